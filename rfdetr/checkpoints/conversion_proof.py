"""Evidence that a converted checkpoint computes what the old one computed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rfdetr.checkpoints.adapt import adapt_weights
from rfdetr.checkpoints.legacy_names import legacy_names, to_legacy
from rfdetr.checkpoints.record import CheckpointRecord, parse_checkpoint
from rfdetr.checkpoints.safe_io import load_file, verify_file
from rfdetr.checkpoints.structure import infer_config, structure_mismatch
from rfdetr.errors import RFDETRError
from rfdetr.files import to_disk
from rfdetr.model.network import RFDETRNetwork, build_network

PROBE_SIDE = 32  # pixels; rounded up to the next side that the network accepts
PROBE_QUERIES = 16

Compared = Literal["outputs", "tensors"]


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, and the largest difference between old and new.

    `compared` is "outputs" (both files' networks on the same input) or "tensors" (each tensor of
    the new file with the old one), where `reason` says why no network could be built. `joined`
    counts tensors made from a query, a key and a value; `averaged` says whether EMA weights exist.
    """

    old_path: str
    new_path: str
    kind: str
    tensors: int
    renamed: int
    joined: int
    averaged: bool
    epoch: int | None
    compared: Compared
    max_abs_difference: float
    reason: str = ""

    @property
    def summary(self) -> str:
        """One sentence for a log."""
        return (
            f"{self.old_path} -> {self.new_path}: {self.tensors} tensors, {self.renamed} renamed, "
            f"{self.joined} joined from query, key and value; largest difference of {self.compared}"
            f" {self.max_abs_difference:g}{f' ({self.reason})' if self.reason else ''}."
        )


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a file computes, or else its tensors under legacy names."""

    compared: Compared
    values: Mapping[str, Tensor]


class ConversionProbe:
    """A small network without memory of its own that runs one file's weights after another's.

    It has the file's structure with one query group and few queries, so that every layer runs in a
    fraction of a real forward's time.
    """

    def __init__(self, record: CheckpointRecord) -> None:
        self.reason = ""  # why there is no network
        self._network: RFDETRNetwork | None = None
        try:
            config = infer_config(record)
            few = {"num_queries": min(PROBE_QUERIES, config.num_queries), "group_detr": 1}
            self._config = config.model_copy(update=few)
            self.reason = structure_mismatch(record, config) or ""
            if not self.reason:
                with torch.device("meta"), _NoInitialValues():
                    self._network = build_network(self._config, initialise=False).eval()
        except RFDETRError as error:
            self.reason = str(error)

    def evidence(self, record: CheckpointRecord) -> Evidence:
        """Predictions on the fixed input, or the tensors if they do not fill a network."""
        outputs = self._outputs(record)
        if outputs is None:
            return Evidence("tensors", to_legacy(record.weights))
        return Evidence("outputs", outputs)

    def _outputs(self, record: CheckpointRecord) -> dict[str, Tensor] | None:
        if self._network is None:
            return None
        block = self._config.block_size
        try:
            weights = adapt_weights(record, self._config).weights
            self._network.load_state_dict(weights, strict=True, assign=True)
            with torch.inference_mode():
                result = self._network(_fixed_input(-(-PROBE_SIDE // block) * block))
        except (RuntimeError, RFDETRError) as error:
            self.reason, self._network = str(error).splitlines()[0], None
            return None
        return {name: value for name, value in result.items() if isinstance(value, Tensor)}


class _NoInitialValues(TorchFunctionMode):
    """Skips torch.nn.init: every tensor is replaced by one from a file."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def prove_conversion(
    old: CheckpointRecord, write: Callable[[], None], written: Path, new_path: str
) -> ConversionReport:
    """Run `write`, which makes the file `written` from `old`, and compare the two.

    Also compares the checksums of the old file and waits until the new one is on the disk. Empties
    the weights of `old` before the new file is mapped, so that one file fits in memory at a time.
    """
    shapes = _shapes(old)
    sources = {name: legacy_names(name) for name in old.weights}
    averaged = old.ema is not None
    probe = ConversionProbe(old)
    with _single_threaded_workers() as workers:
        # 1. write the new file while the old weights run
        running = workers.submit(probe.evidence, old)
        write()
        flushed = workers.submit(to_disk, written)
        verify_file(old.path, copy=written)
        before = running.result()
        old.weights.clear()
        (old.ema or {}).clear()
        # 2. run the new weights as they were written
        new = parse_checkpoint(load_file(written, mmap=True, verify=False), new_path)
        after = workers.submit(probe.evidence, new).result()
        flushed.result()
    # 3. compare
    return ConversionReport(
        old_path=old.path,
        new_path=new_path,
        kind=old.kind,
        tensors=len(sources),
        renamed=sum(len(names) == 1 and names[0] != name for name, names in sources.items()),
        joined=sum(len(names) > 1 for names in sources.values()),
        averaged=averaged,
        epoch=old.epoch,
        compared=after.compared,
        max_abs_difference=(
            max_difference(before.values, after.values) if _shapes(new) == shapes else float("inf")
        ),
        reason=probe.reason,
    )


def _shapes(record: CheckpointRecord) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in record.weights.items()}


@contextlib.contextmanager
def _single_threaded_workers() -> Iterator[ThreadPoolExecutor]:
    """Two workers in which torch uses one thread; afterwards the caller's setting is restored."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        yield executor
    torch.set_num_threads(threads)


def max_difference(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
    """The largest absolute difference over equal names; infinite if names or shapes differ."""
    if set(old) != set(new) or any(old[n].shape != new[n].shape for n in old):
        return float("inf")
    return max((_difference(old[name], new[name]) for name in old), default=0.0)


def _difference(old: Tensor, new: Tensor) -> float:
    if torch.equal(old, new) or not old.numel():
        return 0.0
    both_nan = old.isnan() & new.isnan()
    return float((old.double() - new.double()).abs().masked_fill(both_nan, 0).max())


def _fixed_input(side: int) -> Tensor:
    """One image of smooth values, (1, 3, side, side)."""
    ramp = torch.arange(3 * side * side, dtype=torch.float32)
    return torch.sin(ramp * 0.37).reshape(1, 3, side, side)
