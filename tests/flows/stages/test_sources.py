"""Datasets on S3: what changes there is noticed, fetched, and known by its version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.config.params import load_params
from flows.project.plan import plan_stages
from flows.project.project import Project
from flows.project.workspace import pin_source
from flows.release.freshness import (
    current_version,
    judged_version,
    pinned_version,
    registry_of,
)
from flows.storage.s3 import make_client
from tests.flows.projects import make_project, run
from tests.flows.servers import S3Server

SOURCES = """sources: # where it comes from
  mine: {uri: "s3://data/KEY"}
dataset: {name: mine, dir: data/mine}
"""


def put(key: str, content: bytes) -> None:
    make_client().put_object(Bucket="data", Key=key, Body=content)


@pytest.fixture
def key(s3: S3Server, tmp_path: Path) -> str:
    """A prefix of the bucket that holds one object."""
    put(f"{tmp_path.name}/a.txt", b"one")
    return tmp_path.name


@pytest.fixture
def folder(key: str, tmp_path: Path) -> Path:
    """params.yaml of a project whose dataset is that prefix."""
    (tmp_path / "params.yaml").write_text(SOURCES.replace("KEY", key))
    return tmp_path


def version(root: Path) -> str | None:
    return load_params(root / "params.yaml").sources["mine"].version


def test_a_run_pins_what_s3_holds(folder: Path, key: str) -> None:
    pin_source(Project(folder))
    first, text = version(folder), (folder / "params.yaml").read_text()
    assert first is not None
    assert "# where it comes from" in text
    pin_source(Project(folder))
    assert (folder / "params.yaml").read_text() == text
    put(f"{key}/b.txt", b"two")
    assert version(folder) == first
    pin_source(Project(folder))
    assert version(folder) not in (None, first)


def test_a_version_that_the_user_set_is_kept(folder: Path, key: str) -> None:
    file = folder / "params.yaml"
    file.write_text(file.read_text().replace('KEY"}', 'KEY"').replace('"}', '", version: June}'))
    before, known = file.read_text(), current_version(Project(folder))
    put(f"{key}/b.txt", b"two")
    pin_source(Project(folder))
    assert file.read_text() == before
    assert current_version(Project(folder)) == known == pinned_version(Project(folder))


def test_both_sides_of_the_comparison_agree(folder: Path, key: str) -> None:
    """The version that a run records is the one that the next look finds, until data changes."""
    found = current_version(Project(folder))
    pin_source(Project(folder))
    assert pinned_version(Project(folder)) == found == current_version(Project(folder))
    put(f"{key}/b.txt", b"two")
    assert pinned_version(Project(folder)) == found
    assert current_version(Project(folder)) != found


@pytest.mark.parametrize(
    ("tags", "champion", "known"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"gate.outcome": "refuse"}, False, True),
        ({"gate.outcome": "promote"}, False, False),  # interrupted before it was promoted
        ({"gate.outcome": "promote", "promotion.action": "promote"}, False, True),  # rolled back
    ],
)
def test_data_that_was_judged_starts_nothing(
    folder: Path,
    key: str,
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    tags: dict[str, str],
    champion: bool,
    known: bool,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    pin_source(Project(folder))
    registry = registry_of(Project(folder))
    client: Any = registry.client
    client.create_registered_model(registry.name)
    for version_tags in ({"lineage.dataset_version": "s3:other"}, tags):
        lineage = {"lineage.dataset_version": str(pinned_version(Project(folder)))}
        client.create_model_version(registry.name, "s3://data/model", tags=lineage | version_tags)
    client.set_registered_model_alias(registry.name, "champion", "2" if champion else "1")
    found = judged_version(Project(folder))
    assert (found.number if found else None) == (2 if known else None)
    put(f"{key}/b.txt", b"two")
    assert judged_version(Project(folder)) is None


def test_dvc_fetches_what_has_changed_and_plan_says_so(
    s3: S3Server, key: str, tmp_path: Path
) -> None:
    root = make_project(tmp_path / "project", dataset={"name": "mine", "dir": "data/mine"},
                        sources={"mine": {"uri": f"s3://data/{key}"}})  # fmt: skip
    run(root, "dvc", "config", "--local", "core.no_scm", "true")
    pin_source(Project(root))
    run(root, "dvc", "repro", "fetch@mine")
    put(f"{key}/a.txt", b"new")
    before = (root / "params.yaml").read_text()
    (plan,) = [plan for plan in plan_stages(Project(root)) if plan.stage == "fetch@mine"]
    assert (plan.state, plan.reasons) == ("runs", (f"s3://data/{key} has changed",))
    assert (root / "params.yaml").read_text() == before
    pin_source(Project(root))
    run(root, "dvc", "repro", "fetch@mine")
    assert (root / "data/mine/a.txt").read_bytes() == b"new"
    put(f"{key}/a.txt", b"later")
    refused = run(root, "python", "-m", "flows.stages.fetch", "mine", check=False)
    assert "has changed: its version is no longer listing-" in refused.stderr
