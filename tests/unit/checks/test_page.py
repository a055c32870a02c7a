from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rfdetr.checks import CheckConfig, DatasetReport, check_dataset
from rfdetr.checks.drawing import Picture
from rfdetr.checks.html import to_html, write_html
from rfdetr.checks.markdown import to_markdown
from rfdetr.checks.pictures import (
    finding_pictures,
    object_pictures,
    sample_pictures,
    twin_pictures,
)
from rfdetr.data.masks import encode, rasterise
from tests.datasets import make_roboflow, make_yolo
from tests.unit.checks import planted_more  # noqa: F401 - registers plants
from tests.unit.checks.planted import COCO

SIZE = 320, 240
BOX = [80, 60, 100, 80]
TRIANGLE = [80, 60, 180, 60, 80, 140]
HEADINGS = (
    "What training does with the files and annotations",
    "Is my data read right?",
    "Findings",
    "Examples of each class",
    "The same or nearly the same image twice",
    "Details",
)
LIMIT = 5_000_000


def write_split(
    folder: Path,
    images: Sequence[Image.Image],
    boxes: Sequence[Sequence[float]] = (BOX,),
    *,
    names: Sequence[str] = ("螺母",),
    outline: Any = (),
    suffix: str = "jpg",
    exif: bytes = b"",
) -> None:
    """A split whose images all have these boxes, of the classes in turn."""
    folder.mkdir(parents=True)
    records, annotations = [], []
    for number, image in enumerate(images):
        name = f"{number:03d}.{suffix}"
        image.save(folder / name, **({"quality": 95, "exif": exif} if suffix == "jpg" else {}))
        width, height = image.size
        records.append({"id": number, "file_name": name, "width": width, "height": height})
        for i, box in enumerate(boxes):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": i % len(names),
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": outline,
                }
            )
    categories = [{"id": i, "name": n, "supercategory": "none"} for i, n in enumerate(names)]
    content = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


def grey(count: int, level: int = 110) -> list[Image.Image]:
    return [Image.new("RGB", SIZE, (level, level + i % 9, level)) for i in range(count)]


def noise(count: int, seed: int = 0, size: tuple[int, int] = (200, 150)) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)) for _ in range(count)]


def check(folder: Path, **options: Any) -> DatasetReport:
    cache = folder.parent / "cache"
    return check_dataset(folder, workers=1, cache_dir=cache, progress=False, **options)


def pixels(picture: Picture) -> np.ndarray:
    data = base64.b64decode(picture.url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def coloured(found: np.ndarray, x: int, y: int) -> bool:
    """Whether a pixel differs from the grey of the images."""
    return bool(np.ptp(found[y, x]) > 60)


class Page(HTMLParser):
    """Tags with their attributes, and the text inside each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and data.strip():
            self.texts.append((self.tags[-1][0], " ".join(data.split())))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_box_is_drawn_where_it_is(tmp_path: Path) -> None:
    write_split(tmp_path / "data/train", grey(3))
    report = check(tmp_path / "data")
    drawn = sample_pictures(report.samples.images["train"])
    assert len(drawn) == 3
    for item in drawn:
        found = pixels(item.picture)
        assert found.shape == (240, 320, 3)
        for x, y in ((80, 100), (179, 100), (130, 60), (130, 139)):
            assert coloured(found, x, y), (x, y)
        for x, y in ((72, 100), (187, 100), (130, 52), (130, 147), (130, 100)):
            assert not coloured(found, x, y), (x, y)
        assert item.classes[0][0] == "螺母" and item.untrained == 0
    assert "螺母" in to_html(report, tmp_path / "data")


@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_a_mask_is_drawn_where_it_is(tmp_path: Path, kind: str) -> None:
    outline: Any = [TRIANGLE]
    if kind == "rle":
        outline = encode(rasterise([TRIANGLE], SIZE[1], SIZE[0]))
        outline = {"size": list(outline["size"]), "counts": outline["counts"].decode()}
    write_split(tmp_path / "data/train", grey(1), outline=outline)
    samples = check(tmp_path / "data").samples
    found = pixels(sample_pictures(samples.images["train"])[0].picture)
    assert coloured(found, 100, 80) and coloured(found, 90, 115)
    assert not coloured(found, 165, 125) and not coloured(found, 60, 80)
    (_, crop), *_ = object_pictures(samples.objects)["螺母"]
    part = pixels(crop)  # 150 pixels around the centre of the box, drawn in 112
    assert part.shape == (112, 112, 3)
    assert coloured(part, round((100 - 55) * 112 / 150), round((80 - 25) * 112 / 150))
    assert not coloured(part, round((165 - 55) * 112 / 150), round((125 - 25) * 112 / 150))


def test_polygons_of_yolo_are_in_pixels(tmp_path: Path) -> None:
    make_yolo(tmp_path / "data", polygons=True, size=(96, 64))
    objects = [
        item for image in check(tmp_path / "data").samples.images["train"] for item in image.objects
    ]
    assert len(objects) >= 5
    for item in objects:
        x, y = np.reshape(item.outline[0], (-1, 2)).T
        extent = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
        assert extent == pytest.approx(list(item.box), abs=0.01)


def test_a_rotated_image_is_shown_as_training_reads_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_split(tmp_path / "data/train", grey(1), exif=exif.tobytes())
    report = check(tmp_path / "data")
    (drawn,) = sample_pictures(report.samples.images["train"])
    assert (drawn.picture.width, drawn.picture.height) == SIZE
    assert coloured(pixels(drawn.picture), 80, 100)
    assert "shown as training reads it" in to_html(report, tmp_path / "data")


def test_deep_grey_levels_are_not_black(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(1000, 4000, SIZE[0]), (SIZE[1], 1)).astype(np.uint16)
    write_split(tmp_path / "data/train", [Image.fromarray(ramp)], suffix="png")
    found = pixels(sample_pictures(check(tmp_path / "data").samples.images["train"])[0].picture)
    assert found[200, 5].mean() < 20 and found[200, 315].mean() > 235
    assert 110 < found[200, 160].mean() < 145


def test_what_is_not_trained_is_grey(tmp_path: Path) -> None:
    write_split(tmp_path / "data/train", grey(1), [[10, 10, 40, 40], [400, 10, 20, 20]])
    (drawn,) = sample_pictures(check(tmp_path / "data").samples.images["train"])
    assert drawn.untrained == 1
    assert [count for _, _, count in drawn.classes] == [1]
    found = pixels(drawn.picture)
    assert coloured(found, 10, 30)
    assert not coloured(found, 319, 20) and found[20, 319].mean() > 135  # at the edge, in grey


def test_samples_are_few_random_and_the_same_in_every_run(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(80)]
    make_roboflow(tmp_path / "data", splits={"train": 300, "valid": 20, "test": 5}, names=names)
    first, second = (check(tmp_path / "data").samples for _ in range(2))
    assert first.images == second.images and first.objects == second.objects
    assert {name: len(found) for name, found in first.images.items()} == {
        "train": 12,
        "val": 12,
        "test": 5,
    }
    files = [int(image.file[-8:-4]) for image in first.images["train"]]
    assert files == sorted(set(files)) and files[-1] > 150
    assert max(map(len, first.objects.values())) == 2
    for name, found in first.objects.items():
        assert len({image.file for image in found}) == len(found)
        assert {image.objects[0].name for image in found} == {name}
    # Classes share images, so that few files are decoded.
    assert len({i.path for found in first.objects.values() for i in found}) < 200


def test_maps_count_boxes_by_size_and_place(tmp_path: Path) -> None:
    half = [0, 0, SIZE[0] / 2, SIZE[1] / 2]
    write_split(tmp_path / "data/train", grey(3), [half])
    report = check(tmp_path / "data")
    maps = report.samples.maps["train"]
    assert maps.places.shape == (32, 32)
    assert (maps.places[:16, :16] == 3).all() and maps.places.sum() == 3 * 16 * 16
    place = int(np.log2(192) / np.log2(384) * 32)  # half of 384 pixels
    assert maps.sizes[place, place] == maps.sizes.sum() == 3
    numbers = report.statistics["train"]
    assert numbers.median_box == (160, 120) and numbers.median_box_input == (192, 192)
    assert numbers.image_sizes == {"320 x 240": 3} and numbers.other_image_sizes == 0


@pytest.fixture(scope="module")
def spoiled(clean: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(clean["coco"], tmp_path_factory.mktemp("page") / "data"))
    for name in ("box_partly_outside", "leak_near", "annotation_id_zero"):
        COCO[name](folder)
    shutil.copy(folder / "valid/image_0003.jpg", folder / "train/image_0005.jpg")
    return folder


def test_the_page_begins_with_the_ledger_and_its_sums_are_the_files_on_disk(spoiled: Path) -> None:
    report = check(spoiled)
    text = to_html(report, spoiled)
    places = [text.index(f"<h2>{heading}</h2>") for heading in HEADINGS]
    assert places == sorted(places)
    assert text.index('class="verdict') < places[0]
    on_disk = [
        sum(p.is_file() for p in (spoiled / n).rglob("*")) for n in ("train", "valid", "test")
    ]
    table = report.ledger_table("files")
    assert table.splits == ["train", "val", "test"] and table.totals == on_disk
    assert [sum(c[i] for _, c in table.rows) for i in range(3)] == on_disk
    rows = Page(text).texts
    total = next(i for i, row in enumerate(rows) if row == ("th", "on disk"))
    assert [text for _, text in rows[total + 1 : total + 4]] == [str(n) for n in on_disk]
    assert "| on disk | " + " | ".join(map(str, on_disk)) + " |" in to_markdown(report)


def test_findings_are_grouped_by_what_one_does_about_them(spoiled: Path) -> None:
    report = check(spoiled)
    groups = {
        action: [group.code for group in found] for action, found in report.by_action().items()
    }
    assert "box-outside" in groups["repair"]
    assert {"split-near-duplicate", "split-duplicate-image"} <= set(groups["decide"])
    assert "annotation-id-zero" in groups["info"]
    totals = Counter({g.code: g.total for found in report.by_action().values() for g in found})
    assert totals == report.counts
    pictures = finding_pictures(report, spoiled)
    assert "box-outside" in pictures and "annotation-id-zero" not in pictures
    severe = check(spoiled, config=CheckConfig(severity={"annotation-id-zero": "error"}))
    assert "annotation-id-zero" in [group.code for group in severe.by_action()["fix"]]


def test_pairs_of_images_are_shown_side_by_side(spoiled: Path) -> None:
    report = check(spoiled)
    twins = twin_pictures(report, spoiled)
    codes = {pair.finding.code for pair in twins}
    assert {"split-near-duplicate", "split-duplicate-image"} <= codes
    for pair in twins:
        (split, file, left), (other_split, other, right) = pair.sides
        assert split != other_split and file in pair.finding.message
        assert other in pair.finding.message
        same = np.corrcoef(pixels(left).ravel(), pixels(right).ravel())[0, 1]
        assert same > 0.95
    text = to_html(report, spoiled).split("image twice</h2>")[1]
    assert text.count('<div class="pair">') == len(twins)


def test_the_page_is_accessible_and_needs_nothing_else(spoiled: Path) -> None:
    text = to_html(check(spoiled), spoiled)
    page = Page(text)
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", text)
    assert all((image["src"] or "").startswith("data:image/") for image in page.of("img"))
    assert all(image["alt"] for image in page.of("img"))
    assert len(page.of("table")) == len(page.of("caption")) > 3
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert "prefers-color-scheme: dark" in text


def test_names_are_text(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>\"'&"
    write_split(tmp_path / "data/train", grey(2), names=[name])
    for number in range(2):
        path = tmp_path / f"data/train/{number:03d}.jpg"
        path.rename(path.with_name(f"{number}{name}.jpg"))
    source = tmp_path / "data/train/_annotations.coco.json"
    content = json.loads(source.read_text())
    for image in content["images"]:
        image["file_name"] = f"{image['id']}{name}.jpg"
    source.write_text(json.dumps(content))
    report = check(tmp_path / "data")
    assert report.samples.images["train"] and report.samples.objects
    page = Page(to_html(report, tmp_path / "data"))
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
    assert all((image["src"] or "").startswith("data:image/") for image in page.of("img"))
    assert any(name in text for _, text in page.texts)


def test_ten_thousand_findings_and_eighty_classes_fit_in_five_megabytes(tmp_path: Path) -> None:
    """Noise, which JPEG cannot compress, long names, and four findings per annotation."""
    rng = np.random.default_rng(1)
    names = [f"class {i} " + "x" * 150 for i in range(80)]
    for split, count in (("train", 60), ("valid", 40), ("test", 20)):
        corners = rng.integers(0, 100, (80, 2))
        boxes = [[int(x), int(y), 101, 51] for x, y in corners]
        write_split(tmp_path / "data" / split, noise(count, len(split)), boxes, names=names)
        source = tmp_path / "data" / split / "_annotations.coco.json"
        content = json.loads(source.read_text())
        for annotation in content["annotations"]:
            annotation["area"], annotation["segmentation"] = -1, [[0, 0, 500, 0]]
        for image in content["images"]:
            new = f"{image['id']} {'n' * 200}.jpg"
            (source.parent / image["file_name"]).rename(source.parent / new)
            image["file_name"] = new
        source.write_text(json.dumps(content))
    report = check(tmp_path / "data")
    assert sum(report.counts.values()) > 10_000
    text = to_html(report, tmp_path / "data")
    assert 1_500_000 < len(text.encode()) <= LIMIT
    assert text.count("data:image/jpeg") > 200  # the limit leaves out no class
    assert "more; the JSON report lists" in text
    assert len(to_markdown(report).encode()) < 40_000


def test_an_image_that_cannot_be_read_any_more_is_left_out(tmp_path: Path) -> None:
    write_split(tmp_path / "data/train", grey(3))
    report = check(tmp_path / "data")
    (tmp_path / "data/train/000.jpg").unlink()
    (tmp_path / "data/train/001.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a JPEG")
    text = to_html(report, tmp_path / "data")
    assert text.endswith("</html>\n") and "train: 1 random image<" in text
    assert text.count('alt="train/002.jpg') == 1 and "001.jpg:" not in text


def test_deep_images_are_drawn_with_the_levels_of_the_dataset(tmp_path: Path) -> None:
    """A dim 16-bit image stays dim on the page, as in training."""
    root = make_roboflow(tmp_path / "data", splits={"train": 4, "valid": 2}, suffix="png")
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        grey = np.asarray(Image.open(file).convert("L")).astype(np.uint16)
        Image.fromarray(grey * (200 if number % 2 else 10)).save(file)
    report = check(root)
    assert report.samples.levels is not None
    assert {finding.severity for finding in report.of("image-mode")} == {"info"}
    drawn = sample_pictures(report.samples.images["train"], report.samples.levels)
    means = [pixels(item.picture).mean() for item in drawn]
    assert max(means[::2]) < 0.3 * min(means[1::2])


def test_a_page_is_drawn_only_when_something_changed(tmp_path: Path) -> None:
    root, page = tmp_path / "data", tmp_path / "page.html"
    write_split(root / "train", noise(4), outline=[TRIANGLE])
    write_split(root / "valid", noise(2, 9))

    def written() -> bool:
        before = page.stat().st_mtime_ns if page.exists() else 0
        write_html(check(root), page, root)
        return page.stat().st_mtime_ns != before

    assert written() and not written()
    noise(1, 5)[0].save(root / "train" / "001.jpg")
    assert written() and not written()
    file = root / "train" / "_annotations.coco.json"
    file.write_text(file.read_text().replace("80, 60, 180, 60", "80, 60, 170, 60", 1))
    assert written() and not written()
    page.write_text(page.read_text()[:-9])
    assert written() and not written()
