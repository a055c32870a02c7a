"""compile=True: regions share code, EMA and live network alike, eager where it cannot work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from rfdetr.training.callbacks.ema import ema_network
from tests.unit.training.helpers import Run, tiny_model, tiny_run


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that torch.compile builds; they run without a C++ compiler."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: compiler(call, backend=backend))
    torch._dynamo.reset()
    return found


@pytest.mark.slow
def test_a_fit_runs_compiled_regions_and_equals_the_eager_one(
    shapes: Path,
    tmp_path: Path,
    graphs: list[torch.fx.GraphModule],
    caplog: pytest.LogCaptureFixture,
) -> None:
    losses = []
    for compiled in (False, True):
        config = tiny_run(shapes, tmp_path / str(compiled), epochs=1, use_ema=True, seed=1)
        run = Run(tiny_model(compile=compiled), config)
        with caplog.at_level(logging.INFO):
            run.fit()
        assert bool(graphs) is compiled
        losses.append(run.metrics())
        assert ("regions; the first step took" in caplog.text) is compiled
    for name in ("train/loss", "val/mAP_50_95", "val/ema_mAP_50_95"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=1e-4), name
    ema = ema_network(run.trainer)
    assert ema is not None
    assert ema.encoder.blocks[0]._compiled_call_impl is not None  # type: ignore[union-attr,index]
    # One probe; training, evaluation and both kinds of attention: not one graph per block and step
    assert len(graphs) <= 24


def test_without_a_compiler_training_is_eager_and_says_why(shapes: Path, tmp_path: Path) -> None:
    from torch._inductor import config as inductor

    torch._dynamo.reset()
    run = Run(tiny_model(compile=True), tiny_run(shapes, tmp_path, epochs=1))
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.warns(UserWarning, match=r"Training is not compiled.*no-such-compiler"),
    ):
        run.fit()
    assert run.metrics()["train/loss"] > 0
