"""Checks and training keep the same ledger, and it adds up to what is on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rfdetr.checks import CheckConfig, DatasetReport, check_dataset
from rfdetr.config import RFDETRNanoConfig, RFDETRSegNanoConfig, TrainConfig
from rfdetr.data import coco
from rfdetr.data.demo import build_demo
from rfdetr.data.ledger import SplitLedger
from rfdetr.errors import DatasetError
from rfdetr.training.datamodule import RFDETRDataModule
from tests.datasets import make_coco, make_roboflow, make_yolo

LEAKS = ["split-duplicate-image", "split-near-duplicate"]  # not a question of what can be trained


def load(root: Path, kind: Any = "roboflow", *, masks: bool = False) -> RFDETRDataModule:
    config = RFDETRSegNanoConfig if masks else RFDETRNanoConfig
    model = config.model_validate({"pretrain_weights": None, "num_classes": 90})
    train = TrainConfig(
        dataset_dir=str(root), dataset_file=kind, num_workers=0, output_dir=str(root.parent / "out")
    )
    data = RFDETRDataModule(model, train)
    data.setup("fit")
    return data


def check(root: Path, kind: Any = "roboflow", *, masks: bool = False) -> DatasetReport:
    config = RFDETRSegNanoConfig if masks else RFDETRNanoConfig
    return check_dataset(
        root,
        kind,
        config=CheckConfig(silence=LEAKS),
        model_config=config.model_validate({"pretrain_weights": None}),
        workers=1,
        cache_dir=root.parent / "cache",
        progress=False,
    )


def files_below(*folders: Path) -> int:
    return sum(len(names) for f in folders for _, _, names in os.walk(f, followlinks=True))


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("roboflow", lambda root: make_roboflow(root, segmentation=True, crowd=True)),
        ("roboflow", lambda root: make_roboflow(root, segmentation=True, parent="parts")),
        ("coco", lambda root: make_coco(root, segmentation=True, crowd=True)),
        ("yolo", lambda root: make_yolo(root, polygons=True)),
        ("roboflow", lambda root: build_demo(root, train=12, valid=4, test=4)),
    ],
)
def test_both_ledgers_are_equal_and_add_up(
    tmp_path: Path, kind: Any, make: Callable[[Path], object], masks: bool
) -> None:
    root = tmp_path / "data"
    make(root)
    report, data = check(root, kind, masks=masks), None
    if report.ok:
        data = load(root, kind, masks=masks)
    else:
        assert "segmentation-none" in report.counts
        with pytest.raises(DatasetError, match="segmentation"):
            load(root, kind, masks=masks)
        return
    assert report.ledger["train"] == data.ledgers["train"]
    assert report.ledger["val"] == data.ledgers["val"]
    folders = {"roboflow": ("train",), "coco": ("train2017",), "yolo": ("train",)}[kind]
    assert sum(report.ledger["train"].files.values()) == files_below(*(root / f for f in folders))
    assert objects(data, "val") == data.ledgers["val"].objects


def objects(data: RFDETRDataModule, split: str) -> int:
    dataset = data.val_dataloader().dataset if split == "val" else data.train_dataloader().dataset
    return sum(len(dataset[i][1]["labels"]) for i in range(len(dataset)))  # type: ignore[arg-type]


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), np.uint8)
    Image.fromarray(noise).save(path, "PNG")


def test_the_ledger_is_logged_and_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_roboflow(tmp_path / "data", crowd=True)
    write_image(root / "train" / ".ipynb_checkpoints" / "copy.png", 1)
    with caplog.at_level("INFO", "rfdetr.training.datamodule"):
        ledger = load(root).ledgers["train"]
    assert ledger.files["ignored: hidden file or folder"] == 1
    assert ledger.files["annotation file"] == 1
    assert ledger.files["trained with objects"] + ledger.files["trained as background"] == 6
    assert str(ledger) in caplog.text
    report = check(root)
    assert DatasetReport.model_validate_json(report.to_json()).ledger["train"] == ledger
    assert isinstance(ledger, SplitLedger)


@pytest.mark.parametrize(("most_read", "smaller"), [(5_000, slice(-1, None)), (1, slice(3))])
def test_objects_beyond_a_file_that_is_smaller_than_listed_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_read: int, smaller: slice
) -> None:
    monkeypatch.setattr(coco, "MOST_READ", most_read)
    root = make_roboflow(tmp_path / "data")
    for path in sorted((root / "train").glob("*.jpg"))[smaller]:
        Image.new("RGB", (1, 1)).save(path)
    ledger = load(root).ledgers["train"]
    assert ledger.rows["dropped: the box lies outside the image"]
    assert check(root).ledger["train"] == ledger


def test_training_on_crowds_alone_is_refused(tmp_path: Path) -> None:
    root = make_roboflow(tmp_path / "data")
    path = root / "train" / "_annotations.coco.json"
    document = json.loads(path.read_text())
    for row in document["annotations"]:
        row["iscrowd"] = 1
    path.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=r"no object to train \(annotations: \d+ crowd\)"):
        load(root)
    assert "split-nothing-to-train" in check(root).counts
