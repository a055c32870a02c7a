"""Which epoch is in which best file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rfdetr.training.callbacks import BestModelCallback
from rfdetr.training.callbacks.best_model import EMA, REGULAR
from rfdetr.training.callbacks.best_score import BestScore, better_of
from tests.unit.training.helpers import Run, tiny_model, tiny_run


def cases():
    path = Path(__file__).parents[2] / "parity/training/selection.json"
    skip = {"skip_best_epochs", "ema_only_evaluation_1_11_2_default"}
    return [case for case in json.loads(path.read_text())["cases"] if case["name"] not in skip]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
def test_stored_epochs_equal_the_reference(case):
    """Except that the first EMA value always counts here: the best starts at minus infinity."""
    live = BestScore("val/mAP_50_95", REGULAR, averaged=False)
    ema = BestScore("val/ema_mAP_50_95", EMA, averaged=True)
    stored = []
    values = zip(case["regular"], case["ema"] or [None] * len(case["regular"]), strict=True)
    for epoch, (live_value, ema_value) in enumerate(values):
        if epoch == case["result"]["epochs_run"]:
            break
        live.observe(live_value, epoch)
        ema.observe(ema_value, epoch)
        stored.append([live.epoch, ema.epoch])
    expected = case["result"]["stored_epoch_after_each_epoch"]
    if case["name"] == "ema_never_positive":
        expected = [[0, 0], [1, 0]]
    assert stored == expected
    best = better_of(live, ema)
    assert ("ema" if best.averaged else "regular") == case["result"]["best_total_source"]


def test_best_values_survive_a_resume(tmp_path):
    first = BestModelCallback(tmp_path)
    first.live.observe(0.4, 3)
    first.ema.observe(0.5, 2)
    second = BestModelCallback(tmp_path)
    second.load_state_dict(first.state_dict())
    assert (second.live.value, second.ema.epoch) == (0.4, 2)
    other = BestModelCallback(tmp_path, "val/segm_mAP_50_95", "val/ema_segm_mAP_50_95")
    other.load_state_dict(first.state_dict())
    assert other.best is None


def test_an_interrupted_run_has_its_best_file_and_record(shapes, tmp_path):
    from tests.unit.training.helpers import StopAt

    run = Run(tiny_model(), tiny_run(shapes, tmp_path))
    run.trainer.callbacks.append(StopAt(7))
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run.fit()
    assert (tmp_path / "checkpoint_best_total.pth").is_file()
    assert json.loads((tmp_path / "best_model.json").read_text())["epoch"] == 0


def test_run_test_tests_the_best_weights_and_gives_the_module_its_own_back(shapes, tmp_path):
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, run_test=True))
    tested = {}
    step = run.module.test_step

    def test_step(batch, batch_idx):
        tested["weights"] = run.module.model.class_embed.weight.clone()
        return step(batch, batch_idx)

    run.module.test_step = test_step
    run.fit()
    best = torch.load(tmp_path / "checkpoint_best_total.pth", weights_only=True)["model"]
    assert torch.equal(tested["weights"], best["class_embed.weight"])
    assert not torch.equal(run.module.model.class_embed.weight, tested["weights"])
    assert "test/mAP_50_95" in run.metrics()
    assert "test/mAP_50_95" in (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert run.trainer.state.fn == "fit"


def test_dont_save_weights_writes_none(shapes, tmp_path):
    Run(tiny_model(), tiny_run(shapes, tmp_path, dont_save_weights=True, epochs=1)).fit()
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".pth", ".ckpt")]


def test_numbered_checkpoints_count_epochs_from_zero(shapes, tmp_path):
    Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=3, checkpoint_interval=2)).fit()
    found = {path.name for path in tmp_path.glob("*.ckpt")}
    assert found == {"last.ckpt", "checkpoint_1.ckpt"}


def test_best_path_for_ckpt_path_best(tmp_path):
    assert BestModelCallback(tmp_path).best_model_path == ""
    (tmp_path / "checkpoint_best_total.pth").touch()
    callback = BestModelCallback(tmp_path)
    assert Path(callback.best_model_path).name == "checkpoint_best_total.pth"


def test_nothing_is_judged_in_a_sanity_check(tmp_path):
    callback = BestModelCallback(tmp_path)
    trainer = SimpleNamespace(
        sanity_checking=True, callback_metrics={"val/mAP_50_95": torch.tensor(0.9)}, callbacks=[]
    )
    callback.on_validation_end(trainer, None)
    assert callback.best is None
