from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import Dataset

from rfdetr.data.dataset import SampleKey
from rfdetr.data.sampler import EpochSampler, ResumableLoader


class Keys(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: SampleKey) -> tuple[int, int, int]:
        return tuple(key)


def sampler(count: int, epoch: int = 0, **options: int) -> EpochSampler:
    given = {"batch_size": 2, "window": 3, "seed": 7} | options
    made = EpochSampler(Keys(count), **given)  # type: ignore[arg-type]
    made.set_epoch(epoch)
    return made


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_large_split_is_shown_once_in_full_batches(replicas: int) -> None:
    parts = [sampler(203, replicas=replicas, rank=r) for r in range(replicas)]
    keys = [list(part) for part in parts]
    assert {len(k) for k in keys} == {len(parts[0])} == {203 // (2 * replicas) * 2}
    shown = Counter(key.image for part in keys for key in part)
    assert max(shown.values()) == 1
    assert len(shown) == 203 // (2 * replicas) * 2 * replicas
    assert not parts[0].repeated


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("count", [1, 7, 29])
def test_a_small_split_fills_five_windows_evenly(count: int, replicas: int) -> None:
    keys = [k for r in range(replicas) for k in sampler(count, replicas=replicas, rank=r)]
    assert len(keys) == 5 * 2 * 3 * replicas
    shown = Counter(key.image for key in keys)
    assert set(shown) == set(range(count))
    assert max(shown.values()) - min(shown.values()) <= 1
    assert sorted(key.draw for key in keys) == list(range(len(keys)))


def test_the_threshold_is_five_windows() -> None:
    assert sampler(29).repeated
    assert not sampler(30).repeated
    assert sampler(59, replicas=2).repeated


def test_order_depends_on_seed_and_epoch_alone() -> None:
    state = torch.get_rng_state()
    first = list(sampler(100, epoch=3))
    torch.manual_seed(99)
    assert list(sampler(100, epoch=3)) == first
    torch.set_rng_state(state)
    assert [k.image for k in sampler(100, epoch=4)] != [k.image for k in first]
    assert [k.image for k in sampler(100, epoch=3, seed=8)] != [k.image for k in first]
    assert {k.epoch for k in first} == {3}


def test_processes_share_one_order() -> None:
    whole = {k.draw: k.image for k in sampler(96, batch_size=2)}
    parts = [list(sampler(96, batch_size=2, replicas=2, rank=r)) for r in range(2)]
    assert {k.draw: k.image for part in parts for k in part} == whole


def loader(workers: int = 0) -> ResumableLoader:
    made = sampler(64, batch_size=4)
    return ResumableLoader(
        made.dataset, sampler=made, batch_size=4, num_workers=workers, collate_fn=list
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_continues_where_it_was(workers: int) -> None:
    full = list(loader(workers))
    first = loader(workers)
    batches = iter(first)
    for _ in range(5):
        next(batches)
    state = first.state_dict()
    assert state == {"batches": 5}
    second = loader(workers)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert list(second) == full[5:]
    assert second.state_dict() == {"batches": 0}
    assert list(second) == full
    assert len(second) == 16
