"""Foreign formats: what was annotated becomes a dataset that training and checks accept."""

from __future__ import annotations

import base64
import io
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from flows.cli import import_data
from flows.cli.main import main
from rfdetr.checks import check_dataset
from rfdetr.errors import DatasetError
from rfdetr.importers import READERS, ImportReport, Shares, import_dataset
from tests.datasets import NAMES, Scene, make_roboflow, make_yolo
from tests.unit.checks.conftest import snapshot
from tests.unit.importers import foreign

FOLDERS = ("train", "valid", "test")


def convert(source: Path, **options: Any) -> ImportReport:
    target = source.with_name("out")
    return import_dataset(source, target, progress=False, cache_dir=source.parent / "c", **options)


def content(root: Path) -> dict[str, list[dict[str, Any]]]:
    """File name -> annotations of all splits, with the class name as `label`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in FOLDERS:
        file = root / folder / "_annotations.coco.json"
        if not file.exists():
            continue
        data = json.loads(file.read_text())
        names = {c["id"]: c["name"] for c in data["categories"]}
        for image in data["images"]:
            assert (root / folder / image["file_name"]).is_file()
            found[image["file_name"]] = [
                {**row, "label": names[row["category_id"]]}
                for row in data["annotations"]
                if row["image_id"] == image["id"]
            ]
    return found


@pytest.mark.parametrize("name", foreign.FORMATS)
def test_every_format_gives_the_objects_that_were_drawn(name: str, tmp_path: Path) -> None:
    source = tmp_path / "my export"
    scenes = foreign.FORMATS[name](source)
    before = snapshot(source)
    report = convert(source)
    assert snapshot(source) == before
    found = content(tmp_path / "out")
    assert set(found) == set(scenes)
    for file, scene in scenes.items():
        _same_objects(found[file], scene, outlines=name not in foreign.BOXES_ONLY)
        copy = next((tmp_path / "out").glob(f"*/{file}"))
        assert (np.asarray(Image.open(copy)) == np.asarray(scene.image)).all()
    assert report.skipped == {}
    assert sum(report.images.values()) == foreign.COUNT
    checked = check_dataset(tmp_path / "out", cache_dir=tmp_path / "c", progress=False)
    assert checked.errors == 0, checked.findings
    assert set(checked.class_names) == set(NAMES)


def _same_objects(rows: list[dict[str, Any]], scene: Scene, *, outlines: bool) -> None:
    assert [row["label"] for row in rows] == [NAMES[shape.label] for shape in scene.shapes]
    for row, shape in zip(rows, scene.shapes, strict=True):
        assert row["bbox"] == pytest.approx(shape.bbox, abs=0.02)
        if outlines:
            assert row["segmentation"][0] == pytest.approx(shape.polygon, abs=0.02)


def test_formats_of_the_command_are_the_readers() -> None:
    assert tuple(READERS) == import_data.FORMATS


def test_the_command_prints_what_it_did_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.voc(tmp_path / "voc")
    target = str(tmp_path / "my data")
    assert main(["import", str(tmp_path / "voc"), "--to", target, "--split", "0.5/0.5"]) == 0
    text = capsys.readouterr().out
    assert "Pascal VOC: 12 images" in text and f"rfdetr-pipeline init '{target}'" in text
    assert "train    6 images" in text and "valid    6 images" in text
    assert main(["import", str(tmp_path / "voc"), "--to", target]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "voc"), "--to", target, "--force"]) == 0
    assert "test     1 images" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_corners_at_zero_show_that_a_tool_counts_from_zero(tmp_path: Path) -> None:
    scenes = foreign.voc(tmp_path / "voc", first=0)
    shape = next(shape for scene in scenes.values() for shape in scene.shapes)
    file = next((tmp_path / "voc/Annotations").glob("*00.xml"))
    file.write_text(file.read_text().replace(f"<xmin>{shape.bbox[0]:g}<", "<xmin>0<", 1))
    convert(tmp_path / "voc")
    found = content(tmp_path / "out")
    name, scene = next((n, s) for n, s in list(scenes.items())[1:] if s.shapes)
    _same_objects(found[name], scene, outlines=False)


def test_an_xml_file_with_entities_is_not_read(tmp_path: Path) -> None:
    foreign.voc(tmp_path / "voc")
    secret = tmp_path / "secret"
    secret.write_text("password")
    file = tmp_path / "voc/Annotations/photo 00.xml"
    attack = f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{secret}">]>'
    file.write_text(attack + file.read_text().replace(NAMES[0], "&x;"))
    report = convert(tmp_path / "voc")
    assert any("document type or entities" in reason for reason in report.skipped)
    assert "password" not in json.dumps(content(tmp_path / "out"))


def test_names_never_lead_out_of_the_source(tmp_path: Path) -> None:
    Image.new("RGB", (96, 64), "red").save(tmp_path / "secret.png")
    scenes = foreign.coco(tmp_path / "coco")
    file = tmp_path / "coco/annotations/instances_everything.json"
    data = json.loads(file.read_text())
    data["images"][0]["file_name"] = "../../secret.png"
    data["images"][1]["file_name"] = str(tmp_path / "secret.png")
    file.write_text(json.dumps(data))
    report = convert(tmp_path / "coco")
    missing = report.skipped["images that are listed but missing"]
    assert missing == ["../../secret.png", str(tmp_path / "secret.png")]
    assert len(content(tmp_path / "out")) == len(scenes) - 2


@pytest.mark.parametrize("kind", ["folders", "lists", "2017", "data.yaml", "subset"])
def test_splits_of_the_source_are_kept(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if kind == "folders":
        make_roboflow(source, splits={"train": 6, "valid": 3, "test": 2})
    elif kind == "2017":
        for number, (split, count) in enumerate({"train": 6, "val": 3, "test": 2}.items()):
            names = [f"{n}.png" for n in range(count)]  # the same names in each split
            scenes = foreign.drawn(source / f"{split}2017", names)
            document = foreign.coco_document(scenes, first=number * 100)
            (source / "annotations").mkdir(exist_ok=True)
            file = source / f"annotations/instances_{split}2017.json"
            file.write_text(json.dumps(document))
    elif kind == "data.yaml":
        make_yolo(source, splits={"train": 6, "valid": 3, "test": 2})
    else:
        {"lists": foreign.voc, "subset": foreign.cvat}[kind](source)
        parts = {"train": range(6), "val": range(6, 9), "test": range(9, 11)}
        if kind == "lists":
            (source / "ImageSets/Main").mkdir(parents=True)
            for split, numbers in parts.items():
                lines = "".join(f"photo {n:02d}\n" for n in numbers)
                (source / f"ImageSets/Main/{split}.txt").write_text(lines)
        else:
            file = source / "annotations.xml"
            text = file.read_text()
            for split, numbers in parts.items():
                for n in numbers:
                    text = text.replace(f'<image id="{n}" ', f'<image id="{n}" subset="{split}" ')
            file.write_text(text.replace('<image id="11"', '<image id="11" subset="train"'))
    report = convert(source)
    extra = 1 if kind == "subset" else 0
    assert report.images == {"train": 6 + extra, "val": 3, "test": 2}
    if kind == "lists":
        assert report.skipped == {
            "images that ImageSets does not list": ["JPEGImages/photo 11.png"]
        }
    again = convert(source, shares=Shares.parse("60/40"), replace_target=True)
    assert set(again.images) == {"train", "val"}
    assert any("replaces " in note for note in again.notes)


def test_labelme_shapes(tmp_path: Path) -> None:
    source = tmp_path / "labelme"
    foreign.labelme(source)
    file = source / "photo 00.json"
    data = json.loads(file.read_text())
    mask = Image.fromarray(np.full((8, 10), 255, np.uint8))
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    square = {"label": "bolt", "group_id": 5}
    data["shapes"] = [
        {"label": "nut", "shape_type": "rectangle", "points": [[30, 20], [10, 5]]},
        {"label": "nut", "shape_type": "circle", "points": [[40, 30], [40, 40]]},
        {"label": "nut", "shape_type": "mask", "points": [[50, 10], [59, 17]],
         "mask": base64.b64encode(stream.getvalue()).decode()},
        {**square, "points": [[1, 1], [5, 1], [5, 5]]},
        {**square, "points": [[20, 20], [25, 20], [25, 28]]},
        {"label": "nut", "shape_type": "linestrip", "points": [[0, 0], [5, 5]]},
        {"label": "", "points": [[1, 1], [5, 1], [5, 5]]},
    ]  # fmt: skip
    photo = (source / "photo 00.png").read_bytes()
    (source / "photo 00.png").unlink()
    data["imageData"] = base64.b64encode(photo).decode()  # the image is in the file
    file.write_text(json.dumps(data))
    (source / "photo 01.json").unlink()
    (source / "photo 02.json").write_text("{")
    report = convert(source)
    rectangle, circle, filled, joined = content(tmp_path / "out")["photo 00.png"]
    assert rectangle["bbox"] == [10, 5, 20, 15]
    assert circle["bbox"] == pytest.approx([30, 20, 20, 20], abs=0.2)
    assert filled["bbox"] == [50, 10, 10, 8]
    assert coco_mask.area(filled["segmentation"]) == 80 == filled["area"]
    assert joined["bbox"] == [1, 1, 24, 27] and len(joined["segmentation"]) == 2
    assert {reason.split(",")[0]: len(what) for reason, what in report.skipped.items()} == {
        "linestrip shapes": 1,
        "objects without a class name": 1,
        "images without an annotation file": 2,
        "JSON files that cannot be read": 1,
    }


def test_cvat_shapes(tmp_path: Path) -> None:
    source = tmp_path / "cvat"
    foreign.cvat(source)
    file = source / "annotations.xml"
    shapes = """<box label="nut" xtl="10" ytl="5" xbr="30" ybr="20"/>
      <box label="nut" xtl="40" ytl="20" xbr="60" ybr="30" rotation="90"/>
      <ellipse label="nut" cx="50" cy="40" rx="10" ry="5"/>
      <mask label="nut" rle="1, 2, 1, 4" left="70" top="10" width="4" height="2"/>
      <mask label="nut" rle="1, 99999999" left="70" top="10" width="4" height="2"/>
      <points label="nut" points="1,1"/><tag label="nut"/>"""
    start = file.read_text()
    row = '<image id="90" name="photo 00.png" width="96" height="64">'
    head, tail = start.split('<image id="0"', 1)
    file.write_text(f"{head}{row}{shapes}</image>{tail.split('</image>', 1)[1]}")
    report = convert(source)
    box, turned, ellipse, mask = content(tmp_path / "out")["photo 00.png"]
    assert box["bbox"] == [10, 5, 20, 15]
    assert turned["bbox"] == pytest.approx([45, 15, 10, 20])
    assert ellipse["bbox"] == pytest.approx([40, 35, 20, 10], abs=0.2)
    assert mask["bbox"] == [70, 10, 4, 2]
    assert mask["area"] == 6
    assert sorted(len(what) for what in report.skipped.values()) == [1, 1]


def test_label_studio_regions(tmp_path: Path) -> None:
    source = tmp_path / "ls"
    foreign.label_studio(source)
    file = source / "project-1.json"
    tasks = json.loads(file.read_text())
    size = {"original_width": 96, "original_height": 64}
    value = {"x": 25.0, "y": 50.0, "width": 25.0, "height": 25.0, "rotation": 0}
    tasks[0]["annotations"] = [
        {
            "result": [
                {**size, "id": "a", "type": "rectanglelabels",
                 "value": {**value, "rectanglelabels": ["nut"]}},
                {**size, "id": "b", "type": "rectangle", "value": value},
                {**size, "id": "b", "type": "labels", "value": {**value, "labels": ["bolt"]}},
                {**size, "id": "c", "type": "rectanglelabels",
                 "value": {**value, "rotation": 90, "rectanglelabels": ["nut"]}},
                {**size, "id": "d", "type": "brushlabels",
                 "value": {"format": "rle", "rle": [0, 1], "brushlabels": ["nut"]}},
                {"id": "e", "type": "choices", "value": {"choices": ["good"]}},
            ]
        }
    ]  # fmt: skip
    tasks[1]["annotations"] = []
    file.write_text(json.dumps(tasks))
    report = convert(source)
    first, second, turned = content(tmp_path / "out")["photo 00.png"]
    assert first["bbox"] == second["bbox"] == [24, 32, 24, 16]
    assert (first["label"], second["label"]) == ("nut", "bolt")
    assert turned["bbox"] == pytest.approx([8, 32, 16, 24])
    assert {reason.split(",")[0]: len(what) for reason, what in report.skipped.items()} == {
        "brushlabels regions": 1,
        "tasks that nobody has annotated": 1,
    }


def test_label_studio_minimal_export(tmp_path: Path) -> None:
    source = tmp_path / "ls"
    foreign.label_studio(source)
    region = {"x": 25, "y": 50, "width": 25, "height": 25, "rotation": 0,
              "original_width": 96, "original_height": 64, "rectanglelabels": ["nut"]}  # fmt: skip
    tasks = [
        {"image": f"/data/local-files/?d=media/photo%20{n:02d}.png", "id": n, "label": [region]}
        for n in range(4)
    ]
    del tasks[2]["label"]  # nothing is in it
    tasks[2] |= {"annotator": 1, "annotation_id": 7}
    (source / "project-1.json").write_text(json.dumps(tasks))
    report = convert(source)
    assert sum(report.images.values()) == 4
    assert content(tmp_path / "out")["photo 02.png"] == []
    assert [row["bbox"] for row in content(tmp_path / "out")["photo 03.png"]] == [[24, 32, 24, 16]]


def test_label_studio_tasks_in_files_of_their_own(tmp_path: Path) -> None:
    source = tmp_path / "ls"
    foreign.label_studio(source)
    file = source / "project-1.json"
    for task in json.loads(file.read_text()):
        (source / f"{task['id']}.json").write_text(json.dumps(task))
    file.unlink()
    assert sum(convert(source).images.values()) == foreign.COUNT


def test_class_names_in_utf16_and_labels_that_are_all_empty(tmp_path: Path) -> None:
    foreign.yolo(tmp_path / "yolo")
    names = tmp_path / "yolo/classes.txt"
    names.write_text("\n".join(NAMES), "utf-16")
    assert convert(tmp_path / "yolo").class_names == list(NAMES)
    names.write_bytes("Bäume\nb\nc".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"classes\.txt: not UTF-8 text"):
        convert(tmp_path / "yolo", replace_target=True)
    names.write_text("a\nb\nc")
    for file in (tmp_path / "yolo/labels").iterdir():
        file.write_text("")
    with pytest.raises(DatasetError, match="YOLO: no object to train is left"):
        convert(tmp_path / "yolo", replace_target=True)


INVERSE = {  # EXIF orientation -> from the view to the stored pixels
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("view", ["upright", "stored"])
@pytest.mark.parametrize("name", ["voc", "labelme", "cvat", "label-studio", "coco"])
def test_images_follow_the_view_that_was_annotated(name: str, view: str, tmp_path: Path) -> None:
    """The sizes prove the view of images that EXIF turns by 90 degrees, and so that of the rest."""
    source = tmp_path / "source"
    scenes = foreign.FORMATS[name](source)
    for number, (file, scene) in enumerate(scenes.items()):
        exif, pixels = Image.Exif(), scene.image
        exif[0x0112] = orientation = number % 8 + 1
        if view == "upright" and orientation > 1:
            pixels = pixels.transpose(INVERSE[orientation])
        pixels.save(next(source.rglob(file)), exif=exif)
    convert(source)
    found = content(tmp_path / "out")
    for file, scene in scenes.items():
        copy = next((tmp_path / "out").glob(f"*/{file}"))
        assert (np.asarray(Image.open(copy)) == np.asarray(scene.image)).all(), file
        _same_objects(found[file], scene, outlines=name != "voc")


@pytest.mark.parametrize("change", ["case", "unicode", "no suffix", "url"])
def test_images_are_found_by_names_that_differ_in_form(change: str, tmp_path: Path) -> None:
    scenes = foreign.coco(tmp_path / "coco")
    file = tmp_path / "coco/annotations/instances_everything.json"
    data = json.loads(file.read_text())
    for image in data["images"]:
        name = f"Bäume {image['file_name']}"
        path = tmp_path / "coco/pictures" / image["file_name"]
        stored, stated = {
            "case": (name.replace(".png", ".PNG"), name),
            "unicode": (unicodedata.normalize("NFD", name), name),
            "no suffix": (name, name.removesuffix(".png")),
            "url": (name, f"https://example.com/a%20b/{quote(name)}"),
        }[change]
        path.rename(path.with_name(stored))
        image["file_name"] = stated
    file.write_text(json.dumps(data))
    report = convert(tmp_path / "coco")
    assert sum(report.images.values()) == len(scenes) and not report.skipped


def test_images_that_nothing_lists_are_counted(tmp_path: Path) -> None:
    for number, name in enumerate(("coco", "cvat", "label-studio")):
        source = tmp_path / f"{number}/source"
        foreign.FORMATS[name](source)
        Image.new("RGB", (9, 9)).save(source / "more.png")
        assert convert(source).skipped == {"images that no annotation file lists": ["more.png"]}


def test_broken_images_and_impossible_boxes_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "coco"
    scenes = foreign.coco(source)
    file = source / "annotations/instances_everything.json"
    data = json.loads(file.read_text())
    rows = data["annotations"]
    rows[0]["bbox"], rows[1]["bbox"], rows[2]["bbox"] = (
        [5, 5, 0, 9],
        [500, 5, 9, 9],
        [90, 60, 30, 9],
    )
    rows[2]["segmentation"] = []
    rows[3]["bbox"] = [1, 2, 3]
    rows[4]["image_id"], rows[5]["category_id"] = 12345, 12345
    victim = list(scenes)[-2]
    (source / "pictures" / victim).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    file.write_text(json.dumps(data))
    report = convert(source)
    assert victim not in content(tmp_path / "out")
    clipped = [row for rows in content(tmp_path / "out").values() for row in rows]
    assert [90, 60, 6, 4] in [row["bbox"] for row in clipped]
    counts = {reason: len(what) for reason, what in report.skipped.items()}
    assert counts == {
        "images that cannot be decoded": 1,
        "boxes without area": 1,
        "boxes outside their image": 1,
        "annotations of an image that is not listed": 1,
        "annotations of a category that is not listed": 1,
        "entries of annotations/instances_everything.json that cannot be read (box-malformed)": 1,
    }
    assert "skipped  1 boxes without area" in report.to_text()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"annotations.xml": "<annotations><track id='0' label='a'/></annotations>"}, "of a video"),
        ({"a.json": '{"items": [], "categories": {}}'}, "Datumaro export; in CVAT choose"),
        ({"a.json": '{"_via_img_metadata": {}}'}, "VIA project; in VIA choose"),
        ({"a.json": '{"samples": []}'}, "FiftyOne dataset; export it with"),
        ({"a.json": '[{"image": "x", "annotations": []}]'}, "CreateML; export it again as COCO"),
        ({"a.tfrecord": ""}, "TFRecord files; export"),
        ({"a.csv": "image,xmin"}, "CSV files"),
        ({"a.txt": "0 .5 .5 .1 .1"}, "YOLO labels without class names"),
        ({"readme.md": ""}, "no annotations in a format that is read"),
        ({}, r"images \(1\) without annotations"),
        ({"a.json": '{"images": [], "annotations": [], "categories": []}'}, "but no images"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_the_way(
    files: dict[str, str], said: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if "a.json" not in files or "but no" not in said:
        Image.new("RGB", (8, 8)).save(source / "a.png")
    for name, text in files.items():
        (source / name).write_text(text)
    with pytest.raises(DatasetError, match=said):
        convert(source)
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_and_one_in_another_are_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        convert(tmp_path / "nothing")
    foreign.voc(tmp_path / "voc/inner/deeper")  # one folder in another
    assert sum(convert(tmp_path / "voc").images.values()) == foreign.COUNT


def test_two_formats_in_one_folder_are_said(tmp_path: Path) -> None:
    source = tmp_path / "both"
    foreign.yolo(source)
    scenes = foreign.voc(tmp_path / "voc")
    shutil.copytree(tmp_path / "voc/Annotations", source / "Annotations")
    report = convert(source)
    assert report.format == "Pascal VOC"
    assert any("other formats are not read: yolo" in note for note in report.notes)
    chosen = convert(source, format_name="yolo", replace_target=True)
    assert chosen.format == "YOLO"
    assert sum(chosen.images.values()) == len(scenes)


def test_a_stale_file_name_does_not_lead_to_another_image(tmp_path: Path) -> None:
    """Copies of one XML file often keep its <filename>."""
    scenes = foreign.voc(tmp_path / "voc")
    for file in (tmp_path / "voc/Annotations").glob("*.xml"):
        file.write_text(file.read_text().replace(f"{file.stem}.png", "photo 00.png"))
    report = convert(tmp_path / "voc")
    assert report.skipped == {}
    for name, rows in content(tmp_path / "out").items():
        _same_objects(rows, scenes[name], outlines=False)


def test_the_target_may_not_be_inside_the_source(tmp_path: Path) -> None:
    foreign.voc(tmp_path / "voc")
    before = snapshot(tmp_path / "voc")
    with pytest.raises(DatasetError, match="lie in each other"):
        import_dataset(tmp_path / "voc", tmp_path / "voc/out", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be written"):
        import_dataset(tmp_path / "voc", tmp_path / "file/out", progress=False)
    assert snapshot(tmp_path / "voc") == before
