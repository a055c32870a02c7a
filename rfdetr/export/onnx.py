"""ONNX export with a parity check: the exported graph is run and compared with the network.

Input `input` (B, 3, H, W), normalised like the result of `rfdetr.data.transforms.preprocess`.
Outputs `dets` (B, Q, 4) cxcywh as fractions, `labels` (B, Q, K) logits, and for segmentation
`masks` (B, Q, H/4, W/4) logits. The metadata of the file hold `class_names` (JSON, label -> name),
`input_size` (JSON, height and width), and `mean` and `std` (JSON, of RGB values between 0 and 1).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfdetr.checkpoints.safe_io import StrPath
from rfdetr.data.transforms import MEAN, STD
from rfdetr.errors import InputError, MissingDependencyError
from rfdetr.export.frozen import FinalOutputs, checked_shape, frozen_copy
from rfdetr.files import atomic_path
from rfdetr.model.network import RFDETRNetwork

logger = logging.getLogger(__name__)

FILE_NAME = "inference_model.onnx"
OUTPUT_NAMES = ("dets", "labels", "masks")
# the first with GridSample, and the last that torch's TorchScript exporter writes
OPSETS = range(16, 21)
TOLERANCE = 1e-3  # largest difference without a warning
PROBES = 16  # random images to choose from
DISTINCT = 4  # images of the probe


@dataclass(frozen=True)
class OnnxExport:
    """An exported file, usable as its path: other attributes are those of `path`.

    `max_difference` is the largest absolute difference from the network.
    """

    path: Path
    opset: int
    shape: tuple[int, int]  # height, width in pixels
    batch_size: int | None  # None: any
    outputs: tuple[str, ...]
    max_difference: float | None  # None: not checked

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or name == "path":  # not while it is copied or unpickled
                raise AttributeError(name)
            return getattr(self.path, name)

    def describe(self) -> str:
        """The file and its properties in one line."""
        height, width = self.shape
        checked = "not checked" if self.max_difference is None else f"{self.max_difference:.2g}"
        return (
            f"{self.path}: opset {self.opset}, batch {self.batch_size or 'any'}, "
            f"{height} x {width} pixels, largest difference from the network: {checked}"
        )


def export_onnx(
    network: RFDETRNetwork,
    output_dir: StrPath,
    *,
    shape: tuple[int, int] | None = None,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    opset: int = 17,
    check: bool = True,
    class_names: Mapping[int, str] | None = None,
) -> OnnxExport:
    """Write `output_dir`/inference_model.onnx from a copy of `network`.

    `shape` is (height, width), by default the configured resolution. `check=True` runs the file
    with onnxruntime and warns about a difference above TOLERANCE. Raises InputError for an opset
    outside OPSETS and for a shape that is not a pair of multiples of the block size,
    MissingDependencyError if onnx or onnxruntime is not installed.
    """
    _require("onnx", *(["onnxruntime"] if check else []))
    config = network.config
    height, width = checked_shape(shape or (config.resolution, config.resolution), config)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(
            f"batch_size must be an integer of at least 1; got {batch_size!r}. dynamic_batch=True "
            "allows any number of images."
        )
    if type(opset) is not int or opset not in OPSETS:
        raise InputError(
            f"The network needs ONNX opset {OPSETS[0]} or higher, and {OPSETS[-1]} is the highest "
            f"that can be written; got {opset!r}."
        )
    model = frozen_copy(network, (height, width), "cpu")
    path = Path(output_dir) / FILE_NAME
    probe, reference = _probe(model, height, width, batch_size)
    with atomic_path(path) as temporary:
        _write(model, probe, temporary, opset, dynamic_batch=dynamic_batch)
        _describe(temporary, (height, width), class_names or {})
        difference = _difference(temporary, probe, reference) if check else None
    if difference is not None and not difference <= TOLERANCE:
        warnings.warn(
            f"{path} differs from the network by up to {difference:g}; expected at most "
            f"{TOLERANCE:g}.",
            UserWarning,
            stacklevel=2,
        )
    size = None if dynamic_batch else batch_size
    result = OnnxExport(path, opset, (height, width), size, _names(model), difference)
    logger.info(result.describe())
    return result


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"ONNX export needs {' and '.join(missing)}: pip install 'rfdetr-pipeline[onnx]'."
        )


def _probe(model: FinalOutputs, height: int, width: int, batch: int) -> tuple[Tensor, list[Tensor]]:
    """Images and the network's outputs for them, with proposals that rounding cannot reorder.

    The order of two proposals with nearly equal scores may differ between two correct programs.
    Of some random images, takes the DISTINCT ones with the largest gaps, repeated to the batch.
    """
    images = torch.randn(PROBES, 3, height, width, generator=torch.Generator().manual_seed(0))
    gaps = []
    with torch.inference_mode():
        for image in images:
            scores = model.network(image[None])["enc_outputs"]["pred_logits"].amax(-1)[0]
            gaps.append((scores[:-1] - scores[1:]).min() if len(scores) > 1 else torch.tensor(1.0))
        chosen = torch.stack(gaps).argsort(descending=True)[: min(DISTINCT, batch)]
        probe = images[chosen.repeat(-(-batch // len(chosen)))[:batch]]
        return probe, list(model(probe))


def _names(model: FinalOutputs) -> tuple[str, ...]:
    return OUTPUT_NAMES[: len(model.names)]


def _write(
    model: FinalOutputs, probe: Tensor, path: Path, opset: int, *, dynamic_batch: bool
) -> None:
    names = ["input", *_names(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes that become constants, as intended
        torch.onnx.export(
            model,
            (probe,),
            str(path),
            input_names=names[:1],
            output_names=names[1:],
            opset_version=opset,
            dynamo=False,
            dynamic_axes={name: {0: "batch"} for name in names} if dynamic_batch else None,
        )


def _describe(path: Path, size: tuple[int, int], class_names: Mapping[int, str]) -> None:
    """Add to a file what a program needs to prepare images and to name detections."""
    import onnx

    model = onnx.load(path)
    facts = {"class_names": dict(class_names), "input_size": size, "mean": MEAN, "std": STD}
    onnx.helper.set_model_props(model, {name: json.dumps(v) for name, v in facts.items()})
    onnx.save(model, path)


def _difference(path: Path, probe: Tensor, reference: list[Tensor]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": probe.numpy()})
    pairs = zip(found, reference, strict=True)
    return max(float((torch.from_numpy(a) - b).abs().max()) for a, b in pairs)
