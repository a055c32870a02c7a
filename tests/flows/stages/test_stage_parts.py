"""Parts of the stages: devices, resume files, labels and curves."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.config.environment import Environment
from flows.config.params import parse_params
from flows.config.sections import DatasetSettings, EvaluateSettings, RuntimeSettings
from flows.core.digest import path_digest
from flows.core.errors import explain
from flows.core.files import write_json
from flows.fit_job import job
from flows.fit_job.job import FitJob, command, newest_checkpoint, resolve_devices
from flows.fit_job.resume_state import FitState
from flows.gate.decide import decide
from flows.gate.score_cache import _cache_file
from flows.gate.scoring import label_table, relabel, score_model
from flows.gate.verdict import GatePolicy
from flows.project.project import Project
from flows.registry.registry import RegistryError
from flows.release import run_record
from flows.stages import convert as convert_stage
from flows.stages import evaluate, fit, validate
from flows.stages.fit import AFTER_TRAINING, code_of_training
from flows.stages.runner import check_unchanged, run_stage
from flows.stages.trained_model import epoch_rows
from flows.stages.validate import UNREADABLE, reasons_to_stop
from rfdetr.checkpoints.record import CheckpointRecord
from rfdetr.checkpoints.safe_io import save_file
from rfdetr.checks.dataset_report import DatasetReport, Finding, SplitStatistics
from rfdetr.data.demo import build_demo
from rfdetr.errors import ConfigError
from rfdetr.evaluation.box_table import EvaluationData, make_box_table
from tests.flows.models import NAMES, write_model
from tests.flows.projects import write_params

ROOT = Path(__file__).parents[3]


def test_stages_compare_the_sections_that_dvc_tracks() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, module in (
        ("validate", validate), ("convert", convert_stage), ("fit", fit), ("evaluate", evaluate),
    ):  # fmt: skip
        assert stages[name]["params"] == module.SECTIONS
        assert f"flows/stages/{name}.py" in stages[name]["deps"]
    code = code_of_training(Project(ROOT))
    assert all((ROOT / path).exists() for path in {*code, *AFTER_TRAINING})
    assert not AFTER_TRAINING & set(code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accelerator": "gpu"}, r"accelerator is gpu, but 0 GPU\(s\) are visible"),
        ({"devices": 2}, r"devices is 2, but 0 GPU\(s\) are visible"),
        ({"accelerator": "gpu", "devices": 4}, "CUDA driver"),
    ],
)
def test_a_missing_gpu_is_an_error(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_devices(RuntimeSettings(**fields))


def test_processes_on_the_cpu_are_possible() -> None:
    assert resolve_devices(RuntimeSettings(accelerator="cpu", devices=3)) == ("cpu", 3)
    assert resolve_devices(RuntimeSettings(accelerator="cpu")) == ("cpu", 1)


def test_several_machines_meet_at_one_address(tmp_path: Path) -> None:
    runtime = RuntimeSettings(nodes=2, rendezvous="host:29500")
    line = " ".join(command(tmp_path, runtime, 4, "run1"))
    assert "--nnodes=2" in line
    assert "--rdzv-endpoint=host:29500" in line
    assert "--nproc-per-node=4" in line
    alone = command(tmp_path, RuntimeSettings(), 1, "run1")
    assert "--standalone" not in alone  # it needs a resolver that knows this machine
    assert {"--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"} <= set(alone)


def test_an_unreadable_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == (None, [])
    good = {"state_dict": {"model.class_embed.bias": torch.zeros(4)}}
    for number, name in enumerate(("checkpoint_9.ckpt", "checkpoint_19.ckpt", "last.ckpt")):
        save_file(good, tmp_path / name)
        os.utime(tmp_path / name, (number, number))
    assert newest_checkpoint(tmp_path) == (tmp_path / "last.ckpt", [])
    (tmp_path / "last.ckpt").write_bytes(b"half a file")
    path, warnings = newest_checkpoint(tmp_path)
    assert path == tmp_path / "checkpoint_19.ckpt"
    assert "last.ckpt is unreadable" in warnings[0]


def test_classes_are_matched_by_name() -> None:
    old = CheckpointRecord("x.pth", "weights", {}, class_names=["dog", "cat", "cow"])
    assert label_table(old, ["cat", "dog"]) == {0: 1, 1: 0}
    shifted = CheckpointRecord("x.pth", "weights", {}, class_names=["dog", "cat"], label_offset=1)
    assert label_table(shifted, ["cat", "dog"]) == {1: 1, 2: 0}
    assert label_table(CheckpointRecord("x.pth", "weights", {}), ["a", "b"]) == {0: 0, 1: 1}
    with pytest.warns(UserWarning, match="no class in common"):
        assert label_table(old, ["zebra"]) == {}
    rows = make_box_table([0, 0, 1], [0, 1, 2], np.ones((3, 4)), score=[0.9, 0.8, 0.7])
    columns = EvaluationData(np.array([1, 2]), rows, make_box_table([], [], []))
    assert relabel(columns, {0: 1, 1: 0}).detections.label.tolist() == [1, 0]


def test_a_model_of_other_classes_scores_zero_and_the_gate_says_why(tmp_path: Path) -> None:
    """`models.write_model` knows zero, one, four; the dataset holds sevens and nines."""
    files = write_model(tmp_path)
    data = build_demo(tmp_path / "demo", classes=(7, 9), train=2, valid=2, test=4)
    dataset = DatasetSettings(name="demo", dir=str(data), layout="roboflow")
    with pytest.warns(UserWarning, match="no class in common"):
        scored = score_model(
            files.weights, data, dataset, EvaluateSettings(), accelerator="cpu"
        ).scores("version 1", "d")
    assert scored.metrics["map_50_95"] == 0
    assert scored.class_names == tuple(NAMES)
    better = {"class_names": ("seven", "nine"), "metrics": {"map_50_95": 0.5}}
    challenger = scored.model_copy(
        update={**better, "weights_sha256": "other", "export_parity": True}
    )
    policy = GatePolicy(min_images=1, evidence="point")
    verdict = decide(scored, challenger, policy)
    assert [rule.name for rule in verdict.rules if rule.passed is False] == ["same_classes"]
    consent = policy.model_copy(update={"allow_class_change": True})
    assert decide(scored, challenger, consent).promote


@pytest.mark.parametrize(
    "change",
    [
        {"evaluate": {"batch_size": 3}},
        {"evaluate": {"operating_point": "f1"}},
        {"slices": {"night": "path:night"}},
        {"dataset": {"layout": "yolo"}},
        {"runtime": {"accelerator": "gpu"}},
    ],
)
def test_scores_are_kept_for_one_way_of_scoring(
    change: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RFDETR_STATE_DIR", str(tmp_path))
    assert kept_file() != kept_file(**change)


def test_times_with_a_budget_are_those_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RFDETR_STATE_DIR", str(tmp_path))
    here, timed = kept_file(), kept_file(gate={"max_latency_ms": 10.0})
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert kept_file() == here
    assert kept_file(gate={"max_latency_ms": 10.0}) != timed


def kept_file(**changes: dict) -> Path:
    dataset = {"name": "demo", "dir": "data/demo", "layout": "roboflow"}
    sections = {"dataset": {**dataset, **changes.pop("dataset", {})}, **changes}
    project = Project()
    project.params = parse_params(sections)
    return _cache_file(project, "weights", "digest")


def test_rows_of_steps_and_epochs_become_one_row_per_epoch(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text(
        "epoch,step,train/lr,train/loss,val/mAP_50_95\n"
        "0,9,0.1,,\n0,10,,,0.25\n0,10,,3.5,\n1,19,0.1,,\n1,20,,2.5,\n"
    )
    assert list(epoch_rows(file)) == [
        {"epoch": 1.0, "val/mAP_50_95": 0.25, "train/loss": 3.5},
        {"epoch": 2.0, "train/loss": 2.5},
    ]


def report(train: int, errors: int, **finding: object) -> DatasetReport:
    finding = {"code": "x"} | finding
    found = [
        Finding(severity="error", message="m", fix="f", split="train", **finding)
        for _ in range(errors)
    ]
    return DatasetReport(
        dataset="d",
        layout="roboflow",
        severities={"error": errors},
        findings=found,
        statistics={"train": SplitStatistics(images=train)},
    )


def test_the_share_of_bad_images_decides() -> None:
    strict = parse_params({})
    patient = parse_params({"validate": {"max_bad_fraction": 0.1}})
    assert reasons_to_stop(report(100, 0), strict) == []
    assert "min_images is 20" in reasons_to_stop(report(19, 0), strict)[0]
    one = report(100, 1, file="a.jpg", image_id=7)
    assert "1 errors in 1 of 100 images" in reasons_to_stop(one, strict)[0]
    assert reasons_to_stop(one, patient) == []
    assert reasons_to_stop(report(100, 1, file="_annotations.coco.json"), patient)


def test_errors_beyond_the_listing_limit_count() -> None:
    patient = parse_params({"validate": {"max_bad_fraction": 0.5}})
    many = report(100, 40, code="box-nan", file="a.jpg", image_id=7)
    listed = many.model_copy(update={"findings": many.findings[:1]})
    assert reasons_to_stop(many, patient) == []  # one image
    assert reasons_to_stop(listed, patient) == []
    more = listed.model_copy(update={"severities": {"error": 60}})
    assert "60 errors in 60 of 100 images" in reasons_to_stop(more, patient)[0]


@pytest.mark.parametrize("code", sorted(UNREADABLE))
def test_images_that_cannot_be_read_are_never_tolerated(code: str) -> None:
    lenient = parse_params({"validate": {"max_bad_fraction": 1.0}})
    (reason,) = reasons_to_stop(report(100, 1, code=code, file="a.jpg", image_id=7), lenient)
    assert f"training cannot skip images that it cannot read ({code})" in reason
    assert "`python -m rfdetr.checks data/demo --fix COPY`" in reason


@pytest.mark.parametrize("stage", ["validate", "convert", "evaluate"])
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--bogus", 2)])
def test_a_stage_with_arguments_does_nothing(
    stage: str, argument: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[Project] = []
    assert run_stage(stage, [], called.append, [argument]) == status
    told = capsys.readouterr()
    assert f"python -m flows.stages.{stage}" in (told.err if status else told.out)
    assert not called


def test_a_damaged_cache_of_hashes_is_replaced(tmp_path: Path) -> None:
    file, memory = tmp_path / "a.txt", tmp_path / "digests.db"
    file.write_text("a")
    wanted = path_digest(file)
    memory.write_bytes(b"no database at all, but long enough to be read" * 20)
    assert path_digest(file, memory) == wanted == path_digest(file, memory)


def test_numbers_of_classes_with_punctuation_are_recorded(tmp_path: Path) -> None:
    per_class = {"bolt & nut": 0.25, "50% off": 0.5, "T-joint (left)": 0.75, "on/off": 1.0}
    write_json(tmp_path / "metrics/test.json", {"mAP50": 1.0, "per_class": per_class})
    write_json(tmp_path / "metrics/fit.json", {"seconds": 3.0})
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = client.create_run(client.create_experiment("e")).info.run_id
    (tmp_path / "params.yaml").write_text("")
    run_record._add_numbers(client, run_id, Project(tmp_path))
    assert client.get_run(run_id).data.metrics == {
        "test.mAP50": 1.0,
        "test.per_class.bolt _ nut": 0.25,
        "test.per_class.50_ off": 0.5,
        "test.per_class.T-joint _left_": 0.75,
        "test.per_class.on_off": 1.0,
        "fit.seconds": 3.0,
    }


def test_recording_needs_finished_stages(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("")
    with pytest.raises(RegistryError, match=r"dvc\.lock, models/trained/model\.json"):
        run_record.complete_run(Project(tmp_path), {})


def test_a_cycle_of_causes_ends() -> None:
    error = RuntimeError("x")
    other = ValueError("y")
    error.__cause__, other.__cause__ = other, error
    assert "unexpected RuntimeError" in explain(error)


def test_an_answer_of_mlflow_needs_no_traceback() -> None:
    text = explain(MlflowException("no run http://user:pass@host/x"))
    assert text.startswith("MLflow: no run")
    assert "pass" not in text


@pytest.mark.parametrize(
    ("batch", "devices", "words"),
    [(8, 1, "effective batch of 8, which does not fit the 1"), (4, 2, "uses 2 devices, this")],
)
def test_a_node_with_other_devices_cannot_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, devices: int, words: str
) -> None:
    mine = FitJob(
        model={"variant": "nano"}, train={}, initial="", precision="auto", accelerator="cpu",
        devices=1, nodes=2, params={}, run_name="", dataset={},
    )  # fmt: skip
    inputs = {"data": "d", "effective_batch": 4}
    monkeypatch.setattr(fit, "plan", lambda _: mine)
    monkeypatch.setattr(fit, "fingerprint", lambda *_: inputs)
    first = FitState(tmp_path, {**inputs, "effective_batch": batch})
    first.begin_attempt()
    mine.model_copy(update={"devices": devices}).write(first.folder)
    env = Environment.read({"RFDETR_STATE_DIR": str(tmp_path)})
    write_params(tmp_path)
    monkeypatch.setattr(job, "BEAT_SECONDS", 0.2)
    with job.offered(first.folder), pytest.raises(fit.FitError, match=words):
        fit.join(Project(tmp_path, env))


def test_a_fetch_depends_on_its_own_source_only(tmp_path: Path) -> None:
    def write(mine: str, other: str) -> None:
        uris = {"mine": {"uri": f"s3://{mine}"}, "other": {"uri": f"s3://{other}"}}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump({"sources": uris}))

    write("a/x", "b/x")
    project = Project(tmp_path, Environment.read({"RFDETR_STATE_DIR": str(tmp_path)}))
    _ = project.params
    write("a/x", "changed/x")
    check_unchanged(project, [("sources", "mine")])
    write("changed/x", "b/x")
    with pytest.raises(ConfigError, match=r"sources\.mine was"):
        check_unchanged(project, [("sources", "mine")])
