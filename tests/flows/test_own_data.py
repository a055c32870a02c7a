"""Real datasets of four kinds, from the folder to a champion, two projects at a time."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from flows.registry.registry import Registry
from rfdetr.data.layouts import detect_layout
from rfdetr.evaluation.plots import DETECTION_COLOUR, TRUTH_COLOUR
from tests.flows import real_datasets
from tests.flows.mlflow_fixtures import free_port, stop, wait_for
from tests.flows.projects import ROOT, TINY, environment, make_project, run, set_params

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODEL = yaml.safe_load((ROOT / "params.yaml").read_text())["model"]
FIT = {"epochs": 3, "effective_batch_size": 4, "lr": 1e-3, "lr_encoder": 1e-3, "multi_scale": False}


def prepared(kind: str, folder: Path) -> Path:
    """A project beside its dataset, set up by `init`, with a model that a CPU trains."""
    source = getattr(real_datasets, kind)(folder / f"my {kind} export", folder / "wheels")
    if kind == "roboflow":
        source = Path(shutil.make_archive(str(folder / "my trees.v3i.coco"), "zip", source))
    root = make_project(folder / f"project of {kind}")
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (root / "weights/start.pth").write_bytes((ROOT / "weights/start.pth").read_bytes())
    told = command(root, "init", str(source), "--name", kind, "--weights", "none")
    assert f"data/{kind}.dvc" in told and "rfdetr-pipeline retrain" in told
    masks = kind == "nuclei"
    model = {**TINY["model"], "resolution": 96, "segmentation_head": True} if masks else MODEL
    source = None if masks else "weights/start.pth"
    set_params(
        root, model=model, convert={"source": source}, fit=FIT, runtime={"accelerator": "cpu"}
    )
    return root


def command(root: Path, *arguments: str) -> str:
    done = run(root, sys.executable, "-m", "flows.cli.main", *arguments, PYTHONPATH=str(root))
    return done.stdout


def retrain(root: Path) -> tuple[float, str]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.main", "retrain"],
        cwd=root,
        env=environment(root, PYTHONPATH=str(root), PREFECT_HOME=str(root / "prefect")),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return time.monotonic() - started, done.stdout + done.stderr


@pytest.mark.parametrize("pair", [("roboflow", "nuclei"), ("yolo", "voc")], ids="-".join)
def test_four_real_datasets_become_champions(pair: tuple[str, str], tmp_path: Path) -> None:
    roots = [prepared(kind, tmp_path) for kind in pair]
    assert not (tmp_path / ".git").exists()
    with ThreadPoolExecutor(len(roots)) as pool:
        results = list(pool.map(retrain, roots))
    for kind, root, (seconds, log) in zip(pair, roots, results, strict=True):
        print(f"{kind}: retrain {seconds:.0f} s")
        champion = Registry(kind, f"sqlite:///{root / 'mlflow.db'}").champion()
        assert champion is not None and champion.number == 1
        assert champion.tags["lineage.dataset"] == kind
        found = detect_layout(root / f"data/{kind}").splits
        assert set(found) == {"train", "val", "test"}
        _require_report(root)
        _require_drawn(root / "reports/pictures/samples.png", masks=kind == "nuclei")
        _require_usable(root, log)


def _require_usable(root: Path, log: str) -> None:
    """Whether the commands that `retrain` printed predict and serve, as a user pastes them."""
    said = dict(re.findall(r"^(predict|serve) +(.+)$", log, re.MULTILINE))
    folder = next((root / "data").glob("*/test"))
    photos = [file for file in folder.rglob("*") if file.suffix in (".tif", ".jpg")]
    env = environment(root, PYTHONPATH=str(root))
    line = said["predict"].replace("IMAGES", shlex.quote(str(folder)))
    subprocess.run(line, shell=True, cwd=root, env=env, check=True, timeout=300)
    found = json.loads((root / "found/detections.json").read_text())
    assert len(found["images"]) == len(photos)
    port = free_port()
    line, log_file = said["serve"].replace("8080", str(port)), root / "serve.log"
    with open(log_file, "wb") as stream:
        server = subprocess.Popen(
            line,
            shell=True,
            cwd=root,
            env=env,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", 120, log_file)
        photo = base64.b64encode(photos[0].read_bytes()).decode()
        body = {"dataframe_split": {"columns": ["image"], "data": [[photo]]}}
        address = f"http://127.0.0.1:{port}/invocations"
        answer = httpx.post(address, json=body | {"params": {"threshold": 0.0}}, timeout=60)
        assert answer.status_code == 200 and answer.json()["predictions"], answer.text
    finally:
        stop(server)


def _require_report(root: Path) -> None:
    """Whether training may start, and the random photographs show their boxes, in red."""
    page = (root / "reports/validation.html").read_text()
    assert "Ready for training" in page
    codes = re.findall(r"data:image/(?:jpeg|png|webp);base64,([A-Za-z0-9+/=]+)", page)
    pictures = [Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB") for code in codes]
    samples = [np.asarray(p).astype(int) for p in pictures if max(p.size) >= 300]
    assert len(samples) >= 12 + 6 + 6  # train, valid, test
    boxes = 0
    for pixels in samples:
        assert pixels.max() > 60 and pixels.std() > 3
        red = (pixels[..., 0] > 150) & (pixels[..., 1:].max(axis=2) < 110)
        boxes += red.sum() > 100
    assert boxes >= 0.8 * len(samples), (boxes, len(samples))


def _require_drawn(file: Path, *, masks: bool) -> None:
    """Photographs that are not black, with boxes of the ground truth, and masks where asked."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert np.median(pixels.max(axis=2)) > 20
    truth = (np.abs(pixels - TRUTH_COLOUR).max(axis=2) < 40).sum()
    assert truth > 500, truth
    if masks:  # green laid over grey levels
        green = (pixels[..., 1] - pixels[..., [0, 2]].max(axis=2)) > 15
        assert green.sum() > 3 * truth
    assert TRUTH_COLOUR != DETECTION_COLOUR
