"""RFDETR.predict: every kind of image gives the same detections, lists stay lists."""

from __future__ import annotations

import base64
import http.server
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision
import torch
from PIL import Image

from rfdetr import RFDETR
from rfdetr.checkpoints.best_file import best_payload
from rfdetr.checkpoints.safe_io import save_file
from rfdetr.config import TrainConfig
from rfdetr.data.batch import pad_images
from rfdetr.data.coco_names import COCO_CATEGORIES, COCO_NAMES
from rfdetr.data.image_input import read_image
from rfdetr.data.transforms import preprocess
from rfdetr.errors import InputError
from rfdetr.model import postprocess
from rfdetr.model.network import RFDETRNetwork
from rfdetr.model.postprocess import resize_masks
from tests.unit.detector.small import pixels, small, small_segmentation

DETECTOR = small(num_classes=3)


def _same(first: supervision.Detections, second: supervision.Detections) -> None:
    np.testing.assert_allclose(first.xyxy, second.xyxy, atol=1e-4)
    np.testing.assert_allclose(first.confidence, second.confidence, atol=1e-6)
    assert first.class_id.tolist() == second.class_id.tolist()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_every_kind_of_image_gives_the_same_detections(tmp_path: Path, served: str) -> None:
    array = pixels()
    Image.fromarray(array).save(tmp_path / "image.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    kept = tensor.clone()
    kinds = [
        array, Image.fromarray(array), tensor, tmp_path / "image.png",
        str(tmp_path / "image.png"), f"{served}/image.png",
        array[:, :, ::-1].copy()[:, :, ::-1],  # a view with negative strides, as of a BGR image
    ]  # fmt: skip
    expected = DETECTOR.predict(array, threshold=0.0)
    assert isinstance(expected, supervision.Detections)
    assert len(expected) == 10
    for kind in kinds:
        _same(DETECTOR.predict(kind, threshold=0.0), expected)
    found = DETECTOR.predict(kinds, threshold=0.0)
    assert isinstance(found, list)
    assert len(found) == len(kinds)
    for detections in found:
        _same(detections, expected)
    assert torch.equal(tensor, kept)


def test_a_list_gives_a_list_also_of_one_and_of_none() -> None:
    assert isinstance(DETECTOR.predict([pixels()]), list)
    assert DETECTOR.predict([]) == []


def test_batches_of_different_images_keep_their_own_sizes() -> None:
    images = [pixels(40, 90, 1), pixels(90, 40, 2), pixels(64, 64, 3)]
    together = DETECTOR.predict(images, threshold=0.0, batch_size=2)
    for image, detections in zip(images, together, strict=True):
        _same(detections, DETECTOR.predict(image, threshold=0.0))
        assert detections.xyxy[:, [0, 2]].max() <= image.shape[1]
        assert detections.xyxy[:, [1, 3]].max() <= image.shape[0]


def test_detections_are_those_of_the_network() -> None:
    image = pixels()
    with torch.no_grad():
        outputs = DETECTOR.model.model(preprocess(image, 64)[None])
    result = DETECTOR.model.postprocess(outputs, torch.tensor([[50, 70]]))[0]
    found = DETECTOR.predict(image, threshold=0.0)
    np.testing.assert_allclose(found.xyxy, result["boxes"].numpy(), atol=1e-4)
    assert found.class_id.tolist() == result["labels"].tolist()


def test_images_keep_their_aspect_ratio_where_training_did() -> None:
    detector, image = small(num_classes=3), pixels(40, 90)
    squares = detector.predict(image, threshold=0.0)
    detector.model.square = False
    with torch.no_grad():
        batch = pad_images([preprocess(image, (64, 144))], detector.model_config.block_size)
        outputs = detector.model.model(batch)
    result = detector.model.postprocess(outputs, torch.tensor([[40, 90]]))[0]
    found = detector.predict(image, threshold=0.0)
    np.testing.assert_allclose(found.xyxy, result["boxes"].numpy(), atol=1e-4)
    assert np.abs(found.confidence - squares.confidence).max() > 1e-4
    assert len(detector.predict([image, pixels(90, 40)], threshold=0.0)) == 2
    with pytest.warns(UserWarning, match="square_resize_div_64=False"):
        detector.optimize_for_inference()
    _same(detector.predict(image, threshold=0.0), squares)


@pytest.mark.parametrize("square", [True, False])
def test_a_best_file_says_whether_images_become_squares(square: bool, tmp_path: Path) -> None:
    config = TrainConfig(dataset_dir=tmp_path, square_resize_div_64=square)
    network, model_config = DETECTOR.model.model, DETECTOR.model_config
    save_file(best_payload(network.state_dict(), model_config, config), tmp_path / "best.pth")
    for found in (
        RFDETR.from_checkpoint(tmp_path / "best.pth"),
        small(num_classes=3, pretrain_weights=str(tmp_path / "best.pth")),
    ):
        assert found.model.square is square


def test_the_threshold_is_strict() -> None:
    everything = DETECTOR.predict(pixels(), threshold=0.0)
    limit = float(everything.confidence[3])
    kept = DETECTOR.predict(pixels(), threshold=limit)
    assert len(kept) == int((everything.confidence > limit).sum()) < len(everything)
    nothing = DETECTOR.predict(pixels(), threshold=1.0)
    assert (len(nothing), nothing.xyxy.shape) == (0, (0, 4))
    assert len(nothing.data["class_name"]) == 0


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_network_stays(training: bool) -> None:
    detector = small()
    detector.model.model.train(training)
    detector.predict(pixels())
    assert detector.model.model.training is training
    with pytest.raises(FileNotFoundError):
        detector.predict("none.jpg")
    assert detector.model.model.training is training


def test_names_of_coco_models_follow_the_sparse_ids() -> None:
    detector = small()
    assert detector.class_names == COCO_NAMES
    assert (len(COCO_NAMES), COCO_CATEGORIES[1], COCO_CATEGORIES[90]) == (
        80,
        "person",
        "toothbrush",
    )
    found = detector.predict(pixels(), threshold=0.0)
    names = [COCO_CATEGORIES.get(int(i), str(i)) for i in found.class_id]
    assert found.data["class_name"].tolist() == names


def test_names_of_custom_models() -> None:
    assert DETECTOR.class_names == ["0", "1", "2"]
    detector = small(num_classes=3)
    detector.model.class_names = ["a", "b", "c"]
    found = detector.predict(pixels(), threshold=0.0)
    wanted = [{0: "a", 1: "b", 2: "c"}.get(int(i), str(i)) for i in found.class_id]
    assert found.data["class_name"].tolist() == wanted
    detector.model.label_offset = 1
    found = detector.predict(pixels(), threshold=0.0)
    wanted = [{1: "a", 2: "b", 3: "c"}.get(int(i), str(i)) for i in found.class_id]
    assert found.data["class_name"].tolist() == wanted


def test_segmentation_gives_masks_of_the_image_size() -> None:
    found = small_segmentation(num_classes=2).predict(pixels(), threshold=0.0)
    assert found.mask.shape == (10, 50, 70)
    assert found.mask.dtype == bool


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (torch.full((3, 8, 8), 2.0), "0..1"),
        (torch.full((3, 8, 8), -0.1), "0..1"),
        (torch.rand(1, 8, 8), r"\(3, H, W\)"),
        (np.zeros((8, 8), np.uint8), "Convert the image to RGB first"),
        (np.full((8, 8, 3), 200.0), r"values in 0..1, found 200..200. .* \(255 for 8 bits\)"),
        (np.full((8, 8, 3), np.nan), "values in 0..1, found nan"),
        (np.zeros((8, 8, 3), np.uint16), "Scale the values to 0..255"),
        (7, "got int"),
        ({"a": 1}, "got dict"),
        (None, "got NoneType"),
        (np.zeros((3, 8, 9), np.uint8), r"image\.transpose\(1, 2, 0\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), "batch as a list"),
        (np.zeros((0, 8, 3), np.uint8), "The image is empty"),
        (torch.rand(8, 9, 3), r"image\.permute\(2, 0, 1\)"),
        (torch.rand(2, 3, 8, 8), "batch as a list"),
        (torch.rand(3, 0, 8), "empty"),
        (Path(__file__).parent, "is a folder: pass a list"),
    ],
)
def test_what_is_not_an_image_is_named(image: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        DETECTOR.predict(image)


@pytest.mark.parametrize("threshold", [None, [0.5], "0.5", 50, float("nan")])
def test_what_is_no_threshold_is_named(threshold: Any) -> None:
    with pytest.raises(InputError, match="threshold must be a number up to 1 or 'operating_point'"):
        DETECTOR.predict(pixels(), threshold=threshold)
    assert len(DETECTOR.predict(pixels(), threshold=np.float32(0))) == 10


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_float_array_in_0_to_1_is_the_same_image(dtype: Any) -> None:
    image = pixels()
    floats = (image / 255).astype(dtype)
    np.testing.assert_array_equal(read_image(floats), np.rint(floats.astype(np.float32) * 255))
    if dtype != np.float16:  # which cannot hold every level
        np.testing.assert_array_equal(read_image(floats), image)
        _same(DETECTOR.predict(floats, 0.0), DETECTOR.predict(image, 0.0))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16", "I", "F"])
def test_every_mode_of_an_image_has_its_right_values(mode: str, tmp_path: Path) -> None:
    """A ramp of grey levels arrives as the same ramp, in memory and from a file."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    grey = Image.fromarray(ramp)
    if mode == "1":
        grey, ramp = grey.point(lambda v: 255 * (v > 99)), np.where(ramp > 99, 255, 0)
    arrays = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    if mode in arrays:
        image = Image.fromarray(ramp.astype(arrays[mode]))
        assert image.mode == mode
    else:
        image = grey.convert("RGB" if mode == "CMYK" else mode).convert(mode)
    image.save(tmp_path / "image.tif")
    for source in (image, tmp_path / "image.tif"):
        found = read_image(source)
        assert found.shape == (4, 256, 3)
        np.testing.assert_array_equal(found, np.repeat(ramp[..., None], 3, axis=2))


def test_an_image_of_one_colour_is_reported(tmp_path: Path) -> None:
    Image.new("RGB", (70, 50), (0, 0, 0)).save(tmp_path / "dark.png")
    with pytest.warns(UserWarning, match=r"dark\.png has one colour: \(0, 0, 0\)"):
        DETECTOR.predict(tmp_path / "dark.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = np.zeros((200, 200, 3), np.uint8)
        image[131, 77] = 1
        DETECTOR.predict(image)


def test_broken_files_and_addresses_are_named(tmp_path: Path, served: str) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(base64.b64decode("/9j/AAAA") + b"no image")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        DETECTOR.predict(broken)
    with pytest.raises(InputError, match=r"broken\.jpg is not an image"):
        DETECTOR.predict(f"{served}/broken.jpg")
    with pytest.raises(InputError, match=r"absent\.jpg cannot be fetched"):
        DETECTOR.predict(f"{served}/absent.jpg")
    Image.fromarray(pixels()).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    with Image.open(tmp_path / "cut.png") as picture, pytest.raises(InputError, match="PIL image"):
        DETECTOR.predict(picture)
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        DETECTOR.predict(str(tmp_path / "absent.jpg"))


def test_gray_and_alpha_images_are_accepted() -> None:
    for mode in ("L", "RGBA", "P"):
        assert len(DETECTOR.predict(Image.fromarray(pixels()).convert(mode), threshold=0.0)) == 10


@pytest.mark.parametrize("compile", [True, False])
def test_an_optimized_copy_gives_the_same(compile: bool) -> None:
    detector = small(num_classes=3)
    before = detector.predict(pixels(), threshold=0.0)
    detector.optimize_for_inference(compile=compile)
    _same(detector.predict(pixels(), threshold=0.0), before)
    with torch.no_grad():
        detector.model.model.class_embed.bias.fill_(-20)
    _same(detector.predict(pixels(), threshold=0.0), before)
    detector.remove_optimized_model()
    assert len(detector.predict(pixels(), threshold=0.01)) == 0


def test_only_a_recorded_copy_runs_without_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, plain = small(num_classes=3), small(num_classes=3)
    recorded.optimize_for_inference(compile=True)
    plain.optimize_for_inference(compile=False)

    def forbidden(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(RFDETRNetwork, "forward", forbidden)
    assert len(recorded.predict(pixels(), threshold=0.0)) == 10
    with pytest.raises(AssertionError):
        plain.predict(pixels())


def test_an_optimized_copy_refuses_other_numbers() -> None:
    detector = small(num_classes=3)
    detector.optimize_for_inference(batch_size=2, dtype=torch.float32)
    assert len(detector.predict([pixels(), pixels()])) == 2
    with pytest.raises(ValueError, match="batches of 2 at 64 pixels; got 1 images"):
        detector.predict(pixels())
    detector.model.resolution = 128
    with pytest.raises(ValueError, match="got 2 images at 128"):
        detector.predict([pixels(), pixels()])
    with pytest.raises(ValueError, match="at least 1"):
        detector.optimize_for_inference(batch_size=0)


def test_an_optimized_segmentation_copy_in_low_precision() -> None:
    detector = small_segmentation(num_classes=2)
    detector.optimize_for_inference(dtype=torch.bfloat16)
    assert detector.predict(pixels(), threshold=0.0).mask.shape == (10, 50, 70)


def test_only_masks_above_the_threshold_are_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = small_segmentation(num_classes=2)
    images = [pixels(50, 70), pixels(31, 20, seed=1)]
    everything = detector.predict(images, threshold=0.0)
    limit = float(everything[0].confidence[3])
    resized: list[tuple[int, int, int]] = []

    def resize(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
        resized.append((len(logits), height, width))
        return resize_masks(logits, height, width)

    monkeypatch.setattr(postprocess, "resize_masks", resize)
    kept = detector.predict(images, threshold=limit)
    assert resized == [(len(kept[0]), 50, 70), (len(kept[1]), 31, 20)]
    assert len(kept[0]) == 3
    for some, whole in zip(kept, everything, strict=True):
        assert np.array_equal(some.mask, whole.mask[: len(some)])
