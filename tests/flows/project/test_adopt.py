"""Datasets of any kind become folders below data/ that training reads; nothing else is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.config.environment import Environment
from flows.project.adopt import Adopted, adopt, dataset_name
from flows.project.project import Project
from rfdetr.data.layouts import detect_layout
from rfdetr.errors import ConfigError, DatasetError
from rfdetr.importers import Shares
from tests.datasets import make_coco, make_roboflow, make_yolo
from tests.unit.checks.conftest import snapshot
from tests.unit.importers import foreign


def take(
    root: Path, source: Path, name: str = "mine", force: bool = False, **more: object
) -> Adopted:
    project = Project(root, Environment(state_dir=root / "state"))
    shares = Shares.parse(str(more["split"])) if "split" in more else None
    return adopt(project, source, name, shares=shares, seed=0, force=force, progress=False)


@pytest.mark.parametrize("kind", ["roboflow", "coco", "yolo"])
def test_a_dataset_from_elsewhere_is_copied(kind: str, tmp_path: Path) -> None:
    make = {"roboflow": make_roboflow, "coco": make_coco, "yolo": make_yolo}[kind]
    source, root = make(tmp_path / "my set"), tmp_path / "the project"
    before = snapshot(source)
    for _ in range(2):  # repeating changes nothing
        found = take(root, source)
        assert (found.facts.dir, found.facts.layout) == ("data/mine", kind)
        assert f"copied from {source}" in found.told
    assert snapshot(source) == before
    layout = detect_layout(root / "data/mine", kind)  # type: ignore[arg-type]
    assert {"train", "val"} <= set(layout.splits)
    assert sorted(p.name for p in (root / "data").iterdir()) == ["mine"]


@pytest.mark.parametrize("kind", ["roboflow", "voc"])
def test_a_zip_file_becomes_a_dataset(kind: str, tmp_path: Path) -> None:
    make = {"roboflow": make_roboflow, "voc": foreign.voc}[kind]
    make(tmp_path / "set")
    packed = Path(shutil.make_archive(str(tmp_path / "My Trees.v3i.coco"), "zip", tmp_path / "set"))
    left = tmp_path / "p/data/.other.0123456789ab.partial"  # of a killed process
    left.mkdir(parents=True)
    for _ in range(2):
        found = take(tmp_path / "p", packed, dataset_name(None, packed))
        assert found.facts.dir == "data/My-Trees" and str(packed) in found.told
        assert {"train", "val", "test"} == set(
            detect_layout(tmp_path / "p" / found.facts.dir).splits
        )
    assert [p.name for p in (tmp_path / "p/data").iterdir()] == ["My-Trees"]


def test_a_dataset_below_data_stays(tmp_path: Path) -> None:
    make_yolo(tmp_path / "data/my trees")
    found = take(tmp_path, tmp_path / "data/my trees")
    assert (found.facts.dir, found.facts.layout) == ("data/my trees", "yolo")
    assert found.told == "used where it is"


@pytest.mark.parametrize("name", foreign.FORMATS)
def test_other_formats_and_datasets_without_splits_are_imported(name: str, tmp_path: Path) -> None:
    foreign.FORMATS[name](tmp_path / "export")
    found = take(tmp_path / "project", tmp_path / "export")
    assert (found.facts.dir, found.facts.layout) == ("data/mine", "roboflow")
    assert "imported from" in found.told and "split 0.8/0.1/0.1" in found.told
    splits = detect_layout(tmp_path / "project/data/mine").splits
    assert set(splits) == {"train", "val", "test"}
    assert take(tmp_path / "project", tmp_path / "export") == found


def test_an_import_within_data_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    foreign.voc(tmp_path / "data/mine")
    before = snapshot(tmp_path / "data/mine")
    assert take(tmp_path, tmp_path / "data/mine").facts.dir == "data/mine-imported"
    assert snapshot(tmp_path / "data/mine") == before


def test_an_asked_split_is_made_of_any_dataset(tmp_path: Path) -> None:
    make_roboflow(tmp_path / "set", splits={"train": 20, "valid": 5, "test": 5})
    found = take(tmp_path / "p", tmp_path / "set", split="0.5/0.5")
    assert "replaces" in found.told
    assert set(detect_layout(tmp_path / "p" / found.facts.dir).splits) == {"train", "val"}


def test_paths_that_lead_out_of_a_yolo_dataset_are_not_followed_later(tmp_path: Path) -> None:
    source = make_yolo(tmp_path / "set")
    file = source / "data.yaml"
    file.write_text(f"path: {source}\n{file.read_text()}")
    found = take(tmp_path / "p", source)
    assert "imported from" in found.told and found.facts.layout == "roboflow"


def test_other_content_is_not_overwritten(tmp_path: Path) -> None:
    make_roboflow(tmp_path / "one")
    make_roboflow(tmp_path / "two", seed=5)
    take(tmp_path / "p", tmp_path / "one")
    before = snapshot(tmp_path / "p/data/mine")
    with pytest.raises(DatasetError, match="exists with other content: --force"):
        take(tmp_path / "p", tmp_path / "two")
    assert snapshot(tmp_path / "p/data/mine") == before
    take(tmp_path / "p", tmp_path / "two", force=True)
    assert snapshot(tmp_path / "p/data/mine") != before
    assert sorted(p.name for p in (tmp_path / "p/data").iterdir()) == ["mine"]


@pytest.mark.parametrize(
    "text", ['{"images": [', '{"images": [], "annotations": [], "categories": []}', ""]
)
def test_a_dataset_that_cannot_be_trained_is_refused_before_it_is_copied(
    text: str, tmp_path: Path
) -> None:
    source = make_roboflow(tmp_path / "set")
    (source / "train/_annotations.coco.json").write_text(text)
    with pytest.raises(DatasetError, match=str(source)) as raised:
        take(tmp_path / "p", source)
    assert ".partial" not in str(raised.value)
    assert not list((tmp_path / "p/data").iterdir())


def test_names_stay_below_data() -> None:
    assert dataset_name(None, Path("/x/My Trees (v3)")) == "My-Trees-v3"
    assert dataset_name(None, Path("/x/...")) == "data"
    assert dataset_name(None, Path("/x/trees.v2-416.yolov8")) == "trees"
    for given in ("../up", "a/b", "/abs", ".hidden", "a b", ""):
        if given:
            with pytest.raises(ConfigError, match="use letters"):
                dataset_name(given, Path("/x/y"))
    with pytest.raises(ConfigError, match="built-in dataset"):
        dataset_name(None, Path("/x/demo"))
    assert dataset_name("trees", Path("/x/demo")) == "trees"
