"""The model card: every number is that of a record, in both formats."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.config.environment import Environment
from flows.gate.decide import decide
from flows.gate.verdict import ClassScore, GatePolicy, Scores
from flows.project.project import Project
from flows.registry.registry import Registry
from flows.release import steps
from flows.release.audit import AuditRecord
from flows.release.card_files import publish_card
from flows.release.model_card import Card, make_card
from rfdetr.evaluation.error_types import TYPES, ErrorTypes
from rfdetr.monitoring.image_profile import ImageProfile
from rfdetr.tracking.client import experiment_id
from tests.flows.projects import write_params

CARD: dict[str, Any] = {
    "variant": "nano",
    "class_names": ["zero", "<b>one</b>", "four"],
    "resolution": 128,
    "epochs": 3,
    "best": {"epoch": 2},
    "dataset": {"name": "demo", "digest": "d" * 64},
    "source": {"source": "weights/start.pth"},
    "weights_sha256": "a" * 64,
    "git_commit": "c0ffee",
    "mlflow_run_id": "run7",
    "packages": {"torch": "2.14.1"},
}
VALIDATION = {
    "ledger": {
        "train": {
            "files": {"trained with objects": 1147, "ignored: not an image": 3},
            "rows": {"trained": 2853, "dropped: empty box": 2},
            "images": 1147,
        }
    }
}


def _scores(**changes: Any) -> Scores:
    values: dict[str, Any] = {
        "model": "version 4",
        "weights_sha256": "a" * 64,
        "dataset_sha256": "t" * 64,
        "settings": "s",
        "class_names": ("zero", "<b>one</b>", "four"),
        "images": 200,
        "metrics": {"map_50_95": 0.6271, "map_50": 0.8993},
        "per_class": {
            "zero": ClassScore(ap=0.7001, boxes=100),
            "<b>one</b>": ClassScore(ap=0.5002, boxes=12),
        },
        "error_types": ErrorTypes(
            0.8993,
            dict(zip(TYPES, range(11, 17), strict=True)),
            dict(zip(TYPES, (0.011, 0.012, 0.013, 0.014, 0.015, 0.016), strict=True)),
        ),
        "suspected_labels": 5,
    }
    return Scores(**{**values, **changes})


def _profile() -> ImageProfile:
    values = np.linspace(0, 1, 101, dtype=np.float32)
    none = np.zeros(0)
    return ImageProfile(
        files=tuple(f"{i}.jpg" for i in range(101)),
        features={"brightness": values},
        owner=none.astype(np.int32),
        scores=none.astype(np.float16),
        sizes=none.astype(np.float16),
        labels=none.astype(np.int32),
        embeddings=np.zeros((0, 4), dtype=np.float16),
        held_out=np.ones(101, dtype=bool),
        class_names=("zero",),
    )


def _card(promotion: AuditRecord | None = None, **changes: Any) -> dict[str, str]:
    verdict = decide(None, _scores(), GatePolicy(min_images=1), None)
    made = make_card("trees", 4, CARD, verdict, **changes)
    stored = Card.from_json(made.to_json())
    assert stored.files(promotion) == made.files(promotion)
    return stored.files(promotion)


def _text(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def test_both_formats_contain_the_numbers_of_the_records() -> None:
    promoted = AuditRecord(
        action="promote",
        version=4,
        previous=2,
        reason="better",
        by="ada",
        at="2026-01-02T03:04:05Z",
    )
    files = _card(validation=VALIDATION, profile=_profile(), promotion=promoted)
    assert set(files) == {"card.md", "card.html"}
    for text in (files["card.md"].replace("\\", ""), _text(files["card.html"])):
        for number in (
            *("0.6271", "0.8993", "0.7001", "0.5002", "200", "1147", "2853", "0.0110", "11"),
            *("0.0500", "0.9500", "ada", "better", "2026-01-02T03:04:05Z", "c0ffee", "run7"),
            *("a" * 64, "d" * 64, "t" * 64, "weights/start.pth", "2.14.1"),
            *("dropped: empty box: 2", "ignored: not an image: 3", "only 12 boxes"),
            *("four", "no boxes in the test set", "5 test labels are probably wrong"),
        ):
            assert number in text, number


def test_a_promotion_by_hand_completes_the_card_of_any_model(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    write_params(tmp_path)
    project, registry = Project(tmp_path, env=Environment.read()), Registry("tiny", tracking_uri)
    registry.client.create_registered_model(registry.name)
    where = experiment_id(registry.client, "rfdetr/demo", registry.uri)
    for _ in range(3):
        run_id = str(registry.client.create_run(where).info.run_id)
        registry.client.create_model_version(registry.name, "file:///x", run_id=run_id)
    verdict = decide(None, _scores(), GatePolicy(min_images=1), None)
    for number in (1, 2):  # the third was never judged
        made = make_card("tiny", number, CARD, verdict)
        publish_card(project, registry, number, made)

    def stored(number: int, name: str) -> str:
        return registry.read_text(registry.version(number), f"card/version-{number}/{name}") or ""

    before = stored(2, "card.md")
    assert "This version is not champion." in before
    for number, why in ((1, "first"), (2, "sharper lens")):
        steps.promote_by_hand(project, number, reason=why, force=True)
    after = stored(2, "card.md")
    assert after.split("## Promotion")[0] == before.split("## Promotion")[0]
    assert "sharper lens" in after and "promote (gate overruled)" in after
    assert "sharper lens" in stored(2, "card.html")
    first = stored(1, "card.md")
    assert "first" in first and re.search(r"Then replaced by \| version 2: sharper lens", first)
    steps.roll_back(project, reason="blurred")
    assert "rollback" in stored(1, "card.md") and "blurred" in stored(1, "card.md")
    assert "replaced by" not in stored(1, "card.md")  # it is champion again
    assert "sharper lens" in stored(2, "card.html")
    assert re.search(r"Then rolled back to \| version 1: blurred", stored(2, "card.md"))
    steps.promote_by_hand(project, 3, reason="try", force=True)
    assert registry.aliases()["champion"] == 3
    assert stored(3, "card.md") == ""
    assert not (tmp_path / "reports" / "card.md").exists()  # not the model of this project


def test_names_are_escaped_and_a_version_that_is_not_champion_says_so() -> None:
    files = _card()
    assert "<b>one</b>" not in files["card.html"]
    assert "&lt;b&gt;one&lt;/b&gt;" in files["card.html"]
    assert "This version is not champion." in files["card.md"]
    assert "## Data" not in files["card.md"]  # no report, no numbers


def test_weak_spots_are_limits() -> None:
    few = _scores(per_class={}, suspected_labels=None)
    verdict = decide(None, few, GatePolicy(min_images=1), None)
    text = make_card("trees", 4, CARD, verdict).files()["card.md"]
    limits = text.split("## Limits")[1].split("##")[0]
    assert limits.count("not measured") == 3
    assert "probably wrong" not in limits


def test_types_of_errors_are_a_chart_against_the_champion() -> None:
    old = _scores(
        weights_sha256="b" * 64,
        error_types=ErrorTypes(0.88, dict.fromkeys(TYPES, 9), dict.fromkeys(TYPES, 0.032)),
    )
    verdict = decide(old, _scores(), GatePolicy(min_images=1), 3)
    page = make_card("trees", 4, CARD, verdict).files()["card.html"]
    chart = page.split('<figure class="chart">')[1].split("</figure>")[0]
    assert "<i></i>model</span><span><i></i>champion" in chart
    bars = re.findall(r"--share:([\d.]+)%\"><i></i><span>([\d.]+)<", chart)
    assert len(bars) == 2 * len(TYPES)
    assert bars[:2] == [("34.4", "0.0110"), ("100.0", "0.0320")]
    alone = _card()["card.html"].split('<figure class="chart">')[1]
    assert "champion" not in alone.split("</figure>")[0]
