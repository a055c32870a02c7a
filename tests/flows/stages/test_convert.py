"""Starting weights: every generation with proof, refused files, S3, from scratch."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from flows.config.params import parse_params
from flows.project.project import Project
from flows.stages.convert import convert
from flows.storage.objects import upload
from rfdetr.checkpoints.best_file import best_payload
from rfdetr.checkpoints.record import read_checkpoint
from rfdetr.checkpoints.safe_io import save_file
from rfdetr.errors import CheckpointError, DownloadError, RFDETRError
from rfdetr.model.network import build_network
from tests.flows.projects import TINY
from tests.flows.servers import S3Server

CHECKPOINTS = Path(__file__).parents[2] / "parity" / "training" / "checkpoints"


def project(source: str | None, **model: object) -> Project:
    made = Project()
    sections = {"model": {**TINY["model"], **model}, "convert": {"source": source}}
    made.params = parse_params(sections)
    return made


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A legacy file of the tiny model, in a project folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    config = project(None).params.model.config(num_classes=3)
    payload = best_payload(build_network(config).state_dict(), config, class_names=["a", "b", "c"])
    Path("weights").mkdir()
    save_file(payload, "weights/start.pth")
    return Path("weights/start.pth")


def card() -> dict:
    return json.loads(Path("models/initial/model.json").read_text())


def test_a_legacy_file_is_converted_with_proof(start: Path) -> None:
    convert(project(str(start)))
    found = card()
    assert found["proof"]["compared"] == "outputs"
    assert found["proof"]["max_abs_difference"] == 0
    assert found["class_names"] == ["a", "b", "c"]
    new, old = read_checkpoint("models/initial/model.ckpt"), read_checkpoint(start)
    assert new.kind == "lightning"
    assert all((new.weights[name] == old.weights[name]).all() for name in old.weights)
    convert(project("models/initial/model.ckpt"))
    assert "copied unchanged" in card()["proof"]["summary"]


def test_from_scratch_the_seed_decides(start: Path) -> None:
    convert(project(None))
    first = card()["weights_sha256"]
    convert(project(None))
    assert card()["weights_sha256"] == first
    assert card()["kind"] == "scratch"


def test_published_weights_without_network_are_one_sentence(
    start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RF_WEIGHTS_URL", "http://127.0.0.1:9")
    with pytest.raises(DownloadError) as refused:
        convert(project("rf-detr-nano.pth"))
    assert "`convert: {source: null}` trains from scratch" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_come_from_s3(start: Path, s3: S3Server) -> None:
    upload(start, "s3://data/weights/start.pth", progress=False)
    convert(project("s3://data/weights/start.pth"))
    assert card()["source"] == "s3://data/weights/start.pth"


@pytest.mark.parametrize("name", ["evil_reduce_in_args", "evil_reduce_inside_namespace"])
def test_a_malicious_file_is_refused_and_the_old_result_stays(start: Path, name: str) -> None:
    convert(project(str(start)))
    before = card()
    shutil.copy(CHECKPOINTS / f"{name}.pth", "weights/evil.pth")
    with pytest.raises(CheckpointError, match=r"weights/evil\.pth"):
        convert(project("weights/evil.pth"))
    assert card() == before


@pytest.mark.parametrize("name", ["truncated", "empty", "bad_not_a_dict", "bad_no_model_key"])
def test_a_damaged_file_is_one_clear_error(start: Path, name: str) -> None:
    shutil.copy(CHECKPOINTS / f"{name}.pth", f"weights/{name}.pth")
    with pytest.raises(CheckpointError, match=name):
        convert(project(f"weights/{name}.pth"))
    assert not Path("models/initial").exists()


def test_weights_of_another_network_and_missing_files_are_named(start: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit the model section"):
        convert(project(str(start), patch_size=8, resolution=64))
    other = Project()
    other.params = parse_params({"model": {"variant": "medium"}, "convert": {"source": str(start)}})
    with pytest.raises(CheckpointError) as refused:
        convert(other)
    text = str(refused.value)
    assert "`convert: {source: rf-detr-medium.pth}`" in text
    kept = re.search(r"`(model: .*)`", text)
    assert kept, text
    fitting = parse_params({**yaml.safe_load(kept[1]), "convert": {"source": str(start)}})
    other.params = fitting  # the proposed section is accepted as it is printed
    convert(other)
    assert card()["proof"]["max_abs_difference"] == 0
    with pytest.raises((RFDETRError, FileNotFoundError), match="nothing"):
        convert(project("weights/nothing.pth"))
