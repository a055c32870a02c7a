"""Sample images of a validation, and the plots that loggers receive."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.loggers import Logger, MLFlowLogger
from torch import Tensor

from rfdetr.data.transforms import MEAN, STD
from rfdetr.evaluation.plots import Sample

SAMPLES = 6


def take_samples(
    samples: Any,
    targets: Sequence[Mapping[str, Any]],
    wanted: int,
    files: Mapping[int, str] | None = None,
) -> list[Sample]:
    """The first `wanted` images of a batch, normalisation undone, on the CPU.

    `files` gives the file name of an image id.
    """
    tensors: Tensor = samples if isinstance(samples, Tensor) else samples.tensors
    taken = []
    for tensor, target in zip(tensors[:wanted], targets, strict=False):
        height, width = tensor.shape[-2:]
        if "size" in target:
            height, width = (int(side) for side in target["size"])
        image = tensor[:, :height, :width].detach().float().cpu()
        image = image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        rows, columns = (int(side) for side in target["orig_size"])
        image_id = int(torch.as_tensor(target["image_id"]).reshape(-1)[0])
        name = (files or {}).get(image_id, "")
        taken.append(Sample(image_id, pixels, (rows, columns), name))
    return taken


def send_plots(
    loggers: Iterable[Logger], plots: Mapping[str, Path], prefix: str, step: int
) -> None:
    """Send image files to every logger that accepts images, as `prefix`/<name>.

    A logger that fails is skipped with a warning: a plot never ends a training run.
    """
    for logger in loggers:
        for name, path in plots.items():
            try:
                _send(logger, f"{prefix}/{name}", path, step)
            except Exception as error:  # noqa: BLE001 - clients of servers raise anything
                warnings.warn(
                    f"{type(logger).__name__} did not accept the plot {path.name}: {error}. It is "
                    f"still in {path.parent}.",
                    UserWarning,
                    stacklevel=2,
                )
                break


def _send(logger: Logger, tag: str, path: Path, step: int) -> None:
    log_image = getattr(logger, "log_image", None)
    if callable(log_image):  # Weights & Biases, our MLflow logger
        log_image(key=tag, images=[str(path)], step=step)
    elif isinstance(logger, MLFlowLogger):
        folder = f"plots/{tag.rpartition('/')[0]}"
        logger.experiment.log_artifact(logger.run_id, str(path), folder)
    else:  # TensorBoard
        add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
        if callable(add_image):
            with Image.open(path) as image:
                add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")
