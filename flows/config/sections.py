"""The sections of params.yaml, one model each; `flows.config.params` reads the file.

A setting that changes a result is in the section of the stage that uses it. `runtime` holds the
others (devices, workers, time limits), which DVC does not track.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
)

from flows.core.digest import digest_of
from rfdetr.checks.options import CheckConfig
from rfdetr.config import (
    MODEL_CONFIGS,
    Hyperparameters,
    ModelConfig,
    Positive,
    StrictConfig,
    Workers,
    optional_fields,
)
from rfdetr.errors import InputError
from rfdetr.evaluation.slice_rules import SliceRule
from rfdetr.evaluation.targets import parse_target

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Variant = Annotated[str, Field(min_length=1)]

SOURCE_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"  # a folder of data/; DVC splits names at dots
SLICE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"

EVALUATOR_VERSION = 2  # increased when the same weights would get other numbers


def _devices(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and value != "auto"):
        raise ValueError("must be 'auto' or a number of devices, 1 or more")
    return value


def _takes(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_takes(part, kind) for part in get_args(annotation))


class NumberChecks(BaseModel):
    """Numbers must be finite. Booleans are rejected: pydantic would accept true as 1."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        number = _takes(annotation, int) or _takes(annotation, float)
        given = value if isinstance(value, list) else [value]
        if number and any(isinstance(item, bool) for item in given):
            raise ValueError("must be a number, not true or false")
        return value


class Section(StrictConfig, NumberChecks):
    """A section of params.yaml."""


class DemoSettings(Section):
    """The built-in dataset of digits on photographs: number of images, classes, seed."""

    train: int = Field(1500, ge=1, description="Images of the training split")
    valid: int = Field(200, ge=1, description="Images of the validation split")
    test: int = Field(200, ge=1, description="Images of the test split")
    classes: list[int] = Field([0, 1, 4], min_length=1, description="Digits that are the classes")
    seed: int = Field(0, ge=0, description="Seed of the generator")


class SourceSettings(Section):
    """Where `data/<name>` is fetched from: an s3:// prefix of plain files or of a pack."""

    uri: str = Field(pattern=r"^s3://[^/]+/.+", description="The s3:// prefix, plain or packed")
    version: str | None = Field(None, description="Version to fetch; default: the newest")


class DatasetSettings(Section):
    """The dataset to check, train on and test with."""

    name: Name = Field("demo", description="Name of the dataset in reports and MLflow")
    dir: str = Field("data/demo", min_length=1, description="Folder of the dataset")
    layout: Literal["roboflow", "coco", "yolo"] = Field(
        "roboflow", description="A Roboflow export, plain COCO, or YOLO"
    )

    @field_validator("dir")
    @classmethod
    def _without_last_slash(cls, value: str) -> str:
        return value.rstrip("/") or value  # DVC's pointer file is beside the folder


# Fields that other sections decide, and where.
SET_ELSEWHERE = {
    "model.num_classes": "it follows from the dataset's classes",
    "model.pretrain_weights": "convert.source names the starting weights",
    "model.device": "runtime.accelerator chooses the device",
    "fit.num_workers": "use runtime.num_workers",
    "fit.devices": "use runtime.devices",
    "fit.num_nodes": "use runtime.nodes",
    "fit.accelerator": "use runtime.accelerator",
    "fit.dataset_dir": "use dataset.dir",
    "fit.dataset_file": "use dataset.layout",
    "gate.bootstrap": "the interval is always computed, and gate.evidence says how it decides",
}


class _VariantSettings(Section):
    variant: Variant = Field("nano", description="Size of the network; see Variants below")

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, value: str) -> str:
        if value not in MODEL_CONFIGS:
            raise ValueError(f"must be one of {', '.join(MODEL_CONFIGS)}")
        return value


_ModelFields = create_model(  # every field of ModelConfig that a project may choose
    "_ModelFields",
    __base__=_VariantSettings,
    **optional_fields(
        ModelConfig, *(n for n in ModelConfig.model_fields if f"model.{n}" not in SET_ELSEWHERE)
    ),
)


class ModelSettings(_ModelFields):  # type: ignore[valid-type,misc]
    """The network: a variant, and any field of its configuration that differs."""

    def config(self, **more: Any) -> ModelConfig:
        """The model configuration, with `more` fields on top. Never downloads weights."""
        given = self.model_dump(exclude={"variant"}, exclude_none=True)
        return MODEL_CONFIGS[self.variant](**{"pretrain_weights": None, **given, **more})


class ValidateSettings(CheckConfig, NumberChecks):
    """Which findings stop the pipeline before training: the options of the checks and two more."""

    min_images: int = Field(20, ge=1, description="Minimum number of training images")
    max_bad_fraction: float = Field(0.0, ge=0, le=1, description="Accepted share of bad images")


class ConvertSettings(Section):
    """The starting weights: a file, an s3:// address, a published name, or null for none."""

    source: str | None = Field(
        "weights/start.pth",
        min_length=1,
        description="File, s3:// address, published name, or null",
    )
    seed: int = Field(42, description="Seed of the initial weights")
    tolerance: float = Field(1e-4, ge=0, description="Accepted difference of the outputs")


class FitSettings(Section, Hyperparameters):
    """Training: the hyperparameters of `rfdetr.config`, and how the batch is composed.

    With `effective_batch_size`, the number of images per optimizer step is the same on any number
    of devices: `batch_size` is then the largest micro-batch, and accumulation follows from it.
    """

    effective_batch_size: Positive | None = Field(None, description="Images per optimizer step")
    grad_accum_steps: Positive | None = Field(None, description="Batches per optimizer step")
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed"] = Field(
        "auto", description="Floating-point precision of the training"
    )
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of all generators")

    def train_fields(self) -> dict[str, Any]:
        """The fields that go into a TrainConfig unchanged; `plan_batch` decides about the batch."""
        return self.model_dump(include={"seed", *Hyperparameters.model_fields} - {"batch_size"})


class EvaluateSettings(Section):
    """How models are scored, champion and challenger alike."""

    split: Literal["test", "valid"] = Field("test", description="Split that models are scored on")
    batch_size: int = Field(8, ge=1, description="Images per batch")
    max_dets: int = Field(500, ge=1, description="Detections per image for metrics")
    score_threshold: float = Field(0.05, ge=0, lt=1, description="Minimum score written to files")
    pictures: int = Field(12, ge=0, le=100, description="Sample images in the report")
    operating_point: str | None = Field(
        None,
        description="Score thresholds chosen on valid, for the best f1, or for a precision or "
        "recall such as precision>=0.95; null: none",
    )

    @field_validator("operating_point")
    @classmethod
    def _known_target(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_target(value)
            except InputError as error:
                raise ValueError(str(error)) from None
        return value and value.replace(" ", "")

    def key(self, slices: Sequence[SliceRule] = ()) -> str:
        """A key of what determines the numbers: these settings, slices, evaluator version."""
        rules = [[rule.name, rule.kind, rule.value, sorted(rule.listed)] for rule in slices]
        how = [self.split, self.max_dets, EVALUATOR_VERSION, self.operating_point, rules]
        return digest_of(how)[:16]


GateEvidence = Literal["superior", "non_inferior", "point"]


class GateSettings(Section):
    """When a challenger replaces the champion."""

    metric: Literal["map_50_95", "map_50", "map_75", "f1", "f1_at_point"] = Field(
        "map_50_95", description="Metric that is compared"
    )
    floor: float = Field(0.0, ge=0, le=1, description="Minimum value for a first champion")
    min_delta: float = Field(0.0, ge=-1, le=1, description="Minimum gain over the champion")
    evidence: GateEvidence = Field(
        "superior",
        description="What must reach min_delta: the lower end of the interval (superior) or the "
        "difference itself (point); or a gain whose lower end reaches -tolerance (non_inferior)",
    )
    tolerance: float = Field(0.01, ge=0, le=1, description="Loss that non_inferior accepts")
    max_class_drop: float = Field(
        0.05, ge=0, le=1, description="Largest accepted drop of the AP of a class"
    )
    class_min_boxes: int = Field(20, ge=1, description="Classes with fewer boxes are ignored")
    max_slice_drop: float = Field(
        0.05, ge=0, le=1, description="Largest accepted drop of the mAP of a slice"
    )
    slice_min_boxes: int = Field(50, ge=1, description="Slices with fewer boxes are ignored")
    min_images: int = Field(50, ge=1, description="Minimum number of test images")
    allow_class_change: bool = Field(False, description="Accept another list of classes")
    max_false_alarms_per_image: float | None = Field(
        None, ge=0, description="Most false alarms per image at the operating point"
    )
    max_latency_ms: float | None = Field(None, gt=0, description="Largest latency per image")
    max_size_mb: float | None = Field(None, gt=0, description="Largest weights file, 10^6 bytes")
    require_export_parity: bool = Field(True, description="ONNX must match the network")
    manual_approval: bool = Field(False, description="Wait for `rfdetr-pipeline promote`")


class RegistrySettings(Section):
    """The registered model of this detector line."""

    name: Name = Field("demo", description="Registered model; default: the name of the dataset")


class RuntimeSettings(Section):
    """The machine. Nothing here changes a result, so DVC does not track this section."""

    devices: Annotated[int | Literal["auto"], BeforeValidator(_devices)] = Field(
        "auto", description="Devices per node, or auto"
    )
    nodes: int = Field(1, ge=1, description="Number of nodes")
    rendezvous: str | None = Field(None, description="host:port of the first node")
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = Field(
        "auto", description="Lightning accelerator"
    )
    num_workers: Workers = Field(
        "auto", description="Data loader processes per device; auto: the cores of its share"
    )
    gpu_slot: Name = Field("gpu", description="Prefect concurrency limit")
    timeout_s: float | None = Field(None, gt=0, description="Seconds that the training may take")
    stage_timeout_s: float = Field(21600, gt=0, description="Seconds that other stages may take")
    silence_timeout_s: float = Field(1800, gt=0, description="Seconds of silence that mean a hang")
    price_per_hour: float | None = Field(None, ge=0, description="Price of one device per hour")
    grace_s: float = Field(60, gt=0, description="Seconds from the request to stop to SIGKILL")

    @field_validator("devices")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be 'auto' or a number of devices, 1 or more")
        return value
