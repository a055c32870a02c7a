"""One recorded input size of a network, for `cuda_graphs`.

All recordings of a network share one memory pool, their results and the gradients of the weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rfdetr.data.batch import NestedTensor
from rfdetr.model.types import Outputs

if TYPE_CHECKING:
    from rfdetr.model.network import RFDETRNetwork

_ALIGNMENT = 64  # elements between two gradients


class Recorder(Protocol):
    """Runs work on a device, and records it for replays."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run `work` as it is recorded later; random generators keep their state."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` launches; returns the replay."""

    def follow(self) -> None:
        """Before a replay: wait for replays on other streams, which use the same memory."""


class CudaRecorder:
    """Records CUDA graphs in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._latest = torch.cuda.current_stream(device)  # of a replay

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run `work` on the stream of the recordings, which cannot use the cache of another one."""
        torch.cuda.empty_cache()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.random.fork_rng([self._device]), torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work`; other threads may use CUDA meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def follow(self) -> None:
        """Let the current stream wait for that of the latest replay."""
        current = torch.cuda.current_stream(self._device)
        if current != self._latest:
            current.wait_stream(self._latest)
            self._latest = current


class SharedMemory:
    """Memory that the recordings of a network share: results, and gradients of the weights.

    It is taken while a graph is recorded, from the pool of the graphs.
    """

    def __init__(self) -> None:
        self.weights: list[Tensor] = []  # trainable ones
        self.parts: list[Tensor] = []  # their gradients, which every backward graph fills
        self._results: dict[Any, list[Tensor]] = {}
        self._block = torch.empty(0)
        self._sizes: list[int] = []

    def results(self, like: Sequence[Tensor], *, training: bool) -> list[Tensor]:
        """Tensors shaped `like` these; in training, as many again for their gradients."""
        shapes = (training, tuple((x.shape, x.dtype) for x in like))
        if shapes not in self._results:
            copies = 2 if training else 1
            with torch.inference_mode(False):
                self._results[shapes] = [torch.empty_like(x) for _ in range(copies) for x in like]
        return self._results[shapes]

    def allocate(self, network: RFDETRNetwork | None) -> None:
        """Take the memory of the gradients once."""
        if self.parts or network is None:
            return
        weights = [p for p in network.parameters() if p.requires_grad]
        if len({(p.dtype, p.device) for p in weights}) != 1:
            raise RuntimeError("no weights are trained, or in several number formats.")
        self.weights = list(weights)
        self._sizes = [-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in weights]
        self._block = weights[0].new_empty(sum(self._sizes))
        self.parts = self._views(self._block)

    def _views(self, block: Tensor) -> list[Tensor]:
        pieces = zip(torch.split(block, self._sizes), self.weights, strict=True)
        return [piece[: p.numel()].view_as(p) for piece, p in pieces]

    def keep_gradients(self) -> None:
        """Move gradients that the weights still hold out of the way of the next replay."""
        own = [p.grad is part for p, part in zip(self.weights, self.parts, strict=True)]
        if any(own):
            kept = self._views(self._block.clone())
            for p, is_own, part in zip(self.weights, own, kept, strict=True):
                if is_own:
                    p.grad = part

    def give_gradients(self, reached: Sequence[bool]) -> None:
        """Set or add the gradients of the weights that the backward pass has reached."""
        totals, parts = [], []
        for p, part, is_reached in zip(self.weights, self.parts, reached, strict=True):
            if not is_reached:
                continue
            if p.grad is None:
                p.grad = part
            else:
                totals.append(p.grad)
                parts.append(part)
        if totals:
            torch._foreach_add_(totals, parts)


class Recording:
    """One recorded size: forward, and backward if it trains."""

    def __init__(
        self,
        network: RFDETRNetwork,
        example: tuple[Tensor, Tensor | None],
        recorder: Recorder,
        shared: SharedMemory,
        warm_up: int,
    ) -> None:
        self._network = weakref.ref(network)  # which owns this
        self._training = network.training
        self._shared = shared
        self._inputs = [None if x is None else x.detach().clone() for x in example]
        self.batch = len(example[0])
        self.anchor = torch.zeros((), device=example[0].device, requires_grad=True)
        self.rebuild: Callable[[Iterator[Tensor]], Any] = list
        self._cast = _autocast(example[0].device)
        self._live: list[Tensor] = []  # results with their autograd graph
        self._weights: list[Tensor] = []  # aliases of the trainable weights in it
        self._results: list[Tensor] = []
        self._slopes: list[Tensor] = []
        self._reached: list[bool] = []
        # After the first size one image does: it fills the caches and takes little memory.
        recorder.warm_up(lambda: self._warm_up(warm_up))
        self._forward = recorder.record(self._run_forward)
        self._backward = recorder.record(self._run_backward) if self._training else None
        self._live, self._weights = [], []

    def _warm_up(self, batch: int) -> None:
        """Libraries choose their algorithms and fill their caches before a recording."""
        live = self._compute(batch)
        if self._training:
            self._gradients(live, [torch.zeros_like(x) for x in live])

    def _compute(self, batch: int) -> list[Tensor]:
        """The results of the network for the first images of the inputs.

        In training, aliases of the weights keep the autograd graph apart from other ones.
        """
        images, mask = (None if x is None else x[:batch] for x in self._inputs)
        network = self._network()
        assert images is not None and network is not None
        with torch.set_grad_enabled(self._training), self._cast(), network.graphs.eager():
            if self._training:
                named = dict(network.named_parameters())
                aliases = {n: p.detach().requires_grad_(p.requires_grad) for n, p in named.items()}
                self._weights = [p for p in aliases.values() if p.requires_grad]
                samples = NestedTensor(images, mask)
                outputs = torch.func.functional_call(network, aliases, (samples,))
            else:
                outputs = network.compute(images, mask)
        tensors, self.rebuild = _flatten(outputs)
        return tensors

    def _gradients(
        self, live: Sequence[Tensor], slopes: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        pairs = [(x, slope) for x, slope in zip(live, slopes, strict=True) if x.requires_grad]
        outputs, given = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, self._weights, given, allow_unused=True)

    def _run_forward(self) -> None:
        self._live = self._compute(self.batch)
        values = [x.detach() for x in self._live]
        memory = self._shared.results(values, training=self._training)
        self._results, self._slopes = memory[: len(values)], memory[len(values) :]
        torch._foreach_copy_(self._results, values)

    def _run_backward(self) -> None:
        found = self._gradients(self._live, self._slopes)
        self._live = []
        self._shared.allocate(self._network())
        self._reached = [grad is not None for grad in found]
        parts = zip(self._shared.parts, found, strict=True)
        given = [(part, grad) for part, grad in parts if grad is not None]
        torch._foreach_copy_([part for part, _ in given], [grad for _, grad in given])

    def replay(self, images: Tensor, mask: Tensor | None) -> list[Tensor]:
        """The results for these inputs; the next replay overwrites them."""
        for own, given in zip(self._inputs, (images, mask), strict=True):
            if own is not None and given is not None:
                own[: len(given)].copy_(given)
                own[len(given) :].zero_()
        self._forward()
        return [self._of_batch(result, len(images)) for result in self._results]

    def evaluate(self, images: Tensor, mask: Tensor | None) -> Outputs:
        """Outputs that stay as they are."""
        results = [result.clone() for result in self.replay(images, mask)]
        return cast(Outputs, self.rebuild(iter(results)))

    def replay_backward(self, slopes: Sequence[Tensor], batch: int) -> None:
        """Add the gradients of the weights for these gradients of the results."""
        assert self._backward is not None
        self._shared.keep_gradients()
        if batch < self.batch:
            torch._foreach_zero_(self._slopes)
        own = [self._of_batch(slope, batch) for slope in self._slopes]
        torch._foreach_copy_(own, list(slopes))
        self._backward()
        self._shared.give_gradients(self._reached)

    def _of_batch(self, result: Tensor, batch: int) -> Tensor:
        """The rows of the first images; a result without an image axis has one row."""
        return result[:batch] if len(result) == self.batch else result


class Step:
    """One forward pass in training, until its backward pass."""

    def __init__(self, graph: Recording) -> None:
        self.graph = graph
        self.done = False


def train(step: Step, images: Tensor, mask: Tensor | None) -> Outputs:
    """Outputs whose backward pass gives the weights their gradients."""
    graph = step.graph
    outputs = _Replay.apply(graph.anchor, step, images, mask)  # type: ignore[no-untyped-call]
    return cast(Outputs, graph.rebuild(iter(outputs)))


class _Replay(torch.autograd.Function):
    """A training step's network as one node, which gives the weights their gradients itself."""

    @staticmethod
    def forward(
        ctx: Any, _anchor: Tensor, step: Step, images: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.step, ctx.batch = step, len(images)
        return tuple(result.detach() for result in step.graph.replay(images, mask))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, ...]:
        step: Step = ctx.step
        if step.done:
            raise RuntimeError(
                "A training step on CUDA graphs has one backward pass. Set accelerate to 'off' to "
                "use retain_graph=True."
            )
        step.done = True
        step.graph.replay_backward(slopes, ctx.batch)
        return None, None, None, None


def _autocast(device: torch.device) -> Callable[[], torch.autocast]:
    """The autocast of the caller without its cache, whose tensors belong to the recording."""
    enabled = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False)


def _flatten(value: Any) -> tuple[list[Tensor], Callable[[Iterator[Tensor]], Any]]:
    """The tensors of nested dictionaries and lists, and what builds the same from others."""
    if isinstance(value, Tensor):
        return [value], next
    if isinstance(value, dict):
        names, parts = list(value), [_flatten(part) for part in value.values()]
    else:
        names, parts = None, [_flatten(part) for part in value]
    tensors = [tensor for own, _ in parts for tensor in own]

    def build(given: Iterator[Tensor]) -> Any:
        built = [make(given) for _, make in parts]
        return built if names is None else dict(zip(names, built, strict=True))

    return tensors, build
