"""Predicting with a detector, and exporting it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from rfdetr import compat
from rfdetr.checkpoints.safe_io import StrPath
from rfdetr.data.upload import read_batches
from rfdetr.detector.public_names import PublicNames
from rfdetr.detector.state import eval_mode
from rfdetr.errors import InputError
from rfdetr.export.frozen import FrozenNetwork, checked_shape, number_format

if TYPE_CHECKING:
    import supervision

    from rfdetr.export.onnx import OnnxExport

IMAGES_AT_ONCE = 8
EXPORT_SETTINGS = ("shape", "batch_size", "dynamic_batch", "opset", "check")


class WithoutImage(dict[str, Any]):
    """The metadata of detections that do not keep their image: says how to get it."""

    def __missing__(self, name: str) -> Any:
        how = ": call predict(..., include_source_image=True)" if name == "source_image" else ""
        raise KeyError(f"{name} is not kept{how}")


def _inference_dtype(dtype: torch.dtype | str, *, optimized: bool) -> torch.dtype:
    """The number format of `predict`. Raises InputError."""
    found = number_format(dtype)
    if found == torch.float64:
        raise InputError("predict computes in float32, float16 or bfloat16.")
    if optimized and found != torch.float32:
        raise InputError(
            "The optimized model has a number format of its own: pass dtype to "
            "optimize_for_inference, or call remove_optimized_model()."
        )
    return found


class Prediction(PublicNames):
    """`predict`, `optimize_for_inference` and `export` of `RFDETR`."""

    def predict(
        self,
        images: Any,
        threshold: float | Literal["operating_point"] = 0.5,
        shape: tuple[int, int] | None = None,
        patch_size: int | None = None,
        include_source_image: bool | None = None,
        *,
        batch_size: int = IMAGES_AT_ONCE,
        dtype: torch.dtype | str = torch.float32,
        **others: Any,
    ) -> supervision.Detections | list[supervision.Detections]:
        """Detections with a score above `threshold`, boxes xyxy in pixels of the image.

        `images` is a path, an http(s) URL, a PIL image, a uint8 RGB array (H, W, 3), a tensor
        (3, H, W) in 0..1, or a list of these; a list gives a list. `class_id` are the labels of
        the network, `data["class_name"]` their names, `mask` (N, H, W) for segmentation, and
        `data["source_shape"]` (N, 2) the height and width of the image. `metadata["source_image"]`
        is the image as a uint8 RGB array (H, W, 3): for a single image, or for every image of a
        list with `include_source_image=True`, which keeps all of them in memory. `shape` (height,
        width) replaces the resolution of the network; `patch_size` can only be the network's.
        Weights trained with square_resize_div_64=False see images as in validation: at their own
        aspect ratio, padded to the largest of the batch. A list is processed in batches of
        `batch_size`; at most two are in memory. `dtype` float16 or bfloat16 runs the network in
        mixed precision. The threshold "operating_point" is the threshold per class in the
        model.json beside the weights, as registered models have it. Raises InputError or
        FileNotFoundError for anything that is not an image.
        """
        least = self.model.threshold(threshold)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be an integer of at least 1; got {batch_size}.")
        _refuse(others, compat.PREDICT_OPTIONS, self.predict)
        if patch_size not in (None, self.model_config.patch_size):
            raise InputError(
                f"patch_size is {self.model_config.patch_size} in this model; got {patch_size}: "
                "omit it."
            )
        if shape is not None:
            shape = checked_shape(shape, self.model_config)
        self.model.warn_of_resized_head()
        single = not isinstance(images, list | tuple)
        sources: Sequence[Any] = [images] if single else images
        optimized = self.model.optimized
        dtype = _inference_dtype(dtype, optimized=optimized is not None)
        if optimized is not None:
            optimized.check(len(sources), shape or self.model.resolution)
            batch_size = optimized.batch_size
        found: list[supervision.Detections] = []
        with torch.inference_mode(), eval_mode(self.model.model):
            for batch in read_batches(sources, batch_size, self.model.config.grey_levels):
                part = self.model.detect(batch, least, dtype, shape)
                for detections, image in zip(part, batch, strict=True):
                    if include_source_image or (include_source_image is None and single):
                        detections.metadata["source_image"] = image.copy()
                    else:
                        detections.metadata = WithoutImage()
                found += part
        return found[0] if single else found

    def optimize_for_inference(
        self,
        compile: bool = True,
        batch_size: int = 1,
        dtype: torch.dtype | str = torch.float32,
        **others: Any,
    ) -> None:
        """Predict with a fixed copy in `dtype`, for `batch_size` images at a time.

        If `compile`, its operators are recorded once and replayed: as a CUDA graph on a GPU.
        `dtype` is float32, float16, bfloat16 or float64, also as a name. Until
        `remove_optimized_model`, another number of images or another resolution raises ValueError.
        Images are resized to squares, with a warning if the weights were trained with
        square_resize_div_64=False.
        """
        _refuse(others, compat.INFERENCE_OPTIONS, self.optimize_for_inference)
        if not self.model.square:
            warnings.warn(
                "The optimized model resizes images to squares, but the weights were trained with "
                "square_resize_div_64=False. Predict without it to keep the aspect ratio.",
                UserWarning,
                stacklevel=2,
            )
        self.model.optimized = FrozenNetwork(
            self.model.model, self.model.resolution, batch_size, dtype, capture=compile
        )

    def remove_optimized_model(self) -> None:
        """Predict with the network itself again."""
        self.model.optimized = None

    def inference(self, *settings: Any, **options: Any) -> None:
        """As `optimize_for_inference`."""
        self.optimize_for_inference(*settings, **options)

    def export(
        self,
        output_dir: StrPath = "output",
        *others: Any,
        format: str = "onnx",
        verbose: bool = False,
        simplify: bool = False,
        infer_dir: StrPath | None = None,
        **options: Any,
    ) -> OnnxExport:
        """Write an ONNX file and check it against the network; see `rfdetr.export.onnx`.

        The result is path-like; `verbose` prints what it is. `opset_version` is another name of
        `opset`. `simplify` and `infer_dir` are ignored with a warning. Raises InputError for a
        `format` other than onnx and for options that are not offered.
        """
        from rfdetr.export.onnx import export_onnx

        if others:
            raise InputError(
                "export() takes output_dir without its name, other options by name, for example "
                "opset_version=17."
            )
        if format.lower() != "onnx":
            raise InputError(
                f"format {format!r} is not offered: export writes ONNX files. Convert the file "
                "with the tools of the other format."
            )
        if "opset_version" in options:
            options["opset"] = options.pop("opset_version")
        known = {name: options.pop(name) for name in EXPORT_SETTINGS if name in options}
        _refuse(options, compat.EXPORT_OPTIONS, self.export, (*EXPORT_SETTINGS, "opset_version"))
        ignored = [
            "simplify is ignored: constants are folded already. Run onnxsim on the file for more."
        ] * bool(simplify)
        if infer_dir is not None:
            ignored.append("infer_dir is ignored: random images compare the file with the network.")
        if ignored:
            warnings.warn(" ".join(ignored), UserWarning, stacklevel=2)
        self.model.warn_of_resized_head()
        known = {"class_names": self.model.label_names()} | known
        result = export_onnx(self.model.model, output_dir, **known)
        if verbose:
            print(result.describe())  # noqa: T201
        return result


def _refuse(
    options: dict[str, Any],
    missing: compat.Missing,
    method: Callable[..., Any],
    more: Sequence[str] = (),
) -> None:
    """Raise InputError for options that `missing` does not list or that ask for something.

    Known are the named parameters of `method`, and `more`.
    """
    unknown, texts = compat.drop_neutral(options, missing)
    if unknown:
        parameters = inspect.signature(method).parameters.values()
        more_than_one = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        known = [one.name for one in parameters if one.kind not in more_than_one] + list(more)
        found = ", ".join(f"{name!r}{compat.nearest(name, known)}" for name in unknown)
        texts.append(f"{method.__name__}() has no option {found}. It takes {', '.join(known)}.")
    if texts:
        raise InputError(" ".join(texts))
