"""Loading into a network: fitting, the report, and refusals that name the right configuration."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rfdetr import config as configs
from rfdetr.checkpoints.adapt import resize_rows, slice_query_groups
from rfdetr.checkpoints.legacy_names import from_legacy, to_legacy
from rfdetr.checkpoints.pretrained import initialise_weights, load_pretrained, load_record
from rfdetr.checkpoints.record import parse_checkpoint
from rfdetr.checkpoints.safe_io import save_file
from rfdetr.config import ModelConfig, RFDETRNanoConfig, RFDETRSegNanoConfig
from rfdetr.errors import CheckpointError
from rfdetr.model.network import RFDETRNetwork, build_network

PARITY = Path(__file__).parents[2] / "parity"
CASES = json.loads((PARITY / "adapt.json").read_text())
SMALL = {
    "encoder_dim": 32, "encoder_depth": 2, "encoder_heads": 2, "out_feature_indexes": [1, 2],
    "resolution": 64, "hidden_dim": 32, "dec_layers": 1, "dim_feedforward": 16, "num_queries": 4,
    "num_select": 4, "group_detr": 2, "pretrain_weights": None,
}  # fmt: skip


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PARITY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fill, compare = _module("fill"), _module("compare")


def small(**changes: Any) -> ModelConfig:
    return RFDETRNanoConfig(**{**SMALL, **changes})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    network = build_network(small(num_classes=5))
    path = tmp_path / "five.pth"
    save_file({"model": to_legacy(network.state_dict())}, path)
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_parity_of_fitted_weights(case: dict[str, Any]) -> None:
    manifest = fill.load_manifest(PARITY / f"{case['checkpoint']}.manifest.json")
    content = {"model": fill.state_dict(manifest)}
    if case["args"]:
        content["args"] = case["args"]
    config = getattr(configs, case["config_class"])(pretrain_weights=None, **case["config"])
    network = build_network(config)
    report = load_record(network, config, parse_checkpoint(content, "fixture.pth"))
    assert (report.missing, report.unexpected) == ((), ())
    assert list(report.class_names or ()) == case["class_names"]
    assert config.num_classes == case["num_classes_after"]
    assert config.positional_encoding_size == case["positional_encoding_size"]
    state = to_legacy(network.state_dict())
    actual: dict[str, Any] = {f"state/{name}": value for name, value in state.items()}
    if case["run"]:
        with torch.no_grad():
            out = network.eval()(torch.stack(fill.images(**case["images"])))
        actual |= {"pred_logits": out["pred_logits"], "pred_boxes": out["pred_boxes"]}
        actual["enc/pred_logits"] = out["enc_outputs"]["pred_logits"]
    assert compare.compare(actual, PARITY / "adapt.expected.npz", case["name"], strict=True)


def test_unit_vectors_of_head_and_query_rows() -> None:
    import numpy as np

    units = {k: torch.from_numpy(v) for k, v in np.load(PARITY / "units.expected.npz").items()}
    for rows in (2, 7, 9):
        for part in ("weight", "bias"):
            expected = units[f"class_head/out/{rows}/{part}"]
            assert torch.equal(resize_rows(units[f"class_head/in/{part}"], rows), expected)
    for queries, groups in ((3, 2), (3, 1), (5, 1)):
        actual = slice_query_groups(units["query_groups/in"], queries, groups, 5)
        assert torch.equal(actual, units[f"query_groups/out/{queries}x{groups}"])


@pytest.mark.parametrize("name", ["tiny-reg", "tiny-seg", "tiny-ms"])
def test_a_written_file_has_the_keys_shapes_and_order_of_the_manifest(name: str) -> None:
    manifest = fill.load_manifest(PARITY / f"{name}.manifest.json")
    overrides = {"pretrain_weights": None, **manifest["config_overrides"]}
    network = build_network(getattr(configs, manifest["config_class"])(**overrides))
    written = to_legacy(network.state_dict())
    assert [(n, list(v.shape)) for n, v in written.items()] == [
        (p["name"], p["shape"]) for p in manifest["params"]
    ]


def test_the_class_count_of_the_file_is_adopted_unless_the_user_set_one(file: Path) -> None:
    config = small()
    network = build_network(config)
    report = load_pretrained(network, config, file)
    assert (config.num_classes, len(network.class_embed.bias), report.num_classes) == (5, 6, 5)
    assert "num_classes" not in config.model_fields_set
    chosen = small(num_classes=9)
    wider = build_network(chosen)
    report = load_pretrained(wider, chosen, file)
    assert len(wider.class_embed.bias) == 10
    assert torch.equal(wider.class_embed.weight[6:], network.class_embed.weight[:4])
    assert report.adapted == ("class head from 6 to 10 rows",)


def test_missing_and_unexpected_tensors_are_named(file: Path) -> None:
    config = small(num_classes=5)
    network = build_network(config)
    state = to_legacy(network.state_dict())
    del state["bbox_embed.layers.1.bias"]
    state["something.else"] = torch.ones(1)
    with pytest.warns(UserWarning, match=r"bbox_embed\.layers\.1\.bias.*something\.else"):
        report = load_record(network, config, parse_checkpoint({"model": state}, "x.pth"))
    assert report.missing == ("bbox_embed.layers.1.bias",)
    assert report.unexpected == ("something.else",)
    assert report.loaded == len(from_legacy(state)) - 1


def test_surplus_groups_are_left_out_without_a_warning(file: Path) -> None:
    config = small(num_classes=5, group_detr=1, num_queries=3, num_select=3)
    network = build_network(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_pretrained(network, config, file)
    assert any("surplus query groups" in text for text in report.adapted)
    assert network.refpoint_embed.weight.shape == (3, 4)


def test_query_slices_follow_the_settings_of_the_file(file: Path) -> None:
    config = small(num_classes=5, group_detr=2, num_queries=3, num_select=3)
    network = build_network(small(num_classes=5))
    table = torch.arange(32.0).reshape(8, 4)
    state = to_legacy(network.state_dict()) | {"refpoint_embed.weight": table}
    expected = {None: [0, 1, 2, 3, 4, 5], "num_queries": [0, 1, 2, 4, 5, 6]}
    expected["group_detr"] = expected["num_queries"]
    for key, rows in expected.items():
        args = {} if key is None else {key: {"num_queries": 4, "group_detr": 2}[key]}
        other = build_network(config)
        load_record(other, config, parse_checkpoint({"model": state, "args": args}, "x.pth"))
        assert torch.equal(other.refpoint_embed.weight, table[rows])


@pytest.mark.parametrize("change", [{"num_queries": 5, "num_select": 5}, {"group_detr": 3}])
@pytest.mark.parametrize("args", [{}, {"num_queries": 4, "group_detr": 2}])
def test_more_queries_than_the_file_has_is_an_error(
    file: Path, change: dict[str, int], args: dict[str, int]
) -> None:
    config = small(num_classes=5, **change)
    state = to_legacy(build_network(small(num_classes=5)).state_dict())
    with pytest.raises(CheckpointError, match="Lower num_queries or group_detr"):
        load_record(
            build_network(config), config, parse_checkpoint({"model": state, "args": args}, "x")
        )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"patch_size": 8}, "patch_size is 16 in the file, 8 in the configuration"),
        ({"hidden_dim": 64}, "hidden_dim is 32 in the file, 64"),
        ({"dec_layers": 2}, "dec_layers is 1 in the file, 2"),
        ({"segmentation_head": True}, "segmentation_head is False in the file, True"),
        ({"projector_scale": ["P3"]}, "projector_scale"),
        ({"encoder_depth": 3}, "encoder blocks is 2 in the file, 3"),
        ({"dim_feedforward": 32}, "dim_feedforward is 16 in the file, 32"),
        ({"out_feature_indexes": [2]}, "out_feature_indexes"),
    ],
)
def test_a_structure_that_does_not_fit_is_an_error(
    file: Path, change: dict[str, Any], text: str
) -> None:
    config = small(num_classes=5, **change)
    network = build_network(config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"five\.pth.*{text}"):
        load_pretrained(network, config, file)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_fitting_configuration_is_named() -> None:
    weights = build_network(RFDETRSegNanoConfig(pretrain_weights=None)).state_dict()
    content = {"model": to_legacy(weights)}
    config = small()
    with pytest.raises(CheckpointError, match=r"The file fits RFDETRSegNanoConfig\."):
        load_record(build_network(config), config, parse_checkpoint(content, "seg.pt"))


def test_settings_of_the_file_count_where_tensors_do_not_tell() -> None:
    config = small(num_classes=5)
    network = build_network(config)
    state = to_legacy(network.state_dict())
    for model in ({"class_embed.bias": torch.ones(3)}, state):
        content = {"model": model, "args": {"patch_size": 14}}
        with pytest.raises(CheckpointError, match="patch_size is 14"):
            load_record(network, config, parse_checkpoint(content, "x.pth"))
    content = {"model": state, "args": argparse.Namespace(segmentation_head=True)}
    with pytest.raises(CheckpointError, match="segmentation_head is True"):
        load_record(network, config, parse_checkpoint(content, "x.pth"))


def test_nothing_in_common_is_an_error() -> None:
    config = small()
    content = {"model": {"conv1.weight": torch.ones(3)}}
    with pytest.raises(CheckpointError, match="None of the 1 tensors"):
        load_record(build_network(config), config, parse_checkpoint(content, "resnet.pth"))


def test_a_file_without_adapters_fits_a_model_with_them(file: Path) -> None:
    config = small(num_classes=5, backbone_lora=True)
    network = build_network(config)
    report = load_pretrained(network, config, file)
    assert (report.missing, report.unexpected) == ((), ())


def test_settings_that_no_tensor_shows_are_reported() -> None:
    network = build_network(small())
    content = {"model": to_legacy(network.state_dict()), "args": {"num_windows": 1}}
    with pytest.warns(UserWarning, match=r"num_windows=1 \(the configuration has 2\)"):
        load_record(network, small(), parse_checkpoint(content, "one.pth"))
    content["args"] = {"num_windows": 2, "out_feature_indexes": [1, 2]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_record(network, small(), parse_checkpoint(content, "two.pth"))


def test_weights_without_adapters_replace_trained_adapters(file: Path) -> None:
    network = build_network(small(num_classes=5, backbone_lora=True)).eval()
    plain = build_network(small(num_classes=5)).eval()
    for name, tensor in network.state_dict().items():
        if name.endswith(("lora_b", "magnitude")):
            tensor.add_(0.5)
    load_pretrained(network, small(num_classes=5), file)
    load_pretrained(plain, small(num_classes=5), file)
    images = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        difference = network(images)["pred_logits"] - plain(images)["pred_logits"]
    assert difference.abs().max() < 1e-4


def test_initialise_without_weights_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = small()
    with caplog.at_level(logging.WARNING):
        assert initialise_weights(build_network(config), config) is None
    assert "random weights" in caplog.text


def test_initialise_from_a_file(file: Path) -> None:
    config = small(pretrain_weights=str(file))
    network: RFDETRNetwork = build_network(config)
    report = initialise_weights(network, config)
    assert report is not None
    assert report.loaded == len(network.state_dict())


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    config = small(pretrain_weights=str(tmp_path / "rf-detr-nano.pht"))
    with pytest.raises(FileNotFoundError, match=r"Did you mean rf-detr-nano\.pth"):
        initialise_weights(build_network(config), config)


def test_a_damaged_file_of_the_user_is_neither_replaced_nor_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "rf-detr-nano.pth"
    own.write_bytes(b"broken")
    config = small(pretrain_weights="rf-detr-nano.pth")
    with pytest.raises(CheckpointError, match=r"rf-detr-nano\.pth is truncated or corrupt"):
        initialise_weights(build_network(config), config)
    assert own.read_bytes() == b"broken"
