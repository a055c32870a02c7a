"""`import_dataset`: read a foreign dataset, check its images, split it, write it."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rfdetr.checks.cache import FactsCache, Inspected
from rfdetr.checks.image_probe import ImageFacts
from rfdetr.checks.inspection import inspect_images
from rfdetr.data.decode import MAX_PIXELS
from rfdetr.data.layouts import SPLITS
from rfdetr.errors import DatasetError
from rfdetr.files import new_folder
from rfdetr.importers.archive import opened_source
from rfdetr.importers.formats import read_source
from rfdetr.importers.records import Collection, ImportedImage, ImportedObject
from rfdetr.importers.split import Shares, alike, assign
from rfdetr.importers.write import FOLDER, Prepared, write_split

EXAMPLES = 3  # file names that a line about skipped things shows
DEFAULT_SHARES = Shares(0.8, 0.1, 0.1)


@dataclass(frozen=True)
class ImportReport:
    """What an import read and wrote. `classes` counts the objects of each class per split."""

    source: Path
    target: Path
    format: str
    images: dict[str, int]
    classes: dict[str, dict[str, int]]
    skipped: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_text(self, *, written: bool = True) -> str:
        """The summary for a terminal, one line per split and per reason; `written` adds where."""
        objects = sum(sum(counts.values()) for counts in self.classes.values())
        total = sum(self.images.values())
        names, count = ", ".join(self.class_names), len(self.class_names)
        lines = [
            f"{self.format}: {total} images, {objects} objects, {count} class"
            f"{'' if count == 1 else 'es'} ({names if len(names) <= 60 else names[:57] + '...'})"
        ]
        for split, count in self.images.items():
            counted = sum(self.classes[split].values())
            lines.append(f"{FOLDER[split]:9}{count} images, {counted} objects")
        for reason, what in self.skipped.items():
            shown = ", ".join(dict.fromkeys(what[:EXAMPLES]))
            more = ", ..." if len(what) > EXAMPLES else ""
            lines.append(f"skipped  {len(what)} {reason}: {shown}{more}")
        lines += [f"note     {text}" for text in self.notes]
        if written:
            lines.append(f"wrote    {self.target} (COCO; the images are copies)")
        return "\n".join(lines)

    @property
    def class_names(self) -> list[str]:
        """All classes in the order of their ids."""
        return list(dict.fromkeys(name for counts in self.classes.values() for name in counts))


def import_dataset(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format_name: str | None = None,
    shares: Shares | None = None,
    seed: int = 0,
    replace_target: bool = False,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> ImportReport:
    """Write the dataset `source` as a COCO export with splits into the new folder `target`.

    The source, a folder or a zip file, is not changed. Splits of the source are kept unless
    `shares` is given. The target appears when it is complete. Raises DatasetError for what cannot
    be read, and for a target that exists, unless `replace_target` is set.
    """
    given, out = Path(source).expanduser().absolute(), Path(target).expanduser().absolute()
    if given.is_relative_to(out) or out.is_relative_to(given):
        raise DatasetError(
            f"{out} and the source {given} lie in each other; choose another folder."
        )
    if out.exists() and not replace_target and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(
            f"{out} exists already; choose another folder, or --force to replace it."
        )
    try:
        with opened_source(given, out) as root:
            found = read_source(root, format_name)
            by_split = _convert(found, out, shares, seed, cache_dir, progress=progress)
    except OSError as error:
        raise DatasetError(f"{out} cannot be written: {error}.") from error
    classes = found.used_classes()
    return ImportReport(
        source=given,
        target=Path(target),
        format=found.format,
        images={split: len(items) for split, items in by_split.items()},
        classes={split: _counts(items, classes) for split, items in by_split.items()},
        skipped=dict(found.skipped),
        notes=found.notes,
    )


def _convert(
    found: Collection,
    out: Path,
    shares: Shares | None,
    seed: int,
    cache_dir: Path | None,
    *,
    progress: bool,
) -> dict[str, list[Prepared]]:
    """Write the images that can be decoded to `out`; what was written, by split."""
    classes = found.used_classes()
    with tempfile.TemporaryDirectory(prefix="rfdetr-import-") as scratch:
        prepared, seen = _prepare(found, Path(scratch), cache_dir, progress=progress)
        if not any(item.image.objects for item in prepared):
            raise DatasetError(f"{found.root}: {_text(found)} no object to train is left.")
        _split(found, prepared, seen, shares, seed)
        by_split = {
            split: [item for item in prepared if item.image.split == split] for split in SPLITS
        }
        by_split = {split: items for split, items in by_split.items() if items}
        with new_folder(out) as work:
            for split, items in by_split.items():
                write_split(work / FOLDER[split], items, classes)
    return by_split


def _text(found: Collection) -> str:
    why = ", ".join(f"{len(what)} {reason}" for reason, what in found.skipped.items())
    return f"{found.format}: {why};" if why else f"{found.format}:"


def _counts(items: Sequence[Prepared], classes: Sequence[str]) -> dict[str, int]:
    counted = Counter(found.label for item in items for found in item.image.objects)
    return {name: counted[name] for name in classes}


def _prepare(
    found: Collection, scratch: Path, cache_dir: Path | None, *, progress: bool
) -> tuple[list[Prepared], list[Inspected]]:
    """The images that can be decoded, with what of their objects is within the image."""
    paths = [_file_of(image, found.root, scratch) for image in found.images]
    cache = FactsCache(cache_dir, MAX_PIXELS)
    inspected = inspect_images(
        [str(path) for path in paths], cache, max_pixels=MAX_PIXELS, progress=progress
    )
    upright = _is_upright(found, [seen.facts for seen in inspected])
    prepared, kept, other_sizes = [], [], []
    for image, path, seen in zip(found.images, paths, inspected, strict=True):
        facts = seen.facts
        if facts.status != "ok":
            found.skip("images that cannot be decoded", f"{image.name} ({facts.detail})")
            continue
        stored, viewed = _sizes(facts)
        proof = _proof(image, facts)
        rotate = facts.orientation > 1 and (upright if proof is None else proof)
        if image.size not in (None, viewed if rotate else stored):
            other_sizes.append(image.name)
        image.objects = list(_within(image, viewed if rotate else stored, found))
        prepared.append(Prepared(image, path, *stored, rotate))
        kept.append(seen)
    if other_sizes:
        found.notes.append(
            f"{len(other_sizes)} images have another size than their annotations state "
            f"({', '.join(other_sizes[:EXAMPLES])}): look at their boxes in the report"
        )
    return prepared, kept


def _file_of(image: ImportedImage, root: Path, scratch: Path) -> Path:
    """The image file; one that the annotation file contains is written to `scratch`."""
    if image.content is None:
        return root / image.name
    path = scratch / image.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.content)
    return path


def _sizes(facts: ImageFacts) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height as stored, and of the view that the EXIF tag describes."""
    stored = facts.width, facts.height
    return stored, stored[::-1] if facts.orientation >= 5 else stored


def _proof(image: ImportedImage, facts: ImageFacts) -> bool | None:
    """Whether the coordinates follow the EXIF view, where the stated size proves it."""
    stored, viewed = _sizes(facts)
    return None if stored == viewed or image.size not in (stored, viewed) else image.size == viewed


def _is_upright(found: Collection, facts: Sequence[ImageFacts]) -> bool:
    """Whether coordinates follow the EXIF view where no size proves it.

    One tool made them all, so most of the images with a proof decide; without any, what is known of
    the tool.
    """
    proofs = Counter(map(_proof, found.images, facts))
    return proofs[True] > proofs[False] if proofs[True] or proofs[False] else found.upright


def _within(
    image: ImportedImage, size: tuple[int, int], found: Collection
) -> Iterator[ImportedObject]:
    """The objects of an image, clipped to it; those without any area in it are skipped."""
    limits = np.array([*size, *size], float)
    for item in image.objects:
        box = np.array(item.box, float)
        if not (box[2:] > box[:2]).all():
            found.skip("boxes without area", image.name)
            continue
        clipped = np.clip(box, 0, limits)
        if not (clipped[2:] > clipped[:2]).all():
            found.skip("boxes outside their image", image.name)
            continue
        if (clipped == box).all():
            yield item
            continue
        outline = item.outline
        if isinstance(outline, list):
            outline = [np.clip(np.reshape(p, (-1, 2)), 0, size).ravel().tolist() for p in outline]
        x0, y0, x1, y1 = clipped.tolist()
        yield replace(item, box=(x0, y0, x1, y1), outline=outline)


def _split(
    found: Collection,
    prepared: Sequence[Prepared],
    inspected: Sequence[Inspected],
    shares: Shares | None,
    seed: int,
) -> None:
    """Give every image a split: the source's, unless it has none or `shares` are asked for."""
    given = Counter(item.image.split for item in prepared)
    if shares is None and given["train"] and given["val"]:
        for item in prepared:
            item.image.split = item.image.split or "train"
        if given[None]:
            found.notes.append(f"{given[None]} images that are in no split are trained")
        return
    chosen, rows = shares or DEFAULT_SHARES, list(range(len(prepared)))
    if shares is None and given["train"] and given["test"]:  # only val is missing
        rows = [row for row in rows if prepared[row].image.split != "test"]
        total = chosen.train + chosen.val
        chosen = Shares(chosen.train / total, chosen.val / total, 0.0)
    groups = alike([inspected[i].facts for i in rows], [inspected[i].hash for i in rows])
    labels = [[o.label for o in prepared[i].image.objects if not o.crowd] for i in rows]
    for row, split in zip(rows, assign(labels, groups, chosen, seed), strict=True):
        prepared[row].image.split = split
    together = len(rows) - len(set(groups.tolist()))
    shown = "/".join(f"{share:g}" for share in (round(v, 3) for v in chosen))
    kept = "; test stays" if len(rows) < len(prepared) else ""
    text = f"split {shown} by class, seed {seed}{kept}"
    text += f"; {together} images stay with one that looks alike" if together else ""
    replaced = {key: n for key, n in given.items() if key} if shares else {}
    if replaced:
        text += f"; replaces {', '.join(f'{FOLDER[key]} {n}' for key, n in replaced.items())}"
    found.notes.append(text)
