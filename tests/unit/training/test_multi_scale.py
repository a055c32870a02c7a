from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch

from rfdetr.data.batch import NestedTensor
from rfdetr.training.multi_scale import draw_size, multi_scale_sizes, resize_batch


def test_sizes_equal_the_reference(parity: Path):
    stored = json.loads((parity / "training/multi_scale.json").read_text())
    for case in stored["variants"]:
        block = case["patch_size"] * case["num_windows"]
        expanded = multi_scale_sizes(case["resolution"], block, expanded=True)
        assert expanded == case["expanded"]
        assert multi_scale_sizes(case["resolution"], block, expanded=False) == case["default"]
        assert expanded[-1] == case["dataset_scale_when_multi_scale"]
    for case in stored["custom"]:
        block = case["patch_size"] * case["num_windows"]
        sizes = multi_scale_sizes(case["resolution"], block, case["expanded_scales"])
        assert sizes == case["scales"]


def test_sizes_drawn_per_step_equal_the_reference(parity: Path):
    variants = json.loads((parity / "training/multi_scale.json").read_text())["variants"]
    for variant in variants:
        for step, size in variant["per_step_choice_expanded"]:
            assert draw_size(variant["expanded"], step) == size, variant["config"]


def test_drawing_leaves_the_global_generator_alone():
    state = random.getstate()
    draw_size([1, 2, 3], 5)
    assert random.getstate() == state


def test_resized_batch_equals_the_reference(parity: Path):
    data = np.load(parity / "training/batch_multiscale_small.npz")
    batch = NestedTensor(torch.from_numpy(data["tensors"]), torch.from_numpy(data["mask"]))
    resize_batch(batch, int(data["scale"]))
    assert np.allclose(batch.tensors, data["tensors_out"], atol=1e-5)
    assert np.array_equal(batch.mask, data["mask_out"])
    unmasked = NestedTensor(torch.zeros(1, 3, 4, 4), None)
    resize_batch(unmasked, 8)
    assert unmasked.mask is None
    assert unmasked.tensors.shape == (1, 3, 8, 8)


def test_resizing_keeps_the_batch_object_and_its_padded_flag():
    batch = NestedTensor(
        torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool), padded=False
    )
    resize_batch(batch, 96)
    assert batch.tensors.shape == (2, 3, 96, 96)
    assert batch.mask.shape == (2, 96, 96)
    assert not batch.padded
