"""The complete graph by `dvc repro`: results, nothing to do, restored clones, experiments."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from rfdetr.checkpoints.safe_io import load_file
from rfdetr.files import sha256_file
from tests.flows.projects import make_project, run, write_params


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository in which the pipeline has run once, with its own DVC cache."""
    root = make_project(
        tmp_path_factory.mktemp("pipeline") / "project",
        evaluate={"operating_point": "f1"},
        slices={"odd": r"path:[13579]\.jpg$", "small": "area<32**2"},
    )
    run(root, "git", "init", "-q")
    run(root, "git", "config", "user.email", "test@localhost")
    run(root, "git", "config", "user.name", "test")
    run(root, "dvc", "config", "--local", "cache.dir", str(root.parent / "cache"))
    done = run(root, "dvc", "repro")
    (root / "repro.log").write_text(done.stdout)
    run(root, "git", "add", ".")
    run(root, "git", "commit", "-qm", "trained")
    return root


def test_every_stage_left_its_results(project: Path) -> None:
    card = json.loads((project / "models/trained/model.json").read_text())
    weights = project / "models/trained/model.pth"
    assert card["weights_sha256"] == sha256_file(weights)
    assert card["class_names"] == ["zero", "one", "four"]
    assert card["epochs"] == 2
    assert load_file(weights)["class_names"] == card["class_names"]
    initial = json.loads((project / "models/initial/model.json").read_text())
    assert initial["proof"]["max_abs_difference"] == 0
    report = json.loads((project / "reports/validation.json").read_text())
    assert report["severities"].get("error", 0) == 0
    assert "<html" in (project / "reports/validation.html").read_text().lower()
    rows = list(csv.DictReader((project / "plots/fit.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row["train/loss"]) > 0 and row["val/mAP_50_95"] for row in rows)
    pictures = {path.name for path in (project / "reports/pictures").iterdir()}
    assert {"confusion_matrix.png", "precision_recall.png", "samples.png"} <= pictures
    with Image.open(project / "reports/training_curves.png") as drawn:
        assert drawn.width > 600
    truth = json.loads((project / "data/demo/train/_annotations.coco.json").read_text())
    ids = {category["name"]: category["id"] for category in truth["categories"]}
    assert card["category_ids"] == [ids[name] for name in card["class_names"]]
    page = (project / "reports/evaluation.html").read_text()
    text = (project / "reports/evaluation.md").read_text()
    assert "<h2>Slices</h2>" in page and "<h2>Operating point</h2>" in page
    assert "| odd | 4 |" in text
    numbers = json.loads((project / "metrics/test.json").read_text())
    assert list(numbers["slices"]) == ["odd", "small"]
    point = json.loads((project / "reports/operating_point.json").read_text())
    assert point["target"] == numbers["operating_point"]["target"] == "f1"


def test_numbers_of_the_test_stage_equal_those_of_its_detections(project: Path) -> None:
    """The written detections, scored by the oracle, give the written numbers."""
    from tests.unit.evaluation.reference import evaluate_with_pycocotools

    numbers = json.loads((project / "metrics/test.json").read_text())
    found = json.loads((project / "reports/detections.json").read_text())
    truth = json.loads((project / "data/demo/test/_annotations.coco.json").read_text())
    result = evaluate_with_pycocotools(truth, found)
    assert result.bbox is not None
    assert numbers["images"] == 8
    assert numbers["map_50_95"] == pytest.approx(result.bbox.summary.ap, abs=1e-3)
    assert numbers["coco_100"]["mAP_50"] == pytest.approx(result.bbox.coco.ap50, abs=1e-3)


def test_a_second_run_has_nothing_to_do_and_git_is_clean(project: Path) -> None:
    done = run(project, "dvc", "repro")
    assert "up to date" in done.stdout
    assert run(project, "dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    assert run(project, "git", "status", "--porcelain").stdout == ""


def test_metrics_and_plots_are_read_by_dvc(project: Path) -> None:
    shown = json.loads(run(project, "dvc", "metrics", "show", "--json").stdout)
    assert "metrics/test.json" in shown[""]["data"]
    run(project, "dvc", "plots", "show")
    page = (project / "dvc_plots" / "index.html").read_text()
    assert "http" not in page  # it works without internet
    shown = re.findall(r'<img[^>]* src="([^"]+)"', page)
    assert {Path(name).name.partition("_")[2] for name in shown} >= {
        "reports_training_curves.png",
        "reports_pictures_samples.png",
        "reports_pictures_class_precision.png",
    }
    assert all((project / "dvc_plots" / name).is_file() for name in shown)


@pytest.mark.parametrize("git", [True, False])
def test_a_fresh_copy_restores_everything_from_the_cache(
    project: Path, tmp_path: Path, git: bool
) -> None:
    copy = tmp_path / "copy"
    if git:
        run(project, "git", "clone", "-q", str(project), str(copy))
    else:
        kept = shutil.ignore_patterns(
            ".git", "models", "reports", "metrics", "plots", "demo", "tmp"
        )
        shutil.copytree(project, copy, ignore=kept)
        run(copy, "dvc", "config", "--local", "core.no_scm", "true")
        (copy / "dvc.lock").unlink()  # the run cache alone must do
    run(copy, "dvc", "config", "--local", "cache.dir", str(project.parent / "cache"))
    done = run(copy, "dvc", "repro")
    assert "training in" not in done.stdout
    assert "is cached - skipping run" in done.stdout or "checking out" in done.stdout.lower()
    assert sha256_file(copy / "models/trained/model.pth") == sha256_file(
        project / "models/trained/model.pth"
    )


@pytest.mark.slow
def test_an_experiment_trains_again_and_only_what_depends_on_it(project: Path) -> None:
    done = run(project, "dvc", "exp", "run", "-S", "fit.lr=2e-3", "-n", "faster")
    try:
        assert "training in" in done.stdout
        assert "Stage 'convert' didn't change" in done.stdout
        diff = json.loads(run(project, "dvc", "params", "diff", "--json").stdout)
        assert diff["params.yaml"]["fit.lr"]["new"] == 0.002
        metrics = json.loads(run(project, "dvc", "metrics", "diff", "--json").stdout)
        assert "metrics/fit.json" in metrics
    finally:
        run(project, "git", "checkout", "-q", ".")
        run(project, "dvc", "checkout", "-f")


def test_a_dataset_with_errors_stops_before_training_and_leaves_its_report(
    project: Path, tmp_path: Path
) -> None:
    copy = make_project(tmp_path / "broken", dataset={"name": "bad", "dir": "data/bad"})
    run(copy, "dvc", "config", "--local", "core.no_scm", "true")
    shutil.copytree(project / "data/demo", copy / "data/bad")
    file = copy / "data/bad/train/_annotations.coco.json"
    file.chmod(0o644)
    document = json.loads(file.read_text())
    document["annotations"][0]["category_id"] = 99
    document["annotations"][1]["category_id"] = 98
    document["annotations"][2]["bbox"] = [10, 10, -5, 4]  # training drops it: a warning
    file.write_text(json.dumps(document))
    done = run(copy, "dvc", "repro", "evaluate", check=False)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "cannot be used for training: 2 errors" in text
    assert "99" in text
    assert "training in" not in text
    assert json.loads((copy / "reports/validation.json").read_text())["severities"]["error"] == 2


def test_wrong_params_stop_a_stage_with_all_mistakes(tmp_path: Path) -> None:
    copy = make_project(tmp_path / "wrong")
    write_params(copy, fit={"epoch": 1, "lr": -1}, model={"resolution": 65})
    done = run(copy, "python", "-m", "flows.stages.convert", check=False)
    assert done.returncode == 1
    assert "convert failed: params.yaml has 3 mistakes" in done.stderr
    assert "Traceback" not in done.stderr
