"""The page's sections on running: code blocks, files, metrics, resume."""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path

import pytest
import torch

from rfdetr.checkpoints.legacy_names import to_legacy
from rfdetr.config import RFDETRMediumConfig, TrainConfig
from rfdetr.errors import CheckpointError
from rfdetr.training import (
    RFDETRDataModule,
    RFDETRModule,
    build_trainer,
    convert_legacy_checkpoint,
)
from rfdetr.training.callbacks import BestModelCallback, RFDETREMACallback
from tests.unit.training.helpers import Run, tiny_model, tiny_run
from tests.unit.training.test_api_page_module import SIZES

BOX_KEYS = {"mAP_50_95", "mAP_50", "mAP_75", "mAR", "F1", "precision", "recall", "loss"}


def test_full_training_run_block(shapes, tmp_path):
    model_config = RFDETRMediumConfig(num_classes=10, **SIZES)
    train_config = TrainConfig(
        dataset_dir=shapes,
        epochs=1,
        batch_size=4,
        grad_accum_steps=4,
        lr=1e-4,
        output_dir=tmp_path / "output",
    )

    module = RFDETRModule(model_config, train_config)
    datamodule = RFDETRDataModule(model_config, train_config)
    trainer = build_trainer(train_config, model_config)

    trainer.fit(module, datamodule)

    assert trainer.global_step == 5
    expected = {"last.ckpt", "metrics.csv", "hparams.yaml", "best_model.json"}
    expected |= {f"checkpoint_best_{kind}.pth" for kind in ("regular", "ema", "total")}
    assert expected <= {path.name for path in (tmp_path / "output").iterdir()}


def test_train_keys_are_logged_every_epoch(finished):
    rows = finished_rows(finished)
    for key in ("train/loss", "train/loss_bbox", "train/loss_ce", "train/loss_giou"):
        assert len([row for row in rows if row[key]]) == 2, key


def finished_rows(run: Run) -> list[dict[str, str]]:
    with open(run.output / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("key", sorted(BOX_KEYS))
def test_val_key_is_logged_each_epoch(finished, key):
    assert len([row for row in finished_rows(finished) if row[f"val/{key}"]]) == 2


def test_ema_and_per_class_keys(finished):
    metrics = finished.metrics()
    assert "val/ema_mAP_50_95" in metrics
    assert {k for k in metrics if k.startswith("val/AP/")} == {
        f"val/AP/{name}" for name in ("washer", "bolt", "nut")
    }


def test_keys_follow_their_switches(shapes, tmp_path):
    config = tiny_run(
        shapes,
        tmp_path,
        epochs=3,
        eval_interval=2,
        compute_val_loss=False,
        log_per_class_metrics=False,
        use_ema=False,
        train_log_on_step=True,
    )
    run = Run(tiny_model(), config, log_every_n_steps=1).fit()
    rows = finished_rows(run)
    assert [row["epoch"] for row in rows if row["val/mAP_50_95"]] == ["1", "2"]  # and the last one
    assert not {k for k in rows[0] if k.startswith(("val/AP/", "val/ema_")) or k == "val/loss"}
    assert len([row for row in rows if row["train/loss_step"]]) == 15
    assert len([row for row in rows if row["train/loss"]]) == 3


def test_segmentation_keys(tmp_path):
    from rfdetr.config import SegmentationTrainConfig
    from tests.datasets import make_roboflow

    shapes = make_roboflow(tmp_path / "data", segmentation=True)
    base = tiny_run(shapes, tmp_path / "out", epochs=1).model_dump(
        exclude={"segmentation_head", "cls_loss_coef"}
    )
    config = SegmentationTrainConfig(**base)
    run = Run(tiny_model(segmentation_head=True, patch_size=8, resolution=64), config).fit()
    assert {"val/segm_mAP_50_95", "val/segm_mAP_50", "val/mAP_50_95"} <= set(run.metrics())
    assert {"train/loss_mask_ce", "train/loss_mask_dice"} <= set(run.metrics())
    best = next(c for c in run.trainer.callbacks if isinstance(c, BestModelCallback))
    assert best.live.metric == "val/segm_mAP_50_95"


def test_validation_only(shapes, tmp_path):
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))
    module, datamodule, trainer = run.module, run.data, run.trainer
    trainer.validate(module, datamodule)
    expected = {"val/mAP_50_95", "val/mAP_50", "val/F1", "val/AP/bolt"}
    assert expected <= set(run.metrics())
    assert expected <= set(finished_rows(run)[0])


def test_keys_of_a_test_mirror_those_of_validation(shapes, tmp_path):
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))
    run.trainer.validate(run.module, run.data)
    val = {key.removeprefix("val/") for key in run.metrics()}
    run.trainer.test(run.module, run.data)
    assert val <= {key.removeprefix("test/") for key in run.metrics()}


def test_inference_with_the_data_pipeline(shapes, tmp_path):
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))
    module, datamodule, trainer = run.module, run.data, run.trainer
    predictions = trainer.predict(module, dataloaders=datamodule.val_dataloader())
    assert [len(batch) for batch in predictions] == [2, 1]
    assert set(predictions[0][0]) == {"scores", "labels", "boxes"}
    assert len(trainer.predict(module, dataloaders=datamodule.test_dataloader())) == 1
    with pytest.raises(Exception, match="predict"):
        trainer.predict(module, datamodule)


def test_smoke_run_leaves_no_files(shapes, tmp_path):
    run = Run(tiny_model(), tiny_run(shapes, tmp_path), fast_dev_run=2).fit()
    assert run.trainer.global_step == 2
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".pth")]


def test_best_files_load_safely_and_say_what_they_are(finished):
    for name, is_ema in (("regular", False), ("ema", True)):
        file = torch.load(finished.output / f"checkpoint_best_{name}.pth", weights_only=True)
        assert file["args"]["class_names"] == ["washer", "bolt", "nut"]
        assert file["averaged"] is is_ema
        assert "backbone.0.encoder.encoder.embeddings.cls_token" in file["model"]
    record = json.loads((finished.output / "best_model.json").read_text())
    total = torch.load(finished.output / "checkpoint_best_total.pth", weights_only=True)
    assert total["best_total_source"] == "regular"  # both are 0: a tie keeps the live weights
    assert record["source"] == "checkpoint_best_regular.pth"
    assert (record["epoch"], record["averaged"]) == (0, False)


def test_module_has_the_ema_weights_after_training(finished):
    ema = next(c for c in finished.trainer.callbacks if isinstance(c, RFDETREMACallback))
    for name, value in finished.module.model.state_dict().items():
        assert torch.equal(value, ema.ema_model.state_dict()[name])


def legacy_file(path: Path, run: Run, epoch: int | None = 0, **extra) -> Path:
    """What the old training loop wrote: raw weights, EMA weights, a namespace, an epoch."""
    state = to_legacy(run.module.model.state_dict())
    content = {
        "model": state,
        "ema_model": {f"module.{name}": value + 0.25 for name, value in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"params": [0], "lr": 1.0}]},
        "args": argparse.Namespace(num_classes=3, output_dir=Path("somewhere")),
    }
    if epoch is not None:
        content["epoch"] = epoch
    torch.save(content | extra, path)
    return path


def test_resume_from_a_legacy_checkpoint(finished, shapes, tmp_path):
    path = legacy_file(tmp_path / "checkpoint.pth", finished)
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, lr_scheduler="cosine"))
    seen = {}

    class Look(type(run.trainer.callbacks[0]).__mro__[1]):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            ema = next(c for c in trainer.callbacks if isinstance(c, RFDETREMACallback))
            weights = module.model.class_embed.weight
            difference = (ema.ema_model.class_embed.weight - weights).mean().item()
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            seen.setdefault("first", (trainer.current_epoch, trainer.global_step, lr, difference))

    run.trainer.callbacks.append(Look())
    with pytest.warns(UserWarning, match="optimizer starts fresh"):
        run.fit(path)
    epoch, step, lr, difference = seen["first"]
    assert (epoch, step) == (1, 5)
    assert lr == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 5 / 10)))
    assert difference == pytest.approx(0.25, abs=1e-4)
    assert run.trainer.global_step == 10


def test_resume_from_a_converted_checkpoint(finished, shapes, tmp_path):
    old = legacy_file(tmp_path / "old_checkpoint.pth", finished)
    convert_legacy_checkpoint(old, tmp_path / "new_checkpoint.ckpt")
    run = Run(tiny_model(), tiny_run(shapes, tmp_path)).fit(tmp_path / "new_checkpoint.ckpt")
    assert run.trainer.global_step == 10


def test_weights_without_an_epoch_start_at_epoch_0(finished, shapes, tmp_path):
    path = legacy_file(tmp_path / "weights.pth", finished, epoch=None)
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1))
    with pytest.warns(UserWarning, match="starting from these weights"):
        run.fit(path)
    assert run.trainer.global_step == 5


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_finished_run_says_so_and_returns(finished, shapes, tmp_path, epochs):
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=epochs))
    with pytest.warns(UserWarning, match=f"2 epochs are done, epochs is {epochs}. Increase"):
        run.fit(finished.output / "last.ckpt")
    assert run.trainer.global_step == 10
    assert run.trainer.state.finished


def test_more_epochs_continue_with_the_schedule_of_the_new_length(finished, shapes, tmp_path):
    config = tiny_run(shapes, tmp_path, epochs=3, lr_scheduler="cosine")
    run = Run(tiny_model(), config).fit(finished.output / "last.ckpt")
    assert run.trainer.global_step == 15
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert (tmp_path / "checkpoint_best_regular.pth").is_file()  # fetched from the resumed folder


def test_another_class_count_explains_resume_and_pretrain_weights(finished, shapes, tmp_path):
    run = Run(tiny_model(num_classes=7), tiny_run(shapes, tmp_path))
    with pytest.raises(CheckpointError, match="pretrain_weights"):
        run.fit(finished.output / "last.ckpt")


@pytest.mark.parametrize("name", ["evil_reduce_in_args.pth", "evil_reduce_inside_namespace.pth"])
def test_malicious_files_are_refused_as_ckpt_path(parity, shapes, tmp_path, monkeypatch, name):
    empty = tmp_path / "tmp"
    empty.mkdir()
    monkeypatch.setenv("TMPDIR", str(empty))
    monkeypatch.setattr("tempfile.tempdir", None)
    run = Run(tiny_model(), tiny_run(shapes, tmp_path / "out"))
    with pytest.raises(CheckpointError, match="refused"):
        run.fit(parity / "training/checkpoints" / name)
    assert not list(empty.iterdir())
