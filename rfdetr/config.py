"""Configuration of models and of training runs. Importing this module does not import torch.

Field names and defaults follow the specification (model section 1, training section 3). Unknown
fields are refused with the nearest known name, so that a typing error never trains silently.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rfdetr.errors import ConfigError

Encoder = Literal[
    "dinov2_windowed_small", "dinov2_windowed_base", "dinov2_registers_windowed_small"
]
Level = Literal["P3", "P4", "P5"]
ProgressBar = Literal["tqdm", "rich"]

# name -> (width, blocks, heads, register tokens)
ENCODER_SIZES: dict[str, tuple[int, int, int, int]] = {
    "dinov2_windowed_small": (384, 12, 6, 0),
    "dinov2_windowed_base": (768, 12, 12, 0),
    "dinov2_registers_windowed_small": (384, 12, 6, 4),
}


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value


def _absolute(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike):
        return value
    return str(Path(value).expanduser().absolute())


def _progress_bar(value: Any) -> Any:
    if isinstance(value, bool):
        return "tqdm" if value else None
    return value


# A model that differs in one of these cannot take the published weights of its variant.
STRUCTURE_FIELDS = (
    "encoder",
    "encoder_dim",
    "encoder_depth",
    "encoder_heads",
    "out_feature_indexes",
    "patch_size",
    "projector_scale",
    "hidden_dim",
    "dec_layers",
    "sa_nheads",
    "ca_nheads",
    "dec_n_points",
    "dim_feedforward",
    "segmentation_head",
)

PathText = Annotated[str, BeforeValidator(_as_text)]
FolderText = Annotated[str, BeforeValidator(_absolute)]


class StrictConfig(BaseModel):
    """A pydantic model that refuses unknown fields by name, at construction and on assignment."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [name for name in data if name not in cls.model_fields]
            if unknown:
                raise ValueError(cls._unknown_text(unknown))
        return data

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a validated field; an unknown one raises ValueError."""
        if not name.startswith("_") and name not in type(self).model_fields:
            raise ConfigError(self._unknown_text([name]))
        kept, kept_set = dict(self.__dict__), set(self.model_fields_set)
        try:
            super().__setattr__(name, value)
        except ValueError:  # a check of several fields runs after pydantic has stored the value
            self.__dict__.update(kept)
            self.model_fields_set.intersection_update(kept_set)
            raise

    @classmethod
    def _unknown_text(cls, unknown: list[str]) -> str:
        parts = []
        for name in unknown:
            near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            parts.append(f"'{name}'{hint}")
        extra = ""
        if "strategy" in unknown:
            extra = " Pass strategy= to build_trainer instead."
        known = ", ".join(sorted(cls.model_fields))
        return f"{cls.__name__} has no field {', '.join(parts)}.{extra} Known fields: {known}."


class ModelConfig(StrictConfig):
    """The network of one detector. Use a sized subclass, for example `RFDETRNanoConfig`.

    `num_classes` counts the classes without the surplus output: heads have `num_classes + 1` rows.
    `encoder_dim`, `encoder_depth` and `encoder_heads` replace the named encoder's size when set.
    `pretrain_weights` is a file, a published name, or None for none. When it is not given, a
    variant asks for its published weights; without network it goes on without them, warned.
    """

    variant: ClassVar[str] = ""

    encoder: Encoder
    encoder_dim: int | None = Field(None, ge=8)
    encoder_depth: int | None = Field(None, ge=1)
    encoder_heads: int | None = Field(None, ge=1)
    out_feature_indexes: list[int] = Field(min_length=1)
    patch_size: int = Field(ge=1)
    num_windows: int = Field(ge=1)
    resolution: int = Field(ge=1)
    positional_encoding_size: int = Field(ge=1)
    projector_scale: list[Level] = Field(min_length=1)
    hidden_dim: int = Field(ge=4)
    dec_layers: int = Field(ge=1)
    sa_nheads: int = Field(ge=1)
    ca_nheads: int = Field(ge=1)
    dec_n_points: int = Field(ge=1)
    num_queries: int = Field(300, ge=1)
    num_select: int = Field(300, ge=1)
    group_detr: int = Field(13, ge=1)
    num_classes: int = Field(90, ge=1)
    num_channels: Literal[3] = 3
    dim_feedforward: int = Field(2048, ge=1)
    two_stage: Literal[True] = True
    bbox_reparam: Literal[True] = True
    lite_refpoint_refine: Literal[True] = True
    layer_norm: Literal[True] = True
    ia_bce_loss: Literal[True] = True
    segmentation_head: bool = False
    mask_downsample_ratio: int = Field(4, ge=1)
    drop_path: float = Field(0.0, ge=0.0, lt=1.0)
    pretrain_weights: PathText | None = None
    device: str = "auto"
    amp: bool = True
    compile: bool = False
    fused_optimizer: bool = True
    freeze_encoder: bool = False
    backbone_lora: bool = False
    gradient_checkpointing: bool = False
    license: str = "Apache-2.0"

    @model_validator(mode="before")
    @classmethod
    def _follow_resolution(cls, data: Any) -> Any:
        """Derive the position table's side from a given resolution (specification, section 1)."""
        if not isinstance(data, dict) or "positional_encoding_size" in data:
            return data
        default = {name: field.default for name, field in cls.model_fields.items()}
        native = default["positional_encoding_size"]
        if not isinstance(native, int) or native != default["resolution"] // default["patch_size"]:
            return data
        resolution = data.get("resolution", default["resolution"])
        patch = data.get("patch_size", default["patch_size"])
        if isinstance(resolution, int) and isinstance(patch, int) and patch > 0:
            return {**data, "positional_encoding_size": resolution // patch}
        return data

    @model_validator(mode="before")
    @classmethod
    def _published_weights_need_their_structure(cls, data: Any) -> Any:
        """A changed structure starts without pretrained weights unless a file is named."""
        if not isinstance(data, dict) or "pretrain_weights" in data:
            return data
        default = {name: field.default for name, field in cls.model_fields.items()}
        changed = any(n in data and data[n] != default[n] for n in STRUCTURE_FIELDS)
        counts = ((data.get(n), default[n]) for n in ("num_queries", "group_detr"))
        larger = any(isinstance(given, int) and given > own for given, own in counts)
        return {**data, "pretrain_weights": None} if changed or larger else data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*self._size_problems(), *self._encoder_problems()]
        if problems:
            raise ValueError(f"{type(self).__name__}: " + " ".join(problems))
        return self

    def _size_problems(self) -> list[str]:
        problems = []
        block = self.block_size
        if self.resolution % block:
            low = max(block, self.resolution // block * block)
            problems.append(
                f"resolution {self.resolution} is not a multiple of patch_size * num_windows = "
                f"{block}; use {low} or {self.resolution // block * block + block}."
            )
        for name in ("sa_nheads", "ca_nheads"):
            if self.hidden_dim % getattr(self, name):
                problems.append(
                    f"hidden_dim {self.hidden_dim} is not a multiple of {name} "
                    f"{getattr(self, name)}."
                )
        if self.hidden_dim % 4:
            problems.append(f"hidden_dim {self.hidden_dim} is not a multiple of 4.")
        if sorted(set(self.projector_scale)) != self.projector_scale:
            problems.append(
                f"projector_scale {self.projector_scale} must be ascending without repeats."
            )
        return problems

    def _encoder_problems(self) -> list[str]:
        problems = []
        width, depth, heads, _ = self.encoder_size
        if width % heads:
            problems.append(f"encoder width {width} is not a multiple of its {heads} heads.")
        indexes = self.out_feature_indexes
        if sorted(set(indexes)) != indexes or indexes[0] < 1 or indexes[-1] > depth:
            problems.append(
                f"out_feature_indexes {indexes} must ascend within 1..{depth} "
                "(they count finished encoder blocks)."
            )
        return problems

    @property
    def block_size(self) -> int:
        """Image sides must be multiples of this number of pixels: patch size times windows."""
        return self.patch_size * self.num_windows

    @property
    def encoder_size(self) -> tuple[int, int, int, int]:
        """(width, blocks, heads, register tokens) of the encoder."""
        width, depth, heads, registers = ENCODER_SIZES[self.encoder]
        return (
            self.encoder_dim or width,
            self.encoder_depth or depth,
            self.encoder_heads or heads,
            registers,
        )


class RFDETRNanoConfig(ModelConfig):
    """Nano: 384 pixels, patch 16, 2 decoder layers."""

    variant: ClassVar[str] = "nano"

    pretrain_weights: PathText | None = "rf-detr-nano.pth"
    encoder: Encoder = "dinov2_windowed_small"
    out_feature_indexes: list[int] = Field([3, 6, 9, 12], min_length=1)
    patch_size: int = Field(16, ge=1)
    num_windows: int = Field(2, ge=1)
    resolution: int = Field(384, ge=1)
    positional_encoding_size: int = Field(24, ge=1)
    projector_scale: list[Level] = Field(["P4"], min_length=1)
    hidden_dim: int = Field(256, ge=4)
    dec_layers: int = Field(2, ge=1)
    sa_nheads: int = Field(8, ge=1)
    ca_nheads: int = Field(16, ge=1)
    dec_n_points: int = Field(2, ge=1)


class RFDETRSmallConfig(RFDETRNanoConfig):
    """Small: 512 pixels, 3 decoder layers."""

    variant: ClassVar[str] = "small"

    pretrain_weights: PathText | None = "rf-detr-small.pth"
    resolution: int = Field(512, ge=1)
    positional_encoding_size: int = Field(32, ge=1)
    dec_layers: int = Field(3, ge=1)


class RFDETRMediumConfig(RFDETRNanoConfig):
    """Medium: 576 pixels, 4 decoder layers."""

    variant: ClassVar[str] = "medium"

    pretrain_weights: PathText | None = "rf-detr-medium.pth"
    resolution: int = Field(576, ge=1)
    positional_encoding_size: int = Field(36, ge=1)
    dec_layers: int = Field(4, ge=1)


class RFDETRBaseConfig(RFDETRNanoConfig):
    """Base: 560 pixels, patch 14, the position table of the original DINOv2 (37 x 37)."""

    variant: ClassVar[str] = "base"

    pretrain_weights: PathText | None = "rf-detr-base.pth"
    out_feature_indexes: list[int] = Field([2, 5, 8, 11], min_length=1)
    patch_size: int = Field(14, ge=1)
    num_windows: int = Field(4, ge=1)
    resolution: int = Field(560, ge=1)
    positional_encoding_size: int = Field(37, ge=1)
    dec_layers: int = Field(3, ge=1)


class RFDETRLargeConfig(RFDETRNanoConfig):
    """Large (2026): 704 pixels, 4 decoder layers."""

    variant: ClassVar[str] = "large"

    pretrain_weights: PathText | None = "rf-detr-large-2026.pth"
    resolution: int = Field(704, ge=1)
    positional_encoding_size: int = Field(44, ge=1)
    dec_layers: int = Field(4, ge=1)


class RFDETRLargeDeprecatedConfig(RFDETRBaseConfig):
    """The first large model: base encoder, two feature levels."""

    variant: ClassVar[str] = "large-deprecated"

    pretrain_weights: PathText | None = "rf-detr-large.pth"
    encoder: Encoder = "dinov2_windowed_base"
    projector_scale: list[Level] = Field(["P3", "P5"], min_length=1)
    hidden_dim: int = Field(384, ge=4)
    sa_nheads: int = Field(12, ge=1)
    ca_nheads: int = Field(24, ge=1)
    dec_n_points: int = Field(4, ge=1)


class RFDETRSegPreviewConfig(RFDETRNanoConfig):
    """Segmentation preview: 432 pixels, patch 12, 4 decoder layers, 200 queries."""

    variant: ClassVar[str] = "seg-preview"

    pretrain_weights: PathText | None = "rf-detr-seg-preview.pt"
    segmentation_head: bool = True
    patch_size: int = Field(12, ge=1)
    resolution: int = Field(432, ge=1)
    positional_encoding_size: int = Field(36, ge=1)
    dec_layers: int = Field(4, ge=1)
    num_queries: int = Field(200, ge=1)
    num_select: int = Field(200, ge=1)


class RFDETRSegNanoConfig(RFDETRSegPreviewConfig):
    """Segmentation nano: 312 pixels, no windows, 100 queries."""

    variant: ClassVar[str] = "seg-nano"

    pretrain_weights: PathText | None = "rf-detr-seg-nano.pt"
    num_windows: int = Field(1, ge=1)
    resolution: int = Field(312, ge=1)
    positional_encoding_size: int = Field(26, ge=1)
    num_queries: int = Field(100, ge=1)
    num_select: int = Field(100, ge=1)


class RFDETRSegSmallConfig(RFDETRSegPreviewConfig):
    """Segmentation small: 384 pixels, 100 queries."""

    variant: ClassVar[str] = "seg-small"

    pretrain_weights: PathText | None = "rf-detr-seg-small.pt"
    resolution: int = Field(384, ge=1)
    positional_encoding_size: int = Field(32, ge=1)
    num_queries: int = Field(100, ge=1)
    num_select: int = Field(100, ge=1)


class RFDETRSegMediumConfig(RFDETRSegPreviewConfig):
    """Segmentation medium: 432 pixels, 5 decoder layers, 200 queries."""

    variant: ClassVar[str] = "seg-medium"

    pretrain_weights: PathText | None = "rf-detr-seg-medium.pt"
    dec_layers: int = Field(5, ge=1)


class RFDETRSegLargeConfig(RFDETRSegPreviewConfig):
    """Segmentation large: 504 pixels, 5 decoder layers, 200 queries."""

    variant: ClassVar[str] = "seg-large"

    pretrain_weights: PathText | None = "rf-detr-seg-large.pt"
    resolution: int = Field(504, ge=1)
    positional_encoding_size: int = Field(42, ge=1)
    dec_layers: int = Field(5, ge=1)


class RFDETRSegXLargeConfig(RFDETRSegPreviewConfig):
    """Segmentation extra large: 624 pixels, 6 decoder layers, 300 queries."""

    variant: ClassVar[str] = "seg-xlarge"

    pretrain_weights: PathText | None = "rf-detr-seg-xlarge.pt"
    resolution: int = Field(624, ge=1)
    positional_encoding_size: int = Field(52, ge=1)
    dec_layers: int = Field(6, ge=1)
    num_queries: int = Field(300, ge=1)
    num_select: int = Field(300, ge=1)


class RFDETRSeg2XLargeConfig(RFDETRSegXLargeConfig):
    """Segmentation double extra large: 768 pixels."""

    variant: ClassVar[str] = "seg-2xlarge"

    pretrain_weights: PathText | None = "rf-detr-seg-xxlarge.pt"
    resolution: int = Field(768, ge=1)
    positional_encoding_size: int = Field(64, ge=1)


MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    cls.variant: cls
    for cls in (
        RFDETRNanoConfig,
        RFDETRSmallConfig,
        RFDETRMediumConfig,
        RFDETRBaseConfig,
        RFDETRLargeConfig,
        RFDETRLargeDeprecatedConfig,
        RFDETRSegPreviewConfig,
        RFDETRSegNanoConfig,
        RFDETRSegSmallConfig,
        RFDETRSegMediumConfig,
        RFDETRSegLargeConfig,
        RFDETRSegXLargeConfig,
        RFDETRSeg2XLargeConfig,
    )
}


class TrainConfig(StrictConfig):
    """One training run (training specification, section 3.2).

    `group_detr`, `ia_bce_loss`, `num_select` and `segmentation_head` repeat model settings for
    compatibility: the model's configuration acts, and a different value given here is warned about.
    """

    dataset_dir: FolderText
    dataset_file: Literal["roboflow", "coco", "yolo"] = "roboflow"
    output_dir: FolderText = "output"
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(4, ge=1)
    grad_accum_steps: int = Field(4, ge=1)
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
    resume: PathText | None = None
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    use_ema: bool = True
    ema_decay: float = Field(0.993, ge=0, lt=1)
    ema_tau: int = Field(100, ge=0)
    ema_update_interval: int = Field(1, ge=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    drop_mode: Literal["standard", "early", "late"] = "standard"
    drop_schedule: Literal["constant", "linear"] = "constant"
    cutoff_epoch: int = Field(0, ge=0)
    multi_scale: bool = True
    expanded_scales: bool = True
    do_random_resize_via_padding: bool = False
    square_resize_div_64: bool = True
    aug_config: dict[str, Any] | None = None
    early_stopping: bool = False
    early_stopping_patience: int = Field(10, ge=1)
    early_stopping_min_delta: float = Field(0.001, ge=0)
    early_stopping_use_ema: bool = False
    eval_interval: int = Field(1, ge=1)
    eval_max_dets: int = Field(500, ge=1)
    compute_val_loss: bool = True
    compute_test_loss: bool = True
    log_per_class_metrics: bool = True
    train_log_on_step: bool = False
    train_log_sync_dist: bool = False
    fp16_eval: bool = False
    checkpoint_interval: int = Field(10, ge=1)
    dont_save_weights: bool = False
    run_test: bool = False
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = Field(1, ge=1)
    sync_bn: bool = False
    progress_bar: Annotated[ProgressBar | None, BeforeValidator(_progress_bar)] = None
    tensorboard: bool = True
    wandb: bool = False
    mlflow: bool = False
    project: str | None = None
    run: str | None = None
    class_names: list[str] | None = None
    num_workers: int = Field(2, ge=0)
    pin_memory: bool | None = None
    persistent_workers: bool | None = None
    prefetch_factor: int | None = Field(None, ge=1)
    cls_loss_coef: float = Field(1.0, ge=0)
    group_detr: int = Field(13, ge=1)
    ia_bce_loss: bool = True
    num_select: int = Field(300, ge=1)
    segmentation_head: bool = False


class SegmentationTrainConfig(TrainConfig):
    """A training run of a segmentation model: TrainConfig plus the mask losses."""

    mask_point_sample_ratio: int = Field(16, ge=1)
    mask_ce_loss_coef: float = Field(5.0, ge=0)
    mask_dice_loss_coef: float = Field(5.0, ge=0)
    segmentation_head: bool = True
