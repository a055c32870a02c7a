"""Exponential moving average (EMA) of the network's weights."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rfdetr.checkpoints.convert import LEGACY_EMA_KEY

State = dict[str, Any]


def effective_decay(update: int, decay: float, tau: float) -> float:
    """Decay of update number `update` = 1, 2, ...: ramps up over about `tau` updates."""
    return decay * (1 - math.exp(-update / tau)) if tau > 0 else decay


def ema_network(trainer: Any) -> nn.Module | None:
    """The EMA network of the trainer's `RFDETREMACallback`, or None."""
    callbacks = (c for c in trainer.callbacks if isinstance(c, RFDETREMACallback))
    callback = next(callbacks, None)
    return None if callback is None else callback.ema_model


def only_ema(trainer: Any, module: Any) -> nn.Module | None:
    """The EMA network if validation runs it instead of the live one (`eval_base_model=False`)."""
    config = getattr(module, "train_config", None)
    alone = config is not None and not config.eval_base_model
    return ema_network(trainer) if alone else None


class RFDETREMACallback(Callback):
    """Keeps an EMA copy of `module.model`, and copies it into the module when the fit ends.

    One update per optimizer step whose number is a multiple of `update_interval`, from the first
    one on; float buffers are averaged, integer buffers copied. `ema_model` is the copy (eval mode,
    no gradients), None before the first fit. A test that restores a checkpoint runs on the EMA
    weights of that checkpoint.
    """

    def __init__(self, decay: float = 0.993, tau: float = 100, update_interval: int = 1) -> None:
        self.decay = decay
        self.tau = tau
        self.update_interval = update_interval
        self.ema_model: nn.Module | None = None
        self.updates = 0
        self._latest_step = 0
        self._restored: dict[str, Tensor] | None = None
        self._live_weights: dict[str, Tensor] | None = None
        self._averaged: tuple[list[Tensor], list[Tensor]] = ([], [])  # EMA tensors, live tensors
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._scale: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Forget the checkpoint of an earlier call; that of this one is loaded next."""
        self._restored = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Start a fit from the EMA weights of a legacy checkpoint."""
        if trainer.state.fn == TrainerFn.FITTING and checkpoint.get(LEGACY_EMA_KEY):
            self._restored, self.updates = checkpoint[LEGACY_EMA_KEY], 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Build the EMA network from the restored weights, or from the live ones."""
        if self._restored is None:
            self.updates = 0
            if trainer.ckpt_path is not None:
                warnings.warn(
                    f"{trainer.ckpt_path} contains no EMA weights; EMA starts from the loaded "
                    "weights.",
                    UserWarning,
                    stacklevel=2,
                )
        self._build(pl_module.model)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._latest_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Update after an optimizer step that was taken."""
        step = trainer.global_step
        if step == self._latest_step:  # inside an accumulation window
            return
        self._latest_step = step
        if step % self.update_interval == 0 and not self._scaler_skipped(trainer):
            self.update()

    def _scaler_skipped(self, trainer: pl.Trainer) -> bool:
        """A gradient scaler that finds infinite gradients lowers its scale and skips the step."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return False
        before, self._scale = self._scale, scaler.get_scale()
        return before is not None and self._scale < before

    @torch.no_grad()
    def update(self) -> None:
        """One EMA update from the live weights, in place."""
        self.updates += 1
        decay = effective_decay(self.updates, self.decay, self.tau)
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(*self._averaged, self.updates)
        for target, source in self._copied:
            target.copy_(source)

    def _build(self, live: nn.Module) -> None:
        """Copy the live network, load restored weights into the copy, pair up the tensors."""
        ema = copy.deepcopy(live).eval().requires_grad_(False)
        if self._restored is not None:
            _load(ema, self._restored)
            self._restored = None
        self.ema_model = ema
        pairs = list(zip(_tensors(ema), _tensors(live), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._averaged = [target for target, _ in floats], [source for _, source in floats]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """`trainer.validate(ckpt_path=...)` evaluates the EMA weights of the checkpoint too."""
        if trainer.state.fn == TrainerFn.VALIDATING and self._restored is not None:
            self._build(pl_module.model)

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Test the EMA weights of a restored checkpoint."""
        if self._restored is None:
            return
        network: nn.Module = pl_module.model
        self._build(network)
        self._live_weights = copy.deepcopy(network.state_dict())
        self._copy_to(network)

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Give the module its live weights back."""
        if self._live_weights is not None:
            pl_module.model.load_state_dict(self._live_weights)
            self._live_weights = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.on_test_end(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Leave the EMA weights in the module."""
        self._copy_to(pl_module.model)

    def _copy_to(self, network: nn.Module) -> None:
        if self.ema_model is not None:
            network.load_state_dict(self.ema_model.state_dict())

    def state_dict(self) -> State:
        weights = self._restored if self.ema_model is None else self.ema_model.state_dict()
        return {
            "average_model_state_dict": weights,
            "updates": self.updates,
            "latest_update_step": self._latest_step,
        }

    def load_state_dict(self, state_dict: State) -> None:
        self._restored = state_dict["average_model_state_dict"]
        self.updates = state_dict["updates"]
        self._latest_step = state_dict["latest_update_step"]


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _load(network: nn.Module, weights: dict[str, Tensor]) -> None:
    report = network.load_state_dict(weights, strict=False)
    if report.missing_keys or report.unexpected_keys:
        warnings.warn(
            f"EMA weights of the checkpoint: missing {report.missing_keys}, unexpected "
            f"{report.unexpected_keys}.",
            UserWarning,
            stacklevel=2,
        )
