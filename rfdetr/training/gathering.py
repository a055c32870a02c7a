"""The evaluation data of all ranks on rank 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist

from rfdetr.evaluation.evaluator import CocoEvaluator
from rfdetr.evaluation.exchange import Bytes, from_bytes, to_bytes


def share_evaluators(trainer: pl.Trainer, evaluators: Sequence[CocoEvaluator]) -> bool:
    """Give rank 0 the images of all ranks; whether this rank has them all.

    Every rank always enters these collectives.
    """
    if trainer.world_size == 1 or not dist.is_initialized():
        return True
    for evaluator in evaluators:
        parts = gather_bytes(trainer, to_bytes(evaluator.state()))
        evaluator.merge([from_bytes(part) for part in parts])
    return trainer.is_global_zero


def gather_bytes(trainer: pl.Trainer, content: Bytes) -> list[Bytes]:
    """`content` of every rank, in their order, on rank 0; [] on the others. All ranks must call.

    One collective for the lengths and one for the bytes; no rank but 0 receives them.
    """
    on_gpu = dist.get_backend() == "nccl"
    device = trainer.strategy.root_device if on_gpu else torch.device("cpu")
    own = torch.tensor([len(content)], device=device)
    lengths = [torch.zeros_like(own) for _ in range(trainer.world_size)]
    dist.all_gather(lengths, own)
    counts: list[int] = torch.cat(lengths).tolist()
    padded = torch.zeros(max(counts), dtype=torch.uint8, device=device)
    padded[: len(content)] = torch.from_numpy(content)
    received = None
    if trainer.is_global_zero:
        received = [torch.empty_like(padded) for _ in counts]
    dist.gather(padded, received)
    if received is None:
        return []
    return [np.asarray(r[:n].cpu().numpy()) for r, n in zip(received, counts, strict=True)]
