"""Assignment without a loop over groups, costs in chunks, and their memory."""

from __future__ import annotations

import itertools
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from rfdetr.model import matcher as matcher_module
from rfdetr.model.criterion import build_criterion
from rfdetr.model.matcher import HungarianMatcher, _assign
from rfdetr.model.targets import flatten_targets
from tests.unit.model.small import images, small_network, targets


def _one_by_one(table: np.ndarray, counts: list[int]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """SciPy for every layer, image and group."""
    L, _, G, Q = table.shape
    starts = np.cumsum([0, *counts])
    matches = []
    for layer in range(L):
        matches.append([])
        for first, last in itertools.pairwise(starts):
            queries, indices = [], []
            for group in range(G):
                target, query = linear_sum_assignment(table[layer, first:last, group])
                order = np.argsort(query)
                queries.append(query[order] + group * Q)
                indices.append(target[order])
            matches[-1].append((np.concatenate(queries), np.concatenate(indices)))
    return matches


@pytest.mark.parametrize("queries", [5, 40, 300])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("counts", [[7, 0, 1, 3], [0, 0], [12, 5]])
def test_assignments_equal_those_of_scipy(queries: int, ties: bool, counts: list[int]) -> None:
    """Also with more targets than queries, with conflicts between targets, and with equal costs."""
    draw = np.random.default_rng(queries)
    for _ in range(5):
        table = draw.normal(size=(3, sum(counts), 4, queries)).astype(np.float32)
        if ties:
            table = table.round(1)
        expected = _one_by_one(table, counts)
        lowest = table.min(axis=-1, keepdims=True)
        unsure = np.count_nonzero(table == lowest, axis=-1) > 1
        found = _assign(table, table.argmin(axis=-1), unsure, counts)
        assert len(found) == 3
        for own, theirs in zip(found, expected, strict=True):
            for (query, target), (want_query, want_target) in zip(own, theirs, strict=True):
                assert query.dtype == target.dtype == np.int64
                assert np.array_equal(query, want_query)
                assert np.array_equal(target, want_target)


@pytest.mark.parametrize("masks", [False, True])
def test_chunks_change_no_loss(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = (5, 0, 3, 1)
    model = small_network(masks=masks).train()
    criterion = build_criterion(model.config).train()
    outputs = model(images(len(counts)))
    losses = []
    for pairs in (1 << 21, 1, 300):
        monkeypatch.setattr(matcher_module, "_PAIRS_AT_ONCE", pairs)
        torch.manual_seed(5)
        losses.append(criterion(outputs, targets(counts, masks=masks)))
    for name, value in losses[0].items():
        assert losses[1][name].item() == pytest.approx(value.item(), rel=1e-6), name
        assert losses[2][name].item() == pytest.approx(value.item(), rel=1e-6), name


def _growth() -> int:
    """MiB by which matching grows the peak memory: batch 16, 300 targets, nano's query groups."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 16, 3900, 91, generator=generator)
    boxes = torch.rand(3, 16, 3900, 4, generator=generator) * 0.5 + 0.1
    flat = flatten_targets(targets((300,) * 16), 16, logits.device, with_masks=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the current size
    before = _peak()
    HungarianMatcher().match_layers(logits, boxes, None, flat, 13)
    return _peak() - before


def _peak() -> int:
    """Peak resident memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_300_objects_per_image_fit_in_1_gb() -> None:
    with get_context("spawn").Pool(1) as pool:
        assert 100 < pool.apply(_growth) < 1000
