from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rfdetr.data.categories import (
    category_differences,
    check_ids,
    exported_table,
    raw_table,
)
from rfdetr.data.coco_json import Category
from rfdetr.errors import DatasetError


def categories(rows: list[dict]) -> list[Category]:
    return [Category(r["id"], r["name"], r.get("supercategory"), i) for i, r in enumerate(rows)]


def test_trees(parity: Path) -> None:
    stored = json.loads((parity / "training/dataset_conversion.json").read_text())
    assert len(stored["category_trees"]) == 6
    for tree in stored["category_trees"]:
        table = exported_table(categories(tree["categories"]), tree["annotated_ids"])
        expected = {int(k): v for k, v in tree["cat2label_1_11_2"].items()}
        assert dict(table.labels) == expected, tree["name"]
        assert list(table.class_names) == [name for _, name in tree["kept_1_11_2"]]
        assert table.num_classes == len(table.class_names)


def test_raw_ids_and_their_gaps() -> None:
    table = raw_table(categories([{"id": 3, "name": "c"}, {"id": 1, "name": "a"}]))
    assert table.class_names == ("N/A", "a", "N/A", "c")
    assert table.num_classes == 3
    assert table.lookup(np.array([3, 2, 1])).tolist() == [3, -1, 1]
    assert raw_table(categories([{"id": 0, "name": "a"}])).num_classes == 1


@pytest.mark.parametrize(
    ("rows", "raw", "words"),
    [
        ([], False, "list is empty"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], False, "id 1 is both 'a' and 'b'"),
        ([{"id": -1, "name": "a"}], True, "0..10000"),
        ([{"id": 10**12, "name": "a"}], True, "0..10000"),
    ],
)
def test_unusable_lists(rows: list[dict], raw: bool, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        check_ids(Path("a.json"), categories(rows), raw)
    check_ids(Path("a.json"), categories([{"id": -1, "name": "a"}]), False)


def test_a_project_named_like_its_only_class() -> None:
    rows = [
        {"id": 0, "name": "washer", "supercategory": "none"},
        {"id": 1, "name": "washer", "supercategory": "washer"},
    ]
    assert exported_table(categories(rows), {1}).labels == {1: 0}
    alone = [{"id": 1, "name": "washer", "supercategory": "washer"}]
    assert exported_table(categories(alone), {1}).labels == {1: 0}
    assert exported_table(categories(rows), {0, 1}).class_names == ("washer", "washer")


def test_a_split_may_list_a_part_of_the_categories() -> None:
    train = categories([{"id": 1, "name": "a"}, {"id": 2, "name": "b"}])
    assert category_differences(train[:1], train) == []
    assert category_differences([*train, *categories([{"id": 3, "name": "c"}])], train) == []
    other = categories([{"id": 1, "name": "b"}, {"id": 5, "name": "a"}])
    assert [number for number, _ in category_differences(other, train)] == [1, 5]
