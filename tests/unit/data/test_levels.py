"""16-bit and float images are scaled by the range of the training images, everywhere."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from flows.registry.served_model import read_images
from rfdetr import RFDETR
from rfdetr.checks import check_dataset
from rfdetr.config import ModelConfig, RFDETRNanoConfig, TrainConfig
from rfdetr.data.decode import ImageFile, Levels, eight_bit_levels
from rfdetr.data.levels import dataset_levels
from rfdetr.training import RFDETRDataModule
from tests.datasets import make_roboflow
from tests.unit.detector.small import small
from tests.unit.training.helpers import tiny_run


def grey(path: Path, low: int, high: int, dtype: type = np.uint16) -> Path:
    ramp = np.linspace(low, high, 32 * 24).reshape(24, 32).astype(dtype)
    Image.fromarray(ramp).save(path)
    return path


@pytest.mark.parametrize(
    ("values", "levels", "expected"),
    [
        ([0, 1000, 2000], (0.0, 4000.0), [0, 64, 128]),
        ([-100, 4000, 9000], (0.0, 4000.0), [0, 255, 255]),
        ([np.nan, np.inf, 2000.0], (1000.0, 3000.0), [128, 128, 128]),
        ([5, 5, 5], (5.0, 5.0), [0, 0, 0]),
        ([0.25, 0.5, 1.0], (0.0, 1.0), [64, 128, 255]),
    ],
)
def test_levels_of_the_dataset_decide(
    values: list[float], levels: Levels, expected: list[int]
) -> None:
    assert eight_bit_levels(np.array(values), levels).tolist() == expected


def test_the_range_is_that_of_all_images(tmp_path: Path) -> None:
    paths = [grey(tmp_path / f"{i}.png", 1000 * i, 1000 * i + 500) for i in range(1, 4)]
    assert dataset_levels(paths) == (1000.0, 3500.0)
    (tmp_path / "broken.png").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(tmp_path / "rgb.png")
    assert dataset_levels([*paths, tmp_path / "broken.png", tmp_path / "rgb.png"]) == (1e3, 3.5e3)
    assert dataset_levels([tmp_path / "rgb.png", tmp_path / "missing.tif"]) is None
    assert dataset_levels([grey(tmp_path / "12.png", 3, 200)]) == (0.0, 255.0)
    assert dataset_levels([grey(tmp_path / "1.tif", 0, 1, np.float32)]) == (0.0, 1.0)
    many = [grey(tmp_path / f"many{i}.png", 10, 1000) for i in range(3)] * 400
    assert dataset_levels([*many, grey(tmp_path / "last.png", 0, 9000)]) == (0.0, 9000.0)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A dataset of cold (1000..1500) and hot (3000..3500) images."""
    root = make_roboflow(tmp_path / "data", splits={"train": 4, "valid": 2}, suffix="png")
    for split in ("train", "valid"):
        for number, path in enumerate(sorted((root / split).glob("*.png"))):
            size = Image.open(path).size
            ramp = np.linspace(0, 500, size[0] * size[1]).reshape(size[::-1])
            Image.fromarray((ramp + (1000, 3000)[number % 2]).astype(np.uint16)).save(path)
    return root


def data_of(root: Path, model: ModelConfig) -> RFDETRDataModule:
    config = {"dataset_dir": str(root), "num_workers": 0, "output_dir": str(root.parent / "out")}
    data = RFDETRDataModule(model, TrainConfig.model_validate(config))
    data.setup("fit")
    return data


def test_training_uses_the_range_of_the_training_split(deep: Path) -> None:
    model = RFDETRNanoConfig.model_validate({"pretrain_weights": None})
    data = data_of(deep, model)
    assert model.grey_levels == (1000.0, 3500.0)
    valid = data._datasets["val"]
    pixels = [ImageFile(valid.index.path(i), valid.levels).decode() for i in range(2)]
    assert pixels[0].max() == 51
    assert pixels[1].min() == 204
    given = RFDETRNanoConfig.model_validate({"pretrain_weights": None, "grey_levels": [0, 9000]})
    data_of(deep, given)
    assert given.grey_levels == (0.0, 9000.0)


def test_checks_see_the_images_as_training(deep: Path) -> None:
    report = check_dataset(deep, workers=1, cache_dir=deep.parent / "cache", progress=False)
    mean = report.statistics["train"].colour_mean
    assert mean is not None
    assert mean[0] == pytest.approx((25.5 + 229.5) / 2, abs=2)
    path = min((deep / "train").glob("*.png"))
    size = Image.open(path).size
    Image.fromarray(np.full(size[::-1], 1010, np.uint16)).save(path)
    again = check_dataset(deep, workers=1, cache_dir=deep.parent / "cache", progress=False)
    assert [f.details["image"] for f in again.of("image-flat")] == [f"train/{path.name}"]


def test_the_levels_are_in_the_checkpoints_and_act_in_predict(deep: Path, tmp_path: Path) -> None:
    detector = small(num_classes=3)
    config = tiny_run(deep, tmp_path / "out", epochs=1, batch_size=4)
    fields = ("epochs", "batch_size", "grad_accum_steps", "num_workers", "multi_scale", "seed")
    detector.train(
        dataset_dir=str(deep),
        output_dir=str(tmp_path / "out"),
        tensorboard=False,
        device="cpu",
        **{name: getattr(config, name) for name in fields},
    )
    images = [str(path) for path in sorted((deep / "valid").glob("*.png"))]
    scaled = [eight_bit_levels(np.asarray(Image.open(path)), (1000.0, 3500.0)) for path in images]
    expected = detector.predict([np.stack([grey] * 3, -1) for grey in scaled], threshold=0.0)
    for file in ("checkpoint_best_total.pth", "last.ckpt"):
        loaded = RFDETR.from_checkpoint(tmp_path / "out" / file, device="cpu")
        assert loaded.model_config.grey_levels == (1000.0, 3500.0), file
    for source in (images, [Image.open(path) for path in images]):
        found = detector.predict(source, threshold=0.0)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.xyxy, other.xyxy)
    texts = [base64.b64encode(Path(path).read_bytes()).decode() for path in images]
    request = pd.DataFrame({"image": texts})
    arrays = [np.asarray(image) for image in read_images(request, (1000.0, 3500.0))]
    assert [int(array.mean()) for array in arrays] == [int(grey.mean()) for grey in scaled]
