"""SIGTERM writes a checkpoint before the process ends, and nothing that was trained is lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.datasets import make_roboflow
from tests.unit.training.helpers import Run, tiny_model, tiny_run
from tests.unit.training.processes import started, wait_for
from tests.unit.training.test_resume import equal


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_roboflow(tmp_path_factory.mktemp("data"), splits={"train": 10, "valid": 3})


def test_sigterm_inside_an_epoch_saves_and_exits_with_143(dataset, tmp_path):
    job = {"dataset": dataset, "output": tmp_path, "pause": 0.3}
    with started(job) as process:
        wait_for(process, "step 2 ")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "last.ckpt" in output
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert 2 <= state["global_step"] <= 4
    run = Run(tiny_model(), tiny_run(dataset, tmp_path)).fit(tmp_path / "last.ckpt")
    assert run.trainer.global_step == 10


@pytest.mark.slow
def test_sigterm_inside_a_validation_saves_and_the_resumed_run_validates_again(dataset, tmp_path):
    Run(tiny_model(), tiny_run(dataset, tmp_path / "whole")).fit()
    output = tmp_path / "parts"
    with started({"dataset": dataset, "output": output, "validation_pause": 1.0}) as process:
        wait_for(process, "validated rank 0")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert torch.load(output / "last.ckpt", weights_only=True)["global_step"] == 5
    run = Run(tiny_model(), tiny_run(dataset, output)).fit(output / "last.ckpt")
    assert run.trainer.global_step == 10
    whole, parts = (torch.load(p / "last.ckpt") for p in (tmp_path / "whole", output))
    for part in ("state_dict", "optimizer_states", "callbacks", "global_step"):
        equal(whole[part], parts[part], part)
