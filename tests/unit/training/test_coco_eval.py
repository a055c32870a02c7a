"""COCOEvalCallback in real trainers, on a module that replays prepared detections."""

from __future__ import annotations

import pickle

import pytest
import pytorch_lightning as pl
import torch

from rfdetr.evaluation.evaluator import evaluate_coco
from rfdetr.training.callbacks.coco_eval import COCOEvalCallback
from rfdetr.training.callbacks.ema import RFDETREMACallback
from tests.unit.training.replay import ReplayModule, make_job, make_loader, make_trainer, numbers

BOX_KEYS = {"mAP_50_95", "mAP_50", "mAP_75", "mAR", "F1", "precision", "recall", "best_threshold"}


def expected_numbers(document, results, **options):
    result = evaluate_coco(document, results, **options)
    box, sweep = result.bbox.summary, result.sweep
    best = sweep.best
    return result, {
        "mAP_50_95": box.ap,
        "mAP_50": box.ap50,
        "mAP_75": box.ap75,
        "mAR": box.ar,
        "F1": sweep.macro_f1[best],
        "precision": sweep.macro_precision[best],
        "recall": sweep.macro_recall[best],
        "best_threshold": sweep.best_threshold,
    }


def test_validate_without_fit_or_datamodule_logs_every_key():
    document, results, pairs = make_job(0)
    names = [f"name {label}" for label in range(70)]
    trainer = make_trainer(COCOEvalCallback())
    trainer.validate(ReplayModule(pairs), make_loader(pairs, class_names=names), verbose=False)
    result, expected = expected_numbers(document, results)
    found = numbers(trainer)
    for key, value in expected.items():
        assert found[f"val/{key}"] == pytest.approx(value, abs=1e-9)
    per_class = {
        f"val/AP/name {label}": ap
        for label, ap in zip(result.class_ids, result.bbox.ap, strict=True)
        if ap > -1
    }
    assert per_class
    for key, value in per_class.items():
        assert found[key] == pytest.approx(value, abs=1e-9)
    assert set(found) == {f"val/{key}" for key in expected} | set(per_class)


def test_per_class_flag_and_numbers_instead_of_names():
    document, results, pairs = make_job(0)
    trainer = make_trainer(COCOEvalCallback(log_per_class_metrics=False))
    trainer.validate(ReplayModule(pairs), make_loader(pairs), verbose=False)
    assert set(numbers(trainer)) == {f"val/{key}" for key in BOX_KEYS}
    trainer = make_trainer(COCOEvalCallback())
    trainer.validate(ReplayModule(pairs), make_loader(pairs), verbose=False)
    result = evaluate_coco(document, results)
    found = {key for key in numbers(trainer) if key.startswith("val/AP/")}
    assert found == {
        f"val/AP/{label}"
        for label, ap in zip(result.class_ids, result.bbox.ap, strict=True)
        if ap > -1
    }


def test_test_mirrors_validation_and_adds_the_coco_standard(capsys, tmp_path):
    document, results, pairs = make_job(3, per_image=300, classes=2)
    callback = COCOEvalCallback(max_dets=500, output_dir=tmp_path)
    trainer = make_trainer(callback)
    loader, module = make_loader(pairs), ReplayModule(pairs)
    trainer.validate(module, loader, verbose=False)
    validated = numbers(trainer)
    trainer.test(module, loader, verbose=False)
    tested = {key: value for key, value in numbers(trainer).items() if key.startswith("test/")}
    for key, value in validated.items():
        assert tested.pop(key.replace("val/", "test/")) == value
    assert tested
    assert all(key.startswith("test/coco_") for key in tested)
    standard = evaluate_coco(document, results, max_dets=100).bbox.summary
    assert tested["test/coco_mAP_50_95"] == pytest.approx(standard.ap, abs=1e-9)
    assert tested["test/coco_mAR_100"] == pytest.approx(standard.ar, abs=1e-9)
    assert tested["test/coco_mAP_small"] == pytest.approx(standard.ap_small, abs=1e-9)
    assert tested["test/coco_mAP_50_95"] != validated["val/mAP_50_95"]
    table = capsys.readouterr().out
    assert "Test" in table
    assert f"{standard.ap:.4f}" in table
    assert sorted(p.name for p in (tmp_path / "plots/test").iterdir()) == [
        "confusion_matrix.png",
        "f1_threshold.png",
        "precision_recall.png",
        "samples.png",
    ]


def test_masks_add_their_keys_and_drive_the_sweep():
    document, results, pairs = make_job(2, masks=True)
    trainer = make_trainer(COCOEvalCallback(segmentation=True, log_per_class_metrics=False))
    trainer.validate(ReplayModule(pairs), make_loader(pairs), verbose=False)
    found = numbers(trainer)
    assert set(found) == {f"val/{key}" for key in (*BOX_KEYS, "segm_mAP_50_95", "segm_mAP_50")}
    result = evaluate_coco(document, results, iou_types=["segm"])
    assert found["val/segm_mAP_50_95"] == pytest.approx(result.segm.summary.ap, abs=1e-9)
    assert found["val/segm_mAP_50"] == pytest.approx(result.segm.summary.ap50, abs=1e-9)
    assert found["val/F1"] == pytest.approx(result.sweep.macro_f1.max(), abs=1e-9)


class History(pl.Callback):
    """Metrics as other callbacks read them, epoch by epoch."""

    def __init__(self):
        self.epochs = []

    def on_validation_start(self, trainer, pl_module):
        self.before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer, pl_module):
        fresh = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if self.before.get(key) is not value
        }
        self.epochs.append((trainer.sanity_checking, fresh))


def test_interval_last_epoch_and_sanity_check():
    _, _, pairs = make_job(0)
    history = History()
    trainer = make_trainer(
        COCOEvalCallback(eval_interval=2, plots=False),
        history,
        max_epochs=5,
        num_sanity_val_steps=1,
    )
    loader = make_loader(pairs)
    trainer.fit(ReplayModule(pairs), loader, loader)
    evaluated = [bool(metrics) for _, metrics in history.epochs]
    assert [sanity for sanity, _ in history.epochs] == [True] + [False] * 5
    assert evaluated == [False, False, True, False, True, True]


def test_ema_weights_are_evaluated_on_the_same_batches_in_the_same_precision():
    document, results, pairs = make_job(1)
    module = ReplayModule(pairs, speed=3.0)
    history = History()
    trainer = make_trainer(
        RFDETREMACallback(decay=0.9, tau=0),
        COCOEvalCallback(log_per_class_metrics=False, plots=False),
        history,
        max_epochs=1,
        precision="bf16-mixed",
    )
    loader = make_loader(pairs)
    trainer.fit(module, loader, loader)
    found = history.epochs[0][1]
    shift = trainer.callbacks[0].ema_model.shift.item()
    assert 0 < shift < 6

    def moved(by):
        rows = [
            r | {"bbox": [r["bbox"][0] + by, r["bbox"][1] + by, *r["bbox"][2:]]} for r in results
        ]
        return evaluate_coco(document, rows).bbox.summary

    live, ema = moved(3.0 * len(loader)), moved(shift)
    assert found["val/mAP_50_95"] == pytest.approx(live.ap, abs=1e-6)
    assert found["val/ema_mAP_50_95"] == pytest.approx(ema.ap, abs=1e-6)
    assert found["val/ema_mAP_50"] == pytest.approx(ema.ap50, abs=1e-6)
    assert found["val/ema_mAP_75"] == pytest.approx(ema.ap75, abs=1e-6)
    assert found["val/ema_mAR"] == pytest.approx(ema.ar, abs=1e-6)
    assert live.ap != ema.ap
    # live and EMA forward in turn, both in eval mode and bfloat16
    assert module.seen_modes == [(False, torch.bfloat16)] * (2 * len(loader))


def test_no_ground_truth_logs_nothing_and_warns_once():
    _, _, pairs = make_job(0)
    bare = [
        (
            result,
            target
            | {
                "boxes": torch.zeros(0, 4),
                "labels": torch.zeros(0),
                "area": torch.zeros(0),
                "iscrowd": torch.zeros(0),
            },
        )
        for result, target in pairs
    ]
    for _, target in bare:
        target.pop("crowd_boxes", None)
    trainer = make_trainer(COCOEvalCallback(), max_epochs=2)
    loader = make_loader(bare)
    with pytest.warns(UserWarning, match="no ground truth") as caught:
        trainer.fit(ReplayModule(bare), loader, loader)
    assert sum("no ground truth" in str(w.message) for w in caught) == 1
    assert not numbers(trainer)


def test_second_dataloader_is_left_out_with_a_warning():
    document, results, pairs = make_job(0)

    class SeveralLoaders(ReplayModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return super().validation_step(batch, batch_idx)

    trainer = make_trainer(COCOEvalCallback())
    loaders = [make_loader(pairs), make_loader(pairs)]
    with pytest.warns(UserWarning, match="first of the given dataloaders"):
        trainer.validate(SeveralLoaders(pairs), loaders, verbose=False)
    expected = evaluate_coco(document, results).bbox.summary.ap
    assert numbers(trainer)["val/mAP_50_95"] == pytest.approx(expected, abs=1e-9)


def test_callback_pickles_after_use():
    _, _, pairs = make_job(0)
    callback = COCOEvalCallback()
    make_trainer(callback).validate(ReplayModule(pairs), make_loader(pairs), verbose=False)
    assert pickle.loads(pickle.dumps(callback)).max_dets == 500
