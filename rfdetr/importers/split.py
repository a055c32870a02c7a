"""Splits a dataset: classes in equal shares, images that look alike together, reproducible."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rfdetr.arrays import Integers
from rfdetr.checks.image_probe import THUMB_SIDE, ImageFacts
from rfdetr.checks.neardup import near_pairs
from rfdetr.checks.options import CheckConfig
from rfdetr.data.layouts import SPLITS
from rfdetr.errors import DatasetError


class Shares(NamedTuple):
    """Share of the images of each split; they add up to 1."""

    train: float
    val: float
    test: float

    @classmethod
    def parse(cls, text: str) -> Shares:
        """Shares from "0.8/0.1/0.1" or "80/10/10"; test may be left out. Raises DatasetError."""
        try:
            values = [float(part) for part in text.split("/")]
        except ValueError:
            values = []
        total = sum(values)
        usable = len(values) in (2, 3) and all(0 <= v < float("inf") for v in values)
        if not usable or total <= 0 or min(values[:2]) <= 0 or round(total, 6) not in (1, 100):
            raise DatasetError(
                f"split {text!r}: write the shares of train, valid and test, for example "
                "0.8/0.1/0.1. They add up to 1, and train and valid are above 0."
            )
        train, val, test = [v / total for v in (*values, 0.0)[:3]]
        return cls(train, val, test)


def alike(facts: Sequence[ImageFacts], hashes: Sequence[str]) -> Integers:
    """A group number per image: copies and near-duplicates, also over several steps, share one.

    The thresholds are those of the dataset checks. `hashes` are those of the files' contents.
    """
    count, limits = len(facts), CheckConfig()
    _, same = np.unique(np.array(hashes, object).astype(str), return_inverse=True)
    first = np.full(same.max(initial=-1) + 1, -1)
    first[same[::-1]] = np.arange(count)[::-1]
    pairs = [(np.arange(count), first[same])]
    usable = np.array([i for i, found in enumerate(facts) if found.thumb], np.int64)
    if len(usable):
        dhash = np.array([facts[i].dhash for i in usable], np.uint64)
        thumbs = np.frombuffer(b"".join(facts[i].thumb for i in usable), np.uint8)
        thumbs = thumbs.reshape(len(usable), THUMB_SIDE * THUMB_SIDE)
        one, other, _ = near_pairs(
            dhash,
            thumbs,
            dhash,
            thumbs,
            max_bits=limits.near_duplicate_bits,
            min_correlation=limits.near_duplicate_correlation,
        )
        pairs.append((usable[one], usable[other]))
    rows, columns = (np.concatenate(part) for part in zip(*pairs, strict=True))
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def assign(
    labels: Sequence[Sequence[str]], groups: Integers, shares: Shares, seed: int
) -> list[str]:
    """The split of each image: one per group, the share of every class near that of the split.

    Iterative stratification (Sechidis et al. 2011) over groups: the rarest class is distributed
    first, always to the split that lacks it most. `labels` are the classes in each image. Raises
    DatasetError if a split would stay empty.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for image, group in enumerate(groups.tolist()):
        members[group].append(image)
    content = {
        group: Counter(label for i in inside for label in set(labels[i]))
        for group, inside in members.items()
    }
    total = sum(content.values(), Counter())
    lacking = [Counter({name: share * n for name, n in total.items()}) for share in shares]
    room = [share * len(labels) for share in shares]
    usable = [number for number, share in enumerate(shares) if share > 0]
    place: dict[int, int] = {}
    order = np.random.default_rng(seed).permutation(len(members)).tolist()
    for label in [*sorted(total, key=lambda name: (total[name], name)), None]:
        for group in order:
            if group in place or (label is not None and label not in content[group]):
                continue
            best = max(usable, key=lambda n: (lacking[n][label or ""], room[n], -n))
            place[group] = best
            room[best] -= len(members[group])
            lacking[best].subtract(content[group])
    _fill_empty(place, usable, members)
    found = [""] * len(labels)
    for group, number in place.items():
        for image in members[group]:
            found[image] = SPLITS[number]
    return found


def _fill_empty(place: dict[int, int], usable: list[int], members: dict[int, list[int]]) -> None:
    """Give a split without images the smallest group of the split with the most groups."""
    count, largest = sum(map(len, members.values())), max(map(len, members.values()))
    if len(members) < len(usable):
        raise DatasetError(
            f"{count} images cannot be split into {len(usable)} parts: images that look alike stay "
            f"together (the largest group has {largest}). Add images, or put them into folders "
            "train, valid and test yourself."
        )
    for number in usable:
        if number not in place.values():
            donor = Counter(place.values()).most_common(1)[0][0]
            groups = [group for group, where in place.items() if where == donor]
            place[min(groups, key=lambda group: len(members[group]))] = number
