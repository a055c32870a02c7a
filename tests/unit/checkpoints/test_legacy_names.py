"""The key map: legacy -> ours -> legacy is bit-equal, in the order of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rfdetr.checkpoints.legacy_names import (
    from_legacy,
    legacy_name,
    legacy_names,
    our_name,
    to_legacy,
)

MANIFESTS = sorted((Path(__file__).parents[2] / "parity").glob("*.manifest.json"))
ENCODER = "backbone.0.encoder.encoder."


def _state(manifest: Path) -> dict[str, torch.Tensor]:
    params = json.loads(manifest.read_text())["params"]
    generator = torch.Generator().manual_seed(0)
    return {p["name"]: torch.rand(p["shape"], generator=generator) for p in params}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda p: p.name.split(".")[0])
def test_round_trip_is_bit_equal_and_keeps_the_order(manifest: Path) -> None:
    legacy = _state(manifest)
    ours = from_legacy(legacy)
    back = to_legacy(ours)
    assert list(back) == list(legacy)
    assert all(torch.equal(back[name], legacy[name]) for name in legacy)
    assert not any(name.startswith(ENCODER) for name in ours)
    assert len(ours) == len(legacy) - 4 * sum(".query.weight" in name for name in legacy)


def test_every_manifest_was_found() -> None:
    assert len(MANIFESTS) == 10


def test_partial_dictionaries_map_tensor_by_tensor() -> None:
    legacy = _state(MANIFESTS[0])
    for name, value in legacy.items():
        if "attention.attention" in name:
            continue
        assert list(to_legacy(from_legacy({name: value}))) == [name]


def test_an_incomplete_qkv_triple_keeps_its_names() -> None:
    prefix = ENCODER + "encoder.layer.3.attention.attention."
    part = {prefix + "query.weight": torch.ones(2, 2), prefix + "value.weight": torch.ones(2, 2)}
    assert list(from_legacy(part)) == list(part)


def test_qkv_rows_are_query_key_value() -> None:
    prefix = ENCODER + "encoder.layer.0.attention.attention."
    parts = {
        f"{prefix}{n}.bias": torch.full((2,), i) for i, n in enumerate(("query", "key", "value"))
    }
    assert from_legacy(dict(reversed(parts.items())))[
        "backbone.0.encoder.blocks.0.attn.qkv.bias"
    ].tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


def test_the_mask_token_buffer_returns_to_its_place() -> None:
    names = ("cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight")
    ours = {"backbone.0.encoder." + name: torch.ones(1) for name in names}
    tails = [name.rsplit(".", 1)[-1] for name in to_legacy(ours)]
    assert tails == ["cls_token", "mask_token", "position_embeddings", "weight"]


def test_from_legacy_leaves_our_own_names() -> None:
    ours = from_legacy(_state(MANIFESTS[0]))
    again = from_legacy(ours)
    assert list(again) == list(ours)


def test_names() -> None:
    fused = "backbone.0.encoder.blocks.11.attn.qkv.weight"
    assert len(legacy_names(fused)) == 3
    assert legacy_name(fused).endswith("encoder.layer.11.attention.attention.query.weight")
    assert all(our_name(name) == fused for name in legacy_names(fused))
    assert legacy_name("class_embed.bias") == our_name("class_embed.bias") == "class_embed.bias"
    assert our_name(ENCODER + "something.new") == ENCODER + "something.new"
