"""`rfdetr-pipeline init`: parameters for someone's own data, and the way back to the demo's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from flows.cli.main import main
from flows.config.params import load_params
from tests.datasets import make_coco, make_roboflow
from tests.unit.importers import foreign

ROOT = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder as in a fresh clone, without git."""
    folder = tmp_path / "my project"
    for name in ("params.yaml", "dvc.yaml", ".dvc/config", "data/.gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RF_WEIGHTS_URL", "http://127.0.0.1:9")
    return folder


def test_own_data_replaces_the_demo(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_roboflow(
        root.parent / "Tree tops", splits={"train": 24, "valid": 6, "test": 8}, segmentation=True
    )
    command = ["init", str(source), "--name", "trees"]
    assert main(command) == 0
    told = capsys.readouterr().out
    params = load_params("params.yaml")
    assert (params.dataset.name, params.dataset.dir) == ("trees", "data/trees")
    assert (params.model.variant, params.convert.source) == ("medium", "rf-detr-medium.pth")
    assert (params.registry.name, params.gate.min_images) == ("trees", 8)
    assert params.runtime == load_params(ROOT / "params.yaml").runtime
    assert (root / "params.demo.yaml").read_text() == (ROOT / "params.yaml").read_text()
    pointer = yaml.safe_load((root / "data/trees.dvc").read_text())
    assert pointer["outs"][0]["nfiles"] == 38 + 3
    for said in ("train 24 images", "tracked by data/trees.dvc", "washer, bolt, nut",
                 "cannot be downloaded now", "--weights none", "--variant seg-medium",
                 "cp params.demo.yaml params.yaml", "rfdetr-pipeline validate"):  # fmt: skip
        assert said in told, said
    first = (root / "params.yaml").read_text()
    assert main(command) == 0
    assert (root / "params.yaml").read_text() == first
    assert len(list(root.glob("params*.yaml"))) == 2


def test_changed_parameters_are_not_overwritten(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.project.adopt.track", lambda *_: "not tracked")  # it runs above
    source = make_coco(root.parent / "trees", splits={"train": 12, "val": 4})
    options = ["init", str(source), "--variant", "nano", "--weights", "none"]
    assert main(options) == 0
    told = capsys.readouterr().out
    for said in ("cannot be downloaded", "N/A", "--variant nano"):
        assert said not in told, said
    file = root / "params.yaml"
    params = load_params(file)
    assert (params.dataset.layout, params.evaluate.split) == ("coco", "valid")
    assert (params.model.variant, params.convert.source) == ("nano", None)
    edited = file.read_text().replace("epochs: 100", "epochs: 7")
    file.write_text(edited)
    assert main(options) == 1
    assert "was changed after `init`" in capsys.readouterr().err
    assert main(["init", str(source), "--name", "other"]) == 1
    assert "is set up for the dataset trees" in capsys.readouterr().err
    assert file.read_text() == edited
    assert not (root / "data/other").exists()
    assert main([*options, "--force"]) == 0
    assert load_params(file).fit.epochs == 100
    assert (root / "params.trees.yaml").read_text() == edited


def test_another_format_is_imported_and_split(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.project.adopt.track", lambda *_: "not tracked")
    foreign.voc(root.parent / "voc")
    assert main(["init", str(root.parent / "voc"), "--split", "0.5/0.25/0.25"]) == 0
    told = capsys.readouterr().out
    assert "imported from" in told and "Pascal VOC: 12 images" in told
    assert "train 6 images" in told and "test 3 images" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "does not exist"),
        (["empty"], "is empty; name the folder with the images"),
        (["broken"], "train/_annotations.coco.json"),
        (["bare"], "the training split has no annotations"),
        (["empty", "--name", "../up"], "use letters"),
        (["empty", "--split", "9"], "write the shares"),
        (["s3://bucket/trees"], "under `sources`"),
    ],
)
def test_mistakes_leave_everything_as_it_was(
    arguments: list[str], said: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "empty").mkdir()
    broken = make_roboflow(root / "broken", splits={"train": 4, "valid": 2})
    (broken / "train/_annotations.coco.json").write_text('{"images": [')
    bare = make_roboflow(root / "bare", splits={"train": 4, "valid": 2})
    (bare / "train/_annotations.coco.json").write_text(
        '{"images": [], "annotations": [], "categories": []}'
    )
    before = (root / "params.yaml").read_text()
    assert main(["init", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert (root / "params.yaml").read_text() == before
    assert [p.name for p in (root / "data").iterdir()] == [".gitignore"]


def test_parameters_that_are_not_text_are_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "params.yaml").write_bytes(b"\xff\xfe")
    make_roboflow(root / "trees", splits={"train": 4, "valid": 2})
    assert main(["init", "trees"]) == 1
    assert "params.yaml is not UTF-8 text" in capsys.readouterr().err
    assert (root / "params.yaml").read_bytes() == b"\xff\xfe"


def test_wrong_weights_are_refused_before_the_parameters_are_written(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_roboflow(root / "data/mine", splits={"train": 4, "valid": 2})
    before = (root / "params.yaml").read_text()
    assert main(["init", str(source), "--weights", "lost.pth"]) == 1
    assert "no such file, and not a published name" in capsys.readouterr().err
    assert (root / "params.yaml").read_text() == before


def test_weights_and_variant_fit_the_project_and_the_dataset(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.project.adopt.track", lambda *_: "not tracked")
    source = make_roboflow(root / "data/mine", splits={"train": 4, "valid": 2})
    assert main(["init", str(source), "--variant", "seg-nano"]) == 1
    assert "data/mine has boxes only" in capsys.readouterr().err
    (root / "weights").mkdir()
    (root / "weights/mine.pth").write_bytes(b"x")
    monkeypatch.chdir(root / "weights")  # paths are those of the current folder
    assert main(["init", "../data/mine", "--weights", "mine.pth"]) == 0
    assert load_params(root / "params.yaml").convert.source == "weights/mine.pth"
