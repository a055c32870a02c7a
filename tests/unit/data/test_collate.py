from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from rfdetr.data.batch import collate


def test_shapes_and_padding(parity: Path) -> None:
    cases = json.loads((parity / "training/collate.json").read_text())["cases"]
    assert len(cases) == 5
    for case in cases:
        images = [torch.full((3, h, w), i + 1.0) for i, (h, w) in enumerate(case["image_hw"])]
        targets = [{"boxes": torch.rand(1, 4)} for _ in images]
        samples = list(zip(images, targets, strict=True))
        batch, kept = collate(samples, block_size=case["block_size"] or 1)
        assert list(batch.tensors.shape) == case["batch_shape"]
        assert batch.mask is not None
        assert list(batch.mask.shape) == case["mask_shape"]
        assert str(batch.mask.dtype) == case["mask_dtype"]
        assert batch.mask.sum((1, 2)).tolist() == case["padded_pixels_per_image"]
        assert batch.tensors.sum((1, 2, 3)).tolist() == case["tensor_sum"]
        for mask, (height, width) in zip(batch.mask, case["valid_hw"], strict=True):
            assert not mask[:height, :width].any()
        assert isinstance(kept, tuple)
        assert all(a is b for a, b in zip(kept, targets, strict=True))


def test_small_batch(parity: Path) -> None:
    stored = np.load(parity / "training/collate_small.npz")
    images = [torch.from_numpy(stored[name]) for name in ("image0", "image1")]
    batch, _ = collate([(image, {}) for image in images], block_size=4)
    np.testing.assert_array_equal(batch.tensors, stored["tensors"])
    np.testing.assert_array_equal(batch.mask, stored["mask"])
