"""How the network runs in training: eagerly, on CUDA graphs, or compiled region by region.

Regions are encoder blocks, decoder layers and projector stages. Those of one kind share their
compiled code, so compiling takes the time of a few layers instead of minutes for the network as one
graph. Multi-scale sizes cost one more compilation per kind.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from rfdetr.config import ModelConfig, TrainConfig
from rfdetr.model.backbone import Backbone
from rfdetr.model.network import RFDETRNetwork
from rfdetr.training.callbacks.ema import ema_network

Mode = Literal["auto", "off", "graphs", "compile"]
# Kinds of attention, drop path on and off, training and evaluation, fixed and changing sizes
_VARIANTS = 32


def accelerate(network: nn.Module, model: ModelConfig, train: TrainConfig) -> Mode:
    """Prepare `network` as `accelerate` says, or compile it if the model asks for that.

    Returns what applies. Nothing is compiled or recorded before the network runs.
    """
    mode: Mode = "compile" if model.compile else train.accelerate
    if isinstance(network, RFDETRNetwork):
        network.graphs.use = "never" if mode in ("off", "compile") else "always"
    if mode == "compile":
        compile_regions(network)
    return mode


def compile_regions(network: nn.Module) -> int:
    """Compile the regions of a network in place; returns their number. Nothing runs yet."""
    torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)
    regions = _regions(network)
    for region in regions:
        region.compile()
    return len(regions)


class Acceleration(Callback):
    """Logs what was recorded or compiled and how long it took, or why training is eager."""

    def __init__(self) -> None:
        self._started: float | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Compile the EMA network like the live one, or neither, with the reason."""
        self._started = None
        if pl_module.acceleration == "graphs" and pl_module.device.type != "cuda":
            rank_zero_warn(
                "accelerate='graphs' has no effect: CUDA graphs need a CUDA device, and this "
                f"training runs on {pl_module.device.type}."
            )
        if pl_module.acceleration != "compile":
            return
        networks = [pl_module.model, ema_network(trainer)]
        reason = _why_unavailable(pl_module.device)
        for network in filter(None, networks):
            if reason is None:
                compile_regions(network)
            else:
                for region in _regions(network):
                    region._compiled_call_impl = None
        if reason is None:
            self._started = time.monotonic()
        else:
            rank_zero_warn(f"Training is not compiled, because torch.compile fails here: {reason}")

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self._started is not None:
            self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Log what happened for the first time."""
        _log_messages(pl_module.model)
        if self._started is None:
            return
        seconds, self._started = time.monotonic() - self._started, None
        rank_zero_info(
            f"torch.compile: {len(_regions(pl_module.model))} regions; the first step took "
            f"{seconds:.1f} s, and the first one at another size takes longer too."
        )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Free the memory of the recordings."""
        _log_messages(pl_module.model)
        if isinstance(pl_module.model, RFDETRNetwork):
            pl_module.model.graphs.clear()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)


def _log_messages(network: nn.Module) -> None:
    messages = network.graphs.messages if isinstance(network, RFDETRNetwork) else []
    while messages:
        rank_zero_info(messages.pop(0))


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
