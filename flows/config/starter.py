"""The params.yaml that `rfdetr-pipeline init` writes: defaults for a dataset and a variant."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from flows.config.sections import GateSettings, ModelSettings
from rfdetr.config import MODEL_CONFIGS, Hyperparameters

STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 20_000, 12, 100
BATCH, SMALL_SET, SMALL_BATCH = 16, 64, 4
LARGE_PIXELS = 600  # sides above this train with half of the micro-batch


class DatasetFacts(BaseModel, frozen=True):
    """What the parameters depend on; `images` are by split, `masks` is the share with outlines."""

    name: str
    dir: str
    layout: str
    class_names: list[str]
    images: dict[str, int]
    objects: dict[str, int]
    masks: float

    @property
    def classes(self) -> str:
        """How many there are, in words."""
        count = len(self.class_names)
        return f"{count} class{'' if count == 1 else 'es'}"

    @property
    def test_split(self) -> str:
        """The split that models are scored on: `valid` if there are no test images."""
        return "test" if self.images.get("test") else "valid"

    @property
    def test_images(self) -> int:
        return self.images.get("test") or self.images.get("val", 0)


class Choices(BaseModel, frozen=True):
    """The values that depend on the dataset or the variant; everything else is a default."""

    variant: str
    source: str | None
    resolution: int
    epochs: int
    steps_per_epoch: int
    effective_batch_size: int
    batch_size: int
    gate_images: int
    min_images: int


def published_weights(variant: str) -> str:
    """The published weights of a variant, by name."""
    return str(MODEL_CONFIGS[variant].model_fields["pretrain_weights"].default)


def choose(facts: DatasetFacts, variant: str, source: str | None) -> Choices:
    """The values for this dataset and variant."""
    train = facts.images.get("train", 0)
    effective = SMALL_BATCH if train < SMALL_SET else BATCH
    steps = max(1, math.ceil(train / effective))
    resolution = ModelSettings.model_validate({"variant": variant}).config().resolution
    return Choices(
        variant=variant,
        source=source,
        resolution=resolution,
        epochs=min(MOST_EPOCHS, max(FEWEST_EPOCHS, STEPS // steps)),
        steps_per_epoch=steps,
        effective_batch_size=effective,
        batch_size=2 if resolution > LARGE_PIXELS else 4,
        gate_images=max(1, min(GateSettings.model_fields["min_images"].default, facts.test_images)),
        min_images=max(1, min(20, train)),
    )


def starter_text(facts: DatasetFacts, chosen: Choices, kept: Mapping[str, Any]) -> str:
    """The text of params.yaml. `kept` are the sections that are taken from the previous file."""
    usual = Hyperparameters.model_validate({})
    weights = {
        None: "from scratch; slower, and needs far more images",
        published_weights(chosen.variant): "published weights, downloaded once",
    }.get(chosen.source, "starting weights")
    decays = (usual.lr_vit_layer_decay, usual.lr_component_decay) if chosen.source else (1.0, 1.0)
    earlier = "earlier blocks of the backbone change less" if chosen.source else "all blocks learn"
    steps = f"of {chosen.steps_per_epoch} steps; {STEPS:,} steps, or {MOST_EPOCHS}"
    images = ", ".join(f"{split} {count}" for split, count in facts.images.items())
    return f"""\
# Written by `rfdetr-pipeline init` for {_flow(facts.dir)}: {facts.classes}, images: {images}.
# Fields that are left out have the defaults of docs/parameters.md; an unknown name is an error.

dataset: {_flow({"name": facts.name, "dir": facts.dir, "layout": facts.layout})}

model: {_flow({"variant": chosen.variant})} # {chosen.resolution} pixels; nano is the fastest

validate: {_flow({"min_images": chosen.min_images})} # fewer training images stop the pipeline

convert: {_flow({"source": chosen.source})} # {weights}

fit:
  epochs: {chosen.epochs} # {steps} epochs
  effective_batch_size: {chosen.effective_batch_size} # images per step, on any number of devices
  batch_size: {chosen.batch_size} # images at a time on one device; lower it if memory runs out
  lr: {usual.lr:g} # of the projector and the heads
  lr_encoder: {usual.lr_encoder:g} # of the backbone's last block
  lr_vit_layer_decay: {decays[0]:g} # {earlier}
  lr_component_decay: {decays[1]:g} # factor for the decoder
  multi_scale: true # sizes vary in training, which helps with objects of other sizes
  use_ema: true # EMA weights are evaluated too; the better ones are kept
  early_stopping: true # ends when the validation mAP stops rising
  early_stopping_patience: {usual.early_stopping_patience} # evaluated epochs without a gain
  seed: 42

evaluate: {_flow({"split": facts.test_split})} # {_why_split(facts)}

slices: {{}} # groups of test images with own numbers, as {{site: 'path:(?P<site>[^/]+)/'}}

gate:
  metric: map_50_95
  floor: 0.0 # least value of a first champion; raise it to what you can use
  min_images: {chosen.gate_images} # the split has {facts.test_images}; few images decide by chance

registry: {{}} # the registered model has the name of the dataset

runtime: {_flow(kept.get("runtime") or {"devices": "auto", "gpu_slot": "gpu"})} # of the machine

sources: {_flow(kept.get("sources") or {})} # data/<name> fetched from S3

demo: {_flow(kept.get("demo") or {})} # used only while dataset.dir is data/demo
"""


def _why_split(facts: DatasetFacts) -> str:
    if facts.test_split == "test":
        return "never used in training"
    return "there is no test split; early stopping has seen these images, so scores are optimistic"


def _flow(value: Any) -> str:
    """Plain data on one line of YAML: braces, names without quotes where YAML allows it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if (
        isinstance(value, str)
        and value.replace("/", "").replace("-", "").replace("_", "").isalpha()
    ):
        reserved = value.lower() in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
        return json.dumps(value) if reserved else value
    return json.dumps(value, ensure_ascii=False)
