"""A repair first looks for what the dataset means; only what cannot be saved is dropped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rfdetr.checks import CheckConfig, DatasetReport, check_dataset
from rfdetr.checks.cli import main
from rfdetr.checks.repair.copy import repair_dataset
from rfdetr.checks.repair.result import RepairResult
from rfdetr.config import RFDETRNanoConfig, TrainConfig
from rfdetr.errors import DatasetError
from rfdetr.training import RFDETRDataModule
from tests.datasets import make_roboflow, make_yolo

SPLITS = {"train": 6, "valid": 3, "test": 2}
JSON = "_annotations.coco.json"
Damage = Callable[[Path, dict[str, Any], str], None]


def check(folder: Path, cache: Path) -> DatasetReport:
    config = CheckConfig(max_findings_per_code=10**9)
    return check_dataset(folder, config=config, workers=1, cache_dir=cache, progress=False)


def repair(folder: Path, out: Path, *, allow_drop: bool = False) -> RepairResult:
    checked = partial(check, cache=folder.parent / "cache")
    return repair_dataset(folder, checked(folder), out, check=checked, allow_drop=allow_drop)


def damage(root: Path, change: Damage) -> dict[str, Any]:
    """Change the document of every split; return the original ones."""
    originals = {}
    for split in SPLITS:
        file = root / split / JSON
        document = json.loads(file.read_text())
        originals[split] = json.loads(file.read_text())
        change(root / split, document, split)
        file.write_text(json.dumps(document))
    return originals


def objects(folder: Path) -> int:
    """Objects that the datamodule loads; 0 if training refuses the dataset."""
    model = RFDETRNanoConfig.model_validate({"pretrain_weights": None, "resolution": 64})
    config = TrainConfig.model_validate({"dataset_dir": str(folder), "num_workers": 0})
    module = RFDETRDataModule(model, config)
    try:
        module.setup("fit")
        loaders = module.val_dataloader(), module.test_dataloader()
        sets = [module.train_dataloader().dataset, *(loader.dataset for loader in loaders)]
        index = [s.index for s in sets]  # type: ignore[attr-defined]
        loaded = [
            s[i] for s, rows in zip(sets[1:], index[1:], strict=True) for i in range(len(rows))
        ]
        return len(index[0].labels) + sum(len(target["labels"]) for _, target in loaded)
    except DatasetError:
        return 0


def _names(change: Callable[[str, str], str]) -> Damage:
    def apply(_folder: Path, document: dict[str, Any], split: str) -> None:
        for image in document["images"]:
            image["file_name"] = change(image["file_name"], split)

    return apply


def _deeper(folder: Path, document: dict[str, Any], _split: str) -> None:
    (folder / "images").mkdir()
    for image in document["images"]:
        (folder / image["file_name"]).rename(folder / "images" / image["file_name"])


def _backslashes(folder: Path, document: dict[str, Any], split: str) -> None:
    _deeper(folder, document, split)
    _names(lambda name, _: f"images\\{name}")(folder, document, split)


def _encoded(folder: Path, document: dict[str, Any], _split: str) -> None:
    for image in document["images"]:
        name = image["file_name"]
        (folder / name).rename(folder / f"an image {name}")
        image["file_name"] = f"an%20image%20{name}"


def _no_ids(_folder: Path, document: dict[str, Any], _split: str) -> None:
    for annotation in document["annotations"]:
        del annotation["id"]


def _text_ids(_folder: Path, document: dict[str, Any], _split: str) -> None:
    for record in (*document["images"], *document["categories"]):
        record["id"] = f"x{record['id']}"
    for annotation in document["annotations"]:
        annotation["image_id"] = f"x{annotation['image_id']}"
        annotation["category_id"] = f"x{annotation['category_id']}"
        annotation["id"] = str(annotation["id"])


def _references_by_name(_folder: Path, document: dict[str, Any], _split: str) -> None:
    images = {image["id"]: image["file_name"] for image in document["images"]}
    categories = {category["id"]: category["name"] for category in document["categories"]}
    for annotation in document["annotations"]:
        annotation["image_id"] = images[annotation["image_id"]]
        annotation["category_id"] = categories[annotation["category_id"]]


def _text_numbers(_folder: Path, document: dict[str, Any], _split: str) -> None:
    for annotation in document["annotations"]:
        annotation["bbox"] = [str(value) for value in annotation["bbox"]]
        annotation.update(area="big", iscrowd="false")


def _flipped(_folder: Path, document: dict[str, Any], _split: str) -> None:
    for annotation in document["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x + w, y + h, -w, -h]


def _other_categories(_folder: Path, document: dict[str, Any], split: str) -> None:
    """Another order and spelling of the classes, as tools write that export one split at a time."""
    if split == "valid":
        number = {category["id"]: 12 - category["id"] for category in document["categories"]}
        for category in document["categories"]:
            category.update(id=number[category["id"]], name=f"{category['name'].upper()} ")
        for annotation in document["annotations"]:
            annotation["category_id"] = number[annotation["category_id"]]


CASES: dict[str, Damage] = {
    "other categories": _other_categories,
    "backslashes": _backslashes,
    "one folder deeper": _deeper,
    "absolute paths": _names(lambda name, split: f"/home/me/data/{split}/{name}"),
    "Windows paths": _names(lambda name, split: f"C:\\data\\{split}\\{name}"),
    "percent": _encoded,
    "URL": _names(lambda name, split: f"https://example.org/{split}/{name}?size=full"),
    "Label Studio upload": _names(lambda name, _: f"/data/upload/1/0a1b2c3d-{name}"),
    "Label Studio": _names(lambda name, split: f"/data/local-files/?d={split}/{name}"),
    "upper case": _names(lambda name, _: name.upper()),
    "no ids": _no_ids,
    "text ids": _text_ids,
    "references by name": _references_by_name,
    "text numbers": _text_numbers,
    "flipped boxes": _flipped,
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_meant_is_restored(name: str, tmp_path: Path) -> None:
    folder = make_roboflow(tmp_path / "data", splits=SPLITS)
    expected = check(folder, tmp_path / "cache")
    originals = damage(folder, CASES[name])
    result = repair(folder, tmp_path / "out")
    after = check(tmp_path / "out", tmp_path / "cache")
    assert after.errors == 0 and result.better, [(f.code, f.message) for f in after.findings]
    for split, original in originals.items():
        document = json.loads((tmp_path / "out" / split / JSON).read_text())
        boxes = [annotation["bbox"] for annotation in document["annotations"]]
        assert boxes == [annotation["bbox"] for annotation in original["annotations"]]
        assert len(document["images"]) == len(original["images"])
    for split, numbers in expected.statistics.items():
        assert after.statistics[split].class_counts == numbers.class_counts
    assert objects(tmp_path / "out") == sum(len(o["annotations"]) for o in originals.values())


OUTLINES: dict[str, Callable[[list[float]], Any]] = {
    "text": lambda ring: json.dumps([ring]),
    "one list": lambda ring: ring,
    "points": lambda ring: [list(zip(ring[::2], ring[1::2], strict=True))],
    "objects": lambda ring: [
        [{"x": x, "y": y} for x, y in zip(ring[::2], ring[1::2], strict=True)]
    ],
    "text numbers": lambda ring: [list(map(str, ring))],
}


@pytest.mark.parametrize("name", OUTLINES)
def test_outlines_are_restored_and_not_dropped(name: str, tmp_path: Path) -> None:
    folder = make_roboflow(tmp_path / "data", splits=SPLITS, segmentation=True)

    def change(_folder: Path, document: dict[str, Any], _split: str) -> None:
        for annotation in document["annotations"]:
            annotation["segmentation"] = OUTLINES[name](annotation["segmentation"][0])

    originals = damage(folder, change)
    repair(folder, tmp_path / "out")
    for split, original in originals.items():
        document = json.loads((tmp_path / "out" / split / JSON).read_text())
        for fixed, first in zip(document["annotations"], original["annotations"], strict=True):
            assert fixed["segmentation"] == first["segmentation"]


def test_many_outlines_are_not_dropped(tmp_path: Path) -> None:
    folder = make_roboflow(tmp_path / "data", splits=SPLITS, segmentation=True)

    def change(_folder: Path, document: dict[str, Any], _split: str) -> None:
        for annotation in document["annotations"]:
            annotation["segmentation"][0].append(5)

    damage(folder, change)
    result = repair(folder, tmp_path / "out")
    assert result.left["polygon-malformed"] > 5 and not result.better
    dropped = repair(folder, tmp_path / "dropped", allow_drop=True)
    assert "polygon-malformed" not in dropped.left


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_files_in_another_encoding_are_saved_as_utf8(encoding: str, tmp_path: Path) -> None:
    coco = make_roboflow(tmp_path / "coco", splits=SPLITS)
    yolo = make_yolo(tmp_path / "yolo", splits=SPLITS)
    files = [coco / split / JSON for split in SPLITS]
    for file in files:
        document = {**json.loads(file.read_text()), "info": {"by": "Jörg"}}
        file.write_bytes(json.dumps(document, ensure_ascii=False).encode(encoding))
    text = f"# Größe\n{(yolo / 'data.yaml').read_text()}"
    (yolo / "data.yaml").write_bytes(text.encode(encoding))
    for folder, name in ((coco, "out"), (yolo, "out-yolo")):
        repair(folder, tmp_path / name)
        after = check(tmp_path / name, tmp_path / "cache")
        assert after.errors == 0, [(f.code, f.message) for f in after.findings]
    assert json.loads((tmp_path / "out" / "train" / JSON).read_text())["info"] == {"by": "Jörg"}


def test_files_that_may_be_meant_are_a_decision(tmp_path: Path) -> None:
    folder = make_yolo(tmp_path / "data", splits=SPLITS, background=0)
    labels = folder / "train" / "labels"
    (labels / "image_0000.txt").rename(labels / "image_0000.png.txt")
    (labels / "image_0001.txt").rename(labels / "another.txt")
    result = repair(folder, tmp_path / "out")
    copied = {path.name for path in (tmp_path / "out" / "train" / "labels").iterdir()}
    assert {"image_0000.txt", "another.txt"} <= copied and "image_0001.txt" not in copied
    assert result.left["label-unreferenced"] == 1
    repair(folder, tmp_path / "dropped", allow_drop=True)
    assert not (tmp_path / "dropped" / "train" / "labels" / "another.txt").exists()


def test_an_ambiguous_name_is_not_guessed(tmp_path: Path) -> None:
    folder = make_roboflow(tmp_path / "data", splits=SPLITS)
    for place in ("a", "b"):
        (folder / "train" / place).mkdir()
        shutil.copy(folder / "train" / "image_0000.jpg", folder / "train" / place / "x.jpg")
    (folder / "train" / "image_0000.jpg").unlink()
    damage(folder, _names(lambda name, _: name.replace("image_0000", "x")))
    with pytest.raises(DatasetError, match="1 of the 6 images of train cannot be saved"):
        repair(folder, tmp_path / "out")


def test_more_than_a_trickle_is_not_dropped(tmp_path: Path) -> None:
    folder = make_roboflow(tmp_path / "data", splits=SPLITS)
    (folder / "train" / "image_0002.jpg").unlink()
    cache = str(tmp_path / "cache")
    command = [str(folder), "--cache", cache, "--no-progress", "--workers", "1", "--fix"]
    assert main([*command, str(tmp_path / "out")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data"]
    assert main([*command, str(tmp_path / "out"), "--allow-drop"]) == 0
    assert len(json.loads((tmp_path / "out" / "train" / JSON).read_text())["images"]) == 5


def test_the_same_images_in_train_and_valid_stay(tmp_path: Path) -> None:
    folder = make_yolo(tmp_path / "data", splits=SPLITS)
    text = "train: train/images\nval: train/images\nnames: [washer, bolt, nut]\n"
    (folder / "data.yaml").write_text(text)
    result = repair(folder, tmp_path / "out", allow_drop=True)
    assert len(list((tmp_path / "out" / "train" / "images").iterdir())) == 6
    assert not result.better and result.left["split-duplicate-image"] == 6


def test_links_become_files_and_dangling_links_are_left_out(tmp_path: Path) -> None:
    folder = make_roboflow(tmp_path / "data", splits=SPLITS)
    shutil.move(folder / "train" / "image_0001.jpg", tmp_path / "elsewhere.jpg")
    (folder / "train" / "image_0001.jpg").symlink_to("../../elsewhere.jpg")
    shutil.move(folder / "valid", tmp_path / "other")
    (folder / "valid").symlink_to(tmp_path / "other")
    (folder / "train" / "nowhere.jpg").symlink_to("nothing.jpg")
    (folder / "train" / "loop").symlink_to("..")
    result = repair(folder, tmp_path / "out")
    assert result.broken_links == ("train/nowhere.jpg",)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert objects(tmp_path / "out") == objects(folder)


def test_labels_are_restored(tmp_path: Path) -> None:
    folder = make_yolo(tmp_path / "data", splits=SPLITS, background=0)
    labels = sorted((folder / "train" / "labels").iterdir())
    before = objects(folder)
    labels[0].rename(folder / "train" / labels[0].name)
    labels[1].write_text(labels[1].read_text().replace(" ", ", "))
    names = ("washer", "bolt", "nut")
    rows = [line.split() for line in labels[2].read_text().splitlines()]
    labels[2].write_text("".join(f"{names[int(a)]} {' '.join(b)}\n" for a, *b in rows))
    rows = [line.split() for line in labels[3].read_text().splitlines()]
    size = (96, 64, 96, 64)
    pixels = [[a, *(str(float(v) * s) for v, s in zip(b, size, strict=True))] for a, *b in rows]
    labels[3].write_text("".join(" ".join(row) + "\n" for row in pixels))
    result = repair(folder, tmp_path / "out")
    assert objects(tmp_path / "out") == before
    after = check(tmp_path / "out", tmp_path / "cache")
    assert after.errors == 0 and result.better, [(f.code, f.message) for f in after.findings]
    original = [float(v) for row in rows for v in row]
    written = (tmp_path / "out" / "train" / "labels" / labels[3].name).read_text()
    assert [float(v) for v in written.split()] == pytest.approx(original, abs=1e-5)


def test_labels_beside_the_images_stay_there(tmp_path: Path) -> None:
    """The same names in both splits; one label has decimal commas, one is in another folder."""
    folder = make_yolo(tmp_path / "data", splits=SPLITS, background=0)
    for split in SPLITS:
        for file in sorted((folder / split / "labels").iterdir()):
            file.rename(folder / split / "images" / file.name)
        (folder / split / "labels").rmdir()
    before = objects(folder)
    labels = sorted((folder / "train" / "images").glob("*.txt"))
    repair(folder, tmp_path / "out")
    assert objects(tmp_path / "out") == before
    labels[0].write_text(labels[0].read_text().replace(".", ","))
    labels[-1].rename(folder / "train" / labels[-1].name)
    assert objects(folder) < before
    repair(folder, tmp_path / "second")
    assert objects(tmp_path / "second") == before


def test_images_that_training_reads_are_kept(tmp_path: Path) -> None:
    """Float images are not converted: the conversion would make them black."""
    folder = make_roboflow(tmp_path / "data", splits=SPLITS, suffix="tif")
    for file in folder.rglob("*.tif"):
        with Image.open(file) as image:
            levels = image.convert("F").point(lambda level: level * (1 / 255) + 0)
        levels.save(file)
    repair(folder, tmp_path / "out")
    for file in folder.rglob("*.tif"):
        assert (tmp_path / "out" / file.relative_to(folder)).read_bytes() == file.read_bytes()


values = st.sampled_from(
    [
        None,
        "",
        "1",
        "x1",
        0,
        1,
        2,
        -1,
        7.5,
        1e9,
        float("nan"),
        [],
        [1, 2],
        "../a.jpg",
        "train\\b.jpg",
    ]
)
keys = st.sampled_from(["id", "image_id", "category_id", "bbox", "file_name", "width", "area"])
edits = st.tuples(
    st.sampled_from(list(SPLITS)),
    st.sampled_from(["images", "annotations", "categories"]),
    st.integers(0, 20),
    keys,
    st.one_of(values, st.lists(st.floats(-50, 150), min_size=4, max_size=4)),
)
moves = st.sampled_from(
    ["delete", "empty", "cut", "deeper", "other split", "duplicate", "link", "png", "exif"]
)
file_edits = st.tuples(st.sampled_from(list(SPLITS)), st.integers(0, 5), moves)


def _damage_file(folder: Path, split: str, number: int, kind: str) -> None:
    file = folder / split / f"image_{number:04d}.jpg"
    if not file.is_file():
        return
    data = file.read_bytes()
    if kind == "delete":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif kind in ("deeper", "link"):
        (folder / split / "more").mkdir(exist_ok=True)
        file.rename(folder / split / "more" / file.name)
        if kind == "link":
            file.symlink_to(f"more/{file.name}")
    elif kind == "other split":
        file.rename(folder / ("valid" if split == "train" else "train") / f"moved_{file.name}")
    elif kind == "duplicate":
        (folder / "train" / f"copy_{file.name}").write_bytes(data)
    else:
        with Image.open(file) as image:
            exif = Image.Exif()
            exif[0x0112] = 6
            image.load()
            options = {"exif": exif.tobytes()} if kind == "exif" else {}
            image.save(file, "PNG" if kind == "png" else "JPEG", **options)


def _random_edit(folder: Path, edit: tuple[str, str, int, str, Any]) -> None:
    split, section, number, key, value = edit
    file = folder / split / JSON
    document = json.loads(file.read_text())
    records = document[section]
    if records:
        record = records[number % len(records)]
        if value is None:
            record.pop(key, None)
        else:
            record[key] = value
    file.write_text(json.dumps(document))


def assert_never_worse(folder: Path, allow_drop: bool) -> None:
    cache = folder.parent / "cache"
    before, could_train = check(folder, cache), objects(folder)
    out = folder.parent / "out"
    try:
        result = repair(folder, out, allow_drop=allow_drop)
    except DatasetError as error:
        assert "no copy was written" in str(error)
        assert not out.exists()
        return
    after = check(out, cache)
    assert after.errors <= before.errors
    assert sum(counts.errors for counts in result.after.values()) == after.errors
    if not allow_drop:
        assert objects(out) >= could_train
    assert not any(path.is_symlink() for path in out.rglob("*"))


random_datasets = settings(max_examples=15, deadline=None, database=None, derandomize=True)


@random_datasets
@given(st.lists(edits, max_size=5), st.lists(file_edits, max_size=2), st.booleans())
def test_a_repair_never_makes_a_dataset_worse(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[str, str, int, str, Any]],
    files: list[tuple[str, int, str]],
    allow_drop: bool,
) -> None:
    folder = tmp_path_factory.mktemp("random") / "data"
    make_roboflow(folder, splits=SPLITS, size=(96, 64))
    for edit in changes:
        _random_edit(folder, edit)
    for file in files:
        _damage_file(folder, *file)
    assert_never_worse(folder, allow_drop)


words = st.sampled_from(
    ["", "0", "1", "7", "-1", "nan", "bolt", "1.0", "0.5", "1.5", "48", ",", "1e-9"]
)
line_edits = st.tuples(
    st.sampled_from(list(SPLITS)), st.integers(0, 5), st.integers(0, 2), st.integers(0, 4), words
)
yaml_texts = st.sampled_from(
    [
        "",
        "val: train/images\n",
        "path: {root}\ntrain: train/images\n",
        "train: list.txt\n",
        "path: ..\ntrain: data/train/images\n",
    ]
)


@random_datasets
@given(
    st.lists(line_edits, max_size=6), st.lists(file_edits, max_size=2), yaml_texts, st.booleans()
)
def test_a_repair_never_makes_a_yolo_dataset_worse(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[str, int, int, int, str]],
    files: list[tuple[str, int, str]],
    yaml_text: str,
    allow_drop: bool,
) -> None:
    folder = tmp_path_factory.mktemp("random") / "data"
    make_yolo(folder, splits=SPLITS, size=(96, 64))
    for split, number, line, word, text in changes:
        file = folder / split / "labels" / f"image_{number:04d}.txt"
        lines = [row.split(" ") for row in file.read_text().splitlines()] if file.exists() else []
        if line < len(lines):
            lines[line][min(word, len(lines[line]) - 1)] = text
            file.write_text("".join(" ".join(row) + "\n" for row in lines))
    for split, number, kind in files:
        image = folder / split / "images" / f"image_{number:04d}.png"
        if image.exists() and kind in ("delete", "empty", "cut", "link"):
            data = image.read_bytes()
            image.unlink()
            if kind == "link":
                (folder.parent / image.name).write_bytes(data)
                image.symlink_to(folder.parent / image.name)
            elif kind != "delete":
                image.write_bytes(data[: len(data) // 2] if kind == "cut" else b"")
    if yaml_text:
        listed = "".join(
            f"{folder if i.stem.endswith('1') else '.'}/train/images/{i.name}\n"
            for i in sorted((folder / "train" / "images").iterdir())
        )
        (folder / "list.txt").write_text(listed)
        names = "names: [washer, bolt, nut]\n"
        (folder / "data.yaml").write_text(yaml_text.format(root=folder) + names)
    assert_never_worse(folder, allow_drop)


def test_an_interrupted_repair_leaves_nothing(tmp_path: Path) -> None:
    folder = make_roboflow(tmp_path / "data", splits={"train": 300, "valid": 20}, size=(96, 64))
    command = [
        sys.executable,
        "-m",
        "rfdetr.checks",
        str(folder),
        "--no-progress",
        "--workers",
        "1",
    ]
    command += ["--cache", str(tmp_path / "cache"), "--fix", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".out.*.tmp/train")):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data"]
