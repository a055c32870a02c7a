"""The order of training samples: a function of (seed, epoch), equal on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from rfdetr.data.dataset import DetectionDataset, SampleKey

MIN_WINDOWS = 5  # optimizer steps of an epoch at least, so that a tiny dataset trains at all


class EpochSampler(DistributedSampler[Any]):
    """Shuffles and distributes samples over `replicas` processes without global random state.

    An epoch visits every image once, except those that do not fill a batch on every process. A
    dataset smaller than five optimizer steps (batch size x `window` micro-batches x processes) is
    repeated to five, each image about equally often. `start` skips that many batches of the next
    pass, once, for a run that is resumed within an epoch.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        batch_size: int,
        window: int,
        seed: int,
        replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)
        self.batch_size = batch_size
        self.start = 0
        least = MIN_WINDOWS * batch_size * window * replicas
        self.repeated = len(dataset) < least
        count = least if self.repeated else len(dataset)
        self.num_samples = count // (batch_size * replicas) * batch_size
        self.total_size = self.num_samples * replicas

    def __len__(self) -> int:
        return self.num_samples

    def order(self) -> npt.NDArray[np.int64]:
        """Image numbers of this epoch for all processes together."""
        count = len(self.dataset)  # type: ignore[arg-type]
        rng = np.random.default_rng([self.seed, self.epoch])
        rounds = [rng.permutation(count) for _ in range(-(-self.total_size // count))]
        return np.concatenate(rounds)[: self.total_size]

    def __iter__(self) -> Iterator[SampleKey]:
        order = self.order()
        first, self.start = self.start * self.batch_size, 0
        for place in range(first, self.num_samples):
            batch, within = divmod(place, self.batch_size)
            draw = (batch * self.num_replicas + self.rank) * self.batch_size + within
            yield SampleKey(int(order[draw]), self.epoch, draw)


class ResumableLoader(DataLoader[Any]):
    """A loader whose position within the epoch Lightning saves and restores."""

    _done = 0
    _skip = 0

    def __iter__(self) -> Any:
        skip, self._skip = self._skip, 0
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start = skip
        self._done = skip
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches of the current epoch that were yielded; 0 after the last."""
        return {"batches": self._done % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next pass start after that many batches."""
        self._skip = int(state["batches"])
        self._done = self._skip
