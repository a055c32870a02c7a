"""What a training step asks of an accelerator: waits of the host, and launched operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rfdetr.config import RFDETRNanoConfig
from rfdetr.model import feedforward
from rfdetr.model.criterion import build_criterion
from rfdetr.model.cuda_graphs import CudaGraphs
from rfdetr.model.network import build_network
from rfdetr.model.recording import Recorder
from tests.unit.model.host_transfers import HostTransfers
from tests.unit.model.small import images, small_network, targets, weighted


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_forward_never_touches_the_host(masks: bool, training: bool) -> None:
    model = small_network(masks=masks).train(training)
    model.set_drop_path([0.1] * 4)
    batch = images()
    with HostTransfers() as transfers:
        model(batch)
    assert transfers.to_host == []
    assert transfers.to_device == 0


def test_a_training_step_reads_once_from_the_device() -> None:
    """The matcher's copy. To the device go the order of the targets and the matched pairs."""
    model = small_network().train()
    criterion = build_criterion(model.config).train()
    given = targets((2, 1))
    with HostTransfers() as transfers:
        weighted(criterion(model(images()), given), criterion.weight_dict).backward()
    assert len(transfers.to_host) == 1
    assert transfers.to_device == 2


_NO_KERNEL = {"_unsafe_view", "empty", "empty_like", "new_empty", "new_empty_strided"}


class _Operators(TorchDispatchMode):
    """Counts dispatched operators that launch a kernel on a GPU: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if not func.is_view and name not in _NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _OneLaunch(Recorder):
    """Repeats recorded work uncounted, as a graph is one launch."""

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            with _disable_current_modes():  # type: ignore[no-untyped-call]
                work()

        return replay


@pytest.mark.parametrize(
    ("autocast", "graphs", "most"),
    [(False, False, 1250), (True, False, 1380), (True, True, 300)],
)
def test_operators_of_a_training_step(
    autocast: bool, graphs: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nano, batch 16, 7 objects per image, forward to backward.

    Fewer queries and smaller images than nano's take the same operators. With one autograd node
    per layer, a step took 1555 operators in float32 and 1914 under autocast.
    """
    monkeypatch.setattr(feedforward, "_CPU_ROWS", 1 << 30)  # as on a GPU: rows are not divided
    torch.manual_seed(0)
    model = build_network(RFDETRNanoConfig(pretrain_weights=None, num_queries=20, num_select=20))
    criterion = build_criterion(model.train().config).train()
    batch, given = images(16, 128), targets((7,) * 16)
    if graphs:
        model.graphs = CudaGraphs("always", _OneLaunch())
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                weighted(criterion(model(batch), given), criterion.weight_dict).backward()
        assert model.graphs.count == 1
    with _Operators() as operators, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        weighted(criterion(model(batch), given), criterion.weight_dict).backward()
    launched = operators.counts.total()
    assert launched <= most
