"""The LightningModule: network, losses, post-processing, optimizer and schedule of one run."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from rfdetr.checkpoints.pretrained import initialise_weights
from rfdetr.checkpoints.record import class_names_of, read_checkpoint
from rfdetr.config import ModelConfig, TrainConfig
from rfdetr.data.batch import NestedTensor
from rfdetr.data.packed import PackedTargets
from rfdetr.model.criterion import build_criterion
from rfdetr.model.network import RFDETRNetwork, build_network
from rfdetr.model.postprocess import PostProcess
from rfdetr.training.acceleration import Acceleration, accelerate
from rfdetr.training.callbacks.ema import RFDETREMACallback
from rfdetr.training.callbacks.process_settings import ProcessSettings
from rfdetr.training.evaluation_steps import Batch, EvaluationSteps
from rfdetr.training.lightning_adapter import attached_trainer, unscales_gradients
from rfdetr.training.loaded_checkpoint import normalise_loaded
from rfdetr.training.multi_scale import draw_size, multi_scale_sizes, resize_batch
from rfdetr.training.non_finite import FiniteCheck
from rfdetr.training.optimizer import build_optimizer
from rfdetr.training.resume import ResumeCallback, prepare_loggers
from rfdetr.training.schedule import lr_factor, planned_steps
from rfdetr.training.stored_settings import (
    hyper_parameters,
    names_of_loader,
    recorded_model_config,
    recorded_train_config,
    stored_model_config,
    stored_train_config,
    warn_ignored_settings,
)
from rfdetr.training.training_log import TrainingLog, logs_now


class RFDETRModule(EvaluationSteps):
    """Trains and evaluates one detector; `model` is the network.

    Pretrained weights are loaded at construction (`load_report` says how); a given `network` is
    trained as it is. Both configurations may be the dictionaries that checkpoints store, with the
    name of the model's configuration class as `model_name`, so `load_from_checkpoint` needs no
    arguments. Raises CheckpointError or DownloadError for requested weights that cannot be used.
    """

    def __init__(
        self,
        model_config: ModelConfig | dict[str, Any],
        train_config: TrainConfig | dict[str, Any],
        network: RFDETRNetwork | None = None,
        model_name: str = "",
    ) -> None:
        super().__init__()
        model_config = stored_model_config(model_config, model_name)
        train_config = stored_train_config(train_config)
        self.model_config = model_config
        self.train_config = train_config
        warn_ignored_settings(model_config, train_config)
        self.model = network or build_network(model_config)
        # RFDETR passes its network in eval mode, and Lightning would leave it there
        self.model.train()
        self.load_report = None if network else initialise_weights(self.model, model_config)
        self.criterion = build_criterion(model_config, train_config)
        self.postprocess = PostProcess(model_config.num_select)
        self.stored_class_names: list[str] | None = None  # of the checkpoint that was loaded
        self.strict_loading = False  # on_load_checkpoint checks and reports
        self.training_log = TrainingLog()
        self._finite = FiniteCheck()
        self.acceleration = accelerate(self.model, model_config, train_config)
        self.save_hyperparameters(hyper_parameters(model_config, train_config))

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, map_location: Any = None, *args: Any, **kwargs: Any
    ) -> RFDETRModule:
        """As Lightning's, and for best and legacy `.pth` files too.

        A file without the settings of its training, as published ones, needs `train_config`.
        """
        if isinstance(checkpoint_path, str | os.PathLike):
            record = read_checkpoint(checkpoint_path, mmap=True)
            if record.kind != "lightning":
                module = cls(
                    kwargs.get("model_config") or recorded_model_config(record),
                    kwargs.get("train_config") or recorded_train_config(record),
                )
                return module.to(map_location) if map_location is not None else module
        loaded: RFDETRModule = super().load_from_checkpoint(
            checkpoint_path, map_location, *args, **kwargs
        )
        return loaded

    @property
    def class_names(self) -> list[str] | None:
        """Class names of the configuration, of the data, or of the loaded weights."""
        names: Any = self.train_config.class_names or self._names_of_data()
        names = names or self.stored_class_names
        if not names and self.load_report is not None:
            names = self.load_report.class_names
        return list(names) if names else None

    @property
    def lr(self) -> float:
        """`TrainConfig.lr`, which Lightning's tuner may change."""
        return self.train_config.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.train_config.lr = value

    def _names_of_data(self) -> list[str] | None:
        trainer = attached_trainer(self)
        if trainer is None:
            return None
        sources = [trainer.train_dataloader, trainer.val_dataloaders]
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        return class_names_of(names or next(filter(None, map(names_of_loader, sources)), None))

    @functools.cached_property
    def _sizes(self) -> list[int]:
        config = self.model_config
        return multi_scale_sizes(
            config.resolution, config.block_size, self.train_config.expanded_scales
        )

    @property
    def _window(self) -> int:
        """Micro-batches per optimizer step."""
        trainer = attached_trainer(self)
        return 1 if trainer is None else trainer.accumulate_grad_batches

    def configure_callbacks(self) -> list[Callback]:
        """Complete and order the trainer's callbacks, whatever list the user has given.

        The EMA callback runs first, so that a checkpoint contains the EMA weights of its own step.
        The resume callback runs last: it restores the random number generators. Nothing is
        returned, because Lightning would move the user's callbacks before those that save.
        """
        callbacks: list[Callback] = list(self.trainer.callbacks)  # type: ignore[attr-defined]
        needed = [ProcessSettings, ResumeCallback, Acceleration]
        for kind in needed:
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(kind())
        prepare_loggers(self.trainer)
        order = {RFDETREMACallback: 0, ProcessSettings: 1, ResumeCallback: 3}
        callbacks.sort(key=lambda callback: order.get(type(callback), 2))
        self.trainer.callbacks = callbacks  # type: ignore[attr-defined]
        return []

    def setup(self, stage: str) -> None:
        """Take the grey levels of the dataset, which the datamodule has read by now."""
        data: Any = getattr(attached_trainer(self), "datamodule", None)
        levels = getattr(getattr(data, "model_config", None), "grey_levels", None)
        if stage == "fit" and levels is not None:
            self.model_config.grey_levels = levels

    def on_fit_start(self) -> None:
        """Seed all generators if a seed is set, each rank differently."""
        if self.train_config.seed is not None:
            seed = (self.train_config.seed + self.global_rank) % 2**32
            pl.seed_everything(seed, workers=True)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Resize the batch in place to the size drawn for this optimizer step."""
        config = self.train_config
        if config.multi_scale and not config.do_random_resize_via_padding:
            resize_batch(batch[0], draw_size(self._sizes, self.trainer.global_step))

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Move the images, normalise those of a loader, and move the targets of a training batch.

        Targets are a list of one dictionary per image, moved in one copy per key. In evaluation
        they stay on the host, where the metrics read them.
        """
        samples, targets = batch
        move = functools.partial(_to_device, device=device)
        samples = move(samples)
        if isinstance(samples, NestedTensor):
            samples = samples.normalised()
        if not self.training:
            return samples, list(targets)
        if not isinstance(targets, PackedTargets):
            targets = PackedTargets(targets)
        return samples, targets.map(move)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted loss, divided by `accumulate_grad_batches`.

        Raises NonFiniteLossError for this or an earlier batch, on all ranks together.
        """
        samples, targets = batch
        terms = self.criterion(self.model(samples, targets), targets)
        loss = self._weighted(terms)
        trainer = attached_trainer(self)
        self._finite.add(loss, terms, targets, trainer)
        if trainer is None or self._finite.is_full or logs_now(trainer, batch_idx):
            self._finite.check(trainer)
        self.training_log.log(self, {**terms, "loss": loss}, len(targets), batch_idx)
        return loss / self._window

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward of the mean loss over the accumulation window, for a window of n micro-batches.

        1. `training_step` returns loss / n: its documented result.
        2. Lightning divides what `training_step` returns by n once more: loss / n^2 arrives here.
        3. One factor n is multiplied back, so each micro-batch contributes the gradient of loss / n
           and the sum over the window is the gradient of the mean.
        """
        super().backward(loss * self._window, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        """AdamW with layer-wise rates, and the schedule over the trainer's actual step count."""
        optimizer = build_optimizer(
            self.model, self.model_config, self.train_config, fused=self._fused()
        )
        total, per_epoch = planned_steps(self.trainer)
        factor = functools.partial(
            lr_factor, total_steps=total, steps_per_epoch=per_epoch, train_config=self.train_config
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _fused(self) -> bool:
        """Fused AdamW: on CUDA with bf16-mixed only, on the CPU with float32 only.

        A gradient scaler (16-mixed) does not work with it under Lightning.
        """
        kind = self.trainer.strategy.root_device.type
        needed = {"cuda": "bf16-mixed", "cpu": "32-true"}.get(kind)
        return self.model_config.fused_optimizer and str(self.trainer.precision) == needed

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, and by norm for a fused optimizer too, which it refuses."""
        fused = unscales_gradients(optimizer)
        by_norm = gradient_clip_algorithm in (None, "norm")
        if not fused or not by_norm or getattr(self.trainer.precision_plugin, "scaler", None):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and math.isfinite(gradient_clip_val):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_validation_start(self) -> None:
        """Weights are neither evaluated nor saved after a loss that was not finite."""
        self._finite.check(attached_trainer(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what identifies the model: its class and the names of its classes."""
        self._finite.check(attached_trainer(self))
        checkpoint["model_name"] = type(self.model_config).__name__.removesuffix("Config")
        checkpoint["class_names"] = self.class_names
        settings = checkpoint.get("hyper_parameters", {}).get("model_config")
        if isinstance(settings, dict) and self.model_config.grey_levels is not None:
            settings["grey_levels"] = list(self.model_config.grey_levels)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Accept full checkpoints and legacy dictionaries; CheckpointError if they do not fit."""
        path = str(getattr(attached_trainer(self), "ckpt_path", None) or "The checkpoint")
        names = normalise_loaded(checkpoint, self.model, self.model_config, path)
        self.stored_class_names = names


RFDETRModelModule = RFDETRModule  # its name in the public package


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, NestedTensor):
        return value.to(device, non_blocking=device.type == "cuda")
    if not isinstance(value, Tensor):
        return value
    if device.type == "mps" and value.dtype == torch.float64:
        value = value.float()
    return value.to(device, non_blocking=device.type == "cuda")
