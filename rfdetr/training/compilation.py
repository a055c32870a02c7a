"""torch.compile of a network region by region: encoder blocks, decoder layers, projector stages.

Regions of one kind share their compiled code, so compiling takes the time of a few layers instead
of minutes for the network as one graph. Multi-scale sizes cost one more compilation per kind.
"""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from rfdetr.model.backbone import Backbone
from rfdetr.model.network import RFDETRNetwork
from rfdetr.training.callbacks.ema import ema_network

# Kinds of attention, drop path on and off, training and evaluation, fixed and changing sizes
_VARIANTS = 32


def compile_regions(network: nn.Module) -> int:
    """Compile the regions of a network in place; returns their number. Nothing runs yet."""
    torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)
    regions = _regions(network)
    for region in regions:
        region.compile()
    return len(regions)


class Compilation(Callback):
    """Trains without compiled code where it cannot be built, and reports what compiling took."""

    def __init__(self) -> None:
        self._started: float | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Compile the EMA network like the live one, or neither, with the reason."""
        networks = [pl_module.model, ema_network(trainer)]
        reason = _why_unavailable(pl_module.device)
        for network in filter(None, networks):
            if reason is None:
                compile_regions(network)
            else:
                for region in _regions(network):
                    region._compiled_call_impl = None
        if reason is not None:
            rank_zero_warn(f"compile=True is ignored, because torch.compile fails here: {reason}")
        self._started = None if reason else time.monotonic()

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self._started is not None:
            self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Log once, after the first batch."""
        if self._started is None:
            return
        seconds, self._started = time.monotonic() - self._started, None
        rank_zero_info(
            f"torch.compile: {len(_regions(pl_module.model))} regions; the first step took "
            f"{seconds:.1f} s, and the first one at another size takes longer too."
        )


def _regions(network: nn.Module) -> list[nn.Module]:
    assert isinstance(network, RFDETRNetwork)
    backbone = network.backbone[0]
    assert isinstance(backbone, Backbone)
    return [
        *network.encoder.blocks,
        *backbone.projector.stages,
        *network.transformer.decoder.layers,
    ]


def _why_unavailable(device: torch.device) -> str | None:
    """The error of compiling one small function for `device`, None if that works."""
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001, whatever a missing or broken compiler raises
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1
