"""The losses of two gloo processes against those of one process that has both images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rfdetr.model.criterion import SetCriterion, build_criterion
from rfdetr.model.types import ImageTarget, Outputs
from tests.unit.model.small import small_config, targets

COUNTS = (5, 1)  # objects of the two images: the processes have unequal numbers of boxes
QUERIES = 36  # of all groups


def _criterion() -> SetCriterion:
    return build_criterion(small_config()).train()


def _batch(image: slice) -> tuple[Outputs, list[ImageTarget]]:
    """Random predictions of three layers for some of the images, and their targets."""
    generator = torch.Generator().manual_seed(4)
    layers = []
    for _ in range(3):
        logits = torch.randn(2, QUERIES, 6, generator=generator)
        boxes = torch.rand(2, QUERIES, 4, generator=generator) * 0.5 + 0.1
        layers.append({"pred_logits": logits[image], "pred_boxes": boxes[image]})
    last, aux, encoder = layers
    outputs = {**last, "aux_outputs": [aux], "enc_outputs": encoder}
    return outputs, targets(COUNTS)[image]


def _work(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    losses = _criterion()(*_batch(slice(rank, rank + 1)))
    torch.save(losses, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_mean_over_processes_equals_the_loss_of_a_single_process(tmp_path: Path) -> None:
    """DDP averages gradients: with box counts averaged too, the number of GPUs changes nothing."""
    torch.multiprocessing.spawn(_work, args=(str(tmp_path),), nprocs=2)
    ranks: list[dict[str, Tensor]] = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    criterion = _criterion()
    single = criterion(*_batch(slice(None)))
    for name in criterion.weight_dict:
        mean = (ranks[0][name] + ranks[1][name]) / 2
        assert mean.item() == pytest.approx(single[name].item(), rel=1e-5), name
        assert ranks[0][name] != ranks[1][name]
