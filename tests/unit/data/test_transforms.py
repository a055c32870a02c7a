from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rfdetr.data.decode import ImageFile
from rfdetr.data.transforms import (
    EvalTransform,
    TrainTransform,
    keep_aspect,
    normalise,
    preprocess,
    resize,
)
from rfdetr.errors import InputError

ONE_LEVEL = 0.0181  # one of 256 levels after normalisation, the tolerance of the numbers


def formula(width: int, height: int, k: int) -> np.ndarray:
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return ((7 * x + 13 * y + 29 * c + 5 * ((x * y) // 11) + 17 * k) % 256).astype(np.uint8)


def numbers(parity: Path) -> dict:
    return json.loads((parity / "training/eval_transform.json").read_text())


@pytest.mark.parametrize("case", range(5))
def test_preprocess_gives_the_reference_pixels(parity: Path, case: int) -> None:
    given = numbers(parity)["square_cases"][case]
    expected = given["pil_bilinear_antialias__rfdetr_1_11_2_val"]
    image = formula(given["width"], given["height"], given["k"])
    out = preprocess(image, given["resolution"])
    assert list(out.shape) == expected["shape"]
    assert out.dtype == torch.float32
    rows, columns = expected["sample_rows"], expected["sample_cols"]
    samples = out[:, rows][:, :, columns].numpy()
    np.testing.assert_allclose(samples, np.array(expected["samples"]), atol=ONE_LEVEL)
    np.testing.assert_allclose(out.mean((1, 2)), expected["mean"], atol=1e-3)
    np.testing.assert_allclose(out.std((1, 2)), expected["std"], atol=1e-3)


def test_preprocess_enlarges_like_the_reference(parity: Path) -> None:
    stored = np.load(parity / "training/eval_transform_small.npz")
    out = preprocess(stored["image_uint8"], 16)
    np.testing.assert_allclose(out, stored["pil_bilinear_antialias"], atol=ONE_LEVEL)


@pytest.mark.parametrize("size", [(64, 64), (384, 384), (300, 700)])
def test_the_resize_is_pillows_to_one_grey_level(size: tuple[int, int]) -> None:
    """On photos. Noise that is enlarged differs by two levels in a few values of a million."""
    from sklearn.datasets import load_sample_images

    photos = [*load_sample_images().images, formula(1920, 1080, 2)]
    noise = [formula(640, 480, 3), np.random.default_rng(0).integers(0, 256, (480, 640, 3))]
    for image in photos + noise:
        pixels = image.astype(np.uint8)
        pillow = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
        ours = resize(torch.from_numpy(pixels).permute(2, 0, 1), size).permute(1, 2, 0)
        assert ours.dtype == torch.uint8
        apart = np.abs(ours.numpy().astype(int) - np.asarray(pillow))
        assert apart.max() <= (1 if any(image is photo for photo in photos) else 2)
        assert (apart > 1).mean() < 1e-5
        assert apart.mean() < 0.3


def test_every_kind_of_input_gives_the_same_tensor() -> None:
    pixels = formula(61, 47, 1)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = preprocess(pixels, 32)
    for same in (Image.fromarray(pixels), chw, chw.float() / 255, chw.half() / 255):
        assert torch.equal(preprocess(same, 32), expected)
    assert preprocess(pixels, (20, 44)).shape == (3, 20, 44)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "I", "F"])
def test_preprocess_takes_every_pil_mode(mode: str) -> None:
    gray = Image.fromarray(formula(30, 20, 0)).convert("L")
    image = gray.convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        full = ImageOps.autocontrast(gray)  # the range of the image is scaled to 0..255
        image = Image.fromarray(np.asarray(full).astype(np.uint16) * 257)
        gray = full
    out = preprocess(image, 16)
    assert out.shape == (3, 16, 16)
    if mode in ("I;16", "I", "F", "LA", "RGBA"):
        torch.testing.assert_close(out, preprocess(gray, 16))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4), np.uint8), r"uint8 \(4, 4\)"),
        (np.full((4, 4, 3), 255, np.float32), r"0\.\.1"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (torch.zeros(1, 4, 4), r"\(1, 4, 4\)"),
        (torch.full((3, 4, 4), 255.0), r"0\.\.1"),
        (torch.full((3, 4, 4), float("nan")), r"0\.\.1"),
        ("a.jpg", "str"),
    ],
)
def test_preprocess_refuses_what_it_cannot_take(image: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        preprocess(image, 16)  # type: ignore[arg-type]


def test_normalise_is_the_formula() -> None:
    pixels = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(normalise(pixels), expected)


def test_sizes_that_keep_the_aspect_ratio(parity: Path) -> None:
    for case in numbers(parity)["non_square_resize_output"]:
        size = keep_aspect(case["height"], case["width"], case["resolution"])
        assert list(size) == case["out_hw"], case


def test_train_views_follow_the_distribution() -> None:
    transform = TrainTransform([96, 128])
    rng = random.Random(0)
    views = [transform.view(480, 640, rng) for _ in range(3000)]
    whole = [v for v in views if (v.height, v.width) == (480, 640)]
    crops = [v for v in views if (v.height, v.width) != (480, 640)]
    assert 0.46 < len(whole) / len(views) < 0.54
    assert 0.46 < sum(v.flip for v in views) / len(views) < 0.54
    assert {v.out_height for v in views} == {96, 128}
    # crops of 384..600 of a shorter side of 400, 500 or 600 cover these parts of 480 pixels
    sides = {v.height for v in crops}
    assert 307 <= min(sides) <= 310
    assert max(sides) <= 480
    assert all(v.height == v.width for v in crops)
    assert all(v.top >= 0 and v.top + v.height <= 480 for v in crops)
    assert all(v.left >= 0 and v.left + v.width <= 640 for v in crops)
    assert max(v.left + v.width for v in crops) == 640
    assert not any(TrainTransform([96], mirror=False).view(480, 640, rng).flip for _ in range(50))


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (50, 40)])
def test_views_of_odd_images(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "odd.png"
    Image.new("RGB", (size[1], size[0]), (255, 0, 0)).save(path)
    file = ImageFile(path)
    for seed in range(20):
        transform = TrainTransform([32, 64])
        view = transform.view(*size, random.Random(seed))
        image, shown = transform.pixels(file, view)
        assert image.shape == (3, view.out_height, view.out_width)
        assert shown.height > 0
        assert (image[0] == 255).all()


def test_train_pixels_show_the_view(tmp_path: Path) -> None:
    """The image's own coordinates, stored as colours, come out where the view says."""
    y, x = np.mgrid[0:200, 0:240]
    path = tmp_path / "map.png"
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(path)
    transform = TrainTransform([64])
    for seed in range(12):
        view = transform.view(200, 240, random.Random(seed))
        image, shown = transform.pixels(ImageFile(path), view)
        assert shown[:4] == view[:4]
        columns = shown.left + (np.arange(64) + 0.5) * shown.width / 64 - 0.5
        columns = columns[::-1] if view.flip else columns
        rows = shown.top + (np.arange(64) + 0.5) * shown.height / 64 - 0.5
        inner = slice(2, -2)
        np.testing.assert_allclose(image[0, 32, inner], columns[inner], atol=1.5)
        np.testing.assert_allclose(image[1, inner, 32], rows[inner], atol=1.5)


def test_reduced_decoding_hardly_changes_training_pixels(tmp_path: Path) -> None:
    from sklearn.datasets import load_sample_images

    photo = Image.fromarray(load_sample_images().images[0]).resize((2400, 1600))
    path = tmp_path / "large.jpg"
    photo.save(path, quality=92)
    file = ImageFile(path)
    transform = TrainTransform([128])
    for seed in range(4):
        view = transform.view(1600, 2400, random.Random(seed))
        reduced, shown = transform.pixels(file, view)
        whole = file.decode()
        assert file.decode(256, 384).shape[0] < whole.shape[0]
        left, top = round(shown.left), round(shown.top)
        part = whole[top : top + round(shown.height), left : left + round(shown.width)]
        expected = normalise(reduced) - preprocess(part[:, :: -1 if view.flip else 1].copy(), 128)
        assert expected.abs().mean() < ONE_LEVEL


def test_evaluation_decodes_every_pixel(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(formula(900, 700, 2)).save(path)
    transform = EvalTransform(64)
    file = ImageFile(path)
    image, view = transform.pixels(file, transform.view(700, 900))
    assert image.dtype == torch.uint8
    assert torch.equal(normalise(image), preprocess(Image.open(path), 64))
    assert view[:4] == (0, 0, 700, 900)
    assert EvalTransform(64, square=False).view(700, 900)[4:6] == (64, 82)
