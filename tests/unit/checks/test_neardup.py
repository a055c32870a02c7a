from __future__ import annotations

import time

import numpy as np
import pytest

from rfdetr.checks.neardup import bit_counts, near_pairs


def thumbnails(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    return hashes, rng.integers(0, 256, (count, 256), dtype=np.uint8)


def flipped(hashes: np.ndarray, bits: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    result = hashes.copy()
    for i in range(len(result)):
        for bit in rng.choice(64, bits, replace=False):
            result[i] ^= np.uint64(1 << int(bit))
    return result


def test_every_pair_within_seven_bits_is_found_and_no_other() -> None:
    queries, query_thumbs = thumbnails(300, 0)
    table, table_thumbs = thumbnails(500, 1)
    for bits in range(10):
        rows = slice(bits * 20, bits * 20 + 20)
        table[rows] = flipped(queries[rows], bits, bits)
        table_thumbs[rows] = query_thumbs[rows]
    first, second, _ = near_pairs(
        queries, query_thumbs, table, table_thumbs, max_bits=7, min_correlation=0.9
    )
    assert (first == second).all()
    assert first.tolist() == list(range(160))  # 0 to 7 bits
    distance = bit_counts(queries[:200] ^ table[:200])
    assert distance.tolist() == [bits for bits in range(10) for _ in range(20)]


def test_equal_hashes_of_different_or_flat_images_do_not_match() -> None:
    hashes, thumbs = thumbnails(50, 0)
    _, others = thumbnails(50, 1)
    assert not len(near_pairs(hashes, thumbs, hashes, others, max_bits=7, min_correlation=0.9)[0])
    flat = np.full_like(thumbs, 120)
    assert not len(near_pairs(hashes, flat, hashes, flat, max_bits=7, min_correlation=0.9)[0])


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_hundred_thousand_images_take_seconds(count: int) -> None:
    queries, query_thumbs = thumbnails(count, 0)
    table, table_thumbs = thumbnails(5_000, 1)
    table[:9], table_thumbs[:9] = queries[:9], query_thumbs[:9]
    started = time.process_time()
    first, _, _ = near_pairs(
        queries, query_thumbs, table, table_thumbs, max_bits=7, min_correlation=0.9
    )
    assert first.tolist() == list(range(9))
    assert time.process_time() - started < count / 3_000
