"""The demo dataset: real handwritten digits drawn on real photos, built in seconds.

Digits: scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set.
Photos: the two of scikit-learn, "china" and "flower", both attributed there to danielbuechele
(CC BY 2.0); the source link of "flower" leads to vultilion on Flickr.
Splits share neither a digit nor a part of a photo. `python -m rfdetr.data.demo FOLDER` builds it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from rfdetr.errors import DatasetError, MissingDependencyError

DESCRIPTION = "The embedded demo dataset: real handwritten digits drawn on real photos, in seconds."
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "valid", "test")
PHOTO_SHARES = {"train": (0.0, 0.6), "valid": (0.6, 0.8), "test": (0.8, 1.0)}
DIGIT_SHARES = {"train": (0.0, 0.7), "valid": (0.7, 0.85), "test": (0.85, 1.0)}
BACKGROUND_SHARE = 0.05
DIGIT_SIDE = (28, 48)
GAP = 2
INKS = ((16, 16, 20), (20, 30, 130), (150, 15, 25), (250, 250, 245), (250, 225, 70))
MIN_CONTRAST = 90.0  # levels of luminance between ink and paper, about that of a marker pen

Gray = npt.NDArray[np.float64]
Box = tuple[int, int, int, int]


class Sources(NamedTuple):
    """The photos and digits that one split uses."""

    photos: list[Image.Image]
    digits: dict[int, list[Gray]]


def build_demo(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    classes: Sequence[int] = (0, 1, 4),
    train: int = 1500,
    valid: int = 200,
    test: int = 200,
    size: int = 128,
    progress: bool = False,
) -> Path:
    """Write the dataset to `root` in Roboflow's COCO layout and return the folder.

    `classes` are the digits to use; category ids start at 0 in that order. Images are `size` pixels
    square with one to four digits whose longer side is 28 to 48 pixels; one image in twenty has
    none. A split of 0 images is left out. The same arguments give the same bytes, and the folder
    appears complete or not at all. Raises DatasetError if `root` is not empty or an argument is
    invalid.
    """
    target = Path(root).expanduser().absolute()
    _check(target, classes, (train, valid, test), size)
    pool, photos = _load(tuple(classes))
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        for number, (split, count) in enumerate(zip(SPLITS, (train, valid, test), strict=True)):
            if not count:
                continue
            sources = _split_sources(split, pool, photos, seed)
            _write_split(
                draft / split, sources, count, (seed, number), size=size, progress=progress
            )
        if target.exists():
            target.rmdir()
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _check(target: Path, classes: Sequence[int], counts: tuple[int, ...], size: int) -> None:
    problems = []
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        problems.append(f"{target} exists and is not an empty folder; choose another.")
    if not classes or len(set(classes)) != len(classes) or not set(classes) <= set(range(10)):
        problems.append(f"classes must be different digits 0..9, got {list(classes)}.")
    if min(counts) < 0 or counts[0] < 1:
        problems.append(
            f"train needs at least one image, the other splits zero or more; got {counts}."
        )
    if size < DIGIT_SIDE[1] + 2 * GAP:
        problems.append(f"size must be at least {DIGIT_SIDE[1] + 2 * GAP} pixels, got {size}.")
    if problems:
        raise DatasetError("The demo dataset cannot be built: " + " ".join(problems))


def _load(classes: tuple[int, ...]) -> tuple[dict[int, list[Gray]], list[Image.Image]]:
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise MissingDependencyError(
            "The demo dataset requires scikit-learn: pip install 'rfdetr-pipeline[pipeline]'."
        ) from error
    digits = load_digits()
    pool = {c: [_trim(d / 16.0) for d in digits.images[digits.target == c]] for c in classes}
    return pool, [Image.fromarray(photo) for photo in load_sample_images().images]


def _trim(digit: Gray) -> Gray:
    rows, columns = np.flatnonzero(digit.max(1) > 0.2), np.flatnonzero(digit.max(0) > 0.2)
    return digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _split_sources(
    split: str, pool: dict[int, list[Gray]], photos: list[Image.Image], seed: int
) -> Sources:
    digits = {}
    for name, drawings in pool.items():
        order = np.random.default_rng([seed, name]).permutation(len(drawings))
        first, last = (round(share * len(drawings)) for share in DIGIT_SHARES[split])
        digits[name] = [drawings[i] for i in order[first:last]]
    left, right = PHOTO_SHARES[split]
    parts = [p.crop((round(left * p.width), 0, round(right * p.width), p.height)) for p in photos]
    return Sources(parts, digits)


def _write_split(
    folder: Path,
    sources: Sources,
    count: int,
    seed: tuple[int, int],
    *,
    size: int,
    progress: bool,
) -> None:
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in tqdm(range(count), desc=folder.name, unit="image", disable=not progress):
        rng = np.random.default_rng([*seed, number])
        image, drawn = _draw_image(rng, sources, size)
        name = f"{folder.name}_{number:05d}.jpg"
        image.save(folder / name, quality=95, subsampling=0)
        images.append({"id": number, "file_name": name, "width": size, "height": size})
        for category, (x0, y0, x1, y1) in drawn:
            width, height = x1 - x0, y1 - y0
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x0, y0, width, height],
                    "area": width * height,
                    "segmentation": [],
                    "iscrowd": 0,
                }
            )
    document = {
        "info": {"description": DESCRIPTION},
        "licenses": [
            {"id": 1, "name": "CC BY 2.0", "url": "https://creativecommons.org/licenses/by/2.0/"}
        ],
        "categories": [
            {"id": i, "name": NAMES[c], "supercategory": "none"}
            for i, c in enumerate(sources.digits)
        ],
        "images": images,
        "annotations": annotations,
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(document), encoding="utf-8")


def _draw_image(
    rng: np.random.Generator, sources: Sources, size: int
) -> tuple[Image.Image, list[tuple[int, Box]]]:
    canvas = np.asarray(_background(rng, sources.photos, size)).astype(np.float64)
    count = 0 if rng.random() < BACKGROUND_SHARE else int(rng.integers(1, 5))
    drawn: list[tuple[int, Box]] = []
    groups = list(sources.digits.values())
    for _ in range(count):
        category = int(rng.integers(len(groups)))
        group = groups[category]
        alpha = _ink(rng, group[int(rng.integers(len(group)))])
        box = _place(rng, (alpha.shape[0], alpha.shape[1]), [b for _, b in drawn], size)
        if box is None:
            continue
        x0, y0, x1, y1 = box
        paper = canvas[y0:y1, x0:x1]
        colour = _marker(rng, paper, alpha)
        canvas[y0:y1, x0:x1] = paper + alpha[..., None] * (colour - paper)
        drawn.append((category, box))
    return Image.fromarray(canvas.round().astype(np.uint8)), drawn


def _background(rng: np.random.Generator, photos: list[Image.Image], size: int) -> Image.Image:
    photo = photos[int(rng.integers(len(photos)))]
    side = int(rng.integers(72, min(photo.size) + 1))
    x = int(rng.integers(photo.width - side + 1))
    y = int(rng.integers(photo.height - side + 1))
    crop = photo.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain = rng.uniform(0.7, 1.2)
    return crop.point(lambda level: level * gain)


def _ink(rng: np.random.Generator, digit: Gray) -> Gray:
    """Opacity (h, w) of the enlarged digit, from 0 to 1."""
    side = int(rng.integers(DIGIT_SIDE[0], DIGIT_SIDE[1] + 1))
    scale = side / max(digit.shape)
    height, width = (max(6, round(n * scale)) for n in digit.shape)
    soft = Image.fromarray(digit.astype(np.float32)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    alpha = np.clip((np.asarray(soft, dtype=np.float64) - 0.15) * 2.2, 0.0, 1.0)
    return alpha * rng.uniform(0.9, 1.0)


def _place(
    rng: np.random.Generator, shape: tuple[int, int], taken: list[Box], size: int
) -> Box | None:
    height, width = shape
    for _ in range(30):
        x0, y0 = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        box = (x0, y0, x0 + width, y0 + height)
        apart = all(
            box[2] + GAP <= b[0]
            or b[2] + GAP <= box[0]
            or box[3] + GAP <= b[1]
            or b[3] + GAP <= box[1]
            for b in taken
        )
        if apart:
            return box
    return None


def _marker(rng: np.random.Generator, paper: Gray, alpha: Gray) -> Gray:
    """A pen colour that stands out from the paper under the digit."""
    weights = np.array([0.299, 0.587, 0.114])
    under = float(((paper @ weights) * alpha).sum() / max(float(alpha.sum()), 1e-9))
    contrasts = [abs(float(np.dot(ink, weights)) - under) for ink in INKS]
    clear = [i for i, contrast in enumerate(contrasts) if contrast >= MIN_CONTRAST]
    chosen = clear[int(rng.integers(len(clear)))] if clear else int(np.argmax(contrasts))
    return np.asarray(INKS[chosen], dtype=np.float64)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: build the demo dataset."""
    parser = argparse.ArgumentParser(prog="python -m rfdetr.data.demo", description=main.__doc__)
    integer = functools.partial(parser.add_argument, type=int)
    parser.add_argument("folder", type=Path)
    integer("--seed", default=0)
    integer("--classes", nargs="+", default=[0, 1, 4], metavar="DIGIT")
    integer("--train", default=1500)
    integer("--valid", default=200)
    integer("--test", default=200)
    integer("--size", default=128)
    given = vars(parser.parse_args(arguments))
    try:
        build_demo(given.pop("folder"), **given, progress=True)
    except DatasetError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
