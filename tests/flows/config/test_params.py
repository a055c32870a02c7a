"""params.yaml: all mistakes at once, overrides, the batch plan, the environment."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from flows.cli.commands import checked, parse_changes
from flows.config.batch_plan import plan_batch
from flows.config.environment import Environment
from flows.config.overrides import RetrainParams
from flows.config.params import SECTIONS, load_params, parse_params
from flows.config.sections import FitSettings, ModelSettings
from rfdetr.config import MODEL_CONFIGS, ModelConfig, TrainConfig
from rfdetr.errors import ConfigError

ROOT = Path(__file__).parents[3]


def test_the_dataset_folder_has_no_last_slash() -> None:
    assert parse_params({"dataset": {"dir": "data/mine/"}}).dataset.dir == "data/mine"


def test_the_shipped_file_is_valid_and_names_every_section() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.dataset.dir == "data/demo"
    assert params.model.config().encoder_dim == 192
    text = (ROOT / "params.yaml").read_text()
    assert all(f"\n{name}:" in f"\n{text}" for name in SECTIONS)


def test_all_mistakes_of_all_sections_are_reported_at_once() -> None:
    wrong = {
        "modle": {},
        "fit": {"epoch": 3, "epochs": 0, "lr": "x"},
        "dataset": {"name": "a b"},
        "model": {"variant": "nano", "resolution": 100},
        "runtime": {"nodes": 0},
        "gate": 7,
        "sources": {"x": {"uri": "http://somewhere"}},
    }
    with pytest.raises(ConfigError) as caught:
        parse_params(wrong)
    text = str(caught.value)
    assert "9 mistakes" in text
    for part in (
        "modle: unknown section. Did you mean 'model'?",
        "fit.epoch: unknown field. Did you mean 'epochs'? Known: accelerate, aug_config,",
        "fit.epochs: Input should be greater than or equal to 1",
        "fit.lr:",
        "dataset.name:",
        "use 96 or 128",
        "runtime.nodes:",
        "gate: expected fields",
        "sources.x.uri:",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not valid YAML"), ("- 1", "expected sections"), (None, "is missing")],
)
def test_an_unreadable_file_is_one_clear_error(
    tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "params.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_params(file)


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("")
    assert load_params(file).fit == FitSettings()


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("fit: {}\nevaluate: {}\nevaluate: {split: valid}\n", "evaluate"),
        ("fit:\n  lr: 0.1\n  'lr': 0.2\n", "lr"),
    ],
)
def test_a_repeated_key_is_named_with_its_line(tmp_path: Path, content: str, key: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_params(file)
    assert f'found duplicate key "{key}"' in str(caught.value)
    assert "line 3, column" in str(caught.value)


def test_a_key_of_a_merged_mapping_may_be_given_again(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("demo: &d {seed: 1, train: 5}\nfit: {<<: {seed: 3}, seed: 4}\n")
    assert load_params(file).fit.seed == 4


def shipped_without(tmp_path: Path, *sections: str) -> Path:
    """A copy of params.yaml, without these sections, beside the shipped dvc.yaml."""
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in data.items() if k not in sections}))
    return file


def test_what_dvc_needs_is_missing_in_one_error_with_the_other_mistakes(tmp_path: Path) -> None:
    file = shipped_without(tmp_path, "dataset", "sources", "validate", "demo", "gate", "runtime")
    file.write_text(f"{file.read_text()}gate: 7\n")
    with pytest.raises(ConfigError) as caught:
        load_params(file)
    text = str(caught.value)
    assert "2 mistakes" in text
    assert "gate: expected fields" in text
    assert "read by dvc.yaml: dataset.dir, demo, sources, validate." in text
    assert 'Add `dataset: {dir: "data/demo"}`, `demo: {}`, `sources: {}`, `validate: {}`.' in text


@pytest.mark.parametrize(
    ("section", "content", "named"),
    [
        ("dataset", "dataset: {name: mine}", "dataset.dir"),
        ("sources", "sources:", "sources"),
        ("fit", "", "fit"),
        ("demo", "demo:", None),
        ("gate", "", None),
    ],
)
def test_only_what_dvc_cannot_do_without_has_to_be_there(
    tmp_path: Path, section: str, content: str, named: str | None
) -> None:
    file = shipped_without(tmp_path, section)
    file.write_text(f"{file.read_text()}{content}\n")
    if named is None:
        load_params(file)
        return
    with pytest.raises(ConfigError, match=rf"1 mistake:.*\n.*read by dvc.yaml: {named}\. Add"):
        load_params(file)


def test_a_project_from_before_slices_gets_an_empty_section(tmp_path: Path) -> None:
    file = shipped_without(tmp_path, "slices")
    text = "# mine\n" + file.read_text().rstrip("\n")
    file.write_text(text)
    before = load_params(ROOT / "params.yaml")
    assert load_params(file) == before
    assert file.read_text() == text + "\n\nslices: {}\n"  # which DVC requires
    assert load_params(file) == before
    assert file.read_text().count("slices") == 1
    file.write_text(json.dumps(yaml.safe_load(text)))  # a section cannot be appended
    with pytest.raises(ConfigError, match=r"read by dvc.yaml: slices\. Add `slices: \{\}`"):
        load_params(file)


@pytest.mark.parametrize("name", ["..", "a b", "", ".hidden", "a/b", "a.b", "a\n", 2024])
def test_the_name_of_a_source_is_one_that_a_folder_and_dvc_can_have(name: object) -> None:
    with pytest.raises(
        ConfigError, match=rf"1 mistake:\n- sources: the name {re.escape(repr(name))} "
    ):
        parse_params({"sources": {name: {"uri": "s3://b/x"}}})
    assert parse_params({"sources": {"a-B_1": {"uri": "s3://b/x"}}}).sources


def test_no_source_has_the_name_of_the_demo() -> None:
    assert "data/demo" in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["demo"]["outs"]
    with pytest.raises(ConfigError, match=r"sources\.demo: the stage demo writes data/demo"):
        parse_params({"sources": {"demo": {"uri": "s3://b/x"}}})


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("fit", "seed", -1),
        ("fit", "seed", 2**32),
        ("fit", "lr", math.inf),
        ("fit", "lr", ".inf"),
        ("fit", "lr", True),
        ("fit", "clip_max_norm", math.inf),
        ("fit", "warmup_epochs", math.nan),
        ("fit", "epochs", True),
        ("fit", "effective_batch_size", True),
        ("demo", "seed", -5),
        ("demo", "classes", [0, True]),
        ("validate", "max_aspect", math.inf),
        ("validate", "min_images", True),
        ("convert", "source", ""),
        ("gate", "min_delta", True),
        ("gate", "tolerance", math.nan),
        ("runtime", "timeout_s", math.inf),
        ("runtime", "price_per_hour", math.inf),
        ("runtime", "devices", True),
    ],
)
def test_a_value_that_would_fail_later_is_refused(section: str, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"1 mistake:\n- {section}\.{field}"):
        parse_params({section: {field: value}})
    with pytest.raises(ValidationError):
        RetrainParams.model_validate({"overrides": {section: {field: value}}})


def test_a_field_of_two_values_takes_true() -> None:
    assert parse_params({"fit": {"multi_scale": True}}).fit.multi_scale
    assert parse_params({"model": {"freeze_encoder": True}}).model.freeze_encoder


def test_fit_and_model_fields_are_those_of_the_library() -> None:
    own = {"effective_batch_size", "precision"}
    for name, field in FitSettings.model_fields.items():
        if name not in own:
            assert name in TrainConfig.model_fields
        if name not in {*own, "seed", "grad_accum_steps"}:
            assert field.default == TrainConfig.model_fields[name].default, name
    elsewhere = {"num_classes", "pretrain_weights", "device"}
    known = set(ModelSettings.model_fields) - {"variant"}
    assert known == set(ModelConfig.model_fields) - elsewhere


def test_every_field_of_a_variant_can_be_set() -> None:
    config = MODEL_CONFIGS["medium"]()
    given = {
        name: getattr(config, name) for name in ModelSettings.model_fields if name != "variant"
    }
    assert parse_params({"model": {"variant": "medium", **given}}).model.config(
        num_classes=90
    ).model_dump(exclude={"pretrain_weights"}) == config.model_dump(exclude={"pretrain_weights"})
    changed = {
        "segmentation_head": True,
        "amp": False,
        "drop_path": 0.1,
        "mask_downsample_ratio": 2,
    }
    assert parse_params({"model": {"variant": "medium", **changed}}).model.config().amp is False


@pytest.mark.parametrize(
    ("section", "field", "hint"),
    [
        ("model", "num_classes", "follows from the dataset's classes"),
        ("model", "pretrain_weights", "convert.source"),
        ("model", "device", "runtime.accelerator"),
        ("fit", "num_workers", "use runtime.num_workers"),
    ],
)
def test_a_field_that_another_section_decides_is_refused_with_its_name(
    section: str, field: str, hint: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"1 mistake:\n- {section}\.{field}: cannot be set here; .*{hint}"
    ):
        parse_params({section: {field: 1}})


def test_a_fixed_field_has_one_value() -> None:
    with pytest.raises(ConfigError, match=r"model\.two_stage: Input should be True"):
        parse_params({"model": {"two_stage": False}})


@pytest.mark.parametrize(
    ("effective", "batch", "steps", "world", "expected"),
    [
        (16, 4, None, 1, (4, 4)),
        (16, 4, None, 2, (4, 2)),
        (16, 4, None, 4, (4, 1)),
        (16, 4, None, 8, (2, 1)),
        (16, 4, 8, 1, (2, 8)),
        (7, 4, None, 1, (1, 7)),
        (None, 4, None, 2, (4, 4)),
        (None, 3, 2, 2, (3, 2)),
    ],
)
def test_the_effective_batch_is_kept(
    effective: int | None, batch: int, steps: int | None, world: int, expected: tuple[int, int]
) -> None:
    fit = FitSettings(effective_batch_size=effective, batch_size=batch, grad_accum_steps=steps)
    plan = plan_batch(fit, world)
    assert (plan.batch_size, plan.grad_accum_steps) == expected
    assert plan.effective == plan.batch_size * plan.grad_accum_steps * world
    assert effective in (None, plan.effective)


@pytest.mark.parametrize(
    ("fields", "world", "possible"),
    [
        ({"effective_batch_size": 16}, 3, "effective_batch_size 15 on 3"),
        ({"effective_batch_size": 16}, 3, "keep 16 on 1, 2, 4, 8, 16 device"),
        ({"effective_batch_size": 16, "grad_accum_steps": 5}, 1, "effective_batch_size 15"),
        ({"effective_batch_size": 2}, 4, "effective_batch_size 4 on 4"),
    ],
)
def test_an_impossible_batch_names_a_possible_one(
    fields: dict[str, int], world: int, possible: str
) -> None:
    with pytest.raises(ConfigError, match="cannot be reached") as caught:
        plan_batch(FitSettings(**fields), world)
    assert possible in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be reached"):
        parse_params({"fit": fields, "runtime": {"devices": world}})


def test_overrides_keep_only_what_was_given() -> None:
    given = {"overrides": {"fit": {"epochs": 3, "lr": None, "aug_config": None}, "validate": {}}}
    assert RetrainParams.model_validate(given).changes() == {
        "fit": {"epochs": 3, "aug_config": None}
    }
    assert RetrainParams().changes() == {}


@pytest.mark.parametrize(
    "overrides", [{"fit": {"epochs": 0}}, {"fit": {"epoch": 1}}, {"nothing": {}}]
)
def test_wrong_overrides_are_refused_before_a_run_exists(overrides: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RetrainParams.model_validate({"overrides": overrides})


def test_the_form_names_every_section_by_its_own_name() -> None:
    schema = RetrainParams.model_json_schema()
    assert set(schema["$defs"]["Overrides"]["properties"]) == set(SECTIONS)


def test_environment_has_a_state_folder_always(tmp_path: Path) -> None:
    env = Environment.read({"XDG_CACHE_HOME": str(tmp_path), "RFDETR_STATE_URL": ""})
    assert env.state_dir == tmp_path / "rfdetr-pipeline"
    assert env.state_url is None
    given = Environment.read({"RFDETR_STATE_DIR": str(tmp_path), "AWS_SECRET_ACCESS_KEY": "k3y"})
    assert given.state_dir == tmp_path
    assert "k3y" not in repr(given)


def test_a_wrong_change_of_the_command_line_is_answered_with_the_nearest_name() -> None:
    wrong = {"fit": {"lrr": 0.1, "epochs": "abc"}, "evalute": {}}
    with pytest.raises(ConfigError) as told:
        checked(RetrainParams, overrides=wrong)
    text = str(told.value)
    assert "fit.lrr: unknown field. Did you mean 'lr'?" in text
    assert "evalute: unknown section. Did you mean 'evaluate'?" in text
    assert "fit.epochs: Input should be a valid integer" in text
    assert "(found 'abc')" in text


@pytest.mark.parametrize("change", ["fit.epochs=", "fit.epochs=null", "registry.name=~"])
def test_an_empty_change_of_the_command_line_is_an_error(change: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {change}: .* cannot be empty"):
        parse_changes(["fit.lr=0.1", change])


def test_an_empty_change_is_applied_where_null_is_a_value() -> None:
    changes = parse_changes(["convert.source=", "gate.max_size_mb=null"])
    params = checked(RetrainParams, overrides=changes)
    assert params.changes() == {"convert": {"source": None}, "gate": {"max_size_mb": None}}


def test_an_empty_change_of_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
        checked(RetrainParams, overrides=parse_changes(["fit.epoch="]))


def test_the_registered_model_is_named_after_the_dataset() -> None:
    trees: dict[str, Any] = {"dataset": {"name": "trees", "dir": "data/trees"}}
    assert parse_params(trees).registry.name == "trees"
    assert parse_params({**trees, "registry": None}).registry.name == "trees"
    assert parse_params({**trees, "registry": {"name": "oaks"}}).registry.name == "oaks"
    assert parse_params({}).registry.name == "demo"
    assert load_params(ROOT / "params.yaml").registry.name == "rfdetr-demo"
