"""`build_trainer`: the Trainer that the two configurations describe."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO, Precision
from pytorch_lightning.callbacks import Callback, RichProgressBar, TQDMProgressBar

from rfdetr.checkpoints.lightning_io import LegacyCheckpointIO
from rfdetr.config import ModelConfig, TrainConfig
from rfdetr.errors import CheckpointError, ConfigError
from rfdetr.training.auto_batch import settle_batch_size
from rfdetr.training.callbacks.best_model import TOTAL, BestModelCallback
from rfdetr.training.callbacks.checkpoints import LAST, CheckpointCallback
from rfdetr.training.callbacks.coco_eval import COCOEvalCallback
from rfdetr.training.callbacks.drop_path import DropPathCallback
from rfdetr.training.callbacks.early_stopping import RFDETREarlyStopping
from rfdetr.training.callbacks.ema import RFDETREMACallback
from rfdetr.training.lightning_adapter import find_checkpoints_with
from rfdetr.training.loggers import build_loggers

SHARDED = ("fsdp", "deepspeed", "modelparallel")
MINUTES_IN_EPOCH = 5.0  # between the writes of last.ckpt inside a long epoch
BF16_CAPABILITY = (8, 0)
# what Lightning's mode for measuring its own overhead refuses
BAREBONES = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "log_every_n_steps": 0,
    "logger": False,
}


def build_trainer(
    train_config: TrainConfig, model_config: ModelConfig, **trainer_kwargs: Any
) -> pl.Trainer:
    """A Trainer with the callbacks and loggers of the configurations.

    Every argument of `pytorch_lightning.Trainer` can be passed as a keyword and overrides the
    configuration; `callbacks=` replaces the complete list, `barebones=True` disables loggers,
    checkpoints and the progress bar. A sharded `strategy` trains without EMA, with a UserWarning if
    the configuration requests it. A batch size of "auto" is replaced in `train_config`. Raises
    MissingDependencyError for a requested logger that is not installed.
    """
    given = dict(trainer_kwargs)
    if Path(train_config.output_dir).is_file():
        raise ConfigError(f"output_dir {train_config.output_dir} is a file: name a folder.")
    accelerator = given.get("accelerator", train_config.accelerator)
    devices = given.get("devices", train_config.devices)
    settings: dict[str, Any] = {
        "max_epochs": train_config.epochs,
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": train_config.num_nodes,
        "strategy": "auto",
        "accumulate_grad_batches": train_config.grad_accum_steps,
        "gradient_clip_val": train_config.clip_max_norm,
        "sync_batchnorm": train_config.sync_bn,
        "enable_progress_bar": train_config.progress_bar is not None,
        "default_root_dir": train_config.output_dir,
        "log_every_n_steps": 10,
        "num_sanity_val_steps": train_config.num_sanity_val_steps,
        **(BAREBONES if given.get("barebones") else {}),
        **given,
    }
    if "precision" not in given and not _has_precision_plugin(given.get("plugins")):
        settings["precision"] = choose_precision(model_config, accelerator, devices)
    if train_config.auto_batch_size:
        if "accumulate_grad_batches" in given:
            raise ConfigError("batch_size='auto' sets accumulate_grad_batches: omit one of them.")
        gpus = _cuda_devices(accelerator, devices)
        settle_batch_size(train_config, model_config, gpus, str(settings.get("precision")))
        settings["accumulate_grad_batches"] = train_config.grad_accum_steps
    if "callbacks" not in given:
        settings["callbacks"] = build_callbacks(train_config, model_config, settings)
    if "logger" not in settings:
        settings["logger"] = build_loggers(train_config)
    settings["plugins"] = _with_checkpoint_io(given.get("plugins"))
    trainer = pl.Trainer(**settings)
    find_checkpoints_with(trainer, _checkpoint)
    return trainer


def _checkpoint(trainer: Any, name: str) -> str | None:
    """The file that our callbacks know as "last" or "best"; None if Lightning is to find it.

    Raises CheckpointError if the best file does not exist yet.
    """
    if name == "last":
        files = (
            c.output_dir / LAST for c in trainer.callbacks if isinstance(c, CheckpointCallback)
        )
        return next((str(file) for file in files if file.is_file()), None)
    first = trainer.checkpoint_callback
    if not isinstance(first, BestModelCallback) or trainer.fast_dev_run:
        return None
    if not first.best_model_path:
        raise CheckpointError(
            f"There is no {TOTAL} in {first.output_dir}: train first, or pass the path of a "
            "checkpoint."
        )
    return str(first.best_model_path)


def build_callbacks(
    train_config: TrainConfig, model_config: ModelConfig, settings: dict[str, Any]
) -> list[Callback]:
    """The default callbacks, given the Trainer arguments they depend on."""
    kind = "segm_mAP_50_95" if model_config.segmentation_head else "mAP_50_95"
    monitors = {"monitor": f"val/{kind}", "monitor_ema": f"val/ema_{kind}"}
    best = monitors
    if train_config.best_model_metric == "mar":
        best = {"monitor": "val/mAR", "monitor_ema": "val/ema_mAR"}
    callbacks: list[Callback] = []
    if _use_ema(train_config, settings["strategy"]):
        callbacks.append(
            RFDETREMACallback(
                train_config.ema_decay, train_config.ema_tau, train_config.ema_update_interval
            )
        )
    if train_config.drop_path > 0:
        if train_config.drop_mode == "early" and train_config.cutoff_epoch == 0:
            warnings.warn(
                f"drop_path={train_config.drop_path} has no effect: drop_mode='early' ends it at "
                "cutoff_epoch, which is 0. Set cutoff_epoch to the number of epochs it should stay "
                "active.",
                UserWarning,
                stacklevel=3,
            )
        callbacks.append(
            DropPathCallback(
                train_config.drop_path,
                train_config.drop_mode,
                train_config.drop_schedule,
                train_config.cutoff_epoch,
            )
        )
    callbacks.append(
        COCOEvalCallback(
            train_config.eval_max_dets,
            train_config.eval_interval,
            log_per_class_metrics=train_config.log_per_class_metrics,
            segmentation=model_config.segmentation_head,
            output_dir=train_config.output_dir,
        )
    )
    if train_config.early_stopping:
        callbacks.append(
            RFDETREarlyStopping(
                train_config.early_stopping_patience,
                train_config.early_stopping_min_delta,
                train_config.early_stopping_use_ema,
                **monitors,
            )
        )
    bar = _progress_bar(train_config, settings)
    return [*callbacks, *bar, *_checkpoints(train_config, settings, best)]


def _checkpoints(
    train_config: TrainConfig, settings: dict[str, Any], monitors: dict[str, str]
) -> list[Callback]:
    off = settings.get("enable_checkpointing") is False
    save = not (off or train_config.dont_save_weights)
    if train_config.run_test and not save:
        cause = "enable_checkpointing=False" if off else "dont_save_weights=True"
        warnings.warn(
            f"run_test is ignored: with {cause} there is no file of the best weights to test. "
            "Call trainer.test after training to test the last weights.",
            UserWarning,
            stacklevel=4,
        )
    if off:
        return []  # Lightning refuses checkpoint callbacks then
    best = BestModelCallback(
        train_config.output_dir,
        **monitors,
        run_test=train_config.run_test,
        save_weights=save,
    )
    minutes = train_config.last_ckpt_minutes
    last = CheckpointCallback(
        train_config.output_dir,
        train_config.checkpoint_interval,
        every_minutes=max(MINUTES_IN_EPOCH, minutes),
        last_epochs=train_config.last_ckpt_epochs,
        last_minutes=minutes,
    )
    return [best, last] if save else [best]


def _progress_bar(train_config: TrainConfig, settings: dict[str, Any]) -> list[Callback]:
    if not settings["enable_progress_bar"]:
        return []
    return [RichProgressBar() if train_config.progress_bar == "rich" else TQDMProgressBar()]


def _use_ema(train_config: TrainConfig, strategy: Any) -> bool:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if not train_config.use_ema or not any(kind in name.lower() for kind in SHARDED):
        return train_config.use_ema
    warnings.warn(
        f"EMA is disabled: it does not work with the sharded strategy {name}. "
        'Use strategy="ddp" or strategy="auto" to keep EMA active.',
        UserWarning,
        stacklevel=4,
    )
    return False


def choose_precision(model_config: ModelConfig, accelerator: Any, devices: Any) -> str:
    """float32 without `amp` and on the CPU; bfloat16 if every selected GPU supports it natively.

    By capability, not by `is_bf16_supported`, which is also true for emulation.
    """
    kind = accelerator if isinstance(accelerator, str) else type(accelerator).__name__.lower()
    if not model_config.amp or "cpu" in kind:
        return "32-true"
    gpus = _cuda_devices(accelerator, devices)
    if gpus:
        native = all(torch.cuda.get_device_capability(i) >= BF16_CAPABILITY for i in gpus)
        return "bf16-mixed" if native else "16-mixed"
    if torch.backends.mps.is_available() and kind in ("auto", "mps", "gpu"):
        return "16-mixed"
    return "32-true"


def _cuda_devices(accelerator: Any, devices: Any) -> list[int]:
    """Indexes of the selected GPUs; empty if training does not run on CUDA."""
    kind = accelerator if isinstance(accelerator, str) else type(accelerator).__name__.lower()
    other = any(name in kind for name in ("cpu", "mps", "tpu"))
    return [] if other or not torch.cuda.is_available() else _selected_gpus(devices)


def _selected_gpus(devices: Any) -> list[int]:
    present = torch.cuda.device_count()
    if isinstance(devices, str) and "," in devices:
        devices = [int(part) for part in devices.split(",") if part.strip()]
    if isinstance(devices, list | tuple):
        return [int(index) for index in devices if int(index) < present]
    number = int(devices) if str(devices).lstrip("-").isdigit() else -1
    return list(range(present if number < 0 else min(number, present)))


def _with_checkpoint_io(plugins: Any) -> list[Any]:
    """The user's plugins, plus LegacyCheckpointIO unless one of them reads checkpoints."""
    several = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    own = [plugin for plugin in several if plugin is not None]
    return own if any(isinstance(p, CheckpointIO) for p in own) else [*own, LegacyCheckpointIO()]


def _has_precision_plugin(plugins: Any) -> bool:
    several = plugins if isinstance(plugins, list | tuple) else [plugins]
    return any(isinstance(plugin, Precision) for plugin in several)
