from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfdetr.data.demo import DIGIT_SIDE, build_demo, main
from rfdetr.errors import DatasetError

SMALL = {"train": 60, "valid": 20, "test": 20}


def digest(root: Path) -> str:
    parts = [(p.relative_to(root).as_posix(), p.read_bytes()) for p in sorted(root.rglob("*.*"))]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def document(root: Path, split: str) -> dict:
    return json.loads((root / split / "_annotations.coco.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("demo") / "set", **SMALL)


def test_same_arguments_same_bytes(demo: Path, tmp_path: Path) -> None:
    assert digest(build_demo(tmp_path / "again", **SMALL)) == digest(demo)
    assert digest(build_demo(tmp_path / "other", seed=1, **SMALL)) != digest(demo)


def test_layout_and_annotations(demo: Path) -> None:
    assert sorted(p.name for p in demo.iterdir()) == ["test", "train", "valid"]
    backgrounds = 0
    for split, count in SMALL.items():
        content = document(demo, split)
        assert [c["name"] for c in content["categories"]] == ["zero", "one", "four"]
        assert len(content["images"]) == count
        by_image: dict[int, list] = {image["id"]: [] for image in content["images"]}
        for row in content["annotations"]:
            x, y, w, h = row["bbox"]
            assert DIGIT_SIDE[0] <= max(w, h) <= DIGIT_SIDE[1]
            assert 0 <= x <= x + w <= 128
            assert 0 <= y <= y + h <= 128
            assert row["area"] == w * h
            by_image[row["image_id"]].append(row["bbox"])
        assert max(map(len, by_image.values())) <= 4
        backgrounds += sum(not boxes for boxes in by_image.values())
        for image in content["images"]:
            with Image.open(demo / split / image["file_name"]) as opened:
                assert opened.size == (128, 128)
    assert 0 < backgrounds < sum(SMALL.values()) * 0.2


def test_digits_stand_out(demo: Path) -> None:
    content = document(demo, "train")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    spreads = []
    for row in content["annotations"]:
        x, y, w, h = row["bbox"]
        gray = np.asarray(Image.open(demo / "train" / names[row["image_id"]]).convert("L"))
        low, high = np.percentile(gray[y : y + h, x : x + w], [5, 95])
        spreads.append(high - low)
    assert np.percentile(spreads, 5) > 60


def test_options_and_left_out_splits(tmp_path: Path) -> None:
    root = build_demo(tmp_path / "set", classes=(7, 3), train=5, valid=2, test=0, size=96)
    assert sorted(p.name for p in root.iterdir()) == ["train", "valid"]
    assert [c["name"] for c in document(root, "train")["categories"]] == ["seven", "three"]
    assert {i["width"] for i in document(root, "valid")["images"]} == {96}


def test_default_size_takes_seconds(tmp_path: Path) -> None:
    start = time.process_time()
    build_demo(tmp_path / "set")
    assert time.process_time() - start < 30


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": (1, 1)}, "different digits"),
        ({"classes": (10,)}, "different digits"),
        ({"train": 0}, "at least one image"),
        ({"size": 40}, "at least 52"),
    ],
)
def test_bad_arguments_leave_nothing(arguments: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=words):
        build_demo(tmp_path / "set", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--train", "2"])
    assert stopped.value.code == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_command_line(tmp_path: Path) -> None:
    main([str(tmp_path / "set"), "--train", "3", "--valid", "1", "--test", "1", "--classes", "5"])
    assert [c["name"] for c in document(tmp_path / "set", "test")["categories"]] == ["five"]
