"""Copies of a network for inference at one resolution."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rfdetr.config import ModelConfig
from rfdetr.errors import InputError
from rfdetr.model.network import RFDETRNetwork

FINAL_OUTPUTS = ("pred_boxes", "pred_logits", "pred_masks")
NUMBER_FORMATS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


class FinalOutputs(nn.Module):
    """The predictions of the last layer as a tuple, in the order of FINAL_OUTPUTS."""

    def __init__(self, network: RFDETRNetwork) -> None:
        super().__init__()
        self.network = network
        self.names = FINAL_OUTPUTS if network.segmentation_head is not None else FINAL_OUTPUTS[:2]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) to boxes (B, Q, 4), logits (B, Q, K), masks (B, Q, H/4, W/4)."""
        outputs = self.network(images)
        return tuple(outputs[name] for name in self.names)


def frozen_copy(
    network: RFDETRNetwork,
    size: tuple[int, int],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> FinalOutputs:
    """A copy in eval mode without gradients, with position embeddings for (height, width)."""
    model = copy.deepcopy(network).to(device=device, dtype=dtype).eval().requires_grad_(False)
    height, width = size
    model.fix_resolution(height, width)
    return FinalOutputs(model).eval()


def checked_shape(shape: tuple[int, int], config: ModelConfig) -> tuple[int, int]:
    """`shape`; InputError unless it is (height, width) in multiples of the block size."""
    if not isinstance(shape, list | tuple) or len(shape) != 2:
        raise InputError(f"shape must be (height, width), for example (384, 384); got {shape!r}.")
    height, width = shape
    block = config.block_size
    if height < 1 or width < 1 or height % block or width % block:
        fitting = [max(1, round(side / block)) * block for side in shape]
        raise InputError(
            f"shape {height} x {width} must be multiples of patch_size * num_windows = {block}, "
            f"for example {fitting[0]} x {fitting[1]}."
        )
    return height, width


def number_format(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point format, also by its name; InputError for anything else."""
    name = str(dtype).removeprefix("torch.")
    if name not in NUMBER_FORMATS:
        raise InputError(f"dtype {name} is not supported: use {', '.join(NUMBER_FORMATS)}.")
    return NUMBER_FORMATS[name]


class _CudaGraph:
    """The kernels of a module, recorded once for images like `example` and replayed."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self._images = example
        stream = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries choose their algorithms before the recording
                    module(example)
            torch.cuda.current_stream(example.device).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._outputs: tuple[Tensor, ...] = module(example)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        self._images.copy_(images)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)


def _graph(module: nn.Module, example: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The operators of a module for images like `example`, without the Python around them."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported: Callable[[Tensor], tuple[Tensor, ...]] = torch.export.export(
            module, (example,)
        ).module()
    return exported


class FrozenNetwork:
    """A copy of a network for one resolution, batch size and number format.

    Called with images (batch_size, 3, resolution, resolution), it returns pred_boxes, pred_logits
    and pred_masks like the network.
    """

    def __init__(
        self,
        network: RFDETRNetwork,
        resolution: int,
        batch_size: int = 1,
        dtype: torch.dtype | str = torch.float32,
        *,
        capture: bool = True,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be an integer of at least 1; got {batch_size!r}.")
        self.resolution = resolution
        self.batch_size = batch_size
        self.dtype = number_format(dtype)
        frozen = frozen_copy(network, (resolution, resolution), dtype=self.dtype)
        self.names = frozen.names
        self._model: Callable[[Tensor], tuple[Tensor, ...]] = frozen
        if capture:
            device = next(network.parameters()).device
            shape = (batch_size, 3, resolution, resolution)
            example = torch.zeros(shape, dtype=self.dtype, device=device)
            self._model = (
                _CudaGraph(frozen, example) if device.type == "cuda" else _graph(frozen, example)
            )

    def check(self, images: int, resolution: int | tuple[int, int]) -> None:
        """Raise InputError unless the images fill batches of this size at this resolution."""
        fixed = (self.resolution, (self.resolution, self.resolution))
        if resolution not in fixed or images % self.batch_size:
            raise InputError(
                f"The optimized model takes batches of {self.batch_size} at {self.resolution} "
                f"pixels; got {images} images at {resolution}. Call remove_optimized_model(), or "
                "optimize_for_inference() with the new sizes."
            )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Predict for normalised images, converted to the copy's number format."""
        return dict(zip(self.names, self._model(images.to(self.dtype)), strict=True))
