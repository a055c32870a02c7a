from __future__ import annotations

import copy
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfdetr.data.coco_annotations import UNKNOWN, parse_segmentation
from rfdetr.data.coco_json import CocoFile, read_coco
from rfdetr.errors import DatasetError

POLYGON = [[0.0, 0.0, 1.0, 1.0, 0.0, 1.0]]
GOOD: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "ä.jpg", "width": 4, "height": 3}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [0, 0.5, 1, 1], "segmentation": POLYGON},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 2, 2], "area": 3, "iscrowd": 1},
    ],
    "categories": [{"id": 2, "name": "x", "supercategory": "y"}],
}


def write(tmp_path: Path, content: Any, indent: int | None = None) -> Path:
    path = tmp_path / "a.json"
    if not isinstance(content, bytes):
        content = json.dumps(content, indent=indent).encode()
    path.write_bytes(content)
    return path


def segmentation(coco: CocoFile, row: int) -> Any:
    table = coco.annotations
    return parse_segmentation(coco.data[table.starts[row] : table.stops[row]])


def changed(**values: Any) -> dict[str, Any]:
    content = copy.deepcopy(GOOD)
    row = {**content["annotations"][0], **values}
    content["annotations"].append({k: v for k, v in row.items() if v is not ...})
    return content


def test_columns(tmp_path: Path) -> None:
    coco = read_coco(write(tmp_path, GOOD))
    assert coco.problems == []
    assert (coco.images.ids.tolist(), coco.images.names) == ([7], ["ä.jpg"])
    assert (coco.images.widths.tolist(), coco.images.heights.tolist()) == ([4], [3])
    rows = coco.annotations
    assert rows.ids.tolist() == [1, 2]
    assert rows.boxes.tolist() == [[0, 0.5, 1, 1], [0, 0, 2, 2]]
    assert np.isnan(rows.areas[0])
    assert rows.areas[1] == 3
    assert rows.crowd.tolist() == [False, True]
    assert segmentation(coco, 0) == POLYGON
    assert segmentation(coco, 1) is None
    (category,) = coco.categories
    assert (category.id, category.name, category.supercategory) == (2, "x", "y")


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        ({"bbox": [0, float("nan"), 1, 1]}, "bbox", "four finite numbers"),
        ({"bbox": [0, 1, 1]}, "bbox", "four finite numbers"),
        ({"bbox": {"x": 1}}, "bbox", "four finite numbers"),
        ({"bbox": ...}, "bbox", "missing"),
        ({"area": float("inf")}, "area", "finite number"),
        ({"area": True}, "area", "finite number"),
        ({"image_id": "7"}, "image_id", "not an integer"),
        ({"image_id": None}, "image_id", "null"),
        ({"category_id": 2.5}, "category_id", "not an integer"),
        ({"id": 2**70}, "id", "beyond 64 bits"),
        ({"iscrowd": "no"}, "iscrowd", "0 or 1"),
    ],
)
def test_a_bad_row_is_reported_and_the_others_are_read(
    tmp_path: Path, values: dict, key: str, words: str
) -> None:
    path = write(tmp_path, changed(**values), indent=1)
    coco = read_coco(path, tolerant=True)
    assert coco.annotations.rows.tolist() == [0, 1]
    (problem,) = coco.problems
    assert (problem.section, problem.row, problem.key) == ("annotations", 2, key)
    assert words in problem.reason
    lines = path.read_text().splitlines()
    entries = [n for n, line in enumerate(lines, 1) if line == "  {"]  # 1 image, 3 annotations
    assert problem.line == entries[3]
    with pytest.raises(DatasetError, match=rf"a\.json(.|\n)*annotations\[2\]\.{key}"):
        read_coco(path)


@pytest.mark.parametrize(
    "values",
    [
        {"image_id": 7.0, "iscrowd": True},
        {"segmentation": [[float("nan")] * 6]},
        {"area": None, "iscrowd": None, "segmentation": None},
        {"extra": {"deep": [[float("nan")]]}},
    ],
)
def test_harmless_differences_are_read(tmp_path: Path, values: dict) -> None:
    coco = read_coco(write(tmp_path, changed(**values)))
    assert len(coco.annotations.ids) == 3
    assert segmentation(coco, 0) == POLYGON


def test_missing_ids_and_sizes_are_unknown(tmp_path: Path) -> None:
    content = changed(id=...)
    del content["images"][0]["width"]
    coco = read_coco(write(tmp_path, content))
    assert coco.annotations.ids.tolist() == [1, 2, UNKNOWN]
    assert coco.images.widths.tolist() == [UNKNOWN]
    assert coco.images.heights.tolist() == [3]
    assert coco.problems == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b" \n ", "empty"),
        (b"[]", "not an object"),
        (b'{"images": [}', "line 1"),
        (b'{"images": [],\n"annotations": [],\n"categories": [1,,2]}', "line 3"),
        (b'{"images": [], "annotations": [], ', "truncated"),
        (b'{"images": [], "annotations": []}', "'categories'|categories.*missing"),
        (b'{"images": 1, "annotations": [], "categories": []}', "images.*not a list"),
        (b'{"images": [3], "annotations": [], "categories": []}', r"images\[0\].*not an object"),
        (b'{"images": [{"id":1,"file_name":"\xff"}], "annotations": [], "categories": []}', "utf"),
        (b'{"images":' + b"[" * 100_000, "nested"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-16"),
        (b'{"categories":[{"id":1,"name":""}],"images":[],"annotations":[]}', "name.*string"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, words: str) -> None:
    path = write(tmp_path, content)
    assert read_coco(path, tolerant=True).problems
    with pytest.raises(DatasetError, match=words) as caught:
        read_coco(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DatasetError, match="cannot be read"):
            read_coco(path, tolerant=True)


def test_byte_order_mark_keeps_the_byte_ranges(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    coco = read_coco(path)
    start, stop = coco.annotations.starts[0], coco.annotations.stops[0]
    assert json.loads(path.read_bytes()[start:stop]) == POLYGON


def test_byte_ranges_where_the_key_occurs_elsewhere(tmp_path: Path) -> None:
    content = changed(note='"segmentation": [[1]]', segmentation=[[5, 5, 6, 6, 7, 7]])
    content["info"] = {"segmentation": [[9]]}
    content = {"info": content.pop("info"), **content}
    coco = read_coco(write(tmp_path, content))
    assert segmentation(coco, 2) == [[5, 5, 6, 6, 7, 7]]
    text = json.dumps(content).replace('"segmentation": [[5', '"\\u0073egmentation": [[5')
    assert segmentation(read_coco(write(tmp_path, text.encode())), 2) == [[5, 5, 6, 6, 7, 7]]


def test_many_bad_rows_of_a_long_file_take_linear_time(tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    content["annotations"] = [{**GOOD["annotations"][0], "bbox": [1]}] * 30_000
    path = write(tmp_path, content, indent=1)
    start = time.process_time()
    coco = read_coco(path, tolerant=True)
    assert time.process_time() - start < 10
    assert len(coco.problems) == 10_001
    assert "20000 further" in coco.problems[-1].reason
    with pytest.raises(DatasetError, match="and 9981 more"):
        read_coco(path)


def test_mutated_files_never_end_in_a_traceback(tmp_path: Path) -> None:
    text = json.dumps(changed(area=float("nan")), indent=1).encode()
    rng = random.Random(0)
    junk = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"NaN",
        b"-",
        b"9" * 400,
        b"\xff",
        b"\\",
        b"null",
    ]
    path = tmp_path / "a.json"
    for _ in range(1500):
        mutated = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(mutated))
            if rng.random() < 0.5:
                mutated[place : place + rng.randint(0, 9)] = rng.choice(junk)
            else:
                mutated[place] = rng.randrange(256)
        path.write_bytes(mutated)
        coco = read_coco(path, tolerant=True)
        for problem in coco.problems:
            assert str(problem)
        for i in range(len(coco.annotations.ids)):
            segmentation(coco, i)


def test_collector_is_left_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    read_coco(path)
    assert gc.isenabled()
    gc.disable()
    try:
        read_coco(path)
        assert not gc.isenabled()
    finally:
        gc.enable()
