"""Configuration: every variant, refused fields, derived fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import create_model

from rfdetr import config as configs
from rfdetr.config import (
    MODEL_CONFIGS,
    RFDETRNanoConfig,
    SegmentationTrainConfig,
    TrainConfig,
    optional_fields,
)

# variant -> (resolution, patch, windows, position side, decoder layers, width, queries, file)
TABLE = {
    "nano": (384, 16, 2, 24, 2, 256, 300, "rf-detr-nano.pth"),
    "small": (512, 16, 2, 32, 3, 256, 300, "rf-detr-small.pth"),
    "medium": (576, 16, 2, 36, 4, 256, 300, "rf-detr-medium.pth"),
    "base": (560, 14, 4, 37, 3, 256, 300, "rf-detr-base.pth"),
    "large": (704, 16, 2, 44, 4, 256, 300, "rf-detr-large-2026.pth"),
    "large-deprecated": (560, 14, 4, 37, 3, 384, 300, "rf-detr-large.pth"),
    "seg-preview": (432, 12, 2, 36, 4, 256, 200, "rf-detr-seg-preview.pt"),
    "seg-nano": (312, 12, 1, 26, 4, 256, 100, "rf-detr-seg-nano.pt"),
    "seg-small": (384, 12, 2, 32, 4, 256, 100, "rf-detr-seg-small.pt"),
    "seg-medium": (432, 12, 2, 36, 5, 256, 200, "rf-detr-seg-medium.pt"),
    "seg-large": (504, 12, 2, 42, 5, 256, 200, "rf-detr-seg-large.pt"),
    "seg-xlarge": (624, 12, 2, 52, 6, 256, 300, "rf-detr-seg-xlarge.pt"),
    "seg-2xlarge": (768, 12, 2, 64, 6, 256, 300, "rf-detr-seg-xxlarge.pt"),
}


@pytest.mark.parametrize("variant", sorted(TABLE))
def test_variant_has_its_published_numbers(variant: str) -> None:
    c = MODEL_CONFIGS[variant]()
    assert (
        c.resolution,
        c.patch_size,
        c.num_windows,
        c.positional_encoding_size,
        c.dec_layers,
        c.hidden_dim,
        c.num_queries,
        c.pretrain_weights,
    ) == TABLE[variant]
    assert c.segmentation_head == variant.startswith("seg-")
    assert c.num_select == c.num_queries
    assert (c.num_classes, c.group_detr, c.amp) == (90, 13, True)


def test_every_variant_is_in_the_table() -> None:
    assert set(MODEL_CONFIGS) == set(TABLE)


@pytest.mark.parametrize(("variant", "resolution", "side"), [("nano", 128, 8), ("base", 448, 37)])
def test_position_table_follows_resolution_except_for_the_native_grid(
    variant: str, resolution: int, side: int
) -> None:
    assert MODEL_CONFIGS[variant](resolution=resolution).positional_encoding_size == side
    assert (
        MODEL_CONFIGS[variant](
            resolution=resolution, positional_encoding_size=5
        ).positional_encoding_size
        == 5
    )


def test_parity_manifests_build_their_configurations(parity: Path) -> None:
    for file in sorted(parity.glob("*.manifest.json")):
        manifest = json.loads(file.read_text())
        getattr(configs, manifest["config_class"])(**manifest["config_overrides"])


def test_unknown_field_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'epoch' \(did you mean 'epochs'\?\)"):
        TrainConfig(dataset_dir="x", epoch=3)
    with pytest.raises(ValueError, match=r"resolution is a setting of the model: RFDETRNano\("):
        TrainConfig(dataset_dir="x", resolution=64)
    with pytest.raises(ValueError, match=r"Pass precision= to build_trainer.*num_classes is a set"):
        TrainConfig(dataset_dir="x", precision=16, num_classes=3)
    with pytest.raises(ValueError, match="epochs is a setting of the training"):
        RFDETRNanoConfig(epochs=3)
    with pytest.raises(ValueError, match="did you mean 'resolution'"):
        RFDETRNanoConfig(resolutoin=384)


def test_strategy_is_not_a_field_at_construction_or_assignment() -> None:
    with pytest.raises(ValueError, match="build_trainer"):
        TrainConfig(dataset_dir="x", strategy="ddp")
    config = TrainConfig(dataset_dir="x")
    with pytest.raises(ValueError, match="strategy"):
        config.strategy = "ddp"


def test_assignment_is_validated_and_a_bad_value_changes_nothing() -> None:
    config = RFDETRNanoConfig()
    with pytest.raises(ValueError, match="use 384 or 416"):
        config.resolution = 400
    assert config.resolution == 384
    config.num_classes = 3
    assert config.num_classes == 3


def test_changed_structure_asks_for_no_published_weights() -> None:
    assert RFDETRNanoConfig(num_classes=4).pretrain_weights == "rf-detr-nano.pth"
    assert RFDETRNanoConfig(hidden_dim=128).pretrain_weights is None
    assert RFDETRNanoConfig(num_queries=301).pretrain_weights is None
    assert (
        RFDETRNanoConfig(hidden_dim=128, pretrain_weights=Path("a.pth")).pretrain_weights == "a.pth"
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"out_feature_indexes": [3, 6, 9, 13]},
        {"out_feature_indexes": [6, 3]},
        {"projector_scale": ["P5", "P3"]},
        {"hidden_dim": 100},
        {"encoder_dim": 200},
        {"num_queries": "many"},
    ],
)
def test_inconsistent_model_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="RFDETRNanoConfig"):
        RFDETRNanoConfig(**bad)


def test_paths_are_absolute_and_text() -> None:
    config = TrainConfig(dataset_dir=Path("~/set"), output_dir="out", resume=Path("a.ckpt"))
    assert config.dataset_dir == str(Path.home() / "set")
    assert config.output_dir == str(Path.cwd() / "out")
    assert config.resume == "a.ckpt"


@pytest.mark.parametrize(
    ("given", "kept"), [(True, "tqdm"), (False, None), ("rich", "rich"), (None, None)]
)
def test_progress_bar_takes_flags_and_names(given: object, kept: str | None) -> None:
    assert TrainConfig(dataset_dir="x", progress_bar=given).progress_bar == kept


def test_defaults_of_the_reference_table(parity: Path) -> None:
    table = json.loads((parity / "training" / "config_fields.json").read_text())
    ours = TrainConfig(dataset_dir="x").model_dump()
    settled = {"grad_accum_steps": 4, "dataset_dir": ours["dataset_dir"]}
    settled["output_dir"] = str(Path.cwd() / "output")
    settled["num_workers"] = "auto"
    checked = 0
    for name, value in ours.items():
        fact = table["classes"]["TrainConfig"].get(name, {}).get("1.6.0")
        if isinstance(fact, dict):
            assert value == settled.get(name, fact["default"]), name
            checked += 1
    assert checked > 50
    seg = SegmentationTrainConfig(dataset_dir="x")
    assert (seg.cls_loss_coef, seg.mask_ce_loss_coef, seg.mask_dice_loss_coef) == (1.0, 5.0, 5.0)
    assert seg.mask_point_sample_ratio == 16
    assert seg.segmentation_head


def test_a_class_count_from_a_file_is_not_a_choice_of_the_user() -> None:
    config = RFDETRNanoConfig()
    assert not config.num_classes_is_explicit
    config.infer_num_classes(5)
    assert (config.num_classes, config.num_classes_is_explicit) == (5, False)
    config.num_classes = 4
    assert config.num_classes_is_explicit
    assert config.model_copy().num_classes_is_explicit


def test_optional_fields_keep_types_and_constraints() -> None:
    fields = optional_fields(RFDETRNanoConfig, "resolution", "projector_scale", "amp")
    settings = create_model("Settings", **fields)
    assert settings().model_dump() == {"resolution": None, "projector_scale": None, "amp": None}
    assert settings(projector_scale=["P3"]).model_dump(exclude_none=True) == {
        "projector_scale": ["P3"]
    }
    for bad in ({"resolution": 0}, {"projector_scale": []}, {"projector_scale": ["P9"]}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            settings(**bad)
