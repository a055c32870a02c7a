"""The parameters that `init` writes: valid, with defaults for the variant and the dataset."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from flows.config.params import parse_params
from flows.config.starter import DatasetFacts, choose, published_weights, starter_text
from rfdetr.config import MODEL_CONFIGS, Hyperparameters


def facts(**changes: Any) -> DatasetFacts:
    usual = {
        "name": "trees",
        "dir": "data/trees",
        "layout": "coco",
        "class_names": ["oak"],
        "images": {"train": 1000, "val": 100, "test": 70},
        "objects": {"train": 5000, "val": 500, "test": 350},
        "masks": 0.0,
    }
    return DatasetFacts.model_validate({**usual, **changes})


@pytest.mark.parametrize("variant", MODEL_CONFIGS)
def test_every_variant_has_valid_parameters_and_its_own_weights(variant: str) -> None:
    text = starter_text(facts(), choose(facts(), variant, published_weights(variant)), {})
    params = parse_params(yaml.safe_load(text))
    assert params.model.variant == variant
    assert params.convert.source == MODEL_CONFIGS[variant].model_fields["pretrain_weights"].default
    assert params.registry.name == "trees"
    kept = ("lr", "lr_encoder", "lr_vit_layer_decay", "lr_component_decay", "multi_scale")
    assert all(getattr(params.fit, name) == getattr(Hyperparameters(), name) for name in kept)
    assert params.fit.use_ema and params.fit.early_stopping
    assert params.model.config() == MODEL_CONFIGS[variant](pretrain_weights=None)
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("train", "epochs", "batch"),
    [(10, 100, 4), (1000, 100, 16), (10_000, 32, 16), (118_287, 12, 16)],
)
def test_epochs_and_batch_follow_the_number_of_images(train: int, epochs: int, batch: int) -> None:
    found = choose(facts(images={"train": train, "val": 50}), "medium", None)
    assert (found.epochs, found.effective_batch_size) == (epochs, batch)


def test_the_gate_follows_the_test_split() -> None:
    small = facts(images={"train": 12, "val": 5, "test": 7})
    none = facts(images={"train": 900, "val": 120})
    for data, split, images, least in ((facts(), "test", 50, 20), (small, "test", 7, 12),
                                       (none, "valid", 50, 20)):  # fmt: skip
        params = parse_params(yaml.safe_load(starter_text(data, choose(data, "nano", None), {})))
        assert (params.evaluate.split, params.gate.min_images) == (split, images)
        assert params.validate.min_images == least
        assert params.convert.source is None


def test_values_cannot_break_out_of_their_place() -> None:
    odd = facts(dir='data/a: {b}, #"c', name="on")
    runtime = {"devices": 2, "rendezvous": "host: 1"}
    text = starter_text(odd, choose(odd, "nano", 'x", # y'), {"runtime": runtime})
    data = yaml.safe_load(text)
    assert data["dataset"] == {"name": "on", "dir": 'data/a: {b}, #"c', "layout": "coco"}
    assert data["convert"] == {"source": 'x", # y'}
    assert data["runtime"] == runtime
