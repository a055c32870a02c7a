"""The network on CUDA graphs: its kernels are recorded once per input size and then replayed.

A replay costs one launch where eager code pays for each of some thousand kernels. The forward and
the backward pass of a training step are two graphs; losses and optimizer stay eager. All graphs of
a network share one memory pool, their outputs and the gradients of the weights.
"""

from __future__ import annotations

import contextlib
import math
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rfdetr.data.batch import NestedTensor
from rfdetr.model.types import Outputs

if TYPE_CHECKING:
    from rfdetr.model.network import RFDETRNetwork

Use = Literal["never", "evaluation", "always"]
_MOST_GRAPHS = 24  # more sizes than multi-scale training has
_ALIGNMENT = 64  # elements between two gradients


class Recorder(Protocol):
    """Runs work on a device, and records it for replays."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run `work` as it is recorded later; random generators keep their state."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` launches; returns the replay."""


class CudaRecorder:
    """Records CUDA graphs in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

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


class CudaGraphs:
    """Decides call by call whether a network replays a graph, and keeps the graphs.

    `use` says where graphs may be used. The first size is recorded when it occurs again; in
    training, others follow at once, because an eager step would need its own memory beside that of
    the graphs. Smaller batches are filled up. Eager code computes what cannot be replayed: networks
    with hooks, a forward pass before the backward pass of the last one. Results are those of eager
    code. A copy of the network has no graphs yet.
    """

    def __init__(self, use: Use = "evaluation", recorder: Recorder | None = None) -> None:
        self.use: Use = use
        self.messages: list[str] = []  # for the log, one of each kind
        self._given = recorder
        self._lock = threading.Lock()
        self._computing = False
        self._reported: set[str] = set()
        self.clear()

    def clear(self) -> None:
        """Forget all graphs, and free their memory."""
        self._recorder: Recorder | None = self._given
        self._structure: _Structure | None = None
        self._graphs: dict[Any, list[_Graph]] = {}
        self._seen: set[Any] = set()
        self._shared = _Shared()
        self._pending: weakref.ref[_Step] | None = None

    def __deepcopy__(self, memo: Any) -> CudaGraphs:
        return CudaGraphs(self.use, self._given)

    def __reduce__(self) -> tuple[Any, ...]:
        return CudaGraphs, (self.use,)

    @property
    def count(self) -> int:
        """Number of recordings, of training and evaluation together."""
        return sum(map(len, self._graphs.values()))

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Run a block without graphs."""
        self._computing = True
        try:
            yield
        finally:
            self._computing = False

    def run(self, network: RFDETRNetwork, images: Tensor, mask: Tensor | None) -> Outputs:
        """network.compute(images, mask), replayed where possible."""
        if self._applies(network, images):
            with self._lock:  # replays share their memory
                graph = self._graph(network, images, mask)
                if graph is not None and network.training:
                    return self._train(graph, images, mask)
                if graph is not None:
                    return graph.evaluate(images, mask)
        return network.compute(images, mask)

    def _applies(self, network: RFDETRNetwork, images: Tensor) -> bool:
        wanted = self.use == "always" or (self.use == "evaluation" and not network.training)
        return (
            wanted
            and not self._computing
            and (images.is_cuda or self._given is not None)
            and network.training is torch.is_grad_enabled()
            and not images.requires_grad
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
            and not (images.is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def _graph(self, network: RFDETRNetwork, images: Tensor, mask: Tensor | None) -> _Graph | None:
        """The recording for this call, None if it is computed eagerly."""
        reason = self._obstacle(network)
        if reason is not None:
            self._report(f"Without a CUDA graph: {reason}.")
            return None
        if self._is_pending():
            return None
        key = _key(network, images, mask)
        largest = math.inf if network.training else 2 * len(images) - 1
        graphs = self._graphs.get(key, [])
        known = [graph for graph in graphs if len(images) <= graph.batch <= largest]
        if known:
            return min(known, key=operator.attrgetter("batch"))
        follows = network.training and any(training for training, *_ in self._graphs)
        seen = (key, len(images))
        if seen in self._seen or follows:
            return self._record(network, images, mask, key, warm_up=1 if follows else len(images))
        self._seen.add(seen)
        return None

    def _obstacle(self, network: RFDETRNetwork) -> str | None:
        """Why this call is computed eagerly, or None."""
        if self._structure is None or not self._structure.same():
            self.clear()
            self._structure = _Structure(network)
        if self._structure.has_hooks():
            return "the network has hooks"
        if not network.training:
            return None
        if dist.is_available() and dist.is_initialized():
            return "processes exchange gradients during the backward pass"
        if network.encoder.gradient_checkpointing:
            return "gradient_checkpointing recomputes activations"
        return None

    def _is_pending(self) -> bool:
        """Whether a backward pass still needs what the last replay has computed."""
        step = None if self._pending is None else self._pending()
        return step is not None and not step.done

    def _record(
        self, network: RFDETRNetwork, images: Tensor, mask: Tensor | None, key: Any, *, warm_up: int
    ) -> _Graph | None:
        """The recording of a size; None, and graphs are not used again, if that fails."""
        if self.count >= _MOST_GRAPHS:
            self._report(f"Without CUDA graphs: there are more than {_MOST_GRAPHS} input sizes.")
            if network.training:
                self._stop()
            return None
        started = time.perf_counter()
        try:
            self._recorder = self._recorder or CudaRecorder(images.device)
            with torch.inference_mode(False):
                graph = _Graph(network, (images, mask), self._recorder, self._shared, warm_up)
        except RuntimeError as error:  # of the driver, or of an operation that cannot be recorded
            self._report(f"Without CUDA graphs: {str(error).strip().splitlines()[0]}")
            self._stop()
            return None
        self._graphs.setdefault(key, []).append(graph)
        kind = "training" if network.training else "evaluation"
        size = " x ".join(map(str, images.shape[2:]))
        self._report(
            f"CUDA graphs: {kind} on {len(images)} images of {size} pixels was recorded in "
            f"{time.perf_counter() - started:.1f} s; other sizes follow when they occur.",
            kind,
        )
        return graph

    def _stop(self) -> None:
        self.clear()
        self.use = "never"

    def _train(self, graph: _Graph, images: Tensor, mask: Tensor | None) -> Outputs:
        step = _Step(graph)
        self._pending = weakref.ref(step)
        outputs = _Replay.apply(graph.anchor, step, images, mask)  # type: ignore[no-untyped-call]
        return cast(Outputs, graph.rebuild(iter(outputs)))

    def _report(self, message: str, kind: str = "") -> None:
        kind = kind or message
        if kind not in self._reported:
            self._reported.add(kind)
            self.messages.append(message)


class _Structure:
    """The modules and weights of a network, to notice any replacement."""

    def __init__(self, network: nn.Module) -> None:
        # The tables themselves: walking the modules by public methods costs a millisecond.
        modules = list(network.modules())
        self._tables = [table for m in modules for table in (m._parameters, m._buffers, m._modules)]
        self._hooks = [
            table
            for m in modules
            for table in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ]
        self._parts = self._read()
        self._weights = [p for p in self._parts if isinstance(p, Tensor)]
        self._state = self._read_state()

    def _read(self) -> list[Any]:
        return [part for table in self._tables for part in cast(Any, table).values()]

    def _read_state(self) -> list[tuple[int, bool]]:
        return [(weight.data_ptr(), weight.requires_grad) for weight in self._weights]

    def same(self) -> bool:
        """Whether no module, weight, storage or `requires_grad` has changed."""
        parts = self._read()
        return (
            len(parts) == len(self._parts)
            and all(map(operator.is_, parts, self._parts))
            and self._read_state() == self._state
        )

    def has_hooks(self) -> bool:
        """Whether a replay would skip hooks."""
        weights = cast(list[Any], self._weights)
        own = (w._backward_hooks or w._post_accumulate_grad_hooks for w in weights)
        return any(self._hooks) or any(own)


class _Shared:
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

    def allocate(self, weights: Sequence[Tensor]) -> None:
        """Take the memory of the gradients once."""
        if self.parts:
            return
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


class _Graph:
    """One recorded size: forward, and backward if it trains."""

    def __init__(
        self,
        network: RFDETRNetwork,
        example: tuple[Tensor, Tensor | None],
        recorder: Recorder,
        shared: _Shared,
        warm_up: int,
    ) -> None:
        self._network = weakref.ref(network)  # which owns this
        self._training = network.training
        self._shared = shared
        self._inputs = [None if x is None else x.detach().clone() for x in example]
        device = example[0].device
        self.batch = len(example[0])
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.rebuild: Callable[[Iterator[Tensor]], Any] = list
        self._cast = _autocast(device)
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
        memory = self._shared.results([x.detach() for x in self._live], training=self._training)
        self._results, self._slopes = memory[: len(self._live)], memory[len(self._live) :]
        torch._foreach_copy_(self._results, [x.detach() for x in self._live])

    def _run_backward(self) -> None:
        found = self._gradients(self._live, self._slopes)
        self._live = []
        network = self._network()
        assert network is not None
        self._shared.allocate([p for p in network.parameters() if p.requires_grad])
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


class _Step:
    """One forward pass in training, until its backward pass."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph
        self.done = False


class _Replay(torch.autograd.Function):
    """A training step's network as one node, which gives the weights their gradients itself."""

    @staticmethod
    def forward(
        ctx: Any, _anchor: Tensor, step: _Step, images: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.step, ctx.batch = step, len(images)
        return tuple(result.detach() for result in step.graph.replay(images, mask))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, ...]:
        step: _Step = ctx.step
        if step.done:
            raise RuntimeError(
                "A training step on CUDA graphs has one backward pass. Set accelerate to 'off' to "
                "use retain_graph=True."
            )
        step.done = True
        step.graph.replay_backward(slopes, ctx.batch)
        return None, None, None, None


def _key(network: RFDETRNetwork, images: Tensor, mask: Tensor | None) -> Any:
    """What a recording depends on besides the weights and the number of images."""
    device = images.device.type
    return (
        network.training,
        images.shape[1:],
        images.dtype,
        mask is not None,
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        tuple(network.encoder.drops_path),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


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
