"""Batch prediction: COCO files, resume after kill -9, folders and S3, invalid images."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from flows.batch_predict import batch_predict
from flows.cli.main import main
from flows.core.names import UnsafeNameError
from flows.inference import drift
from flows.inference.coco_results import PROGRESS
from flows.inference.detections import BATCH
from flows.inference.images import SourceImage, list_images, newest
from flows.inference.predict import Predictions, predict_images
from flows.project.project import Project
from flows.storage.prefixes import fetch, upload_tree
from flows.storage.s3 import make_client
from rfdetr import RFDETR
from rfdetr.checkpoints.legacy_names import to_legacy
from rfdetr.checkpoints.safe_io import save_file
from rfdetr.errors import ConfigError, DatasetError
from tests.datasets import scenes
from tests.flows.models import CATEGORY_IDS, NAMES, register_champion, write_model
from tests.flows.prefect_fixtures import PrefectServer
from tests.flows.projects import ROOT, environment, write_params
from tests.flows.servers import S3Server
from tests.unit.detector.small import small_segmentation

IMAGES = 12 * BATCH + 3


@pytest.fixture(scope="module")
def project(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder whose registry has a champion."""
    root = tmp_path_factory.mktemp("predict")
    write_params(root, registry={"name": "rfdetr-demo"})
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "mlflow.db").write_bytes(migrated_database.read_bytes())
    (root / "model").mkdir()
    register_champion(f"sqlite:///{root / 'mlflow.db'}", write_model(root / "model"))
    return root


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, scene in enumerate(scenes(IMAGES, 3)):
        file = folder / f"day-{number % 2}" / f"{number:03d}.png"
        file.parent.mkdir(exist_ok=True)
        scene.image.save(file)
    return folder


@pytest.fixture(scope="module")
def complete(project: Path, images_dir: Path) -> Path:
    """The result of an uninterrupted call."""
    out = project / "complete"
    found = predict(project, images_dir, out)
    assert (found.images, found.detected, found.unreadable) == (IMAGES, IMAGES, 0)
    return out


def predict(root: Path, source: Any, out: Any, **options: Any) -> Predictions:
    settings = {"threshold": 0.0, "draw": False, **options}
    return predict_images(Project(root), [str(source)], str(out), **settings)


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / PROGRESS).read_text().splitlines()[1:]
    return [row for line in lines if line.startswith("[") for row in json.loads(line)]


def test_results_are_the_detectors_own(complete: Path, images_dir: Path, project: Path) -> None:
    coco = COCO(str(complete / "detections.json"))
    assert sorted(coco.imgs) == list(range(1, IMAGES + 1))
    image = coco.imgs[3]
    assert (image["file_name"], image["width"], image["height"]) == ("day-0/004.png", 96, 64)
    detector = RFDETR.from_checkpoint(str(project / "model/best.pth"), device="cpu")
    expected = detector.predict(str(images_dir / "day-0/004.png"), threshold=0.0)
    found = coco.imgToAnns[3]
    assert len(found) == len(expected) == 30
    for annotation, box, score, label in zip(
        found, expected.xyxy, expected.confidence, expected.class_id, strict=True
    ):
        x, y, w, h = annotation["bbox"]
        assert [x, y, x + w, y + h] == pytest.approx(box.tolist(), abs=0.02)
        assert annotation["score"] == pytest.approx(float(score), abs=1e-4)
        assert annotation["category_id"] == dict(enumerate(CATEGORY_IDS)).get(label, label)
    known = dict(zip([*CATEGORY_IDS, 3], [*NAMES, "3"], strict=True))
    assert all(known[c["id"]] == c["name"] for c in coco.cats.values())
    assert set(coco.cats) >= set(CATEGORY_IDS)
    info = json.loads((complete / "detections.json").read_text())["info"]
    assert (info["model"], info["version"]) == ("rfdetr-demo", 1)


def test_results_file_is_what_coco_reads(complete: Path) -> None:
    coco = COCO(str(complete / "detections.json"))
    again = coco.loadRes(str(complete / "results.json"))
    assert len(again.anns) == len(coco.anns) > 0


def test_a_killed_call_is_resumed_with_the_same_result(
    project: Path, images_dir: Path, complete: Path
) -> None:
    """kill -9 after some batches; the second call does the rest, nothing twice."""
    out = project / "killed"
    command = [
        sys.executable,
        "-m",
        "flows.cli.main",
        "predict",
        str(images_dir),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        [*command, "--threshold", "0.0", "--no-draw"],
        cwd=project,
        env=environment(project, PYTHONPATH=str(ROOT)),
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while _lines(out) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(rows(out))
    assert 2 * BATCH <= finished < IMAGES, "the kill came too late to prove anything"
    assert not (out / "detections.json").exists()
    with open(out / PROGRESS, "a") as stream:
        stream.write('[{"file_name": "day-1/0')  # a batch that was being written
    found = predict(project, images_dir, out)
    assert found.detected == IMAGES - finished
    assert set(Counter(row["file_name"] for row in rows(out)).values()) == {1}
    for name in ("detections.json", "results.json"):
        assert (out / name).read_bytes() == (complete / name).read_bytes()
    assert predict(project, images_dir, out).detected == 0


def _lines(out: Path) -> int:
    file = out / PROGRESS
    return file.read_text().count("\n") if file.exists() else 0


def test_only_new_and_changed_images_are_processed(
    project: Path, images_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "growing"
    folder.mkdir()
    for number in (0, 2):
        (folder / f"{number}.png").write_bytes((images_dir / f"day-0/00{number}.png").read_bytes())
    out = tmp_path / "out"
    assert predict(project, folder, out).detected == 2
    (folder / "1.png").write_bytes((images_dir / "day-0/004.png").read_bytes())
    Image.new("RGB", (50, 40)).save(folder / "2.png")
    found = predict(project, folder, out)
    assert (found.images, found.detected) == (3, 2)
    images = json.loads((out / "detections.json").read_text())["images"]
    assert [i["file_name"] for i in images] == ["0.png", "1.png", "2.png"]
    assert images[2]["width"] == 50
    assert predict(project, folder, out, threshold=0.01).detected == 3


def test_the_command_says_what_was_missed_and_names_its_files(
    project: Path, images_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Nothing passes the threshold: the best score, which a lower threshold then finds."""
    monkeypatch.chdir(project)
    image, out = str(images_dir / "day-0/004.png"), tmp_path / "none"
    assert main(["predict", image, "--out", str(out), "--threshold", "1.0"]) == 0
    said = capsys.readouterr().out
    (score,) = re.findall(r"best score of the first images is (0\.\d+) \(004\.png\)", said)
    for name in ("detections.json", "results.json", "pictures/"):
        assert f"{out}/{name}" in said
    assert (out / "pictures").is_dir()
    lower = f"{float(score) - 0.002:.3f}"
    assert main(["predict", image, "--out", str(tmp_path / "one"), "--threshold", lower]) == 0
    said = capsys.readouterr().out
    assert "best score" not in said
    results = json.loads((tmp_path / "one/results.json").read_text())
    assert max(row["score"] for row in results) == pytest.approx(float(score), abs=6e-4)


def test_a_model_is_exported_with_what_its_users_need(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """From the registry and from a file: the same network, which onnxruntime runs."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("RFDETR_STATE_DIR", str(tmp_path / "state"))
    assert main(["export", "--out", str(tmp_path / "champion.onnx")]) == 0
    assert "differs from the network by at most" in capsys.readouterr().out
    file = project / "model/best.pth"
    assert main(["export", "--model", str(file), "--out", str(tmp_path / "file.onnx")]) == 0
    assert (tmp_path / "file.onnx").read_bytes() == (tmp_path / "champion.onnx").read_bytes()
    session = onnxruntime.InferenceSession(
        str(tmp_path / "champion.onnx"), providers=["CPUExecutionProvider"]
    )
    facts = session.get_modelmeta().custom_metadata_map
    assert list(json.loads(facts["class_names"]).values()) == NAMES
    assert json.loads(facts["input_size"]) == [64, 64]
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert main(["export", "--model", "7", "--out", str(tmp_path / "x.onnx")]) == 1
    assert "no version 7" in capsys.readouterr().err


def test_every_class_of_the_model_is_a_category(
    project: Path, images_dir: Path, tmp_path: Path
) -> None:
    """Also without detections, and in a call that only reads what an earlier one recorded."""
    for _ in range(2):
        found = predict(project, images_dir / "day-0/000.png", tmp_path, threshold=1.0)
        assert found.detections == 0
        categories = json.loads((tmp_path / "detections.json").read_text())["categories"]
        assert [c["name"] for c in categories] == NAMES


def test_invalid_images_are_listed_and_stop_nothing(
    project: Path, images_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"not an image")
    (folder / "b.png").write_bytes((images_dir / "day-0/000.png").read_bytes())
    (folder / "notes.txt").write_text("no image at all")
    found = predict(project, folder, tmp_path / "out")
    assert (found.images, found.unreadable) == (2, 1)
    document = json.loads((tmp_path / "out/detections.json").read_text())
    assert list(document["info"]["unreadable"]) == ["a.jpg"]
    assert [i["file_name"] for i in document["images"]] == ["b.png"]
    assert predict(project, folder, tmp_path / "out").detected == 0


def test_drawn_images_inside_the_source_are_ignored_by_the_next_call(
    project: Path, images_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.png").write_bytes((images_dir / "day-0/000.png").read_bytes())
    out = tmp_path / "found"
    assert predict(project, tmp_path, out).detected == 1
    assert predict(project, tmp_path, out, draw=True).detected == 1, "the drawn images are missing"
    assert predict(project, tmp_path, out, draw=True).images == 1
    with Image.open(out / "pictures/a/one.png.jpg") as drawn:
        assert drawn.size == (96, 64)


def test_sources_that_cannot_be_used_are_named(
    project: Path, images_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        predict(project, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="No images in"):
        predict(project, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ConfigError, match="no version with the alias 'best'"):
        predict(project, images_dir, tmp_path / "out", model="best")
    one, two = images_dir / "day-0", tmp_path / "copy"
    two.mkdir()
    (two / "000.png").write_bytes((one / "000.png").read_bytes())
    with pytest.raises(DatasetError, match=r"both be named 000\.png"):
        list_images([str(one), str(two)])
    assert len(list_images([str(one), str(one)])) == len(list(one.iterdir()))


def test_newest_images_by_time_and_number(tmp_path: Path) -> None:
    for number in range(5):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (4, 4)).save(file)
        os.utime(file, (time.time() - 3600 * number,) * 2)
    listed = list_images([str(tmp_path)])
    assert [p.name for p in newest(listed, hours=2.5)] == ["0.png", "1.png", "2.png"]
    assert [p.name for p in newest(listed, limit=2)] == ["0.png", "1.png"]


def test_from_and_to_s3_and_on_another_machine(
    project: Path,
    images_dir: Path,
    complete: Path,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prefix gives the folder's result; without local state the results on S3 are enough."""
    upload_tree(images_dir, "s3://data/images", progress=False)
    (s3.folder / "data/images-of-others").mkdir(exist_ok=True)
    (s3.folder / "data/images-of-others/x.png").write_bytes(b"never read")
    found = predict(project, "s3://data/images", "s3://data/found")
    assert (found.images, found.detected, found.unreadable) == (IMAGES, IMAGES, 0)
    for name in ("detections.json", "results.json"):
        assert (s3.folder / "data/found" / name).read_bytes() == (complete / name).read_bytes()
    monkeypatch.setenv("RFDETR_STATE_DIR", str(project / "other-machine"))
    assert predict(project, "s3://data/images", "s3://data/found").detected == 0


HOSTILE = ["set/../../evil.png", "set//abs/evil.png", "set/a.png", "set/A.PNG", "set/a.png.jpg"]
HOSTILE += ["set/C:\\evil.png", "set/..\\evil.png", "set/a.png/b.png"]


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A prefix whose keys try to leave a folder; served by moto, which accepts every key."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = make_client()
    client.create_bucket(Bucket="data")
    for key in HOSTILE:
        client.put_object(Bucket="data", Key=key, Body=png())
    yield "s3://data/set"
    server.stop()


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 48)).save(stream, "PNG")
    return stream.getvalue()


def test_object_keys_cannot_lead_out_of_a_folder(
    project: Path, hostile: str, tmp_path: Path
) -> None:
    out = tmp_path / "a/b/out"
    found = predict(project, hostile, out, draw=True)
    assert (found.images, found.unreadable) == (len(HOSTILE), 0)
    drawn = [path for path in (out / "pictures").rglob("*") if path.is_file()]
    assert len({str(path).casefold() for path in drawn}) == len(HOSTILE)
    assert {path for path in tmp_path.rglob("*evil*") if path.is_file()} <= set(drawn)
    files = drift.fetch_images(list_images([hostile]), tmp_path / "recent")
    assert len(files) == len(HOSTILE)
    assert {path.parent for path in files} == {tmp_path / "recent"}
    with pytest.raises(UnsafeNameError, match="not a plain relative path"):
        fetch(hostile, tmp_path / "fetched", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fetched.partial", "a", "recent"]
    assert not list((tmp_path / ".fetched.partial").iterdir())


def test_a_vanished_object_skips_one_image(
    project: Path, hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(sources: list[str], **options: Any) -> list[SourceImage]:
        images = list_images(sources, **options)
        make_client().delete_object(Bucket="data", Key="set/a.png")
        return images

    monkeypatch.setattr("flows.inference.predict.list_images", listed)
    found = predict(project, hostile, tmp_path / "out")
    assert (found.images, found.unreadable) == (len(HOSTILE), 1)
    info = json.loads((tmp_path / "out/detections.json").read_text())["info"]
    assert list(info["unreadable"]) == ["a.png"]
    files = drift.fetch_images([*list_images([hostile]), GONE], tmp_path / "recent")
    assert len(files) == len(HOSTILE) - 1


GONE = SourceImage("a.png", "s3://data/set/a.png", "etag", 0.0)


@pytest.mark.parametrize("damage", [b"\0\0\0\0\n", b"\n\n", b"\xff\xfe\n", b"null\n", b'{"a":\n'])
def test_a_damaged_progress_file_costs_only_what_it_held(
    project: Path, images_dir: Path, tmp_path: Path, damage: bytes
) -> None:
    source = images_dir / "day-0/000.png"
    predict(project, source, tmp_path / "out")
    file = tmp_path / "out" / PROGRESS
    intact = file.read_bytes()
    file.write_bytes(intact + damage)
    assert predict(project, source, tmp_path / "out").detected == 0
    assert file.read_bytes() == intact
    file.write_bytes(damage)
    assert predict(project, source, tmp_path / "out").detected == 1


def test_a_dangling_link_is_one_unreadable_image(
    project: Path, images_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(images_dir / "day-0/000.png", tmp_path / "in")
    (tmp_path / "in/dangling.jpg").symlink_to("/nonexistent.jpg")
    (tmp_path / "in/loop.jpg").symlink_to(tmp_path / "in/loop.jpg")
    found = predict(project, tmp_path / "in", tmp_path / "out")
    assert (found.images, found.unreadable) == (3, 2)
    assert len(newest(list_images([str(tmp_path / "in")]), limit=5)) == 3


def test_results_below_a_file_are_refused(project: Path, images_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match="is a file; choose another --out"):
            predict(project, images_dir, out)


def test_masks_are_written_as_run_lengths(
    migrated_database: Path, images_dir: Path, tmp_path: Path
) -> None:
    files = write_model(tmp_path)
    detector = small_segmentation(num_classes=3)
    save_file(
        {
            "model": to_legacy(detector.model.model.state_dict()),
            "args": {"class_names": NAMES, "num_classes": 3},
            "model_name": "RFDETRSegNano",
            "model_config": detector.model_config.model_dump(mode="json"),
        },
        tmp_path / "best.pth",
    )
    (tmp_path / "mlflow.db").write_bytes(migrated_database.read_bytes())
    write_params(tmp_path, registry={"name": "rfdetr-demo"})
    register_champion(f"sqlite:///{tmp_path / 'mlflow.db'}", files)
    predict(tmp_path, images_dir / "day-0/000.png", tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    expected = detector.predict(str(images_dir / "day-0/000.png"), threshold=0.0)
    decoded = [coco_mask.decode(result["segmentation"]) for result in results]
    assert len(decoded) == len(expected) == 10
    assert all((a == b).all() for a, b in zip(decoded, expected.mask, strict=True))


def test_the_flow_predicts_in_a_child_and_shows_the_result(
    project: Path, images_dir: Path, complete: Path, prefect_server: PrefectServer
) -> None:
    """Results of the command are there already: the flow finds nothing left to do."""
    code = "import sys; from flows.batch_predict import batch_predict as run; "
    code += "run(*sys.argv[1:], threshold=0.0)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(images_dir), str(complete)],
        cwd=project,
        env=environment(
            project,
            PYTHONPATH=str(ROOT),
            PREFECT_API_URL=prefect_server.url,
            PREFECT_HOME=str(prefect_server.folder),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = prefect_server.last_run()
    assert run["state"]["name"] == "Completed"
    table = json.loads(prefect_server.artifacts(run["id"])["predictions"])
    facts = {row[""]: row["value"] for row in table}
    assert (facts["images"], facts["detected"]) == (str(IMAGES), "0")


def test_a_worker_refuses_to_write_into_its_temporary_folder(
    images_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "a-deployment")
    with pytest.raises(ConfigError, match="absolute path"):
        batch_predict.fn(str(images_dir), "found")
