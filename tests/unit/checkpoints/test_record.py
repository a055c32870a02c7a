"""Every generation of checkpoint files reads into the same record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rfdetr.checkpoints.legacy_names import to_legacy
from rfdetr.checkpoints.record import class_names_of, parse_checkpoint, plain, read_checkpoint
from rfdetr.errors import CheckpointError

FOLDER = Path(__file__).parents[2] / "parity" / "training" / "checkpoints"
ENTRIES = json.loads((FOLDER / "manifest.json").read_text())
READABLE = [e for e in ENTRIES if e["generation"] in ("a", "b", "c", "lightning")]


def _sums(state: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {name: [list(v.shape), v.double().sum().item()] for name, v in to_legacy(state).items()}


def _assert_sums(state: dict[str, torch.Tensor] | None, expected: dict[str, list[Any]]) -> None:
    assert state is not None
    actual = _sums(state)
    assert list(actual) == list(expected)
    for name, (shape, total) in expected.items():
        assert actual[name][0] == shape
        assert actual[name][1] == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("entry", READABLE, ids=lambda e: e["file"])
def test_every_generation(entry: dict[str, Any]) -> None:
    expect = entry["expect"]
    read = read_checkpoint(FOLDER / entry["file"])
    _assert_sums(read.weights, entry["model_sums"])
    if "ema_sums" in expect:
        _assert_sums(read.ema, expect["ema_sums"])
    elif "has_ema" in expect:
        assert (read.ema is not None) == expect["has_ema"]
    assert read.num_classes == entry["num_classes_from_head"]
    if expect.get("epoch") is not None:
        assert (read.epoch or 0) == expect["epoch"]
    for name, value in expect.get("hyper_parameters_is_dict_with", {}).items():
        assert read.args[name] == value
        assert type(read.args[name]) is type(value)


def test_class_names_and_model_name() -> None:
    assert read_checkpoint(FOLDER / "c_stripped_best_total_1_11.pth").model_name == "RFDETRNano"
    named = read_checkpoint(FOLDER / "a_best_regular_no_ema_key.pth")
    assert (named.class_names, named.label_offset) == (["bolt", "nut", "washer"], 1)
    assert read_checkpoint(FOLDER / "b_published_model_args.pth").class_names is None
    newer = read_checkpoint(FOLDER / "c_stripped_best_total_1_11.pth")
    assert (newer.class_names, newer.label_offset) == (["bolt", "nut", "washer"], 0)


def test_settings_come_from_the_model_config_first() -> None:
    read = read_checkpoint(FOLDER / "c_stripped_best_total_1_11.pth")
    assert (read.setting("num_queries"), read.setting("group_detr")) == (4, 2)
    assert read.setting("absent") is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bad_no_model_key.pth", "no key 'model'.*'weights', 'epoch'"),
        ("bad_not_a_dict.pth", "list"),
    ],
)
def test_files_without_weights_name_what_they_hold(name: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}.*{text}"):
        read_checkpoint(FOLDER / name)


@pytest.mark.parametrize("model", [{}, [1], {"a": 1}, None])
def test_a_model_entry_without_tensors_is_refused(model: object) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth: 'model'"):
        parse_checkpoint({"model": model}, "x.pth")


def test_empty_entries_of_newer_writers_are_dropped() -> None:
    state = {"class_embed.bias": torch.ones(4), "_kp_active_mask": torch.zeros(0, 0).bool()}
    assert list(parse_checkpoint({"model": state}, "x").weights) == ["class_embed.bias"]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_are_stripped(prefix: str) -> None:
    state = {prefix + "backbone.0._orig_mod.projector.x": torch.ones(4)}
    assert list(parse_checkpoint({"model": state}, "x").weights) == ["backbone.0.projector.x"]


def test_class_names_of_lists_and_numbered_dictionaries() -> None:
    assert class_names_of({2: "b", 1: "a", 10: "c"}) == ["a", "b", "c"]
    assert class_names_of({"2": "b", "1": "a"}) == ["a", "b"]
    assert class_names_of(("a", "b")) == ["a", "b"]
    assert class_names_of([]) is None
    assert class_names_of(None) is None


def test_plain_values() -> None:
    value = {"a": (Path("x"), {1}), "b": None}
    assert plain(value) == {"a": ["x", [1]], "b": None}
