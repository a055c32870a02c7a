"""Exponential moving average of the network's weights (training specification, section 9)."""

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

State = dict[str, Any]


def effective_decay(update: int, decay: float, tau: float) -> float:
    """Decay of update number `update` = 1, 2, ...: ramps up over about `tau` updates."""
    return decay * (1 - math.exp(-update / tau)) if tau > 0 else decay


class RFDETREMACallback(Callback):
    """Keeps an averaged copy of `module.model` and hands it to the module when the fit ends.

    The first update follows the formula. One update per optimizer step whose number is a multiple
    of `update_interval`; float buffers are averaged, integer buffers copied. `averaged_model` is
    the copy (eval mode, no gradients), None before the first fit. A test that restores a
    checkpoint runs on the averaged weights of that checkpoint.
    """

    def __init__(self, decay: float = 0.993, tau: float = 100, update_interval: int = 1) -> None:
        self.decay = decay
        self.tau = tau
        self.update_interval = update_interval
        self.averaged_model: nn.Module | None = None
        self.updates = 0
        self._latest_step = 0
        self._restored: dict[str, Tensor] | None = None
        self._live_weights: dict[str, Tensor] | None = None
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._scale: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._restored = None  # of an earlier call: the checkpoint of this one is read next

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._restored is None:
            self.updates = 0
            self._restored = getattr(pl_module, "legacy_ema_state", None)
            pl_module.legacy_ema_state = None
            if self._restored is None and trainer.ckpt_path is not None:
                warnings.warn(
                    f"{trainer.ckpt_path} holds no averaged weights: the average starts from the "
                    "loaded weights.",
                    UserWarning,
                    stacklevel=2,
                )
        self._build(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._latest_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        step = trainer.global_step
        if step == self._latest_step:  # inside an accumulation window
            return
        self._latest_step = step
        if step % self.update_interval == 0 and not self._scaler_skipped(trainer):
            self.update()

    def _scaler_skipped(self, trainer: pl.Trainer) -> bool:
        """A gradient scaler that met infinite gradients lowers its scale and skips the step."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return False
        before, self._scale = self._scale, scaler.get_scale()
        return before is not None and self._scale < before

    @torch.no_grad()
    def update(self) -> None:
        """One averaging step from the live weights, in place."""
        self.updates += 1
        averaged, live = self._pairs
        weight = 1 - effective_decay(self.updates, self.decay, self.tau)
        torch._foreach_lerp_(averaged, live, weight)
        for target, source in self._copied:
            target.copy_(source)

    def _build(self, pl_module: Any) -> None:
        """Copy the live network, load restored weights into the copy, pair up the tensors."""
        live: nn.Module = pl_module.model
        averaged = copy.deepcopy(live).eval().requires_grad_(False)
        if self._restored is not None:
            _load(averaged, self._restored)
            self._restored = None
        self.averaged_model = averaged
        pairs = list(zip(_tensors(averaged), _tensors(live), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._pairs = [a for a, _ in floats], [b.detach() for _, b in floats]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING and self._restored is not None:
            self._build(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._restored is None:
            return
        self._build(pl_module)
        network: nn.Module = pl_module.model
        self._live_weights = copy.deepcopy(network.state_dict())
        self.copy_to(network)

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._live_weights is not None:
            pl_module.model.load_state_dict(self._live_weights)
            self._live_weights = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.on_test_end(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.averaged_model is not None:
            self.copy_to(pl_module.model)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Write the averaged weights into `network`."""
        if self.averaged_model is not None:
            for target, source in zip(
                _tensors(network), _tensors(self.averaged_model), strict=True
            ):
                target.copy_(source)

    def state_dict(self) -> State:
        weights = self._restored
        if self.averaged_model is not None:
            weights = self.averaged_model.state_dict()
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
            f"Averaged weights in the checkpoint: missing {report.missing_keys}, unexpected "
            f"{report.unexpected_keys}.",
            UserWarning,
            stacklevel=2,
        )
