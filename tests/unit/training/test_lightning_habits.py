"""What users of Lightning do, with this package's module, data and trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CometLogger, WandbLogger
from pytorch_lightning.tuner import Tuner

from rfdetr.checkpoints.safe_io import load_file, save_file
from rfdetr.config import TrainConfig
from rfdetr.errors import CheckpointError
from rfdetr.training import RFDETRModule
from tests.unit.training.helpers import Run, tiny_model, tiny_run

MAP = "val/mAP_50_95"


@pytest.mark.filterwarnings("ignore")
def test_lightnings_callbacks_wait_for_the_evaluated_epochs(shapes: Path, tmp_path: Path) -> None:
    config = tiny_run(shapes, tmp_path, epochs=5, eval_interval=2)
    run = Run(tiny_model(), config)
    saved = ModelCheckpoint(
        tmp_path / "saved", monitor=MAP, mode="max", save_top_k=-1, filename="{epoch}"
    )
    stopping = EarlyStopping(MAP, mode="max", patience=2, min_delta=1)  # never an improvement
    run.trainer.callbacks.extend([saved, stopping])
    run.fit()
    assert run.trainer.current_epoch == 5
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"epoch=1.ckpt", "epoch=3.ckpt", "epoch=4.ckpt"}
    assert stopping.wait_count == 2  # of three evaluations the first one is the best


@pytest.mark.filterwarnings("ignore")
def test_a_monitor_that_does_not_exist_is_still_an_error(shapes: Path, tmp_path: Path) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=3, eval_interval=2))
    run.trainer.callbacks.append(EarlyStopping("val/map", mode="max"))
    with pytest.raises(RuntimeError, match="val/map"):
        run.fit()
    assert run.trainer.current_epoch == 1


@pytest.mark.parametrize("name", ["total", "regular", "ema"])
def test_load_from_checkpoint_takes_best_files(finished: Run, name: str) -> None:
    path = finished.output / f"checkpoint_best_{name}.pth"
    module = RFDETRModule.load_from_checkpoint(path)
    assert module.class_names == finished.module.class_names
    assert module.train_config.batch_size == finished.config.batch_size
    same = RFDETRModule.load_from_checkpoint(finished.output / "last.ckpt")
    assert same.class_names == finished.module.class_names
    wanted = load_file(path)["model"]["class_embed.bias"]
    torch.testing.assert_close(module.model.class_embed.bias, wanted, check_device=False)


def test_load_from_checkpoint_asks_for_settings_that_a_file_lacks(
    finished: Run, shapes: Path, tmp_path: Path
) -> None:
    content = load_file(finished.output / "checkpoint_best_total.pth")
    save_file({"model": content["model"], "model_config": content["model_config"],
               "model_name": content["model_name"]}, tmp_path / "bare.pth")  # fmt: skip
    with pytest.raises(CheckpointError, match="pass train_config="):
        RFDETRModule.load_from_checkpoint(tmp_path / "bare.pth")
    config: TrainConfig = tiny_run(shapes, tmp_path)
    module = RFDETRModule.load_from_checkpoint(tmp_path / "bare.pth", train_config=config)
    assert module.train_config is config


def test_best_is_a_checkpoint_path(shapes: Path, tmp_path: Path) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1)).fit()
    (tested,) = run.trainer.test(run.module, run.data, ckpt_path="best")
    (validated,) = run.trainer.validate(run.module, run.data, ckpt_path="best")
    again = Run(tiny_model(), run.config, seed=5)
    (other,) = again.trainer.test(again.module, again.data, ckpt_path="best")
    assert other["test/loss"] == pytest.approx(tested["test/loss"], abs=1e-5)
    assert "val/mAP_50_95" in validated


def test_checkpoints_that_do_not_exist_are_named_with_those_that_do(
    finished: Run, shapes: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))
    with pytest.raises(CheckpointError, match=r"no checkpoint_best_total\.pth in .*: train first"):
        run.trainer.validate(run.module, run.data, ckpt_path="best")
    with pytest.raises(FileNotFoundError, match=r"Found in .*checkpoint_best_ema\.pth.*last\.ckpt"):
        run.fit(finished.output / "lost.ckpt")


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precisions_that_convert_the_batch(shapes: Path, tmp_path: Path, precision: str) -> None:
    config = tiny_run(shapes, tmp_path, epochs=1)
    run = Run(tiny_model(), config, precision=precision, limit_train_batches=1).fit()
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert run.module.model.class_embed.bias.dtype == expected
    assert MAP in run.metrics()


@pytest.mark.parametrize("limits", [{"max_steps": 2}, {"limit_val_batches": 0}])
def test_without_a_validation_the_hint_says_so(
    shapes: Path, tmp_path: Path, limits: dict[str, int]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1), **limits).fit()
    (hint,) = (str(w.message) for w in caught if "best model" in str(w.message))
    assert "no validation ran" in hint
    assert "ground truth" not in hint


def test_an_appended_logger_gets_every_metric(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    run.trainer.loggers.append(logger)
    run.fit()
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    keys = {"train/loss", MAP, "val/F1", "val/loss", "val/ema_mAP_50_95", "val/AP/bolt"}
    assert keys <= summary.keys()
    assert summary[MAP] == pytest.approx(run.metrics()[MAP])


def test_comet_keeps_every_metric_of_an_offline_run(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_START_ONLINE", "0")  # CometLogger(online=False) disables Comet
    monkeypatch.setenv("COMET_INTERNAL_SENTRY_DSN", "")
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1))
    logger = CometLogger(offline_directory=str(tmp_path / "comet"))
    run.trainer.loggers.append(logger)
    run.fit()
    logger.experiment.end()
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as packed:
        messages = [json.loads(line) for line in packed.read("messages.json").splitlines()]
    metrics = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    values = {one["metricName"]: one["metricValue"] for one in metrics}
    keys = {"train/loss", MAP, "val/F1", "val/loss", "val/ema_mAP_50_95", "val/AP/bolt"}
    assert keys <= values.keys()
    assert float(values[MAP]) == pytest.approx(run.metrics()[MAP], abs=1e-6)


def test_a_plain_trainer_is_told_what_it_lacks(shapes: Path, tmp_path: Path) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1))
    plain: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    plain |= {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    with pytest.warns(UserWarning, match="not made by build_trainer: it has no EMA"):
        pl.Trainer(**plain).fit(run.module, run.data)


@pytest.mark.slow
def test_the_command_line_of_the_documentation(shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    train = {"dataset_dir": str(shapes), "output_dir": str(tmp_path), "epochs": 5}
    train |= {"num_workers": 0, "multi_scale": False, "accelerator": "cpu", "grad_accum_steps": 1}
    fields = tiny_model().model_dump(include=set(tiny_model().model_fields_set), mode="json")
    model = {"model_name": "RFDETRNanoConfig", "model_config": fields, "train_config": train}
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "train/loss"}}
    run = {"model": model, "trainer": {"callbacks": [stopping], "limit_train_batches": 2}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    command = [sys.executable, "-m", "rfdetr.training.cli", "fit", "--config", "run.yaml"]
    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    done = subprocess.run(
        [*command, "--trainer.max_epochs", "1"], cwd=tmp_path, env=os.environ | path,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert (tmp_path / "checkpoint_best_total.pth").is_file()
    stored = load_file(tmp_path / "last.ckpt")
    assert (stored["epoch"], stored["global_step"]) == (0, 2)
    assert any(name.startswith("EarlyStopping{'monitor'") for name in stored["callbacks"])


def test_the_tuner_changes_batch_size_and_learning_rate(shapes: Path, tmp_path: Path) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1), log_every_n_steps=1)
    tuner = Tuner(run.trainer)
    tuner.scale_batch_size(
        run.module, datamodule=run.data, init_val=1, max_trials=2, steps_per_trial=1
    )
    assert run.config.batch_size == 2
    assert run.data.train_dataloader().batch_size == 2
    steps = {"num_training": 4, "early_stop_threshold": None}
    found = tuner.lr_find(run.module, datamodule=run.data, **steps)  # finds `module.lr`
    assert found is not None
    assert len(found.results["lr"]) == 4
    run.module.lr = 3e-4  # as a suggestion does
    assert run.config.lr == 3e-4
