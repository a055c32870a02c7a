"""A fixed copy of a network for repeated inference."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rfdetr.errors import InputError
from rfdetr.model.network import RFDETRNetwork

FINAL = ("pred_boxes", "pred_logits", "pred_masks")


class FinalOutputs(nn.Module):
    """The final outputs of a network as a tuple: boxes, logits, and masks if there are any."""

    def __init__(self, network: RFDETRNetwork) -> None:
        super().__init__()
        self.network = network
        self.names = FINAL if network.segmentation_head is not None else FINAL[:2]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found: dict[str, Any] = self.network(images)
        return tuple(found[name] for name in self.names)


def frozen_copy(
    network: RFDETRNetwork,
    size: tuple[int, int],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> FinalOutputs:
    """An eval copy without gradients whose position table fits images of (height, width)."""
    model = copy.deepcopy(network).to(device=device, dtype=dtype).eval().requires_grad_(False)
    height, width = size
    model.fix_resolution(height, width)
    return FinalOutputs(model).eval()


class Optimized:
    """A copy of a network for one resolution, batch size and number format.

    Called with (batch_size, 3, R, R) it returns the same dictionary of final outputs.
    """

    def __init__(
        self,
        network: RFDETRNetwork,
        resolution: int,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        *,
        trace: bool = True,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1; got {batch_size}.")
        self.resolution = resolution
        self.batch_size = batch_size
        self.dtype = dtype
        frozen = frozen_copy(network, (resolution, resolution), dtype=dtype)
        self.names = frozen.names
        self._model: Any = frozen
        if trace:
            device = next(network.parameters()).device
            example = torch.zeros(batch_size, 3, resolution, resolution, dtype=dtype, device=device)
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # notes about constants that are meant
                trace_module: Any = torch.jit.trace
                self._model = trace_module(frozen, example, check_trace=False)

    def check(self, images: int, resolution: int) -> None:
        """Raise InputError unless the images fill whole batches at the same resolution."""
        if resolution != self.resolution or images % self.batch_size:
            raise InputError(
                f"The optimized model takes batches of {self.batch_size} at {self.resolution} "
                f"pixels; got {images} images at {resolution}. Call remove_optimized_model(), or "
                "optimize_for_inference() with these numbers."
            )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self._model(images.to(self.dtype)), strict=True))
