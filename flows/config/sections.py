"""The sections of params.yaml, one model each; `flows.config.params` reads the file.

What changes a result stands in the section of the stage that uses it; `runtime` holds what does
not (devices, workers, time limits) and is therefore no DVC parameter.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from flows.core.digest import digest_of
from rfdetr.checks.options import CheckConfig
from rfdetr.config import MODEL_CONFIGS, Level, ModelConfig, StrictConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Variant = Annotated[str, Field(min_length=1)]

SOURCE_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"  # of a folder of data/; DVC splits names at dots

EVALUATOR_VERSION = 1  # counts up when the same weights would get other numbers


def _devices(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and value != "auto"):
        raise ValueError("must be 'auto' or a number of devices, 1 or more")
    return value


def _takes(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_takes(part, kind) for part in get_args(annotation))


class NumberChecks(BaseModel):
    """A number is finite, and no yes or true: they would pass as 1."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        number = _takes(annotation, int) or _takes(annotation, float)
        given = value if isinstance(value, list) else [value]
        if number and any(isinstance(item, bool) for item in given):
            raise ValueError("must be a number, not true or false")
        return value


class Section(StrictConfig, NumberChecks):
    """A section of params.yaml: its fields and no other."""


class DemoSettings(Section):
    """The built-in dataset of digits on photos: number of images, classes, seed."""

    train: int = Field(1500, ge=1)
    valid: int = Field(200, ge=1)
    test: int = Field(200, ge=1)
    classes: list[int] = Field([0, 1, 4], min_length=1)
    seed: int = Field(0, ge=0)


class SourceSettings(Section):
    """An address that `data/<key>` is fetched from: an s3:// prefix, plain or packed."""

    uri: str = Field(pattern=r"^s3://[^/]+/.+")
    version: str | None = None  # a new value fetches again; a run writes what S3 lists then


class DatasetSettings(Section):
    """The dataset that is checked, trained on and tested with."""

    name: Name = "demo"
    dir: str = Field("data/demo", min_length=1)
    layout: Literal["roboflow", "coco", "yolo"] = "roboflow"

    @field_validator("dir")
    @classmethod
    def _without_last_slash(cls, value: str) -> str:
        return value.rstrip("/") or value  # DVC's pointer file stands beside the folder


class ModelSettings(Section):
    """The network: a variant, and any field of its configuration that shall differ."""

    variant: Variant = "nano"
    resolution: int | None = Field(None, ge=1)
    encoder_dim: int | None = Field(None, ge=8)
    encoder_depth: int | None = Field(None, ge=1)
    encoder_heads: int | None = Field(None, ge=1)
    out_feature_indexes: list[int] | None = None
    patch_size: int | None = Field(None, ge=1)
    num_windows: int | None = Field(None, ge=1)
    positional_encoding_size: int | None = Field(None, ge=1)
    projector_scale: list[Level] | None = None
    hidden_dim: int | None = Field(None, ge=4)
    dec_layers: int | None = Field(None, ge=1)
    sa_nheads: int | None = Field(None, ge=1)
    ca_nheads: int | None = Field(None, ge=1)
    dec_n_points: int | None = Field(None, ge=1)
    dim_feedforward: int | None = Field(None, ge=1)
    num_queries: int | None = Field(None, ge=1)
    num_select: int | None = Field(None, ge=1)
    group_detr: int | None = Field(None, ge=1)
    freeze_encoder: bool | None = None
    backbone_lora: bool | None = None
    gradient_checkpointing: bool | None = None

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, value: str) -> str:
        if value not in MODEL_CONFIGS:
            raise ValueError(f"must be one of {', '.join(MODEL_CONFIGS)}")
        return value

    def config(self, **more: Any) -> ModelConfig:
        """The model configuration, with `more` fields on top; never asks for a download."""
        given = self.model_dump(exclude={"variant"}, exclude_none=True)
        return MODEL_CONFIGS[self.variant](**{"pretrain_weights": None, **given, **more})


class ValidateSettings(CheckConfig, NumberChecks):
    """Which findings stop the pipeline before a GPU is used: the checks' options and two more."""

    min_images: int = Field(20, ge=1)  # in the train split
    max_bad_fraction: float = Field(0.0, ge=0, le=1)  # images with an error


class ConvertSettings(Section):
    """The starting weights: a file, an s3:// address, a published name, or null for none."""

    source: str | None = Field("weights/start.pth", min_length=1)
    seed: int = 42  # of the initial weights when there is no source
    tolerance: float = Field(1e-4, ge=0)  # largest accepted difference between old and converted


class FitSettings(Section):
    """Training. Names and defaults are those of `rfdetr.config.TrainConfig`.

    With `effective_batch_size` the number of images per optimizer step stays the same on any
    number of devices: `batch_size` is then the largest micro-batch, and accumulation follows.
    """

    epochs: int = Field(100, ge=1)
    effective_batch_size: int | None = Field(None, ge=1)
    batch_size: int = Field(4, ge=1)
    grad_accum_steps: int | None = Field(None, ge=1)
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed"] = "auto"
    seed: int = Field(42, ge=0, le=2**32 - 1)
    lr: float = Field(1e-4, ge=0)
    lr_encoder: float = Field(1.5e-4, ge=0)
    lr_vit_layer_decay: float = Field(0.8, gt=0)
    lr_component_decay: float = Field(0.7, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    lr_scheduler: Literal["step", "cosine"] = "step"
    lr_drop: int = Field(100, ge=1)
    lr_min_factor: float = Field(0.0, ge=0, le=1)
    warmup_epochs: float = Field(0.0, ge=0)
    clip_max_norm: float = Field(0.1, ge=0)
    use_ema: bool = True
    ema_decay: float = Field(0.993, ge=0, lt=1)
    ema_tau: int = Field(100, ge=0)
    ema_update_interval: int = Field(1, ge=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    multi_scale: bool = True
    expanded_scales: bool = True
    square_resize_div_64: bool = True
    aug_config: dict[str, Any] | None = None
    early_stopping: bool = False
    early_stopping_patience: int = Field(10, ge=1)
    early_stopping_min_delta: float = Field(0.001, ge=0)
    early_stopping_use_ema: bool = False
    eval_interval: int = Field(1, ge=1)
    eval_max_dets: int = Field(500, ge=1)
    compute_val_loss: bool = True
    fp16_eval: bool = False
    checkpoint_interval: int = Field(10, ge=1)
    sync_bn: bool = False
    cls_loss_coef: float = Field(1.0, ge=0)

    def train_fields(self) -> dict[str, Any]:
        """The fields that go into a TrainConfig as they are (the batch is planned apart)."""
        apart = {"effective_batch_size", "batch_size", "grad_accum_steps", "precision"}
        return self.model_dump(exclude=apart)


class EvaluateSettings(Section):
    """How a model is scored; champion and challenger alike."""

    split: Literal["test", "valid"] = "test"
    batch_size: int = Field(8, ge=1)
    max_dets: int = Field(500, ge=1)
    score_threshold: float = Field(0.05, ge=0, lt=1)  # of detections that files keep
    pictures: int = Field(12, ge=0, le=100)

    def key(self) -> str:
        """What shapes the numbers: split, number of detections, version of the evaluator."""
        return digest_of([self.split, self.max_dets, EVALUATOR_VERSION])[:16]


class GateSettings(Section):
    """When a challenger replaces the champion."""

    metric: Literal["map_50_95", "map_50", "map_75", "f1"] = "map_50_95"
    floor: float = Field(0.0, ge=0, le=1)  # least value of the metric for a first champion
    min_delta: float = Field(0.0, ge=-1, le=1)
    max_class_drop: float = Field(0.05, ge=0, le=1)
    class_min_boxes: int = Field(20, ge=1)
    min_images: int = Field(50, ge=1)
    allow_class_change: bool = False
    bootstrap: int = Field(0, ge=0)  # resamplings; 0 = no interval
    tolerance: float | None = Field(None, ge=0)  # interval's lower end must be above -tolerance
    max_latency_ms: float | None = Field(None, gt=0)
    max_size_mb: float | None = Field(None, gt=0)
    require_export_parity: bool = True
    manual_approval: bool = False


class RegistrySettings(Section):
    """The registered model of this detector line."""

    name: Name = "rfdetr-demo"


class RuntimeSettings(Section):
    """The machine. Nothing here changes a result, so DVC does not track it."""

    devices: Annotated[int | Literal["auto"], BeforeValidator(_devices)] = "auto"
    nodes: int = Field(1, ge=1)
    rendezvous: str | None = None  # host:port of the first node, with nodes > 1
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    num_workers: int = Field(2, ge=0)
    gpu_slot: Name = "gpu"
    timeout_s: float | None = Field(None, gt=0)  # of the whole training
    stage_timeout_s: float = Field(21600, gt=0)  # of any other stage, push or step of the release
    silence_timeout_s: float = Field(1800, gt=0)  # no line and no checkpoint: a hang
    price_per_hour: float | None = Field(None, ge=0)  # of one device, for the cost on record
    grace_s: float = Field(60, gt=0)  # from the request to stop to the kill

    @field_validator("devices")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be 'auto' or a number of devices, 1 or more")
        return value
