"""`batch_size="auto"`: the largest batch that a training step of the model fits on its device."""

from __future__ import annotations

import copy
import logging
import math
import os
from typing import Any

import torch
from torch import Tensor

from rfdetr.config import ModelConfig, TrainConfig
from rfdetr.data.transforms import LONGEST
from rfdetr.model.criterion import build_criterion
from rfdetr.model.network import build_network
from rfdetr.training.multi_scale import multi_scale_sizes
from rfdetr.training.optimizer import build_optimizer

log = logging.getLogger(__name__)

OBJECTS = 50  # per image of the probe
HEADROOM = 0.85  # share of the device's memory that the probe may reserve
STEPS = 2  # the second one has the optimizer's state


def settle_batch_size(
    train_config: TrainConfig, model_config: ModelConfig, gpus: list[int], precision: str
) -> None:
    """Set `batch_size` and `grad_accum_steps` if the batch size is "auto".

    Their product, the images of an optimizer step on one device, stays. `gpus` are the indexes of
    the selected ones; without any, the batch size stays too.
    """
    if not train_config.auto_batch_size:
        return
    images = train_config.batch_size * train_config.grad_accum_steps
    found = train_config.batch_size
    if gpus:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", gpus[rank % len(gpus)])
        found = largest_batch(train_config, model_config, images, device, precision)
    train_config.auto_batch_size = False
    train_config.batch_size, train_config.grad_accum_steps = found, images // found
    log.info(
        "batch_size auto: %d images per batch, %d batches per optimizer step%s.",
        found,
        images // found,
        "" if gpus else " (without a GPU nothing is measured)",
    )


def largest_batch(
    train_config: TrainConfig,
    model_config: ModelConfig,
    images: int,
    device: torch.device,
    precision: str,
) -> int:
    """The largest divisor of `images` whose training step fits on `device`; 1 if none does."""
    divisors = [size for size in range(images, 0, -1) if images % size == 0]
    for size in divisors:
        if size == 1 or fits(train_config, model_config, size, device, precision):
            return size
    return 1


def fits(
    train_config: TrainConfig,
    model_config: ModelConfig,
    batch_size: int,
    device: torch.device,
    precision: str,
) -> bool:
    """Whether training steps on `batch_size` random images fit on `device`.

    Global random state stays as it is, and the memory is free again afterwards.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        try:
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            _train_steps(train_config, model_config, batch_size, device, precision)
            if not cuda:
                return True
            limit = HEADROOM * torch.cuda.get_device_properties(device).total_memory
            return torch.cuda.max_memory_reserved(device) <= limit
        except torch.OutOfMemoryError:
            return False
        finally:
            if cuda:
                torch.cuda.empty_cache()


def _train_steps(
    train_config: TrainConfig,
    model_config: ModelConfig,
    batch_size: int,
    device: torch.device,
    precision: str,
) -> None:
    network = build_network(model_config).to(device).train()
    ema = copy.deepcopy(network) if train_config.use_ema else None
    criterion = build_criterion(model_config, train_config).to(device)
    optimizer = build_optimizer(network, model_config, train_config, fused=False)
    images = torch.rand(batch_size, 3, *_largest_input(train_config, model_config), device=device)
    targets = [_target(images[0], model_config) for _ in range(batch_size)]
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    for _ in range(STEPS):
        with torch.autocast(device.type, half, enabled=half is not None):
            terms = criterion(network(images, targets), targets)
        weights = criterion.weight_dict
        loss = torch.stack([terms[name] * weights[name] for name in terms if name in weights])
        torch.autograd.backward(loss.sum())
        optimizer.step()
        optimizer.zero_grad()
    del ema


def _largest_input(train_config: TrainConfig, model_config: ModelConfig) -> tuple[int, int]:
    """(height, width) in pixels of the largest input of a training with these settings."""
    block = model_config.block_size
    side = model_config.resolution
    if train_config.multi_scale:
        side = max(multi_scale_sizes(side, block, train_config.expanded_scales))
    if train_config.square_resize_div_64:
        return side, side
    return side, max(side, math.ceil(LONGEST / block) * block)


def _target(image: Tensor, model_config: ModelConfig) -> dict[str, Any]:
    centers = torch.rand(OBJECTS, 2, device=image.device) * 0.6 + 0.2
    target: dict[str, Any] = {
        "labels": torch.zeros(OBJECTS, dtype=torch.int64, device=image.device),
        "boxes": torch.cat([centers, torch.full_like(centers, 0.1)], dim=1),
    }
    if model_config.segmentation_head:
        target["masks"] = torch.rand(OBJECTS, *image.shape[1:], device=image.device) > 0.5
    return target
