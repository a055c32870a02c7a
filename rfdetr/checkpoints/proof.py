"""Evidence that a converted checkpoint computes what the old one computed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rfdetr.checkpoints.adapt import fit, structure_problems
from rfdetr.checkpoints.identify import config_of
from rfdetr.checkpoints.legacy_names import legacy_names, to_legacy
from rfdetr.checkpoints.record import Container, parse_container
from rfdetr.checkpoints.safe_io import load_file, verify_file
from rfdetr.errors import RFDETRError
from rfdetr.files import to_disk
from rfdetr.model.network import RFDETRNetwork, build_network

PROBE_SIDE = 32  # pixels at least
PROBE_QUERIES = 16


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
    """A small network without memory of its own that runs one file's weights after another's.

    It has the file's structure with one query group and few queries, so that every layer runs in a
    fraction of a real forward's time.
    """

    def __init__(self, container: Container) -> None:
        self.reason = ""
        self._network: RFDETRNetwork | None = None
        try:
            config = config_of(container)
            few = {"num_queries": min(PROBE_QUERIES, config.num_queries), "group_detr": 1}
            self._config = config.model_copy(update=few)
            self.reason = structure_problems(container, config) or ""
            if not self.reason:
                with torch.device("meta"), _NoInitialValues():
                    self._network = build_network(self._config, initialise=False).eval()
        except RFDETRError as error:
            self.reason = str(error)

    def outputs(self, container: Container) -> dict[str, Tensor] | None:
        """Predictions on the fixed input, or None where the weights fill no whole network."""
        if self._network is None:
            return None
        block = self._config.block_size
        try:
            weights = fit(container, self._config).weights
            self._network.load_state_dict(weights, strict=True, assign=True)
            with torch.inference_mode():
                result = self._network(_fixed_input(-(-PROBE_SIDE // block) * block))
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


def prove_conversion(
    old: Container, write: Callable[[], None], written: Path, new_path: str
) -> ConversionReport:
    """Run `write`, which makes the file `written` from `old`, and compare the two.

    The old outputs are computed meanwhile, the old file's checksums compared, and the new file is
    sent to the disk while it is read back. Consumes `old`:
    its weights go before the new file is mapped, so that the memory of one file is enough.
    """
    sources = {name: legacy_names(name) for name in old.weights}
    shapes = {name: value.shape for name, value in old.weights.items()}
    averaged = old.ema is not None
    probe = Probe(old)
    with _single_threaded() as worker:
        running = worker.submit(probe.outputs, old)
        write()
        flushed = worker.submit(to_disk, written)
        verify_file(old.path, copy=written)
        before = running.result()
        old_tensors = {} if before is not None else to_legacy(old.weights)
        old.weights.clear()
        (old.ema or {}).clear()
        new = parse_container(load_file(written, mmap=True, verify=False), new_path)
        after = None if before is None else worker.submit(probe.outputs, new).result()
        flushed.result()
    if {name: value.shape for name, value in new.weights.items()} != shapes:
        difference = float("inf")
    elif before is not None and after is not None:
        difference = max_difference(before, after)
    else:
        difference = max_difference(old_tensors, to_legacy(new.weights))
    return ConversionReport(
        old_path=old.path,
        new_path=new_path,
        kind=old.kind,
        tensors=len(sources),
        renamed=sum(len(names) == 1 and names[0] != name for name, names in sources.items()),
        joined=sum(len(names) > 1 for names in sources.values()),
        averaged=averaged,
        epoch=old.epoch,
        compared="tensors" if after is None else "outputs",
        max_abs_difference=difference,
        reason=probe.reason,
    )


@contextlib.contextmanager
def _single_threaded() -> Iterator[ThreadPoolExecutor]:
    """Workers whose products use one thread, beside the writing; the caller's setting returns."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        yield executor
    torch.set_num_threads(threads)


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
