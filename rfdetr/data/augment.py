"""`aug_config`: additional training augmentations, named as in Albumentations."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from rfdetr.data.decode import Pixels
from rfdetr.data.geometry import ImageObjects, Masks, clip
from rfdetr.errors import ConfigError, MissingDependencyError


class Augmentation:
    """Albumentations transforms, applied in the order of `config`.

    `config` maps names to keyword arguments; a composition such as "OneOf" takes `transforms`, a
    mapping of the same form. Raises ConfigError that lists every unknown name or argument, and
    MissingDependencyError if Albumentations is not installed.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        try:
            import albumentations as A
        except ImportError as error:
            raise MissingDependencyError(
                "aug_config requires Albumentations: pip install 'rfdetr-pipeline[augment]', "
                "or set aug_config to None."
            ) from error
        problems: list[str] = []
        transforms = _build(A, config, problems)
        if problems:
            raise ConfigError("aug_config: " + " ".join(problems))
        boxes = A.BboxParams(format="pascal_voc", label_fields=["kept"])
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Got processor for bboxes"
            )  # with pixel transforms only
            self._compose = A.Compose(transforms, bbox_params=boxes)
        self._probe()

    def _probe(self) -> None:
        """Refuse transforms that do not return an image before training starts."""
        image = np.zeros((512, 512, 3), np.uint8)
        out = {"image": image}
        with contextlib.suppress(Exception):  # some transforms cannot process this dummy image
            out = self._compose(image=image, bboxes=np.zeros((0, 4)), kept=np.zeros(0))
        _check_image(out["image"])

    def __call__(
        self, image: Pixels, objects: ImageObjects, masks: Masks | None, seed: int
    ) -> tuple[Pixels, ImageObjects, Masks | None]:
        """Augment an image (H, W, 3) uint8 with its objects and their masks (n, H, W).

        The same seed gives the same result. Objects that leave the image are dropped.
        """
        self._compose.set_random_seed(seed)
        given: dict[str, Any] = {"masks": list(masks.astype(np.uint8))} if masks is not None else {}
        numbers = np.arange(len(objects.rows))
        out = self._compose(image=image, bboxes=objects.boxes, kept=numbers, **given)
        kept = np.asarray(out["kept"], np.int64)
        _check_image(out["image"])
        height, width = out["image"].shape[:2]
        changed = ImageObjects(
            boxes=np.asarray(out["bboxes"], np.float32).reshape(-1, 4),
            areas=objects.areas[kept],
            rows=objects.rows[kept],
            height=height,
            width=width,
        )
        changed = _with_areas(clip(changed), objects)
        if masks is not None:
            stacked = np.array(out["masks"], bool).reshape(len(objects.rows), height, width)
            masks = stacked[np.flatnonzero(np.isin(objects.rows, changed.rows))]
        return np.ascontiguousarray(out["image"]), changed, masks


def _check_image(image: Any) -> None:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return
    raise ConfigError(
        f"aug_config gives {getattr(image, 'dtype', type(image).__name__)} of shape "
        f"{tuple(image.shape)}; images must stay uint8 (height, width, 3). Remove "
        "Normalize, ToFloat and ToTensorV2: normalisation follows the augmentation."
    )


def _with_areas(objects: ImageObjects, before: ImageObjects) -> ImageObjects:
    """Object areas scaled by the same factor as the areas of their boxes."""
    old = dict(zip(before.rows.tolist(), before.boxes, strict=True))
    then = np.array([old[row] for row in objects.rows.tolist()], np.float32).reshape(-1, 4)
    ratio = _box_areas(objects.boxes) / np.maximum(_box_areas(then), 1e-6)
    return ImageObjects(
        objects.boxes, objects.areas * ratio, objects.rows, objects.height, objects.width
    )


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
    """The transform, or None with a problem; Albumentations only warns of unknown arguments."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return kind(**values)
    except (TypeError, ValueError, UserWarning) as error:
        problems.append(f"{kind.__name__}: {error}")
        return None
