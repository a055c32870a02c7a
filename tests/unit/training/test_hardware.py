"""What only several processes or a GPU would show, checked in one process on the CPU."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer
from tests.unit.training.helpers import Run, tiny_model, tiny_run


def rank(number: int, of: int = 2, seed_of_rank_0: int = 77) -> Any:
    """A trainer as process `number` sees it."""
    strategy = SimpleNamespace(broadcast=lambda _: seed_of_rank_0, root_device=torch.device("cpu"))
    return SimpleNamespace(
        strategy=strategy, world_size=of, global_rank=number, accumulate_grad_batches=1
    )


def test_all_ranks_shuffle_with_the_seed_of_rank_0(shapes: Path, tmp_path: Path) -> None:
    """Without it, ranks would draw their own seeds: images lost and shown twice."""
    orders = []
    for number in (0, 1):
        data = RFDETRDataModule(tiny_model(), tiny_run(shapes, tmp_path, seed=None))
        data.order_seed = 1000 + number
        data.trainer = rank(number)
        loader = data.train_dataloader()
        assert (data.order_seed, loader.sampler.seed, loader.dataset.seed) == (77, 77, 77)
        orders.append([key.draw for key in loader.sampler])
    assert not set(orders[0]) & set(orders[1])


@pytest.mark.parametrize("number", [0, 1, 3])
def test_every_rank_has_its_own_seed(shapes: Path, tmp_path: Path, number: int) -> None:
    module = RFDETRModule(tiny_model(), tiny_run(shapes, tmp_path, seed=5))
    module.trainer = SimpleNamespace(global_rank=number)
    module.on_fit_start()
    drawn = torch.rand(3)
    pl.seed_everything(5 + number)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("device", "fp16_eval", "half"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_fp16_eval_evaluates_under_autocast_on_cuda(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    device: str, fp16_eval: bool, half: bool,
) -> None:  # fmt: skip
    module = RFDETRModule(tiny_model(), tiny_run(shapes, tmp_path, fp16_eval=fp16_eval)).eval()
    entered: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def autocast(*args: Any, enabled: bool = True):
        entered.extend([args] * enabled)
        yield
        entered.extend([("left",)] * enabled)

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(RFDETRModule, "device", torch.device(device))
    outputs = module.evaluation_forward(module.model, torch.zeros(1, 3, 64, 64))
    assert entered == ([("cuda", torch.float16), ("left",)] if half else [])
    assert not outputs["pred_boxes"].requires_grad


def test_compile_trains_the_compiled_network(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: compiler(call, backend=backend))
    losses = []
    for compiled in (False, True):
        run = Run(tiny_model(compile=compiled), tiny_run(shapes, tmp_path))
        batch = next(iter(run.data.train_dataloader()))
        batch = run.module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
        run.module.model.eval()  # without dropout
        run.module.log = run.module.log_dict = lambda *_, **__: None
        losses.append(run.module.training_step(batch, 0))
        assert bool(graphs) is compiled
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[1].requires_grad


def test_accelerator_is_passed_on(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default lets Lightning choose, whatever this machine has."""
    passed: list[str] = []

    class Recorder(pl.Trainer):
        def __init__(self, **settings: Any) -> None:
            passed.append(settings["accelerator"])
            super().__init__(**settings | {"accelerator": "cpu", "precision": "32-true"})

    monkeypatch.setattr(pl, "Trainer", Recorder)
    config = tiny_run(shapes, tmp_path)
    default = type(config).model_fields["accelerator"].default
    build_trainer(config.model_copy(update={"accelerator": default}), tiny_model())
    build_trainer(config, tiny_model())
    build_trainer(config, tiny_model(), accelerator="gpu")
    assert passed == ["auto", "cpu", "gpu"]
