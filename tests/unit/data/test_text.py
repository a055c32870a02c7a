from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path

import pytest

from rfdetr.checks import CheckConfig, check_dataset
from rfdetr.data.coco_json import read_coco
from rfdetr.data.index import missing_files
from rfdetr.data.layouts import detect_layout
from rfdetr.data.text import read_text
from rfdetr.data.yolo import YoloSplits
from rfdetr.data.yolo_labels import parse_line, read_labels
from rfdetr.errors import DatasetError
from tests.datasets import make_yolo


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_in_a_certain_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0 0.5 0.5 0.2 0.4\nö", encoding=encoding)
    assert read_text(path) == "0 0.5 0.5 0.2 0.4\nö"
    rows, problems = read_labels(path, 2)
    assert rows[0].box == pytest.approx((0.4, 0.3, 0.6, 0.7))
    assert [problem.line for problem in problems] == [2]


def test_compressed_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for packed, name in ((gzip.compress(b"{}"), "gzip"), (lzma.compress(b"{}"), "xz")):
        path.write_bytes(packed)
        with pytest.raises(UnicodeError, match=f"compressed by {name}. Unpack the file"):
            read_text(path)
        with pytest.raises(DatasetError, match=f"compressed by {name}"):
            read_coco(path)


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("latin-1", r"byte 0xf6 in line 2; it may be Latin-1 or Windows-1252"),
        ("utf-16-le", "it looks like UTF-16"),
    ],
)
def test_other_text_is_refused_with_the_remedy(tmp_path: Path, encoding: str, words: str) -> None:
    path = tmp_path / "a.txt"
    text = "0 0.5\nö" if encoding == "latin-1" else "0 0.5\n\ud800"
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    with pytest.raises(UnicodeError, match=rf"{words}.*Save the file as UTF-8"):
        read_text(path)
    assert "Save the file as UTF-8" in str(read_labels(path, 2)[1][0])


def test_every_text_of_a_yolo_dataset_may_be_utf_16(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data", splits={"train": 3, "valid": 2})
    expected = YoloSplits(detect_layout(root)).index("train")
    (root / "train.txt").write_text("\n".join(map(str, sorted(root.glob("train/images/*")))))
    (root / "data.yaml").write_text(
        (root / "data.yaml").read_text().replace("train/images", "train.txt")
    )
    for path in [*root.glob("**/*.txt"), root / "data.yaml"]:
        path.write_text(path.read_text(), encoding="utf-16")
    index = YoloSplits(detect_layout(root)).index("train")
    assert len(index) == 3
    assert (index.boxes == expected.boxes).all()
    (root / "train.txt").write_bytes(b"caf\xe9.png")
    with pytest.raises(DatasetError, match=r"train\.txt: the list of images is not UTF-8"):
        YoloSplits(detect_layout(root)).index("train")


def test_lines_end_as_in_editors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(
        b"0 0.5 0.5 0.2 0.2\r0 0.5 0.5 0.2 0.2\r\n\n0 0.5 0.5\f0.2 0.2"
    )
    rows, problems = read_labels(tmp_path / "a.txt", 1)
    assert [row.line for row in rows] == [1, 2, 4]
    assert not problems


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    label = next(root.glob("train/labels/*.txt"))
    label.unlink()
    os.mkfifo(label)
    assert "not a regular file" in str(read_labels(label, 2)[1][0])
    with pytest.raises(DatasetError, match="not a regular file"):
        read_coco(label)
    assert not list(missing_files(root, ["data.yaml"]))
    assert list(missing_files(label.parent, [label.name])) == [label.name]


def test_attributes_of_macos_are_not_hidden_images(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    images = root / "train/images"
    (images / "._image_0000.png").write_bytes(b"\0\5\x16\7" + bytes(90))
    config = CheckConfig()
    report = check_dataset(root, "yolo", config=config, workers=1, progress=False)
    assert "file-hidden" not in report.counts
    (images / "._image_0001.png").write_bytes((images / "image_0001.png").read_bytes())
    report = check_dataset(root, "yolo", config=config, workers=1, progress=False)
    assert report.counts["file-hidden"] == 1


@pytest.mark.parametrize(("mark", "name"), [(",", "commas"), (";", "semicolons")])
def test_the_wrong_separator_is_named(mark: str, name: str) -> None:
    with pytest.raises(DatasetError, match=f"separated by {name}"):
        parse_line(f"0{mark}0.5{mark}0.5{mark}0.2{mark}0.2", 1)
