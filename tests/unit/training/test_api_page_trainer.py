"""The page's sections on build_trainer, callbacks and loggers: one test per table row."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from pytorch_lightning.callbacks import LearningRateMonitor, ModelSummary
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from rfdetr.checkpoints.lightning_io import LegacyCheckpointIO
from rfdetr.errors import MissingDependencyError
from rfdetr.tracking.mlflow_logger import JournaledMLFlowLogger
from rfdetr.training import RFDETRDataModule, build_trainer
from rfdetr.training.callbacks import (
    BestModelCallback,
    CheckpointCallback,
    COCOEvalCallback,
    DropPathCallback,
    RFDETREarlyStopping,
    RFDETREMACallback,
)
from rfdetr.training.trainer import choose_precision
from tests.unit.training.helpers import Run, tiny_model, tiny_run


@pytest.fixture
def config(shapes, tmp_path):
    return tiny_run(shapes, tmp_path)


def built(config, model=None, **trainer_kwargs):
    return build_trainer(config, model or tiny_model(), **trainer_kwargs)


def kinds(trainer) -> set[type]:
    return {type(callback) for callback in trainer.callbacks}


@pytest.mark.parametrize(
    ("field", "value", "attribute"),
    [
        ("epochs", 7, "max_epochs"),
        ("grad_accum_steps", 3, "accumulate_grad_batches"),
        ("clip_max_norm", 0.5, "gradient_clip_val"),
    ],
)
def test_configured_from_the_training_configuration(config, field, value, attribute):
    setattr(config, field, value)
    assert getattr(built(config), attribute) == value


def test_gradient_clipping_is_0_1_by_default(config):
    assert built(config).gradient_clip_val == 0.1


def test_sync_batch_norm(config):
    config.sync_bn = True
    assert built(config, strategy="ddp", devices=2).strategy._layer_sync is not None


def test_devices_default_to_one(config):
    assert built(config).num_devices == 1


def test_strategy_is_not_a_field_of_the_configuration(config):
    with pytest.raises(ValueError, match="build_trainer"):
        tiny_run(config.dataset_dir, config.output_dir, strategy="ddp")
    with pytest.raises(ValueError, match="strategy"):
        config.strategy = "ddp"
    assert issubclass(ValidationError, ValueError)


def test_strategy_is_a_keyword_and_devices_too(config):
    trainer = built(config, strategy="ddp", devices=2)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.world_size == 2
    assert "find_unused_parameters" not in trainer.strategy._ddp_kwargs


@pytest.mark.parametrize("bar", [None, "tqdm", "rich", True, False])
def test_progress_bar(config, bar):
    config.progress_bar = bar
    trainer = built(config)
    expected = {None: None, False: None, True: "TQDM", "tqdm": "TQDM", "rich": "Rich"}[bar]
    found = trainer.progress_bar_callback
    assert (found is None) if expected is None else type(found).__name__.startswith(expected)


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [([(8, 0)], "bf16-mixed"), ([(9, 0), (7, 5)], "16-mixed"), ([(7, 0)], "16-mixed")],
)
def test_precision_follows_amp_and_capability(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # true for emulation
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capabilities[i])
    assert choose_precision(tiny_model(), "auto", "auto") == precision
    assert choose_precision(tiny_model(), "gpu", len(capabilities)) == precision
    assert choose_precision(tiny_model(amp=False), "auto", 1) == "32-true"
    assert choose_precision(tiny_model(), "cpu", 1) == "32-true"


def test_precision_is_decided_by_the_chosen_devices_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: [(8, 0), (7, 0)][i])
    assert choose_precision(tiny_model(), "auto", 1) == "bf16-mixed"
    assert choose_precision(tiny_model(), "auto", [1]) == "16-mixed"
    assert choose_precision(tiny_model(), "auto", "0,1") == "16-mixed"


def test_precision_on_the_cpu_and_by_keyword(config):
    assert config.accelerator == "cpu"
    assert built(config).precision == "32-true"
    assert built(config, precision="bf16-mixed").precision == "bf16-mixed"


def test_any_trainer_argument_overrides(config):
    trainer = built(
        config,
        fast_dev_run=2,  # run 2 batches per epoch for a smoke test
        accumulate_grad_batches=8,  # override TrainConfig.grad_accum_steps
        log_every_n_steps=10,
    )
    assert trainer.fast_dev_run == 2
    assert trainer.accumulate_grad_batches == 8
    assert trainer.log_every_n_steps == 10
    assert built(config, max_epochs=3, gradient_clip_val=2.0).max_epochs == 3
    assert built(config, logger=False).loggers == []


def test_checkpointing_can_be_switched_off(config):
    trainer = built(config, enable_checkpointing=False)
    assert not kinds(trainer) & {BestModelCallback, CheckpointCallback}


def test_callbacks_keyword_replaces_the_default_list(config):
    extra_callbacks = [
        LearningRateMonitor(logging_interval="step"),
        ModelSummary(max_depth=3),
    ]
    trainer = built(config, callbacks=extra_callbacks)
    assert {LearningRateMonitor, ModelSummary} <= kinds(trainer)
    assert not kinds(trainer) & {RFDETREMACallback, COCOEvalCallback, BestModelCallback}


def test_callbacks_can_be_extended_afterwards(shapes, tmp_path):
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1), log_every_n_steps=1)
    run.trainer.callbacks.extend([LearningRateMonitor(logging_interval="step")])
    run.fit()
    assert (tmp_path / "checkpoint_best_total.pth").is_file()
    assert "lr-AdamW" in (tmp_path / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("kind", "field", "on", "off"),
    [
        (RFDETREMACallback, "use_ema", True, False),
        (DropPathCallback, "drop_path", 0.1, 0.0),
        (RFDETREarlyStopping, "early_stopping", True, False),
    ],
)
def test_callback_is_enabled_by_its_field(config, kind, field, on, off):
    for value, present in ((on, True), (off, False)):
        setattr(config, field, value)
        assert (kind in kinds(built(config))) is present


def test_callbacks_that_are_always_there(config):
    config.use_ema = False
    assert {COCOEvalCallback, BestModelCallback, CheckpointCallback} <= kinds(built(config))


@pytest.mark.parametrize(
    "strategy", ["fsdp", "FSDP", "deepspeed_stage_2", FSDPStrategy(), ModelParallelStrategy()]
)
def test_sharded_strategies_train_without_ema_and_warn(config, strategy):
    from rfdetr.training.trainer import build_callbacks

    settings = {"strategy": strategy, "enable_progress_bar": False}
    with pytest.warns(UserWarning, match="EMA is disabled"):
        callbacks = build_callbacks(config, tiny_model(), settings)
    assert not any(isinstance(callback, RFDETREMACallback) for callback in callbacks)
    config.use_ema = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_callbacks(config, tiny_model(), settings)


def test_ddp_keeps_ema(config):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EMA is disabled")
        assert RFDETREMACallback in kinds(built(config, strategy="ddp", devices=2))


@pytest.mark.parametrize(("devices", "grad_accum_steps"), [(1, 4), (2, 2), (4, 1)])
def test_effective_batch_size(config, devices, grad_accum_steps):
    """The training page's table: batch 4, always 16 images per optimizer step."""
    config.batch_size, config.grad_accum_steps = 4, grad_accum_steps
    trainer = built(config, strategy="ddp", devices=devices)
    data = RFDETRDataModule(tiny_model(), config)
    images = 0
    for rank in range(devices):
        data.trainer = SimpleNamespace(
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            global_rank=rank,
            strategy=SimpleNamespace(broadcast=lambda seed: seed, root_device=torch.device("cpu")),
        )
        loader = data.train_dataloader()
        images += loader.batch_size * trainer.accumulate_grad_batches
        assert len(loader) == 5 * grad_accum_steps  # the small dataset repeats to five windows
    assert images == 16


def test_csv_logger_always_and_others_by_flag(config, monkeypatch):
    assert [isinstance(logger, CSVLogger) for logger in built(config).loggers] == [True]
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = {
        "tensorboard": TensorBoardLogger,
        "wandb": WandbLogger,
        "mlflow": JournaledMLFlowLogger,
    }
    for flag, kind in flags.items():
        setattr(config, flag, True)
        assert any(isinstance(logger, kind) for logger in built(config).loggers), flag
        setattr(config, flag, False)


@pytest.mark.parametrize("package", ["mlflow", "wandb", "tensorboard"])
def test_a_requested_logger_that_is_missing_is_an_error(config, monkeypatch, package):
    import rfdetr.training.loggers as module

    def missing(*_, **__):
        raise ModuleNotFoundError(f"No module named '{package}'")

    name = {"wandb": "RunWandbLogger", "tensorboard": "RunTensorBoardLogger"}.get(package)
    monkeypatch.setattr(module, name or "JournaledMLFlowLogger", missing)
    setattr(config, package, True)
    with pytest.raises(MissingDependencyError, match=f"pip install {package}"):
        built(config)


def test_missing_tensorboard_is_a_warning_unless_requested(config, monkeypatch):
    import rfdetr.training.loggers as module

    def broken(*_, **__):
        raise AttributeError("module 'numpy' has no attribute 'bool8'")

    monkeypatch.setattr(module, "RunTensorBoardLogger", broken)
    config.tensorboard = True
    config.model_fields_set.discard("tensorboard")
    with pytest.warns(UserWarning, match="Training continues without it"):
        assert len(built(config).loggers) == 1


class Recorder(Logger):
    """A logger of the user."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.params: list = []

    name = version = "recorder"

    def log_metrics(self, metrics, step=None) -> None:
        self.keys |= set(metrics)

    def log_hyperparams(self, params, *_, **__) -> None:
        self.params.append(params)


def test_logged_keys_reach_a_logger_appended_by_the_user(shapes, tmp_path):
    recorder = Recorder()
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1))
    run.trainer.loggers.append(recorder)
    run.fit()
    expected = {"train/loss", "val/loss", "val/mAP_50_95", "val/F1", "val/ema_mAP_50_95"}
    assert expected <= recorder.keys
    assert len(recorder.params) == 1
    assert {"model_config", "train_config"} <= set(recorder.params[0])
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert recorder.keys <= set(header) | {"epoch", "step"}
    assert "hidden_dim" in (tmp_path / "hparams.yaml").read_text()


def test_checkpoint_plugin_is_added_beside_the_plugins_of_the_user(config):
    from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

    assert isinstance(built(config).strategy.checkpoint_io, LegacyCheckpointIO)
    own = TorchCheckpointIO()
    assert built(config, plugins=[own]).strategy.checkpoint_io is own
