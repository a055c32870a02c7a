from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rfdetr.data.coco import CocoSplits
from rfdetr.data.index import AnnotationIndex, PackedStrings
from rfdetr.data.layouts import detect_layout
from rfdetr.data.spawn import safe_workers
from rfdetr.errors import DatasetError
from tests.datasets import make_roboflow


@pytest.fixture
def index(tmp_path: Path) -> AnnotationIndex:
    root = make_roboflow(tmp_path, segmentation=True)
    return CocoSplits(detect_layout(root), masks=True).index("train")


def test_texts() -> None:
    texts = ["a.jpg", "", "ünï/б.png", "x" * 300]
    packed = pickle.loads(pickle.dumps(PackedStrings(texts)))
    assert list(packed) == texts
    assert packed[-1] == texts[-1]
    assert packed[1:3] == texts[1:3]
    assert len(PackedStrings([])) == 0
    with pytest.raises(IndexError):
        packed[4]


def test_a_pickled_index_reads_the_same_polygons(index: AnnotationIndex) -> None:
    assert index.outlines is not None
    before = [index.outlines[row] for row in range(len(index.labels))]
    copy = pickle.loads(pickle.dumps(index))
    assert [copy.outlines[row] for row in range(len(copy.labels))] == before
    np.testing.assert_array_equal(copy.boxes, index.boxes)


def test_a_million_rows_pickle_small() -> None:
    count = 1_000_000
    index = AnnotationIndex(
        root=Path(),
        names=PackedStrings(["a.jpg"]),
        image_ids=np.zeros(1, np.int64),
        first=np.array([0, count]),
        boxes=np.zeros((count, 4), np.float32),
        labels=np.zeros(count, np.int64),
        areas=np.zeros(count, np.float32),
        crowd=np.zeros(count, np.bool_),
        class_names=("a",),
        num_classes=1,
    )
    assert len(pickle.dumps(index)) < 40 * count


def test_a_file_that_changed_is_refused(index: AnnotationIndex) -> None:
    path = index.outlines.path  # type: ignore[union-attr]
    path.write_text(path.read_text() + " ")
    with pytest.raises(DatasetError, match="changed while it was in use"):
        index.outlines[0]  # type: ignore[index]


def test_a_forked_worker_reads_on_its_own(index: AnnotationIndex) -> None:
    """Parent and child alternate; a shared file position would give the wrong polygon."""
    outlines = index.outlines
    assert outlines is not None
    rows = range(len(index.labels))
    expected = [outlines[row] for row in rows]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        same = all([outlines[row] for row in rows] == expected for _ in range(200))
        os.write(write, b"y" if same else b"n")
        os._exit(0)
    same = all([outlines[row] for row in rows] == expected for _ in range(200))
    answer = os.read(read, 1)
    os.waitpid(child, 0)
    assert same
    assert answer == b"y"


SCRIPT = """
import multiprocessing, warnings
from rfdetr.data.spawn import safe_workers
{guard}
{indent}multiprocessing.set_start_method({method!r})
{indent}with warnings.catch_warnings(record=True) as caught:
{indent}    warnings.simplefilter("always")
{indent}    print(safe_workers(3), len(caught))
"""


@pytest.mark.parametrize(
    ("method", "guarded", "printed"),
    [
        ("spawn", True, "3 0"),
        ("spawn", False, "0 1"),
        ("forkserver", False, "0 1"),
        ("fork", False, "3 0"),
    ],
)
def test_unguarded_scripts_get_no_workers(
    tmp_path: Path, method: str, guarded: bool, printed: str
) -> None:
    script = tmp_path / "train.py"
    guard = 'if __name__ == "__main__":' if guarded else "print(end='')"
    indent = "    " if guarded else ""
    script.write_text(SCRIPT.format(guard=guard, indent=indent, method=method))
    command = [sys.executable, str(script)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == printed
    assert safe_workers(0) == 0
