from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rfdetr.data.coco import CocoSplits
from rfdetr.data.layouts import detect_layout
from rfdetr.data.yolo import YoloSplits, label_path
from rfdetr.errors import DatasetError
from tests.datasets import make_coco, make_roboflow, make_yolo


def test_roboflow_export(tmp_path: Path) -> None:
    layout = detect_layout(make_roboflow(tmp_path))
    assert layout.kind == "roboflow"
    assert list(layout.splits) == ["train", "val", "test"]
    assert layout.require("val").images == (tmp_path / "valid",)
    index = CocoSplits(layout).index("val")
    assert len(index) == 3
    assert index.path(2) == tmp_path / "valid" / "image_0002.jpg"
    assert index.class_names == ("washer", "bolt", "nut")


def test_val_is_valid(tmp_path: Path) -> None:
    layout = detect_layout(make_roboflow(tmp_path, splits={"train": 2, "val": 1}))
    assert layout.require("val").images == (tmp_path / "val",)
    assert "test" not in layout.splits


def test_plain_coco(tmp_path: Path) -> None:
    layout = detect_layout(make_coco(tmp_path / "a", first_id=5), "coco")
    index = CocoSplits(layout).index("val")
    assert set(index.labels) <= {5, 6, 7}
    assert index.class_names[5:] == ("washer", "bolt", "nut")
    assert index.num_classes == 7
    assert len(index.class_names) == 8
    (tmp_path / "a/images").mkdir()
    (tmp_path / "a/val2017").rename(tmp_path / "a/images/val2017")
    assert len(CocoSplits(detect_layout(tmp_path / "a", "coco")).index("val")) == 3


@pytest.mark.parametrize("yaml_name", ["data.yaml", "data.yml"])
@pytest.mark.parametrize("valid", ["val", "valid", "validation"])
def test_yolo(tmp_path: Path, yaml_name: str, valid: str) -> None:
    splits = {"train": 4, valid: 2, "test": 1}
    root = make_yolo(tmp_path, splits=splits, yaml_name=yaml_name)
    for layout in (detect_layout(root), detect_layout(root, "yolo")):
        assert layout.kind == "yolo"
        assert layout.require("val").images == (root / valid / "images",)
        assert len(YoloSplits(layout).index("val")) == 2


NAMES = "names: {0: washer, 1: bolt, 2: nut}\n"


@pytest.mark.parametrize(
    "text",
    [
        NAMES,  # no paths: the usual folders
        NAMES + "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n",
        NAMES + "path: .\ntrain: train/images\nvalid: valid/images\ntest: test/images\n",
        NAMES + "train: [train/images]\nval: valid/images\ntest: test.txt\n",
        NAMES + "path: {root}\ntrain: train\nval: valid\ntest: test\n",
    ],
)
def test_paths_of_a_yaml_file(tmp_path: Path, text: str) -> None:
    root = make_yolo(tmp_path / "set", yaml_text=text.replace("{root}", str(tmp_path / "set")))
    listed = "\n".join(f"./test/images/image_{i:04d}.png" for i in range(2))
    (root / "test.txt").write_text(listed)
    splits = YoloSplits(detect_layout(root))
    assert [len(splits.index(name)) for name in ("train", "val", "test")] == [6, 3, 2]
    assert len(splits.index("test").labels) > 0
    assert splits.index("train").class_names == ("washer", "bolt", "nut")


@pytest.mark.parametrize("test", ["../test/images", "test/images", "/none/test", "[a, b]"])
def test_an_absent_test_folder_is_not_a_test_split(tmp_path: Path, test: str) -> None:
    text = NAMES + f"train: ../train/images\nval: ../valid/images\ntest: {test}\n"
    root = make_yolo(tmp_path, splits={"train": 3, "valid": 2}, yaml_text=text)
    assert list(detect_layout(root).splits) == ["train", "val"]


def test_usual_folders_take_the_place_of_absent_ones_with_a_warning(tmp_path: Path) -> None:
    text = NAMES + "train: train/images\nval: val/images\n"
    root = make_yolo(tmp_path, splits={"train": 3, "valid": 2}, yaml_text=text)
    with pytest.warns(UserWarning, match=r"val/images does not exist.*Using .*valid/images"):
        layout = detect_layout(root)
    assert layout.require("val").images == (root / "valid/images",)
    (root / "data.yaml").write_text(text.replace("val/images", "[valid/images, more]"))
    with pytest.raises(DatasetError, match="val: more does not exist"):
        detect_layout(root)


def test_an_absent_validation_folder_lists_what_was_found(tmp_path: Path) -> None:
    text = NAMES + "train: train/images\nval: val/images\n"
    root = make_yolo(tmp_path, splits={"train": 3}, yaml_text=text)
    with pytest.raises(DatasetError, match=r"val/images does not exist.*Found in .*train/"):
        detect_layout(root)


def test_an_empty_test_split_has_an_empty_index(tmp_path: Path) -> None:
    root = make_yolo(tmp_path, splits={"train": 3, "valid": 2, "test": 0})
    splits = YoloSplits(detect_layout(root), masks=True)
    assert (len(splits.index("test")), len(splits.index("val"))) == (0, 2)
    for file in (root / "valid/images").iterdir():
        file.unlink()
    with pytest.raises(DatasetError, match="no images"):
        YoloSplits(detect_layout(root)).index("val")


def test_a_test_file_without_images_has_an_empty_index(tmp_path: Path) -> None:
    root = make_roboflow(tmp_path)
    edit(
        root / "test/_annotations.coco.json",
        lambda content: content.update(images=[], annotations=[], categories=[]),
    )
    index = CocoSplits(detect_layout(root), masks=True).index("test")
    assert (len(index), index.class_names) == (0, ("washer", "bolt", "nut"))


@pytest.mark.parametrize(
    "names", ["[yes, no, 01]", "{0: yes, 1: no, 2: 01}", "\n- yes\n- no\n- 01"]
)
def test_names_are_read_as_they_are_written(tmp_path: Path, names: str) -> None:
    root = make_yolo(tmp_path, yaml_text=f"nc: 3\nnames: {names}\n")
    assert detect_layout(root).names == ("yes", "no", "01")


def test_ultralytics_folders(tmp_path: Path) -> None:
    root = make_yolo(tmp_path, yaml_text="names: [washer, bolt, nut]\n")
    for kind in ("images", "labels"):
        for split in ("train", "valid", "test"):
            (root / kind).mkdir(exist_ok=True)
            (root / split / kind).rename(root / kind / split)
    index = YoloSplits(detect_layout(root)).index("train")
    assert len(index) == 6
    assert len(index.labels) > 0


def test_label_path() -> None:
    assert label_path(Path("/a/images/b/images/c/d.e.jpg")) == Path("/a/images/b/labels/c/d.e.txt")
    assert label_path(Path("/images.jpg")) == Path("/images.txt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: {1: a, 2: b}\n", "0..1"),
        ("names: {0: a, x: b}\n", "0..1"),
        ("names: abc\n", "list of class names"),
        ("nc: 3\nnames: [a, b]\n", "nc: is 3"),
        ("train: nowhere\nnames: [a]\n", "nowhere does not exist"),
        ("names: [a\n", "not valid YAML"),
        ("- a\n", "expected keys"),
        ("names: [a, {b: c}]\n", "only strings"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DatasetError, match=words) as caught:
        detect_layout(tmp_path)
    assert "data.yaml" in str(caught.value)


def test_nothing_found_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "Train").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for kind, words in (
        ("roboflow", r"_annotations\.coco\.json.*data\.yaml"),
        ("coco", r"instances_train2017\.json"),
        ("yolo", r"data\.yaml or data\.yml"),
    ):
        with pytest.raises(DatasetError, match=rf"{words}.*Found in .*Train/, notes\.txt"):
            detect_layout(tmp_path, kind)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="does not exist"):
        detect_layout(tmp_path / "none")


def test_missing_split_names_what_was_expected(tmp_path: Path) -> None:
    layout = detect_layout(make_roboflow(tmp_path, splits={"train": 2}))
    with pytest.raises(DatasetError, match=r"valid/_annotations.*or val/.*Found in .*train/"):
        layout.require("val")


def edit(path: Path, change: object) -> None:
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("suffix", ["jpeg", "png", "gif", "webp", "ppm", "tiff"])
def test_yolo_folders_are_read_in_every_format(tmp_path: Path, suffix: str) -> None:
    root = make_yolo(tmp_path, suffix=suffix)
    index = YoloSplits(detect_layout(root)).index("train")
    assert len(index) == 6
    assert all(index.path(i).suffix == f".{suffix}" for i in range(6))


def test_all_problems_of_a_file_come_together(tmp_path: Path) -> None:
    root = make_roboflow(tmp_path)

    def spoil(content: dict) -> None:
        content["annotations"][0]["category_id"] = 77
        content["images"].append(dict(content["images"][0]))
        content["images"].append({"id": 99, "file_name": "sub/gone.jpg"})

    edit(root / "train/_annotations.coco.json", spoil)
    with pytest.raises(DatasetError) as caught:
        CocoSplits(detect_layout(root)).index("train")
    text = str(caught.value)
    assert "annotation 1: category 77" in text
    assert "image id 1 occurs more than once" in text
    assert "gone.jpg does not exist" in text
    assert "train/_annotations.coco.json: 3 problem(s)" in text


def test_rows_of_unknown_images_are_left_out_with_a_warning(tmp_path: Path) -> None:
    root = make_roboflow(tmp_path)
    path = root / "train/_annotations.coco.json"
    before = len(CocoSplits(detect_layout(root)).index("train").labels)

    def dangle(content: dict) -> None:
        row = {"id": 999, "image_id": 555, "category_id": 0, "bbox": [0, 0, 1, 1]}
        content["annotations"].insert(0, row)

    edit(path, dangle)
    with pytest.warns(UserWarning, match="1 annotation"):
        index = CocoSplits(detect_layout(root)).index("train")
    assert len(index.labels) == before


@pytest.mark.parametrize("change", ["rename", "renumber", "swap"])
def test_splits_that_disagree_on_a_category(tmp_path: Path, change: str) -> None:
    root = make_roboflow(tmp_path)

    def disagree(content: dict) -> None:
        first, second = content["categories"][:2]
        if change == "rename":
            first["name"] = "screw"
        elif change == "renumber":
            first["id"] = 50
            content["annotations"] = []
        else:
            first["id"], second["id"] = second["id"], first["id"]

    edit(root / "valid/_annotations.coco.json", disagree)
    splits = CocoSplits(detect_layout(root))
    assert len(splits.index("train")) == 6
    with pytest.raises(DatasetError, match=r"valid.*differ from those of .*train"):
        splits.index("val")


def test_ghost_parent_is_dropped_in_every_split(tmp_path: Path) -> None:
    splits = CocoSplits(detect_layout(make_roboflow(tmp_path, parent="parts")))
    for name in ("val", "train"):
        index = splits.index(name)
        assert index.class_names == ("washer", "bolt", "nut")
        assert set(index.labels) <= {0, 1, 2}


def test_reading_leaves_the_folder_alone(tmp_path: Path) -> None:
    for number, make in enumerate((make_roboflow, make_coco, make_yolo)):
        root = make(tmp_path / str(number))
        before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
        kind = "coco" if make is make_coco else "roboflow"
        layout = detect_layout(root, kind)  # type: ignore[arg-type]
        reader = YoloSplits if layout.kind == "yolo" else CocoSplits
        reader(layout, masks=True).index("train")
        assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
        shutil.rmtree(root)


def test_an_image_that_is_listed_twice_is_one_image(tmp_path: Path) -> None:
    root = make_yolo(tmp_path, splits={"train": 3, "valid": 1})
    names = [f"./train/images/{path.name}" for path in sorted((root / "train/images").iterdir())]
    (root / "train.txt").write_text("\n".join([*names, names[0]]))
    text = (root / "data.yaml").read_text().replace("train: train/images", "train: train.txt")
    (root / "data.yaml").write_text(text)
    assert len(YoloSplits(detect_layout(root)).index("train")) == 3


@pytest.mark.parametrize("names", ["[a, ' ']", "{0: a, 1: ''}"])
def test_a_class_without_a_name_is_refused(tmp_path: Path, names: str) -> None:
    make_yolo(tmp_path, splits={"train": 1, "valid": 1})
    (tmp_path / "data.yaml").write_text(f"names: {names}\n")
    with pytest.raises(DatasetError, match="not empty"):
        detect_layout(tmp_path)


def test_a_split_may_leave_out_categories_of_train(tmp_path: Path) -> None:
    root = make_roboflow(tmp_path, splits={"train": 4, "valid": 2})
    path = root / "valid/_annotations.coco.json"
    document = json.loads(path.read_text())
    expected = CocoSplits(detect_layout(root)).index("val").labels
    path.write_text(json.dumps({**document, "categories": []}))
    splits = CocoSplits(detect_layout(root))
    splits.index("train")
    assert (splits.index("val").labels == expected).all()


def test_plain_coco_with_an_annotated_test_split(tmp_path: Path) -> None:
    root = make_coco(tmp_path, splits={"train": 3, "val": 2, "test": 2})
    layout = detect_layout(root, "coco")
    assert layout.splits["test"].annotations == root / "annotations/instances_test2017.json"
    assert layout.splits["test"].images == (root / "test2017",)


@pytest.mark.parametrize(
    "text", ["nc: '2'\nnames: [a, b]\n", "names: {'0': a, '1': b}\n", "names: {1: b, '0': a}\n"]
)
def test_numbers_of_data_yaml_may_be_text(tmp_path: Path, text: str) -> None:
    root = make_yolo(tmp_path, yaml_text=text)
    assert detect_layout(root).names == ("a", "b")
