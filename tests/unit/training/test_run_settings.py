"""Settings that once failed late, were ignored silently, or used a file of an earlier run."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rfdetr.config import SegmentationTrainConfig, TrainConfig
from rfdetr.errors import CheckpointError, ConfigError
from rfdetr.training import RFDETRModule, build_trainer
from rfdetr.training.callbacks import CheckpointCallback, RFDETREMACallback
from rfdetr.training.stored_settings import stored_model_config, stored_train_config
from tests.datasets import make_roboflow
from tests.unit.training.helpers import Run, StopAt, tiny_model, tiny_run


@pytest.fixture
def used(finished: Run, tmp_path: Path) -> Path:
    """A folder in which a run has ended."""
    shutil.copytree(finished.output, tmp_path / "used")
    return tmp_path / "used"


@pytest.mark.parametrize("fields", [{}, {"drop_path": 0.1, "lr_scheduler": "cosine"}])
def test_training_without_an_end(shapes: Path, tmp_path: Path, fields: dict[str, object]) -> None:
    run = Run(
        tiny_model(),
        tiny_run(shapes, tmp_path, **fields),
        max_epochs=-1,
        max_time="00:00:00:01",
        limit_val_batches=0,
    ).fit()
    assert run.trainer.global_step > 0


def test_an_epoch_has_five_windows_of_the_trainer(shapes: Path, tmp_path: Path) -> None:
    config = tiny_run(shapes, tmp_path, epochs=1, grad_accum_steps=1)
    run = Run(tiny_model(), config, accumulate_grad_batches=3).fit()
    assert run.trainer.global_step == 5


def test_a_drop_rate_without_effect_warns(shapes: Path, tmp_path: Path) -> None:
    config = tiny_run(shapes, tmp_path, drop_path=0.1, drop_mode="early")
    with pytest.warns(UserWarning, match="drop_path=0.1 has no effect"):
        build_trainer(config, tiny_model())


def test_an_ema_callback_that_was_added_last_is_in_the_checkpoint(
    shapes: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, use_ema=False))
    run.trainer.callbacks.extend([RFDETREMACallback(), StopAt(3)])
    for callback in run.trainer.callbacks:
        if isinstance(callback, CheckpointCallback):
            callback.every_n_steps = 3
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run.fit()
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == saved["callbacks"]["RFDETREMACallback"]["updates"] == 3


@pytest.mark.parametrize("by_trainer", [False, True])
def test_run_test_without_files_warns(shapes: Path, tmp_path: Path, by_trainer: bool) -> None:
    config = tiny_run(shapes, tmp_path, run_test=True, dont_save_weights=not by_trainer)
    off = {"enable_checkpointing": False} if by_trainer else {}
    with pytest.warns(UserWarning, match="run_test is ignored"):
        build_trainer(config, tiny_model(), **off)


def test_an_empty_test_split_is_a_missing_one(tmp_path: Path) -> None:
    dataset = make_roboflow(tmp_path / "data")
    path = dataset / "test" / "_annotations.coco.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"images": [], "annotations": []}))
    run = Run(tiny_model(), tiny_run(dataset, tmp_path / "out", epochs=1, run_test=True))
    with pytest.warns(UserWarning, match="a test split without images; testing uses the valid"):
        run.fit()
    assert "test/mAP_50_95" in run.metrics()


def test_given_class_names_are_in_the_files(shapes: Path, tmp_path: Path) -> None:
    names = ["X", "Y", "Z"]
    Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1, class_names=names)).fit()
    for file in ("checkpoint_best_total.pth", "last.ckpt"):
        assert torch.load(tmp_path / file, weights_only=True)["class_names"] == names


def test_another_number_of_class_names_is_refused(shapes: Path, tmp_path: Path) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, class_names=["X", "Y"]))
    with pytest.raises(ConfigError, match=r"class_names has 2 names, .* has 3 classes"):
        run.fit()
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, class_names=["X", "Y", "X"]))
    with pytest.raises(ConfigError, match="class_names repeats X: give every class a name of its"):
        run.fit()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_refuses(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValidationError, match="seed"):
        TrainConfig(dataset_dir=tmp_path, seed=seed)


def test_a_checkpoint_brings_its_configurations(finished: Run) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Ignored in TrainConfig")
        module = RFDETRModule.load_from_checkpoint(finished.output / "last.ckpt")
    assert type(module.model_config) is type(finished.module.model_config)
    assert module.model_config == finished.module.model_config
    assert module.train_config == finished.config
    saved = torch.load(finished.output / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(module.model.class_embed.bias, saved["model.class_embed.bias"])


def test_stored_configurations_know_their_class(tmp_path: Path) -> None:
    stored = SegmentationTrainConfig(dataset_dir=tmp_path).model_dump(mode="json")
    assert type(stored_train_config(stored)) is SegmentationTrainConfig
    with pytest.raises(ConfigError, match="known: RFDETRNanoConfig"):
        stored_model_config({}, "Unknown")


def test_a_folder_is_not_a_checkpoint(finished: Run, shapes: Path, tmp_path: Path) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))
    with pytest.raises(CheckpointError, match=r"is a folder; .*last\.ckpt"):
        run.fit(finished.output)


def test_barebones(shapes: Path, tmp_path: Path) -> None:
    config = tiny_run(shapes, tmp_path, epochs=1, progress_bar="tqdm")
    trainer = build_trainer(config, tiny_model(), barebones=True)
    run = Run(tiny_model(), config)
    trainer.fit(run.module, run.data)
    assert trainer.global_step == 5
    assert not trainer.loggers


def test_a_new_run_in_a_used_folder_forgets_earlier_best_files(shapes: Path, used: Path) -> None:
    run = Run(tiny_model(), tiny_run(shapes, used, epochs=1, use_ema=False), limit_val_batches=0)
    run.fit()
    with pytest.raises(ValueError, match="best"):
        run.trainer.test(run.module, run.data, ckpt_path="best")
    assert (used / "checkpoint_best_ema.pth").is_file()
    Run(tiny_model(), tiny_run(shapes, used, epochs=1, use_ema=False)).fit()
    assert not (used / "checkpoint_best_ema.pth").exists()


def test_last_is_the_last_checkpoint_of_the_folder(shapes: Path, used: Path) -> None:
    run = Run(tiny_model(), tiny_run(shapes, used, epochs=3)).fit("last")
    assert run.trainer.global_step == 15
    assert run.trainer.ckpt_path == str(used / "last.ckpt")


def test_last_in_a_new_folder_starts_a_run(shapes: Path, tmp_path: Path) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1))
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        run.fit("last")
    assert run.trainer.global_step == 5
