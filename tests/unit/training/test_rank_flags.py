"""Flags of two gloo processes, and how many collectives their exchange takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rfdetr.training import rank_flags
from rfdetr.training.rank_flags import RankFlags, largest

STEPS = 60


def _work(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    collectives = 0

    def reduce(value: Tensor, reduce_op: str) -> Tensor:
        nonlocal collectives
        assert reduce_op == "max"
        collectives += 1
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(world_size=2, strategy=strategy)
    flags = RankFlags()
    rank_flags._SECONDS = 1e9  # as if steps took no time
    # Only rank 1 sets the first flag, after a step without an exchange.
    seen = [flags.at(trainer, step, rank == 1 and step >= 25, False) for step in range(STEPS)]
    fast = collectives
    rank_flags._SECONDS = 0.0  # as if every step took longer
    flags.restart(0)
    slow = [flags.at(trainer, step, False) for step in range(5)]
    rows = {"seen": seen, "fast": fast, "slow": collectives - fast, "quiet": slow}
    rows["largest"] = largest(trainer, [float(rank)])
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def test_all_ranks_see_a_flag_in_the_same_step(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_work, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [step for step, (flag, _) in enumerate(first["seen"]) if flag] == [40]
    assert not any(other for _, other in first["seen"])
    assert first["fast"] == 3  # after every 20 steps
    assert first["slow"] == 5  # with slow steps, each
    assert first["largest"] == [1.0]


def test_one_process_exchanges_nothing() -> None:
    trainer: Any = SimpleNamespace(world_size=1)
    flags = RankFlags()
    assert flags.at(trainer, 1, True, False) == [True, False]
    assert flags.at(trainer, 2, False, True) == [False, True]
