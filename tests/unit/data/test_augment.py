from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfdetr.config import RFDETRNanoConfig, TrainConfig
from rfdetr.data.augment import Augmentation
from rfdetr.data.geometry import ImageObjects
from rfdetr.errors import ConfigError, MissingDependencyError
from rfdetr.training.datamodule import RFDETRDataModule
from tests.datasets import make_roboflow

BOXES = np.array([[2, 4, 20, 30], [40, 10, 60, 38], [50, 2, 63, 9]], np.float32)


def objects() -> ImageObjects:
    areas = (BOXES[:, 2] - BOXES[:, 0]) * (BOXES[:, 3] - BOXES[:, 1])
    return ImageObjects(BOXES, areas, np.array([10, 11, 12]), 40, 64)


def masks() -> np.ndarray:
    out = np.zeros((3, 40, 64), bool)
    for mask, (x0, y0, x1, y1) in zip(out, BOXES.astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
    return out


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)


def test_flip_moves_boxes_and_masks() -> None:
    pixels, found, shown = Augmentation({"HorizontalFlip": {"p": 1.0}})(
        image(), objects(), masks(), 0
    )
    np.testing.assert_array_equal(pixels, image()[:, ::-1])
    expected = BOXES.copy()
    expected[:, [0, 2]] = 64 - BOXES[:, [2, 0]]
    np.testing.assert_allclose(found.boxes, expected, atol=1e-3)
    np.testing.assert_array_equal(shown, masks()[:, :, ::-1])
    np.testing.assert_allclose(found.areas, objects().areas, rtol=1e-4)


def test_objects_that_leave_the_image_go_with_their_masks() -> None:
    crop = {"Crop": {"x_min": 0, "y_min": 0, "x_max": 45, "y_max": 40, "p": 1.0}}
    pixels, found, shown = Augmentation(crop)(image(), objects(), masks(), 0)
    assert pixels.shape == (40, 45, 3)
    assert (found.height, found.width) == (40, 45)
    assert found.rows.tolist() == [10, 11]
    np.testing.assert_allclose(found.boxes, [[2, 4, 20, 30], [40, 10, 45, 38]], atol=1e-3)
    np.testing.assert_allclose(found.areas, [18 * 26, 5 * 28], rtol=1e-3)
    assert shown is not None
    assert [int(m.sum()) for m in shown] == [18 * 26, 5 * 28]


def test_same_seed_same_image_and_empty_images() -> None:
    config = {"OneOf": {"transforms": {"GaussNoise": {"p": 1.0}, "Blur": {"p": 1.0}}, "p": 1.0}}
    augment = Augmentation(config)
    first = augment(image(), objects(), None, 4)[0]
    np.testing.assert_array_equal(augment(image(), objects(), None, 4)[0], first)
    assert (augment(image(), objects(), None, 5)[0] != first).any()
    none = objects().select(np.zeros(3, bool))
    assert len(augment(image(), none, np.zeros((0, 40, 64), bool), 1)[1].rows) == 0


def test_all_mistakes_come_together() -> None:
    config: dict[str, Any] = {"HorizontalFlop": {}, "Blur": {"blurr": 3}, "GaussNoise": [1]}
    with pytest.raises(ConfigError) as caught:
        Augmentation(config)
    text = str(caught.value)
    assert "'HorizontalFlop' (did you mean 'HorizontalFlip'?)" in text
    assert "blurr" in text
    assert "GaussNoise" in text


def test_missing_package_is_an_error_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "albumentations", None)
    root = make_roboflow(tmp_path)
    for config, mirror in ((None, True), ({}, False)):
        data = module(root, config)
        data.setup("fit")
        assert data._datasets["train"].augmentation is None
        assert data._datasets["train"].transform.mirror is mirror
    with pytest.raises(MissingDependencyError, match="aug_config requires Albumentations"):
        module(root, {"Blur": {}}).setup("fit")


def module(root: Path, config: dict | None) -> RFDETRDataModule:
    model = RFDETRNanoConfig(resolution=64, num_classes=3, pretrain_weights=None)
    train = TrainConfig(
        dataset_dir=root, aug_config=config, seed=1, num_workers=0, multi_scale=False
    )
    return RFDETRDataModule(model, train)


def test_training_uses_it_the_same_way_every_time(tmp_path: Path) -> None:
    root = make_roboflow(tmp_path)
    config = {"GaussNoise": {"p": 1.0}, "VerticalFlip": {"p": 0.5}}
    first, again, plain = (module(root, c) for c in (config, config, {}))
    for data in (first, again, plain):
        data.setup("fit")
    items = [d._datasets["train"][2] for d in (first, again, plain)]
    assert torch.equal(items[0][0], items[1][0])
    assert torch.equal(items[0][1]["boxes"], items[1][1]["boxes"])
    assert not torch.equal(items[0][0], items[2][0])
    assert items[0][0].shape == (3, 64, 64)
