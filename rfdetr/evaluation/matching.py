"""Greedy matching of detections to ground truth as pycocotools does it, vectorised.

Detections of one image and class are matched in order of descending score. Images and classes do
not influence each other, so the n-th candidate of every (image, class) group is matched at the
same time, for all IoU thresholds and area ranges at once. Only pairs with IoU >= 0.5 take part.
The rules are those of `COCOeval.evaluateImg` in pycocotools (Lin et al., "Microsoft COCO", 2014).

Axes: D detections, C candidates, K classes, T IoU thresholds, A area ranges.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from pycocotools import mask as mask_api

from rfdetr.arrays import Bools, Floats, Integers, find_rows
from rfdetr.errors import InputError
from rfdetr.evaluation.box_table import BoxTable, EvaluationData, IouType

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
AREA_RANGES: Floats = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
PAIRS_AT_ONCE = 1 << 20  # bounds the memory of the IoU computation
Pairs = tuple[Integers, Integers, Floats]  # row of the detection, row of the ground truth, IoU


@dataclasses.dataclass(frozen=True)
class Matches:
    """Detections of the evaluated classes, by class and descending score, and their matches.

    row: (D,) row in the detections table. label: (D,) index of the class. score: (D,).
    rank: (D,) position by score within the image and class.
    inside: (D, A) whether the area of the detection lies in the range.
    candidate: (C,) the detections that overlap ground truth with IoU >= 0.5, ascending.
    matched, ignored: (C, T, A) for the candidates. An ignored detection is neither true nor false.
    positives: (K, A) ground-truth boxes that count.
    """

    row: Integers
    label: Integers
    score: Floats
    rank: Integers
    inside: Bools
    candidate: Integers
    matched: Bools
    ignored: Bools
    positives: Integers


def match(
    data: EvaluationData,
    class_ids: Integers,
    iou_type: IouType,
    max_dets: int,
    areas: Floats = AREA_RANGES,
) -> Matches:
    """Match the `max_dets` best detections of each image and class; `class_ids` (K,) ascend.

    `areas` (A, 2) are the lowest and highest area of each range, inclusive.
    """
    images = len(data.image_ids)
    truth_row, truth_group = _grouped(data.truth, class_ids, images)
    truth = data.truth.take(truth_row)
    ignore = truth.crowd[:, None] | ~_inside(truth.area, areas)
    row, group = _grouped(data.detections, class_ids, images)
    rank = _rank_in_runs(group)
    kept = rank < max_dets
    row, group, rank = row[kept], group[kept], rank[kept]
    detections = data.detections.take(row)

    find = _mask_pairs if iou_type == "segm" else box_pairs
    pairs = find(detections, group, truth, truth_group)
    candidate, matched, ignored = _assign(group, truth, ignore, pairs)

    inside = _inside(detections.area, areas)
    ignored |= ~matched & ~inside[candidate][:, None, :]
    label = group // max(1, images)
    by_score = np.argsort(-detections.score, kind="stable")
    order = by_score[stable_order(label[by_score], len(class_ids))]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    by_place = np.argsort(place[candidate])
    positives = np.zeros((len(class_ids), len(areas)), dtype=np.int64)
    np.add.at(positives, truth_group // max(1, images), ~ignore)
    return Matches(
        row=row[order],
        label=label[order],
        score=detections.score[order],
        rank=rank[order],
        inside=inside[order],
        candidate=place[candidate][by_place],
        matched=matched[by_place],
        ignored=ignored[by_place],
        positives=positives,
    )


def _inside(area: Floats, areas: Floats) -> Bools:
    low, high = areas.T
    outside: Bools = (area[:, None] < low) | (area[:, None] > high)
    return ~outside


def stable_order(keys: Integers, size: int) -> Integers:
    """Stable ascending order of `keys`, non-negative integers below `size`."""
    # NumPy's stable sort is a radix sort, several times faster, for 16 bits and fewer.
    return np.argsort(keys.astype(np.min_scalar_type(size)), kind="stable")


def _grouped(table: BoxTable, class_ids: Integers, images: int) -> tuple[Integers, Integers]:
    """Row numbers and group keys (class * images + image) of the rows of the evaluated classes.

    Sorted by group, then descending score, then order in the table.
    """
    label = find_rows(class_ids, table.label)
    (row,) = np.nonzero(label >= 0)
    if table.score.any():
        row = row[np.argsort(-table.score[row], kind="stable")]
    row = row[stable_order(table.image[row], images)]
    row = row[stable_order(label[row], len(class_ids))]
    return row, label[row] * images + table.image[row]


def _rank_in_runs(keys: Integers) -> Integers:
    """Position of each element within its run of equal values."""
    if not len(keys):
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    lengths = np.diff(np.r_[starts, len(keys)])
    return np.arange(len(keys)) - np.repeat(starts, lengths)


def _truth_spans(group: Integers, truth_group: Integers) -> tuple[Integers, Integers]:
    """First ground-truth row and their number for each detection."""
    first = np.searchsorted(truth_group, group, side="left")
    return first, np.searchsorted(truth_group, group, side="right") - first


def box_pairs(
    detections: BoxTable,
    group: Integers,
    truth: BoxTable,
    truth_group: Integers,
    min_iou: float = 0.5,
) -> Pairs:
    """All pairs within a group with IoU >= min_iou; `truth` is sorted by group."""
    first, count = _truth_spans(group, truth_group)
    (owner,) = np.nonzero(count)
    first, count = first[owner], count[owner]
    ends = np.cumsum(count)
    cuts = np.searchsorted(ends, np.arange(0, ends[-1] if len(ends) else 0, PAIRS_AT_ONCE))
    found: list[Pairs] = []
    for low, high in itertools.pairwise([*cuts, len(owner)]):
        n = count[low:high]
        pair_det = np.repeat(owner[low:high], n)
        start = np.cumsum(n) - n
        pair_truth = np.arange(n.sum()) - np.repeat(start - first[low:high], n)
        iou = box_iou(detections.box[pair_det], truth.box[pair_truth], truth.crowd[pair_truth])
        near = iou >= min_iou
        found.append((pair_det[near], pair_truth[near], iou[near]))
    return _joined(found)


def box_iou(box: Floats, truth: Floats, crowd: Bools) -> Floats:
    """IoU (n,) of xywh boxes (n, 4) pair by pair; against a crowd, intersection over box area.

    The order of operations is that of pycocotools, so that values on a threshold agree.
    """
    x, y, w, h = box.T
    tx, ty, tw, th = truth.T
    width = np.minimum(w + x, tw + tx) - np.maximum(x, tx)
    height = np.minimum(h + y, th + ty) - np.maximum(y, ty)
    overlap = np.where((width > 0) & (height > 0), width * height, 0.0)
    own = w * h
    union = np.where(crowd, own, own + tw * th - overlap)
    iou = np.zeros_like(overlap)
    np.divide(overlap, union, out=iou, where=overlap > 0)
    return iou


def _mask_pairs(
    detections: BoxTable, group: Integers, truth: BoxTable, truth_group: Integers
) -> Pairs:
    shared = np.intersect1d(group, truth_group)
    if not len(shared):
        return _joined([])
    if detections.rle is None or truth.rle is None:
        raise InputError(
            "mask metrics need a mask for every detection and every ground-truth object."
        )
    found: list[Pairs] = []
    for key in shared:
        d0, d1 = np.searchsorted(group, [key, key + 1])
        t0, t1 = np.searchsorted(truth_group, [key, key + 1])
        iou = mask_api.iou(
            list(detections.rle[d0:d1]),
            list(truth.rle[t0:t1]),
            truth.crowd[t0:t1].tolist(),
        )
        i, j = np.nonzero(iou >= IOU_THRESHOLDS[0])
        found.append((i + d0, j + t0, iou[i, j]))
    return _joined(found)


def _joined(parts: list[Pairs]) -> Pairs:
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return none, none, np.zeros(0)
    first, second, third = zip(*parts, strict=True)
    return np.concatenate(first), np.concatenate(second), np.concatenate(third)


def _assign(
    group: Integers, truth: BoxTable, ignore: Bools, pairs: Pairs
) -> tuple[Integers, Bools, Bools]:
    """Candidates (C,), and per candidate, threshold and area range whether matched and ignored.

    In each round the next candidate of every group takes its best free ground truth. "Best" sorts
    by two keys, packed into one integer so that one maximum decides:

        key = position + pairs_in_round * (ground truth counts)

    Ground truth that counts beats ignored ground truth. Among equals the later position wins:
    the pairs of a candidate ascend in IoU, and of equal IoUs pycocotools lets the last one win.
    """
    order = np.lexsort((pairs[1], pairs[2], pairs[0]))
    pair_det, pair_truth, iou = pairs[0][order], pairs[1][order], pairs[2][order]
    candidate, pair_candidate = np.unique(pair_det, return_inverse=True)
    turn = _rank_in_runs(group[candidate])[pair_candidate]
    by_turn = np.argsort(turn, kind="stable")
    rounds = np.searchsorted(turn[by_turn], np.arange(turn.max() + 2 if len(turn) else 1))
    shape = (len(IOU_THRESHOLDS), ignore.shape[1])
    taken = np.zeros((len(truth), *shape), dtype=bool)
    matched = np.zeros((len(candidate), *shape), dtype=bool)
    ignored = np.zeros_like(matched)
    for low, high in itertools.pairwise(rounds):
        now = by_turn[low:high]
        gt, det = pair_truth[now], pair_candidate[now]
        starts = np.flatnonzero(np.r_[True, det[1:] != det[:-1]])  # first pair of each candidate
        free = ~taken[gt] | truth.crowd[gt][:, None, None]  # a crowd matches many detections
        free &= (iou[now][:, None] >= IOU_THRESHOLDS)[:, :, None]
        count = len(now)
        key = np.arange(count)[:, None] + count * ~ignore[gt]
        best = np.maximum.reduceat(np.where(free, key[:, None, :], -1), starts, axis=0)
        hit = best >= 0
        matched[det[starts]] = hit
        ignored[det[starts]] = hit & (best < count)
        _, threshold, area = np.nonzero(hit)
        taken[gt[best[hit] % count], threshold, area] = True
    return candidate, matched, ignored
