"""One operating point: evaluation, command line, server, API and drift agree to the last box."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from pycocotools import mask as coco_mask

from flows.config.sections import DatasetSettings, EvaluateSettings
from flows.gate.scored_model import ScoredModel
from flows.gate.scoring import score_model
from flows.inference.predict import predict_images
from flows.project.project import Project
from flows.registry.artifacts import global_tracking_uri
from flows.registry.logged_model import log_model
from flows.registry.model_folder import ModelFiles
from flows.registry.registry import Registry
from rfdetr import RFDETR
from rfdetr.checkpoints.legacy_names import to_legacy
from rfdetr.checkpoints.safe_io import save_file
from rfdetr.data.demo import build_demo
from rfdetr.errors import DatasetError, InputError
from rfdetr.evaluation.operating_point import OperatingPoint
from rfdetr.evaluation.slice_rules import parse_rule
from rfdetr.files import sha256_file
from rfdetr.monitoring.image_profile import ImageProfile
from rfdetr.monitoring.profiling import profile_images
from tests.datasets import NAMES, make_roboflow
from tests.flows.models import register_champion
from tests.flows.projects import ROOT, write_params
from tests.unit.detector.small import small_segmentation

TARGET = "recall>=0.5"


@pytest.fixture(scope="module")
def root(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the demo's starting weights and a dataset of the digits that they know."""
    folder = tmp_path_factory.mktemp("point")
    write_params(folder, registry={"name": "rfdetr-demo"})
    (folder / "dvc.yaml").write_text("stages: {}\n")
    (folder / "mlflow.db").write_bytes(migrated_database.read_bytes())
    shutil.copy(ROOT / "weights/start.pth", folder / "model.pth")
    names = RFDETR.from_checkpoint(str(folder / "model.pth")).class_names
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    classes = [digits.index(name) if name in digits else int(name) for name in names]
    build_demo(folder / "data/demo", train=6, valid=16, test=12, classes=classes)
    return folder


def score(root: Path, target: str | None, **texts: str) -> ScoredModel:
    rules = [parse_rule(name, text) for name, text in texts.items()]
    settings = EvaluateSettings(operating_point=target, pictures=0)
    data = root / "data/demo"
    return score_model(root / "model.pth", data, DatasetSettings(), settings, slices=rules)


@pytest.fixture(scope="module")
def scored(root: Path) -> ScoredModel:
    return score(root, TARGET, odd=r"path:[13579]\.jpg$", small="area<32**2")


@pytest.fixture(scope="module")
def registry(root: Path, scored: ScoredModel) -> Registry:
    return register_champion(f"sqlite:///{root / 'mlflow.db'}", files(root, scored.model_point))


def files(root: Path, point: OperatingPoint | None) -> ModelFiles:
    card: dict[str, Any] = {"weights_sha256": sha256_file(root / "model.pth"), "variant": "nano"}
    if point is not None:
        card["operating_point"] = point.to_dict()
    (root / "model.json").write_text(json.dumps(card))
    return ModelFiles(weights=root / "model.pth", card=root / "model.json")


def images_of_test(root: Path) -> list[Path]:
    return sorted((root / "data/demo/test").glob("*.jpg"))


def test_every_way_to_detect_finds_the_same_boxes(
    root: Path, scored: ScoredModel, registry: Registry
) -> None:
    agree(root, scored, registry)
    detector = RFDETR.from_checkpoint(str(root / "model.pth"))
    profile = profile_images(detector, images_of_test(root), point=detector.model.operating_point)
    at_point = scored.at_point()
    assert at_point is not None
    assert profile.features["boxes_per_image"].sum() == at_point.detections
    profile.save(root / "profile.npz")
    assert ImageProfile.load(root / "profile.npz").point == detector.model.operating_point


@pytest.mark.slow
def test_every_way_to_detect_finds_the_same_masks(migrated_database: Path, tmp_path: Path) -> None:
    write_params(tmp_path, registry={"name": "rfdetr-demo"})
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "mlflow.db").write_bytes(migrated_database.read_bytes())
    make_roboflow(
        tmp_path / "data/demo", splits={"train": 4, "valid": 12, "test": 10}, segmentation=True
    )
    detector = small_segmentation(num_classes=len(NAMES))
    head = detector.model.model.class_embed
    head.weight.data[: len(NAMES)] *= 2  # scores on both sides of every threshold
    head.bias.data[: len(NAMES)] = 0.0
    save_file(
        {
            "model": to_legacy(detector.model.model.state_dict()),
            "args": {"class_names": list(NAMES), "num_classes": len(NAMES)},
            "model_name": "RFDETRSegNano",
            "model_config": detector.model_config.model_dump(mode="json"),
        },
        tmp_path / "model.pth",
    )
    for split in ("valid", "test"):
        _label_by(
            RFDETR.from_checkpoint(str(tmp_path / "model.pth")), tmp_path / "data/demo" / split
        )
    scored = score(tmp_path, TARGET, small="area<20**2")
    assert scored.result.segm is not None and scored.slices["small"].evidence is not None
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    registry = register_champion(uri, files(tmp_path, scored.model_point))
    agree(tmp_path, scored, registry)
    document = json.loads((tmp_path / "out/detections.json").read_text())
    at_point = scored.at_point()
    assert at_point is not None
    masks = [row for row in document["annotations"] if row["segmentation"]]
    assert len(masks) == at_point.detections


def _label_by(detector: RFDETR, folder: Path) -> None:
    """Every second mask that the detector finds becomes a label."""
    file = folder / "_annotations.coco.json"
    document = json.loads(file.read_text())
    ids = {row["name"]: row["id"] for row in document["categories"]}
    rows: list[dict[str, Any]] = []
    for image in document["images"]:
        found = detector.predict(str(folder / image["file_name"]), threshold=0.0)[::2]
        for mask, label in zip(found.mask, found.class_id, strict=True):
            if mask.any():
                code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                box, area = coco_mask.toBbox(code).tolist(), int(mask.sum())
                code["counts"] = code["counts"].decode()
                known = {"id": len(rows) + 1, "image_id": image["id"], "iscrowd": 0}
                name = detector.class_names[int(label)]
                known |= {"category_id": ids[name], "segmentation": code}
                rows.append({**known, "bbox": box, "area": area})
    file.write_text(json.dumps({**document, "annotations": rows}))


def agree(root: Path, scored: ScoredModel, registry: Registry) -> None:
    """Evaluation, command line, API and server accept equally many detections of the test split."""
    at_point = scored.at_point()
    assert at_point is not None and at_point.detections > 5
    thresholds = {row.threshold for row in at_point.classes.values()}
    assert thresholds.isdisjoint({0.5})
    images = images_of_test(root)

    found = predict_images(
        Project(root), [str(root / "data/demo/test")], str(root / "out"), draw=False
    )
    assert found.detections == at_point.detections
    document = json.loads((root / "out/detections.json").read_text())
    assert document["info"]["threshold"].startswith(f"{at_point.target} ")

    detector = RFDETR.from_checkpoint(str(root / "model.pth"))
    by_api = detector.predict([str(file) for file in images], threshold="operating_point")
    assert sum(map(len, by_api)) == at_point.detections
    at_half = detector.predict([str(file) for file in images])
    assert sum(map(len, at_half)) != at_point.detections  # the default stays 0.5

    with global_tracking_uri(registry.uri):
        served = mlflow.pyfunc.load_model(f"models:/{registry.name}@champion")
        sent = [base64.b64encode(file.read_bytes()).decode() for file in images]
        frame = pd.DataFrame({"image": sent})
        rows = served.predict(frame)
        given = served.predict(frame, params={"threshold": 0.5})
    assert sum(map(len, rows.boxes)) == at_point.detections
    assert sum(map(len, given.boxes)) == sum(map(len, at_half))
    for row, detections in zip(rows.itertuples(), by_api, strict=True):
        assert np.allclose(sorted(row.scores), sorted(detections.confidence), atol=1e-6)


def test_a_given_threshold_wins(root: Path, registry: Registry) -> None:
    source, out = [str(root / "data/demo/test")], str(root / "half")
    found = predict_images(Project(root), source, out, threshold=0.5, draw=False)
    detector = RFDETR.from_checkpoint(str(root / "model.pth"))
    expected = detector.predict([str(file) for file in images_of_test(root)])
    assert found.detections == sum(map(len, expected))


def test_slices_and_point_are_in_the_record(scored: ScoredModel) -> None:
    record = scored.scores("version 1", "digest")
    assert list(record.slices) == ["odd", "small"]
    assert record.slices["odd"].images == 6
    assert {"f1_at_point", "false_alarms_per_image"} <= set(record.metrics)
    assert record.operating_point is not None and record.operating_point.chosen_on == "valid"
    again = type(record).model_validate_json(record.model_dump_json())
    assert again.model_dump_json() == record.model_dump_json()


def test_without_slices_and_point_no_number_changes(root: Path, scored: ScoredModel) -> None:
    plain = score(root, None)
    assert plain.point is None and plain.slices == {} and plain.at_point() is None
    same = {k: v for k, v in scored.metrics().items() if k in plain.metrics()}
    assert plain.metrics() == same
    assert plain.settings != scored.settings


def test_thresholds_chosen_on_the_images_they_are_reported_on_are_a_note(
    root: Path, tmp_path: Path, scored: ScoredModel
) -> None:
    data, dataset = tmp_path / "data", DatasetSettings()
    shutil.copytree(root / "data/demo", data, ignore=shutil.ignore_patterns("test"))
    settings = EvaluateSettings(operating_point=TARGET, pictures=0)
    found = score_model(root / "model.pth", data, dataset, settings).at_point()
    there = scored.at_point()
    assert found is not None and there is not None
    note = "the thresholds were chosen on the images that they are reported on"
    assert note in found.note and note not in there.note
    assert {n: c.threshold for n, c in found.classes.items()} == {
        n: c.threshold for n, c in there.classes.items()
    }
    labels = data / "valid" / "_annotations.coco.json"
    document = json.loads(labels.read_text())
    for row in document["annotations"]:
        row["iscrowd"] = 1
    labels.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match="has only crowd regions"):
        score_model(root / "model.pth", data, dataset, settings)


def test_another_point_of_the_same_weights_replaces_the_description(
    root: Path, scored: ScoredModel, registry: Registry, tmp_path: Path
) -> None:
    version = registry.version(1)
    before = version.operating_point
    assert before is not None and before.startswith(TARGET)
    assert scored.model_point is not None
    f1 = OperatingPoint("f1", "valid", 0.4, scored.model_point.classes)
    for point, tag in ((f1, "f1 "), (None, None)):
        model_id = log_model(
            registry, files(root, point), experiment="rfdetr/demo", run_id=version.run_id
        )
        assert registry.register(model_id, run_id=version.run_id).number == 1
        found = registry.version(1).operating_point
        assert found is None if tag is None else str(found).startswith(tag)
        stored = registry.fetch(version, tmp_path / str(tag)) / "artifacts/model.json"
        kept = json.loads(stored.read_text()).get("operating_point")
        assert kept == (point and json.loads(json.dumps(point.to_dict())))


def test_weights_without_a_point_say_so(root: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copy(root / "model.pth", tmp_path / "other.pth"))
    detector = RFDETR.from_checkpoint(str(weights))
    image = str(images_of_test(root)[0])
    with pytest.raises(InputError, match="have no operating point: there is none"):
        detector.predict(image, threshold="operating_point")
    with pytest.raises(
        InputError, match="must be a number up to 1 or 'operating_point'; got 'best'"
    ):
        detector.predict(image, threshold="best")  # type: ignore[arg-type]
    assert detector.predict(image) is not None
