"""The profile that registration stores: which images, made once, part of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.config.sections import DatasetSettings
from flows.registry.image_profile import profile_once, split_images, spread
from flows.registry.model_folder import ModelFiles
from flows.storage.packs import pack
from rfdetr.errors import RFDETRError
from rfdetr.monitoring.image_profile import ImageProfile
from tests.datasets import make_coco, make_roboflow, make_yolo
from tests.flows.models import register_champion, write_model


@pytest.fixture
def model(tmp_path: Path) -> ModelFiles:
    (tmp_path / "model").mkdir()
    return write_model(tmp_path / "model")


def profile_of(root: Path, folder: str, model: ModelFiles, digest: str) -> Path:
    dataset = DatasetSettings(name="shapes", dir=folder)
    return profile_once(root / folder, dataset, model.weights, digest, root / "state")


def test_profile_is_made_once_and_again_for_other_data(tmp_path: Path, model: ModelFiles) -> None:
    make_roboflow(tmp_path / "data", splits={"train": 4, "valid": 3, "test": 2})
    first = profile_of(tmp_path, "data", model, "digest-1")
    made = first.stat().st_mtime_ns
    profile = ImageProfile.load(first)
    assert len(profile) == 9
    assert profile.held_out.tolist() == 4 * [False] + 5 * [True]
    assert profile_of(tmp_path, "data", model, "digest-1") == first
    assert first.stat().st_mtime_ns == made
    assert profile_of(tmp_path, "data", model, "digest-2") != first


def test_profile_of_a_packed_dataset_is_that_of_its_files(
    tmp_path: Path, model: ModelFiles
) -> None:
    make_roboflow(tmp_path / "data", splits={"train": 4, "valid": 3, "test": 2})
    pack(tmp_path / "data", tmp_path / "packed", progress=False)
    plain, packed = (
        ImageProfile.load(profile_of(tmp_path, name, model, name)) for name in ("data", "packed")
    )
    assert plain.files == packed.files
    assert (plain.embeddings == packed.embeddings).all()


@pytest.mark.parametrize("layout", ["roboflow", "coco", "yolo"])
def test_images_of_every_layout(tmp_path: Path, layout: str) -> None:
    if layout == "coco":
        make_coco(tmp_path, splits={"train": 4, "val": 3})
        expected = {"train": 4, "val": 3}
    else:
        make = make_yolo if layout == "yolo" else make_roboflow
        make(tmp_path, splits={"train": 4, "valid": 3, "test": 2})
        expected = {"train": 4, "val": 3, "test": 2}
    found = split_images(tmp_path, DatasetSettings(name="x", dir=".", layout=layout))
    assert {name: len(paths) for name, paths in found.items()} == expected
    assert all(path.is_file() for paths in found.values() for path in paths)


def test_a_sample_spreads_over_the_whole_split() -> None:
    paths = [Path(str(i)) for i in range(10)]
    assert spread(paths, 4) == [paths[0], paths[2], paths[5], paths[7]]
    assert spread(paths, 20) == paths


def test_missing_dataset_is_named(tmp_path: Path, model: ModelFiles) -> None:
    with pytest.raises(RFDETRError, match="does not exist"):
        profile_of(tmp_path, "nowhere", model, "digest")


def test_profile_travels_with_the_registered_model(
    tmp_path: Path, model: ModelFiles, tracking_uri: str
) -> None:
    make_roboflow(tmp_path / "data", splits={"train": 4, "valid": 3, "test": 2})
    profile = profile_of(tmp_path, "data", model, "digest")
    files = model.model_copy(update={"profile": profile})
    registry = register_champion(tracking_uri, files)
    champion = registry.champion()
    assert champion is not None
    fetched = registry.fetch(champion, tmp_path / "fetched") / "artifacts/profile.npz"
    assert fetched.read_bytes() == profile.read_bytes()
    assert json.loads((fetched.parent / "model.json").read_text())["variant"] == "nano"
