from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flows.config.sections import EvaluateSettings
from flows.gate import split_run
from tests.flows.gate.test_gate import judge, rule, scores


def run(collector: Any, device: str, seconds: list[float], events: list[str]) -> None:
    """The hooks of a test loop whose batches take `seconds`, after a slow first call."""
    calls = iter([0.2, *seconds])

    def step(*_: Any) -> None:
        events.append("step")
        time.sleep(next(calls))

    trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(test_step_context=contextlib.nullcontext)
    )
    module = SimpleNamespace(device=torch.device(device), test_step=step)
    for _ in seconds:
        collector.on_test_batch_start(trainer, module, None, 0)
        step()
        outputs = {"targets": [{}, {}], "results": []}
        collector.on_test_batch_end(trainer, module, outputs, (None,), 0)


def collector(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = split_run.Collector(EvaluateSettings(pictures=0), masks=False)
    monkeypatch.setattr(made.evaluator, "update", lambda *_: None)
    return made


def test_the_first_call_is_not_timed_even_if_there_is_one_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seconds in ([0.02], [0.02, 0.02, 0.02]):
        timed, events = collector(monkeypatch), list[str]()
        run(timed, "cpu", seconds, events)
        assert len(events) == len(seconds) + 1
        assert 10 <= timed.latency_ms < 50  # 20 ms for two images, not 200
        assert timed.device == split_run.device_name(torch.device("cpu"))
        assert "thread" in timed.device


def test_a_gpu_is_waited_for_before_and_after_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"wait {device}"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    timed = collector(monkeypatch)
    run(timed, "cuda:1", [0.0, 0.0], events)
    batch = ["wait cuda:1", "step", "wait cuda:1"]
    assert events == ["step", *batch, *batch]
    assert timed.device == "NVIDIA H100"


def test_the_verdict_names_the_device() -> None:
    measured = scores(0.6, latency_ms=31.0, latency_on="NVIDIA H100, batches of 8")
    reason = rule(judge(None, measured, max_latency_ms=30.0), "latency").reason
    assert reason == "latency 31.00 ms on NVIDIA H100, batches of 8, budget 30.00 ms"
