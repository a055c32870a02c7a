"""Plots of COCOEvalCallback: when they are drawn and which loggers receive them."""

from __future__ import annotations

import threading

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

from rfdetr.evaluation import plots
from rfdetr.training.callbacks.coco_eval import COCOEvalCallback
from tests.unit.training.replay import ReplayModule, make_job, make_loader, make_trainer, numbers


class Deaf(Logger):
    """A user's logger that accepts no images."""

    def __init__(self):
        super().__init__()
        self.keys = set()

    name = version = "deaf"

    def log_metrics(self, metrics, step=None):
        self.keys |= set(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Broken(Deaf):
    def log_image(self, key, images, step=None):
        raise ConnectionError("server is unreachable")


def test_plots_reach_the_loggers_that_accept_them(tmp_path):
    _, _, pairs = make_job(0)
    board, deaf, broken = TensorBoardLogger(tmp_path, "", ""), Deaf(), Broken()
    trainer = make_trainer(
        COCOEvalCallback(output_dir=tmp_path),
        logger=[deaf, broken, CSVLogger(tmp_path / "csv"), board],
        max_epochs=1,
        log_every_n_steps=1,
    )
    loader = make_loader(pairs)
    with pytest.warns(UserWarning, match="server is unreachable") as caught:
        trainer.fit(ReplayModule(pairs), loader, loader)
    assert sum("server is unreachable" in str(w.message) for w in caught) == 1
    names = {"confusion_matrix", "f1_threshold", "precision_recall", "samples"}
    assert {p.stem for p in (tmp_path / "plots/val").iterdir()} == names
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["images"]) == {f"val/{name}" for name in names}
    assert "val/mAP_50_95" in deaf.keys


@pytest.mark.slow
def test_plots_reach_mlflow(tmp_path):
    _, _, pairs = make_job(0)
    store, folder = f"sqlite:///{tmp_path}/ml.db", tmp_path / "artifacts"
    logger = MLFlowLogger(tracking_uri=store, artifact_location=str(folder))
    trainer = make_trainer(COCOEvalCallback(output_dir=tmp_path), logger=logger)
    trainer.test(ReplayModule(pairs), make_loader(pairs), verbose=False)
    assert len(list(folder.rglob("plots/test/*.png"))) == 4


def test_plots_are_drawn_at_new_best_values_only(tmp_path):
    _, _, pairs = make_job(1)
    callback = COCOEvalCallback(output_dir=tmp_path)
    folder = tmp_path / "plots/val"
    written = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            callback._pictures.finish()
            written.append({p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")})

    trainer = make_trainer(callback, Watch(), max_epochs=3)
    loader = make_loader(pairs)
    trainer.fit(ReplayModule(pairs, speed=0.7), loader, loader)  # worse every epoch
    assert written[0] == {}
    assert len(written[1]) == 4
    assert written[2] == written[1]
    restored = COCOEvalCallback(output_dir=tmp_path)
    restored.load_state_dict(callback.state_dict())
    assert restored.best == callback.best > 0


def test_training_does_not_wait_for_pictures(tmp_path, monkeypatch):
    _, _, pairs = make_job(1)
    released = threading.Event()
    draw = plots.draw_evaluation
    drawn_by = []

    def slow(*args):
        drawn_by.append(threading.current_thread().name)
        assert released.wait(60)
        return draw(*args)

    monkeypatch.setattr(plots, "draw_evaluation", slow)

    class NextEpoch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                assert not list(tmp_path.rglob("*.png"))
                released.set()

    trainer = make_trainer(COCOEvalCallback(output_dir=tmp_path), NextEpoch(), max_epochs=2)
    loader = make_loader(pairs)
    trainer.fit(ReplayModule(pairs, speed=0.7), loader, loader)
    assert drawn_by == ["pictures"]
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_an_unwritable_folder_costs_only_the_plots(tmp_path):
    _, _, pairs = make_job(0)
    (tmp_path / "plots").write_text("a file where the folder should be")
    trainer = make_trainer(COCOEvalCallback(output_dir=tmp_path))
    with pytest.warns(UserWarning, match="Cannot write plots"):
        trainer.test(ReplayModule(pairs), make_loader(pairs), verbose=False)
    assert "test/mAP_50_95" in numbers(trainer)


def test_smoke_run_draws_nothing(tmp_path):
    _, _, pairs = make_job(0)
    trainer = make_trainer(COCOEvalCallback(output_dir=tmp_path), fast_dev_run=2)
    loader = make_loader(pairs)
    trainer.fit(ReplayModule(pairs), loader, loader)
    assert "val/mAP_50_95" in numbers(trainer)
    assert not (tmp_path / "plots").exists()
