from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rfdetr.config import RFDETRNanoConfig
from rfdetr.model.network import build_network
from rfdetr.training.callbacks.drop_path import DropPathCallback, drop_path_schedule, layer_rates


def test_schedules_equal_the_reference(parity: Path):
    for case in json.loads((parity / "training/drop_path.json").read_text())["schedules"]:
        values = drop_path_schedule(
            case["rate"],
            case["epochs"],
            case["steps_per_epoch"],
            **{name: case[name] for name in ("cutoff_epoch", "mode", "schedule")},
        )
        assert np.allclose(values, case["values"], atol=1e-6), case


def test_layer_ramp_equals_the_reference(parity: Path):
    for case in json.loads((parity / "training/drop_path.json").read_text())["per_layer"]:
        assert layer_rates(case["rate"], case["layers"]) == pytest.approx(
            case["per_layer"], abs=1e-6
        )


def test_linear_anneals_over_the_whole_run_and_late_grows():
    assert drop_path_schedule(0.2, 1, 3, schedule="linear").tolist() == pytest.approx([0.2, 0.1, 0])
    late = drop_path_schedule(0.2, 2, 3, cutoff_epoch=1, mode="late", schedule="linear")
    assert late.tolist() == pytest.approx([0, 0, 0, 0, 0.1, 0.2])


def test_callback_acts_on_a_network_built_without_drop_path():
    config = RFDETRNanoConfig(
        pretrain_weights=None,
        encoder_dim=48,
        encoder_depth=3,
        encoder_heads=3,
        out_feature_indexes=[1, 3],
        num_queries=5,
        num_select=5,
        group_detr=1,
        hidden_dim=32,
        dim_feedforward=32,
    )
    network = build_network(config)
    module = SimpleNamespace(model=network, model_config=config)
    callback = DropPathCallback(0.2, schedule="linear")
    trainer = SimpleNamespace(
        estimated_stepping_batches=4,
        train_dataloader=[0, 1],
        num_training_batches=2,
        accumulate_grad_batches=1,
        max_epochs=2,
        global_step=0,
    )
    callback.on_train_start(trainer, module)
    for step, last in ((0, 0.2), (3, 0.0), (9, 0.0)):
        trainer.global_step = step
        callback.on_train_batch_start(trainer, module, None, 0)
        assert network.encoder.drop_path_rates[-1].item() == pytest.approx(last)
