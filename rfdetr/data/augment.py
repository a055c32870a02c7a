"""`aug_config`: further training augmentations by Albumentations names."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from rfdetr.data.decode import Pixels
from rfdetr.data.geometry import Masks, Shapes, clip
from rfdetr.errors import ConfigError, MissingDependencyError


class Augmentation:
    """Albumentations transforms applied in the order given.

    `config` maps names to keyword arguments; a name such as "OneOf" takes `transforms`, a mapping
    of the same form. Raises ConfigError that lists every unknown name or argument, and
    MissingDependencyError without Albumentations.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        try:
            import albumentations as A
        except ImportError as error:
            raise MissingDependencyError(
                "aug_config needs Albumentations: pip install 'rfdetr-pipeline[augment]', or set "
                "aug_config to None."
            ) from error
        problems: list[str] = []
        transforms = _build(A, config, problems)
        if problems:
            raise ConfigError("aug_config: " + " ".join(problems))
        boxes = A.BboxParams(format="pascal_voc", label_fields=["kept"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Got processor for bboxes")  # pixel transforms only
            self._compose = A.Compose(transforms, bbox_params=boxes)
        self._probe()

    def _probe(self) -> None:
        """Refuse at once what gives no picture; a transform may need more than this picture."""
        picture = np.zeros((512, 512, 3), np.uint8)
        out = {"image": picture}
        with contextlib.suppress(Exception):
            out = self._compose(image=picture, bboxes=np.zeros((0, 4)), kept=np.zeros(0))
        _check_picture(out["image"])

    def __call__(
        self, image: Pixels, shapes: Shapes, masks: Masks | None, seed: int
    ) -> tuple[Pixels, Shapes, Masks | None]:
        """Augment a picture (H, W, 3) and its objects; the same seed gives the same result."""
        self._compose.set_random_seed(seed)
        given: dict[str, Any] = {"masks": list(masks.astype(np.uint8))} if masks is not None else {}
        numbers = np.arange(len(shapes.rows))
        out = self._compose(image=image, bboxes=shapes.boxes, kept=numbers, **given)
        kept = np.asarray(out["kept"], np.int64)
        _check_picture(out["image"])
        height, width = out["image"].shape[:2]
        changed = Shapes(
            boxes=np.asarray(out["bboxes"], np.float32).reshape(-1, 4),
            areas=shapes.areas[kept],
            rows=shapes.rows[kept],
            height=height,
            width=width,
        )
        changed = _with_areas(clip(changed), shapes)
        if masks is not None:
            stacked = np.array(out["masks"], bool).reshape(len(shapes.rows), height, width)
            masks = stacked[np.flatnonzero(np.isin(shapes.rows, changed.rows))]
        return np.ascontiguousarray(out["image"]), changed, masks


def _check_picture(image: Any) -> None:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return
    raise ConfigError(
        f"aug_config gives {getattr(image, 'dtype', type(image).__name__)} of shape "
        f"{tuple(image.shape)}; pictures have to stay uint8 (height, width, 3). Leave out "
        "Normalize, ToFloat and ToTensorV2: normalisation and tensors come after the augmentation."
    )


def _with_areas(shapes: Shapes, before: Shapes) -> Shapes:
    """Areas scaled as the boxes were."""
    old = dict(zip(before.rows.tolist(), before.boxes, strict=True))
    then = np.array([old[row] for row in shapes.rows.tolist()], np.float32).reshape(-1, 4)
    ratio = _box_areas(shapes.boxes) / np.maximum(_box_areas(then), 1e-6)
    return Shapes(shapes.boxes, shapes.areas * ratio, shapes.rows, shapes.height, shapes.width)


def _box_areas(boxes: Any) -> Any:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _build(library: Any, config: Mapping[str, Any], problems: list[str]) -> list[Any]:
    transforms = []
    for name, arguments in config.items():
        kind = getattr(library, name, None) if isinstance(name, str) else None
        if not isinstance(kind, type) or not issubclass(
            kind, library.BasicTransform | library.BaseCompose
        ):
            near = difflib.get_close_matches(str(name), dir(library), n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            problems.append(f"Albumentations has no transform '{name}'{hint}.")
            continue
        if not isinstance(arguments or {}, Mapping):
            problems.append(f"{name}: expected a mapping of arguments, found {arguments!r}.")
            continue
        values = dict(arguments or {})
        if isinstance(values.get("transforms"), Mapping):
            values["transforms"] = _build(library, values["transforms"], problems)
        transforms.append(_construct(kind, values, problems))
    return transforms


def _construct(kind: Any, values: dict[str, Any], problems: list[str]) -> Any:
    """The transform; Albumentations only warns about an unknown argument, we refuse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return kind(**values)
    except (TypeError, ValueError, UserWarning) as error:
        problems.append(f"{kind.__name__}: {error}")
        return None
