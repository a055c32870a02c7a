"""Near-duplicate search over 64-bit perceptual hashes, verified on small gray thumbnails.

Two hashes that differ in at most 7 bits differ in at most one bit in one of the four 16-bit bands
(pigeonhole principle). Each query therefore looks up 17 keys per band in a sorted table instead of
being compared with every hash.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rfdetr.arrays import Floats, Integers

Hashes = npt.NDArray[np.uint64]

BANDS = 4
BAND_BITS = 16
FLIPS = np.array([0, *(1 << bit for bit in range(BAND_BITS))], np.uint64)
MIN_CONTRAST = 4.0  # gray levels of standard deviation; a flatter image has nothing to compare
CHUNK_PAIRS = 4_000_000
MAX_SAME_KEY = 2_000  # keys shared by more images than this are skipped as uninformative


def near_pairs(
    queries: Hashes,
    query_thumbs: npt.NDArray[np.uint8],
    table: Hashes,
    table_thumbs: npt.NDArray[np.uint8],
    *,
    max_bits: int,
    min_correlation: float,
) -> tuple[Integers, Integers, Floats]:
    """Index pairs (query, table) within `max_bits` (0..7) whose thumbnails correlate.

    `thumbs` are (n, 256) gray values. Images without contrast are skipped. Returns the sorted
    pairs and the correlation of each.
    """
    query_unit, query_kept = _normalised(query_thumbs)
    table_unit, table_kept = _normalised(table_thumbs)
    queries_kept, table_rows = np.flatnonzero(query_kept), np.flatnonzero(table_kept)
    pairs = _candidates(queries[queries_kept], table[table_rows], max_bits)
    first, second = queries_kept[pairs[0]], table_rows[pairs[1]]
    correlation = np.zeros(len(first))
    for start in range(0, len(first), CHUNK_PAIRS // 256):
        part = slice(start, start + CHUNK_PAIRS // 256)
        products = query_unit[first[part]] * table_unit[second[part]]
        correlation[part] = products.sum(axis=1, dtype=np.float64)
    good = correlation >= min_correlation
    first, second, correlation = first[good], second[good], correlation[good]
    order = np.lexsort((second, first))
    return first[order], second[order], correlation[order]


def _normalised(
    thumbs: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    values = thumbs.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    norm = np.sqrt((values * values).sum(axis=1, keepdims=True))
    contrast = norm[:, 0] / np.sqrt(max(1, thumbs.shape[1]))
    return values / np.maximum(norm, 1e-6), contrast >= MIN_CONTRAST


def _candidates(queries: Hashes, table: Hashes, max_bits: int) -> tuple[Integers, Integers]:
    """Pairs within `max_bits`, each once."""
    found: list[Integers] = [np.zeros(0, np.int64)]
    width = max(1, len(table))
    for band in range(BANDS):
        shift = np.uint64(band * BAND_BITS)
        mask = np.uint64((1 << BAND_BITS) - 1)
        keys = (table >> shift) & mask
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for flip in FLIPS:
            wanted = ((queries >> shift) & mask) ^ flip
            low = np.searchsorted(keys, wanted, "left")
            count = np.searchsorted(keys, wanted, "right") - low
            count[count > MAX_SAME_KEY] = 0
            found.extend(_close(queries, table, order, low, count, max_bits=max_bits, width=width))
    codes = np.unique(np.concatenate(found))
    return codes // width, codes % width


def _close(
    queries: Hashes,
    table: Hashes,
    order: Integers,
    low: Integers,
    count: Integers,
    *,
    max_bits: int,
    width: int,
) -> list[Integers]:
    """Codes query * width + row of the candidate pairs that are within `max_bits`."""
    codes = []
    ends = np.cumsum(count)
    start = 0
    while start < len(queries):
        base = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + CHUNK_PAIRS, "right")))
        part = count[start:stop]
        query = np.repeat(np.arange(start, stop), part)
        offset = np.arange(len(query)) - np.repeat(np.cumsum(part) - part, part)
        row = order[low[query] + offset]
        near = bit_counts(queries[query] ^ table[row]) <= max_bits
        codes.append(query[near] * width + row[near])
        start = stop
    return codes


def bit_counts(values: Hashes) -> npt.NDArray[np.uint8]:
    """Number of set bits of each 64-bit value."""
    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(values))
    table = np.array([value.bit_count() for value in range(256)], np.uint8)  # NumPy 1
    return np.asarray(table[values.view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=np.uint8))
