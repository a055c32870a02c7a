"""The rest of the planted defects: names, folders, splits, YOLO labels and data.yaml."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image, ImageEnhance

from tests.unit.checks.planted import ANNOTATIONS, YOLO, Coco, Expected, coco, yolo


@coco
def image_size_differs(root: Path) -> Expected:
    path = root / "train" / "image_0001.jpg"
    with Image.open(path) as image:
        image.resize((48, 32)).save(path)
    return Expected("image-size-mismatch", {"file": "train/image_0001.jpg", "image_id": 2})


@coco
def boxes_as_corners(root: Path) -> Expected:
    data = Coco(root)
    for annotation in data.annotations:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    data.save()
    return Expected("box-format", {"split": "train", "file": ANNOTATIONS})


@coco
def polygon_in_fractions(root: Path) -> Expected:
    data = Coco(root)
    annotation = data.annotations[1]
    annotation["segmentation"] = [[value / 96 for value in annotation["segmentation"][0]]]
    data.save()
    return Expected("box-outline", {"annotation_id": annotation["id"]})


@coco
def file_unreferenced(root: Path) -> Expected:
    Image.new("RGB", (9, 9)).save(root / "train" / "stray.png")
    return Expected("file-unreferenced", {"file": "train/stray.png"})


@coco
def file_hidden(root: Path) -> Expected:
    (root / "train" / ".ipynb_checkpoints").mkdir()
    copy = root / "train" / ".ipynb_checkpoints" / "image_0001-checkpoint.jpg"
    shutil.copy(root / "train" / "image_0001.jpg", copy)
    return Expected("file-hidden", {"file": f"train/.ipynb_checkpoints/{copy.name}"})


@yolo
def file_hidden_yolo(root: Path) -> Expected:
    folder = root / "train" / "images"
    shutil.copy(folder / "image_0001.png", folder / "._image_0001.png")
    return Expected("file-hidden", {"file": "train/images/._image_0001.png"})


@yolo
def file_of_a_phone(root: Path) -> Expected:
    (root / "train" / "images" / "a.HEIC").write_bytes(b"x")
    return Expected("file-format", {"file": "train/images/a.HEIC"})


@coco
def category_of_val_alone(root: Path) -> Expected:
    data = Coco(root, "valid")
    data.categories.append({"id": 9, "name": "screw", "supercategory": "none"})
    data.annotations[0]["category_id"] = 9
    data.save()
    return Expected("category-split-differs", {"split": "val"})


@coco
def file_outside(root: Path) -> Expected:
    data = Coco(root)
    (data.folder / "image_0000.jpg").rename(root / "image_0000.jpg")
    data.images[0]["file_name"] = "../image_0000.jpg"
    data.save()
    return Expected("file-outside", {"image_id": 1})


@coco
def every_object_is_a_crowd(root: Path) -> Expected:
    data = Coco(root)
    for annotation in data.annotations:
        annotation["iscrowd"] = 1
    data.save()
    return Expected("split-nothing-to-train", {"split": "train"})


@coco
def most_objects_are_crowds(root: Path) -> Expected:
    every_object_is_a_crowd(root)
    data = Coco(root)
    data.annotations[0]["iscrowd"] = 0
    data.save()
    return Expected("crowd-share", {"split": "train"})


@yolo
def label_beside_the_image(root: Path) -> Expected:
    folder = root / "train" / "images"
    (folder / "image_0001.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    return Expected("label-beside", {"file": "train/images/image_0001.txt"})


@coco
def file_stray(root: Path) -> Expected:
    (root / "valid" / "notes.docx").write_bytes(b"x")
    return Expected("file-stray", {"file": "valid/notes.docx"})


@coco
def file_case(root: Path) -> Expected:
    folder = root / "train"
    (folder / "image_0001.jpg").rename(folder / "Image_0001.JPG")
    return Expected("file-case", {"image_id": 2, "file": ANNOTATIONS})


@coco
def file_name_unicode_form(root: Path) -> Expected:
    data = Coco(root)
    data.images[1]["file_name"] = "u\u0308ber.jpg"
    data.save()
    (data.folder / "image_0001.jpg").rename(data.folder / "\u00fcber.jpg")
    return Expected("file-case", {"image_id": 2})


@coco
def file_name_space(root: Path) -> Expected:
    data = Coco(root)
    data.images[1]["file_name"] = "mein Bild ß.jpg"
    data.save()
    (data.folder / "image_0001.jpg").rename(data.folder / "mein Bild ß.jpg")
    return Expected("file-name-portability", {"image_id": 2, "file": "train/mein Bild ß.jpg"})


@coco
def file_twice(root: Path) -> Expected:
    data = Coco(root)
    data.images.append({**data.images[1], "id": 77})
    data.save()
    return Expected("file-repeated", {"image_id": 77, "line": data.line("images", 12)})


@coco
def leak_exact(root: Path) -> Expected:
    shutil.copy(root / "valid" / "image_0001.jpg", root / "train" / "image_0002.jpg")
    return Expected("split-duplicate-image", {"file": "train/image_0002.jpg", "image_id": 3})


@coco
def leak_near(root: Path) -> Expected:
    with Image.open(root / "test" / "image_0001.jpg") as image:
        brighter = ImageEnhance.Brightness(image).enhance(1.15)
        brighter.save(root / "train" / "image_0002.jpg", quality=60)
    return Expected("split-near-duplicate", {"file": "train/image_0002.jpg", "image_id": 3})


@coco
def same_image_twice(root: Path) -> Expected:
    shutil.copy(root / "train" / "image_0001.jpg", root / "train" / "image_0002.jpg")
    return Expected("image-duplicate", {"file": "train/image_0002.jpg"})


@coco
def animated(root: Path) -> Expected:
    data = Coco(root)
    frames = [Image.new("RGB", (96, 64), (i * 60, 90, 30)) for i in range(3)]
    frames[0].save(data.folder / "moving.gif", save_all=True, append_images=frames[1:])
    data.images.append({"id": 50, "file_name": "moving.gif", "width": 96, "height": 64})
    data.save()
    return Expected("image-animated", {"image_id": 50})


@coco
def valid_missing(root: Path) -> Expected:
    shutil.rmtree(root / "valid")
    return Expected("split-missing", {"split": "val"})


@coco
def test_missing(root: Path) -> Expected:
    shutil.rmtree(root / "test")
    return Expected("split-test-missing", {"split": "test"})


@coco
def test_empty(root: Path) -> Expected:
    data = Coco(root, "test")
    data.document["images"], data.document["annotations"] = [], []
    data.document["categories"] = []
    data.save()
    return Expected("split-test-missing", {"split": "test"})


@coco
def test_folder_empty(root: Path) -> Expected:
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    return Expected("split-test-missing", {"split": "test"})


@coco
def categories_missing(root: Path) -> Expected:
    data = Coco(root)
    data.document["categories"] = []
    data.save()
    return Expected("categories-missing", {"split": "train"})


@coco
def valid_annotations_missing(root: Path) -> Expected:
    (root / "valid" / "_annotations.coco.json").unlink()
    return Expected("annotation-file-missing", {"split": "val", "file": "valid"})


@coco
def valid_empty(root: Path) -> Expected:
    data = Coco(root, "valid")
    data.document["images"], data.document["annotations"] = [], []
    data.save()
    return Expected("split-empty", {"split": "val"})


@coco
def valid_unannotated(root: Path) -> Expected:
    data = Coco(root, "valid")
    data.document["annotations"] = []
    data.save()
    return Expected("split-unannotated", {"split": "val"})


@coco
def train_smaller_than_valid(root: Path) -> Expected:
    data = Coco(root)
    data.document["images"] = data.images[:2]
    data.save()
    return Expected("split-size", {"split": "val"})


@coco
def mostly_empty(root: Path) -> Expected:
    data = Coco(root)
    data.document["annotations"] = [a for a in data.annotations if a["image_id"] < 3]
    data.save()
    return Expected("share-empty", {"split": "train"})


@coco
def imbalanced(root: Path) -> Expected:
    data = Coco(root)
    rare = {a["category_id"]: a for a in data.annotations if a["category_id"]}
    data.document["annotations"] = list(rare.values())
    for number in range(400):
        box = [number % 60, number % 40, 10 + number % 20, 12]
        data.annotations.append(
            {
                "id": 1000 + number,
                "image_id": 1 + number % 9,
                "category_id": 0,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": [],
            }
        )
    data.save()
    return Expected("class-imbalance", {"split": "train"})


@coco
def too_many_boxes(root: Path) -> Expected:
    imbalanced(root)
    data = Coco(root)
    for annotation in data.annotations:
        annotation["image_id"] = 1
    data.save()
    return Expected("image-too-many-boxes", {"image_id": 1})


@coco
def sub_pixel_box(root: Path) -> Expected:
    data = Coco(root)
    data.annotations[1].update(bbox=[5, 5, 0.2, 0.3], area=0.06, segmentation=[])
    data.save()
    return Expected("box-sub-pixel", {"annotation_id": 2})


LABELS = "train/labels/image_0001.txt"


def label_plant(name: str, code: str, line: str) -> None:
    """Register a plant that appends a line to the labels of the second training image."""

    def plant(root: Path) -> Expected:
        path = root / LABELS
        text = path.read_text()
        path.write_text(text + line + "\n")
        return Expected(code, {"file": LABELS, "line": text.count("\n") + 1, "image_id": 1})

    YOLO[name] = plant


for _name, _code, _line in (
    ("label_four_numbers", "label-line-malformed", "0 0.5 0.5 0.2"),
    ("label_even_polygon", "label-line-malformed", "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4"),
    ("label_two_points", "label-line-malformed", "0 0.1 0.1"),
    ("label_words", "box-non-numeric", "0 0.5 half 0.2 0.2"),
    ("label_class_word", "label-line-malformed", "cat 0.5 0.5 0.2 0.2"),
    ("label_class_fraction", "label-line-malformed", "1.5 0.5 0.5 0.2 0.2"),
    ("label_class_high", "label-class-range", "3 0.5 0.5 0.2 0.2"),
    ("label_class_negative", "label-class-range", "-1 0.5 0.5 0.2 0.2"),
    ("label_nan", "box-nan", "0 nan 0.5 0.2 0.2"),
    ("label_negative", "box-negative", "0 0.5 0.5 -0.2 0.2"),
    ("label_zero", "box-zero-area", "0 0.5 0.5 0 0.2"),
    ("label_outside", "box-outside", "0 0.95 0.5 0.3 0.2"),
    ("label_pixels", "box-outside-fully", "0 48 32 20 10"),
    ("label_aspect", "box-aspect", "0 0.5 0.5 0.9 0.01"),
    ("label_polygon_outside", "polygon-outside", "0 0.1 0.1 1.4 0.2 0.3 0.6"),
):
    label_plant(_name, _code, _line)


@yolo
def labels_of_rotated_boxes(root: Path) -> Expected:
    for path in (root / "train" / "labels").iterdir():
        path.write_text("0 0.1 0.2 0.4 0.1 0.5 0.4 0.2 0.5\n")
    return Expected("label-rotated", {"split": "train"})


@yolo
def labels_with_keypoints(root: Path) -> Expected:
    for path in (root / "train" / "labels").iterdir():
        path.write_text("0 0.5 0.6 0.1 0.2 0.48 0.6 0.53 0.65\n")
    return Expected("label-pose", {"split": "train"})


@yolo
def label_line_twice(root: Path) -> Expected:
    path = root / LABELS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0]]) + "\n")
    return Expected("box-duplicate", {"file": LABELS, "line": len(lines) + 1})


@yolo
def label_not_text(root: Path) -> Expected:
    (root / LABELS).write_bytes(b"\xff\xfe0 1")
    return Expected("label-line-malformed", {"file": LABELS})


@yolo
def label_file_missing(root: Path) -> Expected:
    (root / "train" / "labels" / "image_0000.txt").unlink()
    (root / "train" / "labels" / "image_0001.txt").write_text("")
    return Expected("label-missing", {"split": "train", "severity": "warning"})


@yolo
def label_without_image(root: Path) -> Expected:
    (root / "train" / "labels" / "lost.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    return Expected("label-unreferenced", {"file": "train/labels/lost.txt"})


@yolo
def labels_shared(root: Path) -> Expected:
    folder = root / "train" / "images"
    Image.new("RGB", (96, 64), (9, 90, 60)).save(folder / "image_0001.jpg")
    return Expected("label-shared", {"split": "train"})


@yolo
def leak_exact_yolo(root: Path) -> Expected:
    shutil.copy(
        root / "valid" / "images" / "image_0001.png", root / "train" / "images" / "image_0002.png"
    )
    return Expected("split-duplicate-image", {"file": "train/images/image_0002.png"})


def yaml_plant(name: str, code: str, old: str, new: str, line: int | None) -> None:
    def plant(root: Path) -> Expected:
        path = root / "data.yaml"
        path.write_text(path.read_text().replace(old, new))
        return Expected(code, {"file": "data.yaml", "line": line})

    YOLO[name] = plant


for _name, _code, _old, _new, _number in (
    ("yaml_bracket", "yaml-malformed", '"nut"]', '"nut"', 6),
    ("yaml_tab", "yaml-malformed", "nc:", "\tnc:", 4),
    ("yaml_no_names", "yaml-structure", "names:", "classes:", 1),
    ("yaml_count", "yaml-structure", "nc: 3", "nc: 4", 4),
    ("yaml_names_keys", "yaml-structure", '["washer", "bolt", "nut"]', "{0: a, 2: b, 5: c}", 5),
    ("yaml_path", "yaml-path", "train/images", "train/pictures", 1),
    ("yaml_paths", "yaml-structure", "train/images", "[train/images, train/pictures]", 1),
    ("yaml_elsewhere", "yaml-structure", "train/images", "..", 1),
    (
        "yaml_word",
        "yaml-structure",
        "train: train/images\nval: valid/images\ntest: test/images\n"
        'nc: 3\nnames: ["washer", "bolt", "nut"]',
        "hello",
        1,
    ),
):
    yaml_plant(_name, _code, _old, _new, _number)


@yolo
def class_unused(root: Path) -> Expected:
    path = root / "data.yaml"
    text = path.read_text().replace("nc: 3", "nc: 4").replace('"nut"]', '"nut", "rivet"]')
    path.write_text(text)
    return Expected("category-unused", {"file": "data.yaml"})
