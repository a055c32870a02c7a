"""The network on CUDA graphs: its kernels are recorded once per input size and then replayed.

A replay costs one launch where eager code pays for each of some thousand kernels. The forward and
the backward pass of a training step are two graphs; losses and optimizer stay eager.
"""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rfdetr.model.recording import CudaRecorder, Recorder, Recording, SharedMemory, Step, train
from rfdetr.model.types import Outputs

if TYPE_CHECKING:
    from rfdetr.model.network import RFDETRNetwork

log = logging.getLogger(__name__)

Use = Literal["never", "evaluation", "always"]
_MOST_GRAPHS = 24  # more sizes than multi-scale training has


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
        self._graphs: dict[Any, list[Recording]] = {}
        self._seen: set[Any] = set()
        self._shared = SharedMemory()
        self._pending: weakref.ref[Step] | None = None

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
                if graph is not None and self._recorder is not None:
                    self._recorder.follow()
                    if network.training:
                        return self._train(graph, images, mask)
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

    def _graph(
        self, network: RFDETRNetwork, images: Tensor, mask: Tensor | None
    ) -> Recording | None:
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
    ) -> Recording | None:
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
                graph = Recording(network, (images, mask), self._recorder, self._shared, warm_up)
        except RuntimeError as error:  # of the driver, or of an operation that cannot be recorded
            log.warning("Without CUDA graphs: %s", str(error).strip().splitlines()[0])
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

    def _train(self, graph: Recording, images: Tensor, mask: Tensor | None) -> Outputs:
        step = Step(graph)
        self._pending = weakref.ref(step)
        return train(step, images, mask)

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
