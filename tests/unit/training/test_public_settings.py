"""Settings of the public package that act here: each test shows that the setting has acted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from rfdetr.config import RFDETRSegNanoConfig, SegmentationTrainConfig, TrainConfig
from rfdetr.errors import ConfigError
from rfdetr.training import BestModelCallback, RFDETRDataModule, auto_batch, build_trainer
from rfdetr.training.callbacks.ema import ema_network
from tests.unit.training.helpers import Run, tiny_model, tiny_run


class Forwards(pl.Callback):
    """Counts evaluation forwards of the live and of the EMA network, per stage of a fit."""

    def __init__(self) -> None:
        self.live = self.ema = self.sizes = 0
        self.batches: list[int] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.model.register_forward_hook(self._count("live"))
        ema = ema_network(trainer)
        if ema is not None:
            ema.register_forward_hook(self._count("ema"))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.batches.append(len(batch[1]))

    def _count(self, name: str) -> Any:
        def count(network: Any, *_: Any) -> None:
            if not network.training:
                setattr(self, name, getattr(self, name) + 1)

        return count


def fitted(shapes: Path, output: Path, **fields: Any) -> tuple[Run, Forwards]:
    run = Run(tiny_model(), tiny_run(shapes, output, **{"epochs": 1, **fields}))
    forwards = Forwards()
    run.trainer.callbacks.append(forwards)
    return run.fit(), forwards


def test_eval_base_model_false_halves_validation(shapes: Path, tmp_path: Path) -> None:
    both, counted = fitted(shapes, tmp_path / "both")
    assert counted.live == counted.ema == len(counted.batches) > 0
    ema_only, halved = fitted(shapes, tmp_path / "ema", eval_base_model=False)
    assert (halved.live, halved.ema) == (0, counted.ema)
    expected = {k: v for k, v in both.metrics().items() if k.startswith("val/ema_mAP")}
    found = ema_only.metrics()
    assert {k: found[k] for k in expected} == expected
    assert found["val/mAP_50_95"] == found["val/ema_mAP_50_95"]
    files = {path.name for path in (tmp_path / "ema").glob("*.pth")}
    assert files == {"checkpoint_best_ema.pth", "checkpoint_best_total.pth"}


def test_eval_base_model_false_without_ema_validates_the_live_weights(
    shapes: Path, tmp_path: Path
) -> None:
    run, forwards = fitted(shapes, tmp_path, eval_base_model=False, use_ema=False)
    assert forwards.live == len(forwards.batches) > 0
    assert (run.output / "checkpoint_best_regular.pth").is_file()


def test_eval_batch_size_and_sanity_steps(shapes: Path, tmp_path: Path) -> None:
    config = tiny_run(shapes, tmp_path, eval_batch_size=3, num_sanity_val_steps=1)
    run = Run(tiny_model(), config)
    forwards = Forwards()
    run.trainer.callbacks.append(forwards)
    run.trainer.fit_loop.max_epochs = 1
    run.fit()
    images = len(run.data.val_dataloader().dataset)
    validation = [min(3, images - start) for start in range(0, images, 3)]
    assert forwards.batches == [*validation[:1], *validation]
    assert run.data.train_dataloader().batch_size == 2


@pytest.mark.parametrize(("metric", "key"), [("map", "val/mAP_50_95"), ("mar", "val/mAR")])
def test_best_model_metric_chooses_the_monitor(metric: str, key: str, tmp_path: Path) -> None:
    config = TrainConfig(dataset_dir=tmp_path, output_dir=tmp_path, best_model_metric=metric)
    trainer = build_trainer(config, tiny_model(), logger=False)
    best = next(c for c in trainer.callbacks if isinstance(c, BestModelCallback))
    assert (best.live.metric, best.ema.metric) == (key, key.replace("val/", "val/ema_"))


def test_best_model_metric_mar_is_recorded(shapes: Path, tmp_path: Path) -> None:
    run, _ = fitted(shapes, tmp_path, best_model_metric="mar")
    stored = torch.load(tmp_path / "checkpoint_best_regular.pth", weights_only=True)
    assert stored["metric"] == "val/mAR"
    assert stored["value"] == pytest.approx(run.metrics()["val/mAR"])


def test_lr_scheduler_kwargs_set_the_fields_of_the_schedule() -> None:
    given = {"lr_drop": 7, "min_factor": 0.2, "warmup_epochs": 1.5}
    config = TrainConfig(dataset_dir="x", lr_scheduler_kwargs=given)
    assert (config.lr_drop, config.lr_min_factor, config.warmup_epochs) == (7, 0.2, 1.5)


@pytest.mark.parametrize(("limit", "found"), [(3, (2, 8)), (16, (16, 1)), (0, (1, 16))])
def test_auto_takes_the_largest_batch_that_fits_and_keeps_the_step(
    limit: int, found: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_batch, "fits", lambda train, model, size, *_: size <= limit)
    config = TrainConfig(dataset_dir=tmp_path, batch_size="auto")
    auto_batch.settle_batch_size(config, tiny_model(), [0], "32-true")
    assert (config.batch_size, config.grad_accum_steps) == found
    assert not config.auto_batch_size


def test_auto_without_a_gpu_keeps_the_default(shapes: Path, tmp_path: Path) -> None:
    config = tiny_run(shapes, tmp_path, batch_size="auto", grad_accum_steps=2)
    data = RFDETRDataModule(tiny_model(), config)
    with pytest.raises(ConfigError, match="settled by build_trainer"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match="omit one of them"):
        build_trainer(config, tiny_model(), logger=False, accumulate_grad_batches=8)
    trainer = build_trainer(config, tiny_model(), logger=False)
    assert (config.batch_size, trainer.accumulate_grad_batches) == (4, 2)
    assert data.train_dataloader().batch_size == 4


@pytest.mark.parametrize("segmentation", [False, True])
def test_the_probe_trains_and_leaves_random_numbers_alone(
    segmentation: bool, tmp_path: Path
) -> None:
    fields = tiny_model().model_dump() | {"resolution": 48, "patch_size": 12, "num_windows": 2}
    model: Any = tiny_model()
    config: TrainConfig = TrainConfig(dataset_dir=tmp_path, multi_scale=False)
    if segmentation:
        model = RFDETRSegNanoConfig(**fields | {"segmentation_head": True})
        config = SegmentationTrainConfig(dataset_dir=tmp_path, multi_scale=False)
    before = torch.random.get_rng_state()
    assert auto_batch.fits(config, model, 2, torch.device("cpu"), "32-true")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_probe_measures_the_memory_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, device = TrainConfig(dataset_dir=tmp_path), torch.device("cuda", 0)
    assert auto_batch.fits(config, tiny_model(), 2, device, "32-true")
    monkeypatch.setattr(auto_batch, "HEADROOM", 1e-6)
    assert not auto_batch.fits(config, tiny_model(), 2, device, "32-true")
