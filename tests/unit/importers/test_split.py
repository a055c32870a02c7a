"""The split: shares per class, look-alikes together, the seed decides, nothing stays empty."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from rfdetr.checks.image_probe import probe_bytes
from rfdetr.errors import DatasetError
from rfdetr.importers.split import Shares, alike, assign

THIRDS = Shares(0.8, 0.1, 0.1)


def singles(count: int) -> np.ndarray:
    return np.arange(count)


def test_every_class_has_its_share_in_every_split() -> None:
    rng = np.random.default_rng(3)
    names = ["common", "usual", "rare"]
    labels = [[n for n, p in zip(names, (0.9, 0.4, 0.05), strict=True) if rng.random() < p]
              for _ in range(2000)]  # fmt: skip
    found = assign(labels, singles(2000), THIRDS, seed=0)
    sizes = Counter(found)
    assert abs(sizes["train"] - 1600) <= 20 and abs(sizes["val"] - 200) <= 20
    for name in names:
        total = sum(name in inside for inside in labels)
        for split, share in zip(("train", "val", "test"), THIRDS, strict=True):
            here = sum(
                name in inside and s == split for inside, s in zip(labels, found, strict=True)
            )
            assert abs(here - share * total) <= 1.5, (name, split)


def test_the_seed_decides() -> None:
    labels = [[str(n % 3)] for n in range(60)]
    first = assign(labels, singles(60), THIRDS, seed=1)
    assert assign(labels, singles(60), THIRDS, seed=1) == first
    assert assign(labels, singles(60), THIRDS, seed=2) != first


def test_groups_stay_together() -> None:
    groups = np.repeat(np.arange(50), 4)
    found = assign([["a"]] * 200, groups, THIRDS, seed=0)
    assert all(len(set(found[i : i + 4])) == 1 for i in range(0, 200, 4))
    assert Counter(found) == {"train": 160, "val": 20, "test": 20}


def test_a_few_images_reach_every_split() -> None:
    assert sorted(assign([["a"]] * 3, singles(3), THIRDS, seed=0)) == ["test", "train", "val"]
    assert Counter(assign([["a"], ["b"], [], []], singles(4), Shares(0.9, 0.1, 0), seed=0)) == {
        "train": 3,
        "val": 1,
    }
    with pytest.raises(DatasetError, match="the largest group has 5"):
        assign([["a"]] * 5, np.zeros(5, int), THIRDS, seed=0)


def test_look_alikes_are_found() -> None:
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).resize((240, 240), 2)
              for _ in range(5)]  # fmt: skip
    shifted = np.clip(np.asarray(photos[2], int) + 3, 0, 255).astype(np.uint8)
    photos += [Image.fromarray(shifted), photos[0]]
    data = [_png(photo) for photo in photos]
    groups = alike([probe_bytes(d) for d in data], ["h0", "h1", "h2", "h3", "h4", "h5", "h0"])
    assert groups[2] == groups[5] and groups[0] == groups[6]
    assert len(set(groups.tolist())) == 5


def test_images_without_contrast_are_compared_by_content() -> None:
    flat = probe_bytes(_png(Image.new("RGB", (32, 32), "grey")))
    assert len(set(alike([flat] * 4, ["a", "b", "a", "c"]).tolist())) == 3


def _png(image: Image.Image) -> bytes:
    import io

    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("text", ["80/10/10", "0.8/0.1/0.1"])
def test_shares_in_parts_and_in_percent(text: str) -> None:
    assert Shares.parse(text) == pytest.approx(THIRDS)
    assert Shares.parse("0.9/0.1") == pytest.approx(Shares(0.9, 0.1, 0.0))


@pytest.mark.parametrize(
    "text", ["", "0.8", "0.5/0.1/0.1", "1/0/0", "a/b/c", "nan/1", "2/-1", "0.8,0.2"]
)
def test_impossible_shares_are_refused(text: str) -> None:
    with pytest.raises(DatasetError, match="write the shares"):
        Shares.parse(text)
