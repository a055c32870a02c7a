"""Evidence that a converted checkpoint computes what the old one computed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rfdetr.errors import RFDETRError
from rfdetr.model.network import RFDETRNetwork, build_network
from rfdetr.weights.adapt import structure_problems
from rfdetr.weights.container import Container, Weights, parse_container
from rfdetr.weights.identify import config_of
from rfdetr.weights.io import load_file
from rfdetr.weights.legacy import legacy_names, to_legacy

PROBE_SIDE = 32  # pixels at least: every layer runs, in a fraction of the time of a real image


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, and the largest difference between old and new.

    `compared` is "outputs" (both files' networks on the same input) or "tensors" (each tensor of
    the new file against the old one), where `reason` says why no network could be built.
    """

    old_path: str
    new_path: str
    kind: str
    tensors: int
    renamed: int
    joined: int
    averaged: bool
    epoch: int | None
    compared: Literal["outputs", "tensors"]
    max_abs_difference: float
    reason: str = ""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def summary(self) -> str:
        """One sentence for a log."""
        return (
            f"{self.old_path} -> {self.new_path}: {self.tensors} tensors, {self.renamed} renamed, "
            f"{self.joined} joined from query, key and value; largest difference of {self.compared}"
            f" {self.max_abs_difference:g}{f' ({self.reason})' if self.reason else ''}."
        )


class Probe:
    """A network without memory of its own that runs one file's weights after the other's."""

    def __init__(self, container: Container) -> None:
        self.reason = ""
        self._network: RFDETRNetwork | None = None
        try:
            config = config_of(container)
            self.reason = structure_problems(container, config) or ""
            if not self.reason:
                with torch.device("meta"), _NoInitialValues():
                    self._network = build_network(config).eval()
        except RFDETRError as error:
            self.reason = str(error)
        side = 1 if self._network is None else config.block_size
        self._side = -(-PROBE_SIDE // side) * side

    def outputs(self, weights: Weights) -> dict[str, Tensor] | None:
        """Predictions on the fixed input, or None where the weights fill no whole network."""
        if self._network is None:
            return None
        try:
            self._network.load_state_dict(weights, strict=True, assign=True)
            with torch.inference_mode():
                result = self._network(_fixed_input(self._side))
        except (RuntimeError, RFDETRError) as error:
            self.reason, self._network = str(error).splitlines()[0], None
            return None
        return {name: value for name, value in result.items() if isinstance(value, Tensor)}


class _NoInitialValues(TorchFunctionMode):
    """Leaves out torch.nn.init: every tensor is replaced by one of a file."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def prove_conversion(old: Container, new_path: str, write: Callable[[], None]) -> ConversionReport:
    """Run `write`, which makes `new_path` from `old`, and compare the two.

    The old outputs are computed while the file is written. Consumes `old`: its weights are dropped
    before the new file is mapped, so that the memory of one file is enough.
    """
    sources = [(name, legacy_names(name)) for name in old.weights]
    averaged = old.ema is not None
    with _single_threaded() as executor:
        running = executor.submit(_probe, old)
        write()
        probe, before = running.result()
        old_tensors = {} if before is not None else to_legacy(old.weights)
        old.weights.clear()
        (old.ema or {}).clear()
        new = parse_container(load_file(new_path, mmap=True, verify=False), new_path).weights
        after = None if before is None else executor.submit(probe.outputs, new).result()
    if before is not None and after is not None:
        difference = max_difference(before, after)
    else:
        difference = max_difference(old_tensors, to_legacy(new))
    return ConversionReport(
        old_path=old.path,
        new_path=new_path,
        kind=old.kind,
        tensors=len(sources),
        renamed=sum(len(names) == 1 and names[0] != name for name, names in sources),
        joined=sum(len(names) > 1 for _, names in sources),
        averaged=averaged,
        epoch=old.epoch,
        compared="tensors" if after is None else "outputs",
        max_abs_difference=difference,
        reason=probe.reason,
    )


@contextlib.contextmanager
def _single_threaded() -> Iterator[ThreadPoolExecutor]:
    """A worker whose products use one thread, beside the writing; the caller's setting returns."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        yield executor
    torch.set_num_threads(threads)


def _probe(container: Container) -> tuple[Probe, dict[str, Tensor] | None]:
    probe = Probe(container)
    return probe, probe.outputs(container.weights)


def max_difference(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
    """The largest absolute difference over equal names; infinite where names or shapes differ."""
    if set(old) != set(new) or any(old[n].shape != new[n].shape for n in old):
        return float("inf")
    return max((_difference(old[name], new[name]) for name in old), default=0.0)


def _difference(old: Tensor, new: Tensor) -> float:
    if torch.equal(old, new) or not old.numel():
        return 0.0
    both_nan = old.isnan() & new.isnan()
    return float((old.double() - new.double()).abs().masked_fill(both_nan, 0).max())


def _fixed_input(side: int) -> Any:
    ramp = torch.arange(3 * side * side, dtype=torch.float32)
    return torch.sin(ramp * 0.37).reshape(1, 3, side, side)
