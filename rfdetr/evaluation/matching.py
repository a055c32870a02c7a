"""Greedy matching of detections to ground truth as pycocotools does it, vectorised.

Detections of one image and class are matched in order of descending score. Images and classes do
not influence each other, so the n-th candidate of every (image, class) group is matched at the
same time, for all IoU thresholds and area ranges at once. Only pairs with IoU >= 0.5 take part.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from pycocotools import mask as mask_api

from rfdetr.errors import InputError
from rfdetr.evaluation.columns import Bools, Columns, Floats, Ints, IouType, Rows

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
AREA_RANGES: Floats = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
PAIRS_AT_ONCE = 1 << 20
Pairs = tuple[Ints, Ints, Floats]  # detection, ground truth, IoU


@dataclasses.dataclass(frozen=True)
class Matches:
    """Detections of the evaluated classes by (class, descending score), and what they matched.

    Per detection (D,): `row` in the source, class index `label`, `score`, `rank` by score within
    its image and class; `inside` (D, A) tells whether its area lies in the range. Only the
    detections `candidate` (C,) overlap ground truth; `matched` and `ignored` (C, T, A) are theirs.
    `positives` (K, A) counts the ground truth that is to be found.
    """

    row: Ints
    label: Ints
    score: Floats
    rank: Ints
    inside: Bools
    candidate: Ints
    matched: Bools
    ignored: Bools
    positives: Ints


def match(columns: Columns, class_ids: Ints, iou_type: IouType, max_dets: int) -> Matches:
    """Match every detection of `class_ids` (ascending), the `max_dets` best of image and class."""
    images = len(columns.image_ids)
    truth_row, truth_group = _grouped(columns.truth, class_ids, images)
    truth = columns.truth.take(truth_row)
    ignore = truth.crowd[:, None] | ~_inside(truth.area)
    row, group = _grouped(columns.detections, class_ids, images)
    rank = _rank_in_runs(group)
    kept = rank < max_dets
    row, group, rank = row[kept], group[kept], rank[kept]
    detections = columns.detections.take(row)

    find = _mask_pairs if iou_type == "segm" else box_pairs
    pairs = find(detections, group, truth, truth_group)
    candidate, matched, ignored = _assign(group, truth, ignore, pairs)

    inside = _inside(detections.area)
    ignored |= ~matched & ~inside[candidate][:, None, :]
    label = group // max(1, images)
    by_score = np.argsort(-detections.score, kind="stable")
    order = by_score[stable_order(label[by_score], len(class_ids))]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    by_place = np.argsort(place[candidate])
    positives = np.zeros((len(class_ids), len(AREA_RANGES)), dtype=np.int64)
    np.add.at(positives, truth_group // max(1, images), ~ignore)
    return Matches(
        row[order],
        label[order],
        detections.score[order],
        rank[order],
        inside[order],
        place[candidate][by_place],
        matched[by_place],
        ignored[by_place],
        positives,
    )


def _inside(area: Floats) -> Bools:
    low, high = AREA_RANGES.T
    outside: Bools = (area[:, None] < low) | (area[:, None] > high)
    return ~outside


def stable_order(keys: Ints, size: int) -> Ints:
    """Stable ascending order of `keys`, whole numbers below `size`."""
    # NumPy's stable sort is a radix sort, several times faster, for 16 bits and fewer.
    return np.argsort(keys.astype(np.min_scalar_type(size)), kind="stable")


def _grouped(rows: Rows, class_ids: Ints, images: int) -> tuple[Ints, Ints]:
    """Row numbers and group keys (class * images + image) of the known classes.

    Sorted by group, descending score, and order of the rows.
    """
    index = np.searchsorted(class_ids, rows.label)
    known = index < len(class_ids)
    known[known] = class_ids[index[known]] == rows.label[known]
    (row,) = np.nonzero(known)
    if rows.score.any():
        row = row[np.argsort(-rows.score[row], kind="stable")]
    row = row[stable_order(rows.image[row], images)]
    row = row[stable_order(index[row], len(class_ids))]
    return row, index[row] * images + rows.image[row]


def _rank_in_runs(keys: Ints) -> Ints:
    """Position of each element within its run of equal values."""
    if not len(keys):
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    lengths = np.diff(np.r_[starts, len(keys)])
    return np.arange(len(keys)) - np.repeat(starts, lengths)


def _truth_spans(group: Ints, truth_group: Ints) -> tuple[Ints, Ints]:
    """First ground-truth row and their number for each detection."""
    first = np.searchsorted(truth_group, group, side="left")
    return first, np.searchsorted(truth_group, group, side="right") - first


def box_pairs(detections: Rows, group: Ints, truth: Rows, truth_group: Ints) -> Pairs:
    """Pairs of one group with IoU >= 0.5: detection, ground truth, IoU; `truth_group` ascends."""
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
        near = iou >= IOU_THRESHOLDS[0]
        found.append((pair_det[near], pair_truth[near], iou[near]))
    return _joined(found)


def box_iou(box: Floats, truth: Floats, crowd: Bools) -> Floats:
    """IoU of xywh boxes (n, 4) pair by pair; against a crowd: the covered part of the box.

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


def _mask_pairs(detections: Rows, group: Ints, truth: Rows, truth_group: Ints) -> Pairs:
    shared = np.intersect1d(group, truth_group)
    if not len(shared):
        return _joined([])
    if detections.rle is None or truth.rle is None:
        raise InputError("mask metrics need a mask for every detection and every annotation.")
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


def _assign(group: Ints, truth: Rows, ignore: Bools, pairs: Pairs) -> tuple[Ints, Bools, Bools]:
    """Candidate detections (C,), and per candidate, threshold and area: matched, ignored."""
    # Within a detection the best pair comes last: pycocotools lets a later equal IoU win.
    order = np.lexsort((pairs[1], pairs[2], pairs[0]))
    pair_det, pair_truth, iou = pairs[0][order], pairs[1][order], pairs[2][order]
    candidate, owner = np.unique(pair_det, return_inverse=True)
    turn = _rank_in_runs(group[candidate])[owner]
    by_turn = np.argsort(turn, kind="stable")
    cuts = np.searchsorted(turn[by_turn], np.arange(turn.max() + 2 if len(turn) else 1))
    shape = (len(IOU_THRESHOLDS), len(AREA_RANGES))
    taken = np.zeros((len(truth), *shape), dtype=bool)
    matched = np.zeros((len(candidate), *shape), dtype=bool)
    ignored = np.zeros_like(matched)
    for low, high in itertools.pairwise(cuts):
        now = by_turn[low:high]
        of = pair_truth[now]
        who = owner[now]
        starts = np.flatnonzero(np.r_[True, who[1:] != who[:-1]])
        free = ~taken[of] | truth.crowd[of][:, None, None]
        free &= (iou[now][:, None] >= IOU_THRESHOLDS)[:, :, None]
        # Real ground truth outranks ignored; then the later pair of the detection.
        many = len(now)
        value = np.arange(many)[:, None] + many * ~ignore[of]
        best = np.maximum.reduceat(np.where(free, value[:, None, :], -1), starts, axis=0)
        hit = best >= 0
        matched[who[starts]] = hit
        ignored[who[starts]] = hit & (best < many)
        _, threshold, area = np.nonzero(hit)
        taken[of[best[hit] % many], threshold, area] = True
    return candidate, matched, ignored
