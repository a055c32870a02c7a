from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rfdetr.checks import CODES
from rfdetr.checks.cli import main
from tests.unit.checks import planted_more  # noqa: F401 - registers plants
from tests.unit.checks.conftest import snapshot
from tests.unit.checks.planted import COCO

QUIET = ["--no-progress", "--workers", "1"]


def test_a_clean_dataset_exits_0_and_writes_three_reports(
    clean: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(clean["coco"])
    assert main([str(clean["coco"]), "--out", str(tmp_path / "out"), *QUIET]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
    }
    assert "Ready for training" in capsys.readouterr().out
    assert snapshot(clean["coco"]) == before


def test_errors_exit_1_and_options_change_that(
    clean: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    COCO["box_nan"](folder)
    assert main([str(folder), *QUIET]) == 1
    assert "box-nan" in capsys.readouterr().out
    assert main([str(folder), *QUIET, "--silence", "box-nan"]) == 0
    assert main([str(folder), *QUIET, "--severity", "box-nan=warning"]) == 0
    assert main([str(folder), *QUIET, "--fix", str(tmp_path / "repaired"), "--fix-plan"]) == 0
    assert main([str(tmp_path / "repaired"), *QUIET, "--model", "small"]) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["absent"], "does not exist"),
        (["{empty}"], "neither a COCO export"),
        (["{empty}", "--format", "yolo"], "expected data.yaml"),
        (["{empty}", "--format", "coco"], "instances_train2017.json"),
        (["{clean}", "--severity", "box-nan=terrible"], "error', 'warning"),
        (["{clean}", "--silence", "box-nam"], "did you mean 'box-nan'"),
        (["{clean}", "--set", "max_aspekt=3"], "did you mean 'max_aspect'"),
        (["{clean}", "--set", "max_aspect"], "NAME=VALUE"),
        (["{clean}", "--resolution", "100"], "multiple"),
        (["{clean}", "--out", "{clean}/report"], "is inside the dataset"),
        (["{clean}", "--previous", "absent.json"], "absent.json"),
    ],
)
def test_unusable_input_exits_2_with_one_message(
    clean: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    text: str,
) -> None:
    filled = [a.format(empty=tmp_path, clean=clean["coco"]) for a in arguments]
    assert main([*filled, *QUIET]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert text in message


def test_the_module_runs_and_lists_its_codes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rfdetr.checks", "--list-codes"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(CODES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "outside_tolerance=-1"], "outside_tolerance=-1: Input should be greater"),
        (["--severity", "box-nan=loud"], "severity.box-nan=loud: Input should be 'error'"),
    ],
)
def test_a_refused_value_is_named_with_its_field(
    clean: dict[str, Path], options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(clean["coco"]), *options]) == 2
    assert words in capsys.readouterr().err
