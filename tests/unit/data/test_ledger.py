"""Checks and training keep the same ledger, and it adds up to what is on disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rfdetr.checks import CheckConfig, DatasetReport, check_dataset
from rfdetr.config import RFDETRNanoConfig, RFDETRSegNanoConfig, TrainConfig
from rfdetr.data.demo import build_demo
from rfdetr.data.ledger import SplitLedger
from rfdetr.errors import DatasetError
from rfdetr.training.datamodule import RFDETRDataModule
from tests.datasets import make_coco, make_roboflow, make_yolo

LEAKS = ["split-duplicate-image", "split-near-duplicate"]  # not a question of what can be trained
WIDTH, HEIGHT = 24, 16


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


numbers = st.one_of(
    st.integers(-4, 30), st.sampled_from([0.0, 0.5, 24.0, 16.0, 1e-9, 23.999999, -0.25])
)
annotation = st.fixed_dictionaries(
    {
        "image_id": st.integers(1, 6),  # 5 and 6 do not exist
        "category_id": st.sampled_from([1, 1, 2, 2, 2, 7]),  # 7 does not exist
        "bbox": st.tuples(numbers, numbers, numbers, numbers),
        "iscrowd": st.sampled_from([0, 0, 0, 1]),
    },
    optional={"id": st.integers(1, 9)},
)
extras = st.sets(
    st.sampled_from(["hidden", "apple", "unlisted", "note", "link", "no-size", "text-id"])
)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(path, "PNG")


def add_extras(folder: Path, chosen: set[str]) -> None:
    if "hidden" in chosen:
        write_image(folder / ".ipynb_checkpoints" / "copy.png", 90)
    if "apple" in chosen:
        (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    if "unlisted" in chosen:
        write_image(folder / "sub" / "new.png", 91)
    if "note" in chosen:
        (folder / "notes.md").write_text("x")
    if "link" in chosen:
        (folder / "loop").symlink_to(folder, target_is_directory=True)


def random_coco(root: Path, rows: list[dict[str, Any]], chosen: set[str]) -> int:
    for split, offset in (("train", 0), ("valid", 10)):
        folder = root / split
        images = []
        for number in range(1, 5):
            write_image(folder / f"{number}.png", offset + number)
            images.append({"id": number, "file_name": f"{number}.png"})
            if "no-size" not in chosen:
                images[-1] |= {"width": WIDTH, "height": HEIGHT}
        valid = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}
        document = {
            "images": images,
            "annotations": rows if split == "train" else [valid],
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        }
        if split == "train" and "text-id" in chosen and rows:
            document["annotations"] = [*rows, {**rows[0], "image_id": "1"}]
        (folder / "_annotations.coco.json").write_text(json.dumps(document))
    add_extras(root / "train", chosen - {"unlisted"} if not rows else chosen)
    return len(rows) + ("text-id" in chosen and bool(rows))


label = st.one_of(
    st.tuples(
        st.integers(0, 2), *(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.2, -0.3]) for _ in range(4))
    ).map(lambda row: " ".join(map(str, row))),
    st.sampled_from(["0 0.1 0.1 0.5 0.1 0.5 0.5", "", "0 0.5 0.5 0.2", "1 0.5 0.5 0.2 0.2"]),
)


def random_yolo(root: Path, lines: list[list[str]], chosen: set[str], suffix: str) -> int:
    for split, offset in (("train", 0), ("valid", 10)):
        for number, text in enumerate(lines if split == "train" else [["0 0.5 0.5 0.2 0.2"]]):
            write_image(root / split / "images" / f"{number}.png", offset + number)
            path = root / split / "labels" / f"{number}{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(text))
    add_extras(root / "train" / "images", chosen)
    lost = 0
    if "note" in chosen:
        (root / "train" / "labels" / "lost.txt").write_text("0 0.5 0.5 0.2 0.2\n\n")
        lost = 1
    (root / "data.yaml").write_text("train: train/images\nval: valid/images\nnames: [a, b]\n")
    return lost + sum(bool(line) for text in lines for line in text)


def compare(root: Path, row_count: int, folders: list[Path]) -> None:
    """Training refuses where the checks report an error; otherwise both ledgers are equal."""
    report = check(root)
    ledger = report.ledger["train"]
    assert sum(ledger.rows.values()) == row_count
    assert sum(ledger.files.values()) == files_below_once(folders)
    try:
        data = load(root)
    except DatasetError as error:
        assert report.errors, error
        return
    assert not report.errors, [f.message for f in report.findings if f.severity == "error"]
    assert ledger == data.ledgers["train"]
    dataset = data.train_dataloader().dataset
    kept = 0
    for image in range(len(dataset)):  # type: ignore[arg-type]
        rows = dataset.index.rows(image)  # type: ignore[attr-defined]
        file = Image.open(dataset.index.path(image))  # type: ignore[attr-defined]
        rows = rows[~dataset.index.crowd[rows]]  # type: ignore[attr-defined]
        kept += len(dataset._objects(rows, file).rows)  # type: ignore[attr-defined]
    assert kept == ledger.objects


def files_below_once(folders: list[Path]) -> int:
    """Files below folders without those that a link to a parent repeats."""
    return sum(len(names) for f in folders for _, _, names in os.walk(f))


# Each example is checked and loaded; the seed of the examples is fixed.
many = settings(
    max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.filterwarnings("ignore:.*refer to image ids")
@many
@given(st.lists(annotation, max_size=8), extras)
def test_random_coco_datasets(rows: list[dict[str, Any]], chosen: set[str]) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        count = random_coco(folder / "data", rows, chosen)
        compare(folder / "data", count, [folder / "data" / "train"])
    finally:
        shutil.rmtree(folder)


@many
@given(
    st.lists(st.lists(label, max_size=3), min_size=1, max_size=4),
    extras,
    st.sampled_from([".txt", ".TXT"]),
)
def test_random_yolo_datasets(lines: list[list[str]], chosen: set[str], suffix: str) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        count = random_yolo(folder / "data", lines, chosen, suffix)
        below = folder / "data" / "train"
        compare(folder / "data", count, [below / "images", below / "labels"])
    finally:
        shutil.rmtree(folder)


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
