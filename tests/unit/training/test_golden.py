"""The demo detector learns the demo dataset from scratch, and its first losses stay what they were.

To record them again: `python -m tests.unit.training.test_golden`.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from rfdetr.config import ModelConfig, RFDETRNanoConfig
from rfdetr.data.demo import build_demo
from tests.unit.training.helpers import Run, tiny_run

RECORDED = Path(__file__).parents[2] / "data/golden_loss.json"
STEPS = 20
TOLERANCE = 0.02  # relative: kernels differ between processors and torch releases


def demo_model() -> ModelConfig:
    return RFDETRNanoConfig(
        pretrain_weights=None,
        encoder_dim=192,
        encoder_depth=3,
        encoder_heads=3,
        out_feature_indexes=[1, 2, 3],
        resolution=128,
        hidden_dim=128,
        dec_layers=2,
        dim_feedforward=512,
        num_queries=30,
        num_select=30,
        group_detr=1,
        num_classes=3,
    )


def demo_run(dataset: Path, output: Path, seed: int, **fields: Any) -> Run:
    """Batch 4, rate 1e-3 everywhere, half a cosine after 50 warm-up steps."""
    steps_per_epoch = len(list((dataset / "train").glob("*.jpg"))) // 4
    settings: dict[str, Any] = {
        "epochs": 10,
        "batch_size": 4,
        "lr_vit_layer_decay": 1,
        "lr_component_decay": 1,
        "lr_scheduler": "cosine",
        "clip_max_norm": 1.0,
        "warmup_epochs": 50 / steps_per_epoch,
        "eval_interval": 10,
        "seed": seed,
    }
    trainer = {"limit_val_batches": 0} if fields.get("epochs") == 1 else {}
    return Run(demo_model(), tiny_run(dataset, output, **settings | fields), seed=seed, **trainer)


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, *args) -> None:
        self.values.append(float(outputs["loss"]))


def first_losses(folder: Path) -> list[float]:
    dataset = build_demo(folder / "demo", train=4 * STEPS, valid=4, test=0)
    run = demo_run(dataset, folder / "output", seed=0, epochs=1, use_ema=False)
    losses = Losses()
    run.trainer.callbacks.append(losses)
    run.fit()
    return losses.values


def test_first_losses_are_the_recorded_ones(tmp_path):
    recorded = json.loads(RECORDED.read_text())["loss"]
    assert len(recorded) == STEPS
    assert first_losses(tmp_path) == pytest.approx(recorded, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_detector_learns_from_scratch(tmp_path, seed):
    dataset = build_demo(tmp_path / "demo", train=400, valid=100, test=0)
    start = time.process_time()
    run = demo_run(dataset, tmp_path / "output", seed).fit()
    seconds = time.process_time() - start
    metrics = run.metrics()
    best = max(metrics["val/mAP_50"], metrics["val/ema_mAP_50"])
    print(f"seed {seed}: mAP50 {best:.3f} after {seconds:.0f} CPU seconds")
    assert best >= 0.5
    assert seconds <= 240


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses = [round(value, 6) for value in first_losses(Path(folder))]
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps({"tolerance": TOLERANCE, "loss": losses}, indent=1) + "\n")
