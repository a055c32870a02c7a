from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from rfdetr.data.batch import NestedTensor, collate, normalise, pad_images


def test_shapes_and_padding(parity: Path) -> None:
    cases = json.loads((parity / "training/collate.json").read_text())["cases"]
    assert len(cases) == 5
    for case in cases:
        images = [torch.full((3, h, w), i + 1.0) for i, (h, w) in enumerate(case["image_hw"])]
        targets = [{"boxes": torch.rand(1, 4)} for _ in images]
        samples = list(zip(images, targets, strict=True))
        batch, kept = collate(samples, block_size=case["block_size"] or 1)
        assert list(batch.tensors.shape) == case["batch_shape"]
        assert batch.tensors.sum((1, 2, 3)).tolist() == case["tensor_sum"]
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(kept, targets, strict=True))
        if not any(case["padded_pixels_per_image"]):
            assert batch.mask is None
            assert not batch.padded
            continue
        assert batch.mask is not None
        assert list(batch.mask.shape) == case["mask_shape"]
        assert str(batch.mask.dtype) == case["mask_dtype"]
        assert batch.mask.sum((1, 2)).tolist() == case["padded_pixels_per_image"]
        for mask, (height, width) in zip(batch.mask, case["valid_hw"], strict=True):
            assert not mask[:height, :width].any()


def test_small_batch(parity: Path) -> None:
    stored = np.load(parity / "training/collate_small.npz")
    images = [torch.from_numpy(stored[name]) for name in ("image0", "image1")]
    batch, _ = collate([(image, {}) for image in images], block_size=4)
    np.testing.assert_array_equal(batch.tensors, stored["tensors"])
    np.testing.assert_array_equal(batch.mask, stored["mask"])


def test_pixels_are_normalised_with_zeros_as_padding() -> None:
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((8, 6), (5, 9))]
    batch = pad_images(images, 4)
    assert batch.tensors.dtype == torch.uint8
    expected = pad_images([normalise(image) for image in images], 4)
    found = batch.normalised()
    assert torch.equal(found.tensors, expected.tensors)
    assert torch.equal(found.mask, expected.mask)
    assert found.normalised() is found
    square = NestedTensor(torch.stack([images[0]] * 2), None).normalised()
    assert torch.equal(square.tensors[1], normalise(images[0]))
