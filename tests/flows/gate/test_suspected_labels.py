"""Suspected labels: records, page with crops, proposals, and the command."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.cli.main import main
from flows.config.sections import DatasetSettings, EvaluateSettings
from flows.gate.report import write_report
from flows.gate.scored_model import ScoredModel
from flows.gate.scoring import score_model
from flows.gate.suspected_labels import image_files, proposals, suspected_labels, write_page
from rfdetr.checks.check import check_dataset
from rfdetr.data.demo import build_demo
from rfdetr.evaluation.box_table import make_box_table
from tests.flows.models import write_model
from tests.flows.projects import make_project

GREEN, RED = (0, 150, 60), (215, 40, 40)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("data") / "demo", train=2, valid=2, test=6)


@pytest.fixture(scope="module")
def scored(data: Path, tmp_path_factory: pytest.TempPathFactory) -> ScoredModel:
    """A perfect model on a test split in which the first label has another class, and the second
    label is gone."""
    dataset = DatasetSettings(name="demo", dir=str(data), layout="roboflow")
    weights = write_model(tmp_path_factory.mktemp("model")).weights
    found = score_model(weights, data, dataset, EvaluateSettings(), accelerator="cpu")
    truth = found.columns.truth
    detections = make_box_table(truth.image, truth.label, truth.box, score=np.full(len(truth), 0.9))
    kept = np.arange(len(truth)) != 1
    label = truth.label.copy()
    label[0] = (label[0] + 1) % 3
    columns = dataclasses.replace(
        found.columns,
        detections=detections,
        truth=dataclasses.replace(truth, label=label).take(kept),
    )
    return dataclasses.replace(found, columns=columns)


def test_records_name_the_file_and_what_the_model_sees(
    data: Path, scored: ScoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = image_files(
        data, DatasetSettings(name="demo", dir=str(data), layout="roboflow"), "test"
    )
    missing, wrong = sorted(suspected_labels(scored, files, data, 2), key=lambda s: s.kind)
    names = scored.class_names
    swapped = int(scored.columns.truth.label[0])
    assert (missing.kind, wrong.kind) == ("missing", "wrong_class")
    assert (wrong.label, wrong.proposal) == (names[swapped], names[(swapped - 1) % 3])
    assert wrong.box == wrong.proposed_box
    assert wrong.annotation == 0
    assert missing.label is None
    assert missing.score == 0.9
    assert (data / wrong.image).is_file()
    document = json.loads((data / "test" / "_annotations.coco.json").read_text())
    by_id = {image["id"]: image["file_name"] for image in document["images"]}
    assert by_id[wrong.image_id] == Path(wrong.image).name
    monkeypatch.chdir(data.parent)  # as a stage runs
    assert wrong in suspected_labels(scored, files, Path(data.name), 2)


def test_the_page_shows_both_boxes_and_escapes_names(
    data: Path, scored: ScoredModel, tmp_path: Path
) -> None:
    files = image_files(
        data, DatasetSettings(name="demo", dir=str(data), layout="roboflow"), "test"
    )
    wrong = next(s for s in suspected_labels(scored, files, data) if s.kind == "wrong_class")
    moved = wrong.model_copy(
        update={"proposed_box": (0.0, 0.0, 9.0, 9.0), "proposal": "<script>alert(1)</script>"}
    )
    gone = wrong.model_copy(update={"image": "test/absent.jpg"})
    write_page(tmp_path / "page.html", [moved, gone], data, "Labels of <demo>")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    (url,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    crop = np.asarray(Image.open(io.BytesIO(base64.b64decode(url))).convert("RGB")).astype(int)
    for colour in (GREEN, RED):
        assert (np.abs(crop - colour).max(axis=-1) < 60).sum() > 20
    assert crop.mean() > 20


def test_the_report_shows_the_first_suspects(
    data: Path, scored: ScoredModel, tmp_path: Path
) -> None:
    files = image_files(
        data, DatasetSettings(name="demo", dir=str(data), layout="roboflow"), "test"
    )
    first = tuple(suspected_labels(scored, files, data, 2))
    scores = scored.scores("version 1", "digest").model_copy(update={"suspects": first})
    scores = type(scores).model_validate_json(scores.model_dump_json())
    write_report(scores, tmp_path / "report.md", title="demo", images=data)
    page, text = ((tmp_path / f"report.{suffix}").read_text() for suffix in ("html", "md"))
    assert page.count("data:image/jpeg") == 2
    for suspect in first:
        assert f"{suspect.kind.replace('_', ' ')} {suspect.suspicion:.2f}" in page
        assert Path(suspect.image).stem in text.replace("\\", "")
    write_report(scores, tmp_path / "report.md", title="demo")
    assert "data:image" not in (tmp_path / "report.html").read_text()


def test_proposals_are_a_dataset_that_the_checks_accept(
    data: Path, scored: ScoredModel, tmp_path: Path
) -> None:
    files = image_files(
        data, DatasetSettings(name="demo", dir=str(data), layout="roboflow"), "test"
    )
    suspects = suspected_labels(scored, files, data, 2)
    document = proposals(scored, suspects, files)
    names = {category["id"]: category["name"] for category in document["categories"]}
    changed = [a for a in document["annotations"] if a["attributes"]]
    assert {a["attributes"]["suspect"] for a in changed} == {"missing", "wrong_class"}
    for annotation in changed:
        suspect = next(s for s in suspects if s.kind == annotation["attributes"]["suspect"])
        assert names[annotation["category_id"]] == suspect.proposal
        assert annotation["bbox"] == list(suspect.proposed_box or ())
    shown = {image["id"] for image in document["images"]}
    labels = scored.columns.image_ids[scored.columns.truth.image]
    assert len(document["annotations"]) == int(np.isin(labels, list(shown)).sum()) + 1
    for split in ("train", "valid"):
        folder = tmp_path / split
        folder.mkdir()
        for image in document["images"]:
            name = Path(image["file_name"]).name
            (folder / name).write_bytes((data / image["file_name"]).read_bytes())
        relative = [
            {**image, "file_name": Path(image["file_name"]).name} for image in document["images"]
        ]
        file = folder / "_annotations.coco.json"
        file.write_text(json.dumps({**document, "images": relative}))
    report = check_dataset(tmp_path)
    assert not [f for f in report.findings if f.severity == "error" and "split" not in f.code]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_project(tmp_path / "project")
    build_demo(root / "data" / "demo", train=2, valid=4, test=2)
    weights = write_model(tmp_path).weights
    monkeypatch.chdir(root)
    monkeypatch.setenv("RFDETR_STATE_DIR", str(tmp_path / "state"))
    for wrong, words in ((["--limit", "0"], "at least 1"), (["--out", "data"], "is a folder")):
        assert main(["labels", "--model", str(weights), *wrong]) != 0
        assert words in capsys.readouterr().err
    arguments = ["labels", "--split", "valid", "--model", str(weights), "--out", "found.json"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "The best epoch was chosen with these labels" in output
    record = json.loads((root / "reports" / "suspected_labels.json").read_text())
    assert record["split"] == "valid"
    assert all(s["image"].startswith("valid/") for s in record["suspects"])
    assert (root / "reports" / "suspected_labels.html").is_file()
    written = json.loads((root / "found.json").read_text())
    assert set(written) == {"images", "annotations", "categories"}
    assert main(["labels", "--split", "train", "--model", str(weights)]) == 0
    assert "The model was trained on these labels" in capsys.readouterr().out
    record = json.loads((root / "reports" / "suspected_labels.json").read_text())
    assert all(s["image"].startswith("train/") for s in record["suspects"])
