"""The network on CUDA graphs equals the eager one and notices whatever would make a replay wrong.

Without a GPU, work is repeated instead of replayed: what decides, copies and adds is the same.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rfdetr.model.criterion import build_criterion
from rfdetr.model.cuda_graphs import CudaGraphs
from rfdetr.model.network import RFDETRNetwork
from rfdetr.model.recording import Recorder
from tests.unit.model.small import images, small_network, targets, weighted

pytestmark = pytest.mark.usefixtures("exact_float32")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Repeat(Recorder):
    """Runs recorded work again, and counts."""

    def __init__(self) -> None:
        self.replays = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        with torch.random.fork_rng():
            work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            work()

        return replay


def pair(*, masks: bool = False, **changes: Any) -> tuple[RFDETRNetwork, RFDETRNetwork]:
    """An eager network and an equal one with graphs."""
    eager = small_network(masks=masks, **changes).to(DEVICE).train()
    graphed = copy.deepcopy(eager)
    eager.graphs.use = "never"
    graphed.graphs = CudaGraphs("always", None if GPU else Repeat())
    return eager, graphed


def given(counts: tuple[int, ...] = (2, 1), *, masks: bool = False) -> list[dict[str, Tensor]]:
    return [
        {name: value.to(DEVICE) for name, value in target.items()}
        for target in targets(counts, masks=masks)
    ]


def loss_of(network: RFDETRNetwork, batch: Any, *, masks: bool = False, count: int = 2) -> Tensor:
    criterion = build_criterion(network.config).to(DEVICE).train()
    torch.manual_seed(3)
    wanted = given((2, 1) + (1,) * (count - 2), masks=masks)[:count]
    return weighted(criterion(network(batch), wanted), criterion.weight_dict)


def gradients(network: RFDETRNetwork) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def assert_same(one: RFDETRNetwork, other: RFDETRNetwork) -> None:
    found, expected = gradients(one), gradients(other)
    assert found.keys() == expected.keys()
    assert len(found) > 50
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * scale + 1e-7)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_steps_equal_eager_ones(masks: bool, half: bool) -> None:
    eager, graphed = pair(masks=masks)
    for step in range(5):
        batch = images(2, 96 if step % 2 else 144 if masks else 128).to(DEVICE) + step
        losses = []
        for network in (eager, graphed):
            network.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
                loss = loss_of(network, batch, masks=masks)
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-2 if half else 1e-5)
        if not half:
            assert_same(graphed, eager)
    assert graphed.graphs.count == 2
    assert eager.graphs.count == 0
    assert "training on 2 images of" in graphed.graphs.messages[0]


def test_gradients_of_several_batches_add_up() -> None:
    eager, graphed = pair()
    for network in (eager, graphed):
        for _ in range(2):  # recorded
            loss_of(network, images().to(DEVICE)).backward()
            network.zero_grad()
        for shift in range(3):
            loss_of(network, images().to(DEVICE) + shift).backward()
        loss_of(network, images(2, 128).to(DEVICE)).backward()  # at a new size
    assert_same(graphed, eager)
    for network in (eager, graphed):
        network.zero_grad(set_to_none=False)
        loss_of(network, images().to(DEVICE)).backward()
    assert_same(graphed, eager)


def test_a_second_forward_pass_before_the_backward_pass_is_eager() -> None:
    eager, graphed = pair()
    for network in (eager, graphed):
        for _ in range(2):
            loss_of(network, images().to(DEVICE)).backward()
        network.zero_grad()
        one = loss_of(network, images().to(DEVICE))
        other = loss_of(network, images().to(DEVICE) + 1)
        (one + other).backward()
    assert_same(graphed, eager)


def test_a_forward_pass_without_a_backward_pass_is_forgotten() -> None:
    eager, graphed = pair()
    for _ in range(3):
        loss_of(graphed, images().to(DEVICE))
    for network in (eager, graphed):
        network.zero_grad()
        loss_of(network, images().to(DEVICE)).backward()
    assert_same(graphed, eager)


def test_a_second_backward_pass_is_refused() -> None:
    _, graphed = pair()
    for _ in range(2):
        loss = loss_of(graphed, images().to(DEVICE))  # the last one is alive during the recording
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"one backward pass.*accelerate"):
        loss.backward()


def replays(network: RFDETRNetwork, batch: Tensor, **options: Any) -> bool:
    """Whether a training step on `batch` replays a graph."""
    node = network(batch, **options)["pred_logits"].grad_fn
    return "Replay" in type(node).__name__


def test_weights_that_change_are_seen() -> None:
    eager, graphed = pair()
    batch = images().to(DEVICE)
    for network in (eager, graphed):
        optimizer = torch.optim.SGD(network.parameters(), 1e-4)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(network, batch).backward()
            optimizer.step()
    assert replays(graphed, batch)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.resize_head(9),
        lambda n: n.class_embed.requires_grad_(False),
        lambda n: n.register_parameter("query", torch.nn.Parameter(torch.zeros(1, device=DEVICE))),
        lambda n: setattr(n.class_embed, "weight", torch.nn.Parameter(n.class_embed.weight + 1)),
    ],
)
def test_a_changed_network_is_recorded_again(change: Callable[[RFDETRNetwork], Any]) -> None:
    _, graphed = pair()
    batch = images().to(DEVICE)
    assert [replays(graphed, batch) for _ in range(3)] == [False, True, True]
    change(graphed)
    assert [replays(graphed, batch) for _ in range(3)] == [False, True, True]


def test_drop_path_is_recorded_apart() -> None:
    _, graphed = pair()
    batch = images().to(DEVICE)
    assert [replays(graphed, batch) for _ in range(2)] == [False, True]
    graphed.set_drop_path([0.0, 0.1, 0.1, 0.1])
    assert replays(graphed, batch)
    assert graphed.graphs.count == 2


def test_an_annealed_drop_path_keeps_the_recording() -> None:
    _, graphed = pair()
    batch = images().to(DEVICE)
    graphed.set_drop_path([0.0, 0.9, 0.9, 0.9])
    outputs = []
    for rate in (0.9, 0.9, 0.9, 0.5, 1e-9, 1e-9):
        graphed.set_drop_path([0.0, rate, rate, rate])
        outputs.append(graphed(batch)["pred_logits"].detach().clone())
    assert graphed.graphs.count == 1
    assert not torch.equal(outputs[1], outputs[2])  # other random numbers
    assert torch.equal(outputs[4], outputs[5])


@pytest.mark.parametrize("masks", [False, True])
def test_a_short_batch_fills_the_recorded_one(masks: bool) -> None:
    eager, graphed = (network.double() for network in pair(masks=masks))  # no near ties
    batch = images(4).to(DEVICE).double()
    for network in (eager, graphed):
        for _ in range(2):
            loss_of(network, batch, count=4, masks=masks).backward()
        network.zero_grad()
        for part in (batch[:3], batch, batch[1:2]):
            loss_of(network, part, count=len(part), masks=masks).backward()
    assert_same(graphed, eager)
    assert graphed.graphs.count == 1
    assert replays(graphed, batch[:1])


def test_more_sizes_than_fit_train_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rfdetr.model.cuda_graphs._MOST_GRAPHS", 2)
    _, graphed = pair()
    found = [replays(graphed, images(1, side).to(DEVICE)) for side in (96, 96, 128, 160, 96)]
    assert found == [False, True, True, False, False]
    assert graphed.graphs.count == 0
    assert "more than 2 input sizes" in graphed.graphs.messages[-1]


def test_hooks_and_checkpointing_are_eager_with_a_reason() -> None:
    _, graphed = pair()
    batch = images(3).to(DEVICE)
    assert [replays(graphed, batch) for _ in range(2)] == [False, True]
    seen: list[int] = []
    handle = graphed.class_embed.register_forward_hook(lambda *_: seen.append(1))
    assert not replays(graphed, batch)
    assert seen
    handle.remove()
    assert replays(graphed, batch)
    handle = graphed.class_embed.weight.register_hook(lambda _: None)
    assert not replays(graphed, batch)
    handle.remove()
    assert "hooks" in graphed.graphs.messages[-1]
    _, checkpointing = pair(gradient_checkpointing=True)
    assert [replays(checkpointing, batch) for _ in range(3)] == [False] * 3
    assert "gradient_checkpointing" in checkpointing.graphs.messages[0]


@pytest.mark.parametrize("masks", [False, True])
def test_evaluation_equals_the_eager_one_and_its_results_stay(masks: bool) -> None:
    eager, graphed = pair(masks=masks)
    eager.eval()
    graphed.eval()
    with torch.inference_mode():
        batches = [images(2).to(DEVICE) + shift for shift in range(4)]
        found = [graphed(batch) for batch in batches]
        expected = [eager(batch) for batch in batches]
    assert graphed.graphs.count == 1
    names = ["pred_logits", "pred_boxes", *["pred_masks"] * masks]
    for one, other in zip(found, expected, strict=True):
        for name in names:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # outside of inference mode, at another size, with padding
        small = images(2, 144 if masks else 128).to(DEVICE)
        results = [graphed(small)["pred_boxes"] for _ in range(3)]
    assert torch.equal(results[0], results[2]) or (results[0] - results[2]).abs().max() < 1e-5
    assert graphed.graphs.count == 2


def test_copies_have_no_recordings() -> None:
    _, graphed = pair()
    for _ in range(2):
        loss_of(graphed, images().to(DEVICE)).backward()
    assert graphed.graphs.count == 1
    for copied in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed.cpu()))):
        assert copied.graphs.count == 0
        assert copied.graphs.use == "always"


def test_a_recording_that_fails_trains_eagerly_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Repeat):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    eager, graphed = pair()
    graphed.graphs = CudaGraphs("always", Broken())
    for network in (eager, graphed):
        for _ in range(3):
            network.zero_grad()
            loss_of(network, images().to(DEVICE)).backward()
    assert_same(graphed, eager)
    assert caplog.messages == [
        "Without CUDA graphs: operation not permitted when stream is capturing"
    ]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_sizes_share_their_memory() -> None:
    _, graphed = pair(resolution=384)
    reserved = []
    for side in range(384, 64, -32):
        for _ in range(2):
            loss_of(graphed, images(4, side).to(DEVICE), count=4).backward()
            graphed.zero_grad()
        reserved.append(torch.cuda.memory_reserved())
    assert graphed.graphs.count == 10
    assert reserved[-1] < 1.6 * reserved[0]
