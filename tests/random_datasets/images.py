"""Defects of image files, their names and their folders, in every layout."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.random_datasets.base import HEIGHT, WIDTH, Case, noise

Defect = Callable[[Case, str, int], None]


def _as(mode: str, suffix: str) -> Defect:
    """The image in another colour mode."""

    def apply(case: Case, split: str, number: int) -> None:
        old = case.image(split, number)
        stem = case.names[split][number % len(case.names[split])].rpartition(".")[0]
        old.unlink(missing_ok=True)
        case.rename(split, number, stem + suffix)
        with case.image(split, number).open("wb") as stream:
            _in_mode(mode, number + 50).save(stream, Image.registered_extensions()[suffix.lower()])

    return apply


def _in_mode(mode: str, seed: int) -> Image.Image:
    image = noise(seed)
    levels = np.asarray(image.convert("L"))
    if mode == "F":
        return Image.fromarray(levels.astype(np.float32) * 3.7)
    if mode == "unit":
        return Image.fromarray(levels.astype(np.float32) / 255)
    if mode == "nan":
        return Image.fromarray(np.where(levels > 100, levels, np.nan).astype(np.float32))
    if mode == "I;16":
        return Image.fromarray(levels.astype(np.uint16) * 16)
    if mode == "flat":
        return Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9))
    return image.convert(mode)


def _named(name: str, listed: str | None = None) -> Defect:
    """Another name; `listed` is what the annotation file says instead."""

    def apply(case: Case, split: str, number: int) -> None:
        case.rename(split, number, name, listed=listed)

    return apply


def _content(data: bytes | None) -> Defect:
    """Other bytes in the file; None removes it."""

    def apply(case: Case, split: str, number: int) -> None:
        path = case.image(split, number)
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)

    return apply


def _truncated(case: Case, split: str, number: int) -> None:
    path = case.image(split, number)
    if path.is_file():
        path.write_bytes(path.read_bytes()[: 60 + 200 * (number % 4)])


def _bomb(case: Case, split: str, number: int) -> None:
    """A PNG whose header says 60,000 x 60,000 pixels."""
    stream = io.BytesIO()
    noise(1).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    _content(bytes(data))(case, split, number)


def _one_pixel(case: Case, split: str, number: int) -> None:
    """The placeholder that a failed download leaves."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "PNG")
    _content(stream.getvalue())(case, split, number)


def _rotated(case: Case, split: str, number: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 5 + number % 4
    case.rename(split, number, f"turned{number}.jpg")
    noise(number + 70).save(case.image(split, number), "JPEG", exif=exif)


def _added(name: str, data: bytes | None = None) -> Defect:
    """A file that nobody lists; an image unless `data` is given."""

    def apply(case: Case, split: str, number: int) -> None:
        path = case.folder(split) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            noise(number + 90).save(path, "PNG")
        else:
            path.write_bytes(data)

    return apply


def _linked_folder(case: Case, split: str, _number: int) -> None:
    """The images folder is a link to a folder elsewhere."""
    folder = case.folder(split)
    if not folder.is_symlink():
        elsewhere = case.root.parent / "elsewhere" / split / "images"
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere, target_is_directory=True)


def _linked_file(case: Case, split: str, number: int) -> None:
    path = case.image(split, number)
    if path.is_file() and not path.is_symlink():
        elsewhere = case.root.parent / "elsewhere" / f"{split}-{number}.png"
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        path.rename(elsewhere)
        path.symlink_to(elsewhere)


def _dangling(case: Case, split: str, number: int) -> None:
    path = case.image(split, number)
    path.unlink(missing_ok=True)
    path.symlink_to(case.root / "nowhere.png")


def _self_link(case: Case, split: str, number: int) -> None:
    path = case.image(split, number)
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def _loop(case: Case, split: str, _number: int) -> None:
    link = case.folder(split) / "loop"
    if not link.is_symlink():
        link.symlink_to(case.folder(split), target_is_directory=True)


def _directory(case: Case, split: str, number: int) -> None:
    """A folder with the name of an image."""
    path = case.image(split, number)
    path.unlink(missing_ok=True)
    path.mkdir(exist_ok=True)


def _leaked(case: Case, split: str, number: int) -> None:
    """An image of train in another split."""
    other = next(name for name in case.splits if name != split)
    source = case.image(other, number)
    if source.is_file() and not source.is_symlink():
        _content(source.read_bytes())(case, split, number)


def _case(case: Case, split: str, number: int) -> None:
    """The file on disk has another case than its record."""
    path = case.image(split, number)
    if path.is_file():
        path.rename(path.with_name(path.name.upper()))


def _empty_split(case: Case, split: str, _number: int) -> None:
    for number in range(len(case.names[split])):
        case.image(split, number).unlink(missing_ok=True)


IMAGE_DEFECTS: dict[str, Defect] = {
    "grey": _as("L", ".png"),
    "grey-alpha": _as("LA", ".png"),
    "palette": _as("P", ".png"),
    "alpha": _as("RGBA", ".webp"),
    "cmyk": _as("CMYK", ".jpg"),
    "cmyk-tiff": _as("CMYK", ".tif"),
    "one-bit": _as("1", ".bmp"),
    "16-bit": _as("I;16", ".png"),
    "float": _as("F", ".tiff"),
    "float-unit": _as("unit", ".tiff"),
    "float-nan": _as("nan", ".tiff"),
    "flat": _as("flat", ".png"),
    "gif": _as("P", ".gif"),
    "jfif": _as("RGB", ".jfif"),
    "upper-suffix": _as("RGB", ".JPG"),
    "space": _named("two words.png"),
    "unicode": _named("grün 日本.png"),
    "percent": _named("a%20b.png"),
    "nested": _named("deep/er/x.png"),
    "dots": _named("a.b.c.png"),
    "long": _named("n" * 200 + ".png"),
    "wrong-suffix": _named("photo.jpg"),
    "no-suffix": _named("photo"),
    "backslash": _named("win/x.png", "win\\x.png"),
    "encoded": _named("c d.png", "c%20d.png"),
    "dotted": _named("e.png", "./e.png"),
    "doubled": _named("f/g.png", "f//g.png"),
    "upwards": _named("h.png", "../h.png"),
    "absolute": _named("i.png", "/data/images/i.png"),
    "url": _named("j.png", "https://example.org/images/j.png?x=1"),
    "null-name": _named("k.png", "k\0.png"),
    "blank-name": _named("l.png", " "),
    "case": _case,
    "text-content": _content(b"not an image"),
    "empty-content": _content(b""),
    "missing": _content(None),
    "truncated": _truncated,
    "one-pixel": _one_pixel,
    "bomb": _bomb,
    "rotated": _rotated,
    "leaked": _leaked,
    "newline": _named("a\nb.png"),
    "trailing-space": _named("a .png"),
    "leading-dash": _named("-a.png"),
    "dot-file": _named(".a.png"),
    "dot-folder": _named(".thumbs/a.png"),
    "mac-folder": _named("__MACOSX/a.png"),
    "quote": _named('it\'s "a".png'),
    "decomposed": _named("gru\u0308n.png", "gr\u00fcn.png"),
    "slash-end": _named("m.png", "m.png/"),
    "root-relative": _named("o.png", "/o.png"),
    "drive": _named("p.png", "C:\\data\\p.png"),
    "surrogate": _named("q.png", "\udcff.png"),
    "zero-image": _content(b"P6\n0 0\n255\n"),
    "web-page": _content(b"<!DOCTYPE html><html></html>"),
    "pointer": _content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "hidden": _added(".ipynb_checkpoints/copy.png"),
    "apple": _added("._x.png", b"\0\5\x16\7"),
    "unlisted": _added("more/unlisted.png"),
    "stray": _added("notes.md", b"x"),
    "heic-content": _content(b"\0\0\0\x18ftypheic"),
    "heic": _added("photo.heic", b"\0\0\0\x18ftypheic"),
    "linked-folder": _linked_folder,
    "linked-file": _linked_file,
    "dangling": _dangling,
    "loop": _loop,
    "self-link": _self_link,
    "directory": _directory,
    "no-images": _empty_split,
}
