"""Configuration of models and of training runs. Importing this module does not import torch.

Unknown fields are refused with the nearest known name, so that a typo never trains silently.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rfdetr import compat
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

# keys of lr_scheduler_kwargs -> fields of Hyperparameters
SCHEDULE_FIELDS = {
    "lr_drop": "lr_drop",
    "min_factor": "lr_min_factor",
    "lr_min_factor": "lr_min_factor",
    "warmup_epochs": "warmup_epochs",
}

# A model that differs in one of these cannot load the published weights of its variant.
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


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value


def _absolute(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike):
        return value
    return str(Path(value).expanduser().absolute())


def _resume(value: Any) -> Any:
    if isinstance(value, bool):
        return "last" if value else None
    return _as_text(value)


def _progress_bar(value: Any) -> Any:
    if isinstance(value, bool):
        return "tqdm" if value else None
    return value


Positive = Annotated[int, Field(ge=1)]
Workers = Annotated[int, Field(ge=0)] | Literal["auto"]
NonNegative = Annotated[float, Field(ge=0)]
Factor = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
EncoderWidth = Annotated[int, Field(ge=8)]
DecoderWidth = Annotated[int, Field(ge=4)]
BlockIndexes = Annotated[list[int], Field(min_length=1)]
Levels = Annotated[list[Level], Field(min_length=1)]


def device_text(value: Any) -> Any:
    """The text of a torch.device or of the number of a GPU; any other value as it is."""
    if type(value) is int:
        return f"cuda:{value}"
    kind = type(value)  # a torch.device, recognised without importing torch
    return str(value) if (kind.__module__, kind.__name__) == ("torch", "device") else value


PathText = Annotated[str, BeforeValidator(_as_text)]
DeviceText = Annotated[str, BeforeValidator(device_text)]
FolderText = Annotated[str, BeforeValidator(_absolute)]


class StrictConfig(BaseModel):
    """A pydantic model that refuses unknown fields by name, at construction and on assignment.

    `not_offered` are fields of the public package: a value that asks for nothing is dropped, for
    any other the text says what to do instead.
    """

    not_offered: ClassVar[compat.Missing] = {}
    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data, refused = compat.drop_neutral(data, cls.not_offered)
            unknown = [name for name in data if name not in cls.model_fields]
            if unknown or refused:
                texts = [cls._unknown_text(unknown)] if unknown else []
                raise ValueError(" ".join([*refused, *texts]))
        return data

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a validated field; an unknown one raises ValueError."""
        if not name.startswith("_") and name not in type(self).model_fields:
            _, refused = compat.drop_neutral({name: value}, self.not_offered)
            raise ConfigError(" ".join([*refused, self._unknown_text([name])]))
        kept, kept_set = dict(self.__dict__), set(self.model_fields_set)
        try:
            super().__setattr__(name, value)
        except ValueError:  # checks across fields run after pydantic has stored the value
            self.__dict__.update(kept)
            self.model_fields_set.intersection_update(kept_set)
            raise

    @classmethod
    def _unknown_text(cls, unknown: list[str]) -> str:
        parts = []
        homes = {name: _home(cls, name) for name in unknown}
        for name, home in homes.items():
            near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near and not home else ""
            parts.append(f"'{name}'{hint}")
        known = ", ".join(sorted(cls.model_fields))
        advice = [home for home in homes.values() if home]
        return " ".join(
            [f"{cls.__name__} has no field {', '.join(parts)}.", *advice, f"Known fields: {known}."]
        )


def _home(config_class: type[BaseModel], name: str) -> str | None:
    """What to do with a setting that `config_class` does not have and another object has."""
    if issubclass(config_class, TrainConfig) and name in compat.TRAINER_ARGUMENTS:
        return f"Pass {name}= to build_trainer instead."
    if issubclass(config_class, TrainConfig) and name in ModelConfig.model_fields:
        return f"{name} is a setting of the model: RFDETRNano({name}=...) or its configuration."
    if issubclass(config_class, ModelConfig) and name in TrainConfig.model_fields:
        return f"{name} is a setting of the training: pass it to train() or to TrainConfig."
    return None


def optional_fields(config_class: type[BaseModel], *names: str) -> dict[str, Any]:
    """Definitions of the named fields for `pydantic.create_model`, with None for "not set".

    Types and constraints are those of `config_class`.
    """
    fields = {name: config_class.model_fields[name] for name in names}
    return {
        name: (
            Annotated[field.annotation, Field(), *field.metadata] | None,
            Field(None, description=field.description),
        )
        for name, field in fields.items()
    }


def _grid_side(values: dict[str, Any]) -> int:
    """Side of a position table with one entry per patch."""
    return int(values["resolution"] // values["patch_size"])


class ModelConfig(StrictConfig):
    """The network of one detector. Use a sized subclass, for example `RFDETRNanoConfig`.

    `num_classes` counts the classes without the extra output: heads have `num_classes + 1` rows.
    `encoder_dim`, `encoder_depth` and `encoder_heads` override the size of the named encoder.
    `positional_encoding_size` follows the resolution unless it is given; base models keep the
    37 x 37 table of DINOv2. `pretrain_weights` is a file, a published name, or None. If the
    download of a variant's default weights fails, training continues with random weights and warns.
    """

    variant: ClassVar[str] = ""
    not_offered: ClassVar[compat.Missing] = compat.MODEL_FIELDS

    encoder: Encoder = Field(description="Backbone")
    encoder_dim: EncoderWidth | None = Field(
        None, description="Backbone width, if not the encoder's"
    )
    encoder_depth: Positive | None = Field(
        None, description="Backbone blocks, if not the encoder's"
    )
    encoder_heads: Positive | None = Field(None, description="Backbone heads, if not the encoder's")
    out_feature_indexes: BlockIndexes = Field(description="Backbone blocks used, from 1")
    patch_size: Positive = Field(description="Patch side in pixels")
    num_windows: Positive = Field(description="Attention windows per image side")
    resolution: Positive = Field(description="Input side in pixels")
    positional_encoding_size: Positive = Field(
        default_factory=_grid_side, description="Side of the position table in patches"
    )
    projector_scale: Levels = Field(description="Feature levels of the projector")
    hidden_dim: DecoderWidth = Field(description="Width of the decoder")
    dec_layers: Positive = Field(description="Number of decoder layers")
    sa_nheads: Positive = Field(description="Heads of the decoder's self-attention")
    ca_nheads: Positive = Field(description="Heads of the decoder's cross-attention")
    dec_n_points: Positive = Field(description="Sampling points per head and level")
    num_queries: Positive = Field(300, description="Object queries")
    num_select: Positive = Field(300, description="Detections returned per image")
    group_detr: Positive = Field(13, description="Query groups in training (Group DETR)")
    num_classes: Positive = Field(90, description="Number of classes")
    num_channels: Literal[3] = Field(3, description="Colour channels of the input")
    dim_feedforward: Positive = Field(2048, description="Width of the decoder's MLP")
    two_stage: Literal[True] = Field(True, description="Queries from encoder proposals")
    bbox_reparam: Literal[True] = Field(True, description="Boxes relative to references")
    lite_refpoint_refine: Literal[True] = Field(True, description="Fixed reference boxes")
    layer_norm: Literal[True] = Field(True, description="Layer norm in the projector")
    ia_bce_loss: Literal[True] = Field(True, description="IoU-aware classification loss")
    segmentation_head: bool = Field(False, description="Predict instance masks")
    mask_downsample_ratio: Positive = Field(4, description="Input pixels per mask pixel")
    drop_path: Probability = Field(0.0, description="Stochastic depth rate of the backbone")
    pretrain_weights: PathText | None = Field(None, description="File, published name or null")
    device: DeviceText = Field("auto", description="Device of the detector")
    amp: bool = Field(True, description="Mixed precision in training")
    compile: bool = Field(False, description="Use torch.compile in training, layer by layer")
    fused_optimizer: bool = Field(True, description="Fused AdamW where available")
    freeze_encoder: bool = Field(False, description="Do not train the backbone")
    backbone_lora: bool = Field(False, description="Train DoRA adapters only")
    gradient_checkpointing: bool = Field(False, description="Recompute activations")
    grey_levels: tuple[float, float] | None = Field(
        None, description="Levels of 16-bit and float images that become 0 and 255"
    )
    license: str = Field("Apache-2.0", description="Licence of the weights")

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
                "(they count encoder blocks)."
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

    @property
    def num_classes_is_explicit(self) -> bool:
        """Whether the user chose `num_classes`; otherwise weights and datasets may change it."""
        return "num_classes" in self.model_fields_set

    def infer_num_classes(self, number: int) -> None:
        """Set the class count found in weights or a dataset; it does not count as chosen."""
        self.num_classes = number
        self.model_fields_set.discard("num_classes")


class RFDETRNanoConfig(ModelConfig):
    """Nano: 384 pixels, patch 16, 2 decoder layers."""

    variant: ClassVar[str] = "nano"
    pretrain_weights: PathText | None = "rf-detr-nano.pth"
    encoder: Encoder = "dinov2_windowed_small"
    out_feature_indexes: BlockIndexes = [3, 6, 9, 12]
    patch_size: Positive = 16
    num_windows: Positive = 2
    resolution: Positive = 384
    projector_scale: Levels = ["P4"]
    hidden_dim: DecoderWidth = 256
    dec_layers: Positive = 2
    sa_nheads: Positive = 8
    ca_nheads: Positive = 16
    dec_n_points: Positive = 2


class RFDETRSmallConfig(RFDETRNanoConfig):
    """Small: 512 pixels, 3 decoder layers."""

    variant: ClassVar[str] = "small"
    pretrain_weights: PathText | None = "rf-detr-small.pth"
    resolution: Positive = 512
    dec_layers: Positive = 3


class RFDETRMediumConfig(RFDETRNanoConfig):
    """Medium: 576 pixels, 4 decoder layers."""

    variant: ClassVar[str] = "medium"
    pretrain_weights: PathText | None = "rf-detr-medium.pth"
    resolution: Positive = 576
    dec_layers: Positive = 4


class RFDETRBaseConfig(RFDETRNanoConfig):
    """Base: 560 pixels, patch 14, the position table of the original DINOv2 (37 x 37)."""

    variant: ClassVar[str] = "base"
    pretrain_weights: PathText | None = "rf-detr-base.pth"
    out_feature_indexes: BlockIndexes = [2, 5, 8, 11]
    patch_size: Positive = 14
    num_windows: Positive = 4
    resolution: Positive = 560
    positional_encoding_size: Positive = 37
    dec_layers: Positive = 3


class RFDETRLargeConfig(RFDETRNanoConfig):
    """Large (2026): 704 pixels, 4 decoder layers."""

    variant: ClassVar[str] = "large"
    pretrain_weights: PathText | None = "rf-detr-large-2026.pth"
    resolution: Positive = 704
    dec_layers: Positive = 4


class RFDETRLargeDeprecatedConfig(RFDETRBaseConfig):
    """The first large model: base encoder, two feature levels."""

    variant: ClassVar[str] = "large-deprecated"
    pretrain_weights: PathText | None = "rf-detr-large.pth"
    encoder: Encoder = "dinov2_windowed_base"
    projector_scale: Levels = ["P3", "P5"]
    hidden_dim: DecoderWidth = 384
    sa_nheads: Positive = 12
    ca_nheads: Positive = 24
    dec_n_points: Positive = 4


class RFDETRSegPreviewConfig(RFDETRNanoConfig):
    """Segmentation preview: 432 pixels, patch 12, 4 decoder layers, 200 queries."""

    variant: ClassVar[str] = "seg-preview"
    pretrain_weights: PathText | None = "rf-detr-seg-preview.pt"
    segmentation_head: bool = True
    patch_size: Positive = 12
    resolution: Positive = 432
    dec_layers: Positive = 4
    num_queries: Positive = 200
    num_select: Positive = 200


class RFDETRSegNanoConfig(RFDETRSegPreviewConfig):
    """Segmentation nano: 312 pixels, no windows, 100 queries."""

    variant: ClassVar[str] = "seg-nano"
    pretrain_weights: PathText | None = "rf-detr-seg-nano.pt"
    num_windows: Positive = 1
    resolution: Positive = 312
    num_queries: Positive = 100
    num_select: Positive = 100


class RFDETRSegSmallConfig(RFDETRSegPreviewConfig):
    """Segmentation small: 384 pixels, 100 queries."""

    variant: ClassVar[str] = "seg-small"
    pretrain_weights: PathText | None = "rf-detr-seg-small.pt"
    resolution: Positive = 384
    num_queries: Positive = 100
    num_select: Positive = 100


class RFDETRSegMediumConfig(RFDETRSegPreviewConfig):
    """Segmentation medium: 432 pixels, 5 decoder layers, 200 queries."""

    variant: ClassVar[str] = "seg-medium"
    pretrain_weights: PathText | None = "rf-detr-seg-medium.pt"
    dec_layers: Positive = 5


class RFDETRSegLargeConfig(RFDETRSegPreviewConfig):
    """Segmentation large: 504 pixels, 5 decoder layers, 200 queries."""

    variant: ClassVar[str] = "seg-large"
    pretrain_weights: PathText | None = "rf-detr-seg-large.pt"
    resolution: Positive = 504
    dec_layers: Positive = 5


class RFDETRSegXLargeConfig(RFDETRSegPreviewConfig):
    """Segmentation extra large: 624 pixels, 6 decoder layers, 300 queries."""

    variant: ClassVar[str] = "seg-xlarge"
    pretrain_weights: PathText | None = "rf-detr-seg-xlarge.pt"
    resolution: Positive = 624
    dec_layers: Positive = 6
    num_queries: Positive = 300
    num_select: Positive = 300


class RFDETRSeg2XLargeConfig(RFDETRSegXLargeConfig):
    """Segmentation double extra large: 768 pixels."""

    variant: ClassVar[str] = "seg-2xlarge"
    pretrain_weights: PathText | None = "rf-detr-seg-xxlarge.pt"
    resolution: Positive = 768


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


class Hyperparameters(StrictConfig):
    """The settings of a training run that change its result.

    `TrainConfig` adds the data, the output and the machine. The `fit` section of the pipeline's
    params.yaml has the same fields.
    """

    epochs: Positive = Field(100, description="Number of epochs")
    batch_size: Positive = Field(4, description="Images per step and device")
    lr: NonNegative = Field(1e-4, description="Learning rate of the projector and the heads")
    lr_encoder: NonNegative = Field(
        1.5e-4, description="Learning rate of the backbone's last block"
    )
    lr_vit_layer_decay: Factor = Field(0.8, description="Learning-rate factor per backbone block")
    lr_component_decay: Factor = Field(0.7, description="Learning-rate factor of the decoder")
    weight_decay: NonNegative = Field(1e-4, description="AdamW weight decay")
    lr_scheduler: Literal["step", "cosine"] = Field("step", description="Learning-rate schedule")
    lr_drop: Positive = Field(100, description="Epoch of the drop with `step`")
    lr_min_factor: float = Field(0.0, ge=0, le=1, description="Lowest factor that `cosine` reaches")
    warmup_epochs: NonNegative = Field(0.0, description="Epochs of linear warm-up")
    clip_max_norm: NonNegative = Field(
        0.1, description="Maximum gradient norm; 0 disables clipping"
    )
    use_ema: bool = Field(True, description="Keep an EMA of the weights")
    ema_decay: Probability = Field(0.993, description="Decay of the EMA")
    ema_tau: int = Field(100, ge=0, description="Updates of the ramp-up, 0: none")
    ema_update_interval: Positive = Field(1, description="Steps between EMA updates")
    drop_path: Probability = Field(0.0, description="Stochastic depth rate of the backbone")
    multi_scale: bool = Field(True, description="Draw a resolution for each step")
    expanded_scales: bool = Field(True, description="Wider range for `multi_scale`")
    square_resize_div_64: bool = Field(True, description="Resize to squares")
    aug_config: dict[str, Any] | None = Field(None, description="Albumentations by name")
    early_stopping: bool = Field(False, description="Stop when mAP stops improving")
    early_stopping_patience: Positive = Field(10, description="Evaluations without a gain")
    early_stopping_min_delta: NonNegative = Field(0.001, description="Smallest gain that counts")
    early_stopping_use_ema: bool = Field(False, description="Consider the EMA metric only")
    eval_interval: Positive = Field(1, description="Epochs between two validations")
    eval_base_model: bool = Field(
        True, description="Validate the live weights too; false: the EMA weights only"
    )
    eval_max_dets: Positive = Field(500, description="Detections per image for metrics")
    compute_val_loss: bool = Field(True, description="Compute the loss in validation")
    fp16_eval: bool = Field(False, description="Validate in float16")
    checkpoint_interval: Positive = Field(10, description="Epochs between kept checkpoints")
    last_ckpt_epochs: Positive = Field(1, description="Epochs between two writes of last.ckpt")
    last_ckpt_minutes: NonNegative = Field(
        0.0, description="Least minutes between the writes of last.ckpt at epoch ends"
    )
    sync_bn: bool = Field(False, description="Synchronize batch norm over processes")
    accelerate: Literal["auto", "off", "graphs", "compile"] = Field(
        "auto", description="CUDA graphs or torch.compile; auto: CUDA graphs on one GPU"
    )
    cls_loss_coef: NonNegative = Field(1.0, description="Weight of the classification loss")


class TrainConfig(Hyperparameters):
    """One training run.

    `group_detr`, `ia_bce_loss`, `num_select` and `segmentation_head` repeat model settings for
    compatibility: the model's configuration decides, and a different value here is warned about.

    `lr_scheduler_kwargs` (lr_drop, min_factor) is another way to set the schedule's fields.
    With `batch_size="auto"`, `build_trainer` finds the largest batch that fits; an optimizer step
    keeps 4 * `grad_accum_steps` images.
    """

    not_offered: ClassVar[compat.Missing] = compat.TRAIN_FIELDS

    dataset_dir: FolderText = Field(description="Folder of the dataset")
    dataset_file: Literal["roboflow", "coco", "yolo"] = Field(
        "roboflow", description="Layout of the dataset"
    )
    output_dir: FolderText = Field("output", description="Folder for checkpoints, metrics and logs")
    grad_accum_steps: Positive = Field(4, description="Batches per optimizer step")
    auto_batch_size: bool = Field(
        False, description="Fit `batch_size` to the device; batch_size='auto' sets it"
    )
    eval_batch_size: Positive | None = Field(
        None, description="Images per evaluation batch; default: `batch_size`"
    )
    num_sanity_val_steps: int = Field(0, ge=-1, description="Validation batches before training")
    best_model_metric: Literal["map", "mar"] = Field(
        "map", description="Metric that chooses the best epoch: mAP or mAR"
    )
    resume: Annotated[str | None, BeforeValidator(_resume)] = Field(
        None, description="Checkpoint to resume from; true: last.ckpt of `output_dir`"
    )
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="Seed of all generators")
    drop_mode: Literal["standard", "early", "late"] = Field(
        "standard", description="Epochs that use drop path"
    )
    drop_schedule: Literal["constant", "linear"] = Field(
        "constant", description="Drop path schedule"
    )
    cutoff_epoch: int = Field(0, ge=0, description="Epoch where `drop_mode` switches")
    do_random_resize_via_padding: bool = Field(False, description="Pad instead of resizing")
    compute_test_loss: bool = Field(True, description="Compute the loss in testing")
    log_per_class_metrics: bool = Field(True, description="Log the AP of each class")
    train_log_on_step: bool = Field(False, description="Log losses on steps too")
    train_log_sync_dist: bool = Field(False, description="Average losses over processes")
    dont_save_weights: bool = Field(False, description="Write no checkpoints")
    run_test: bool = Field(False, description="Run the test split after training")
    accelerator: str = Field("auto", description="Lightning accelerator")
    devices: int | str = Field(1, description="A number, a list, or 'auto'")
    num_nodes: Positive = Field(1, description="Number of machines")
    progress_bar: Annotated[ProgressBar | None, BeforeValidator(_progress_bar)] = Field(
        None, description="Kind of progress bar"
    )
    tensorboard: bool = Field(True, description="Log to TensorBoard")
    wandb: bool = Field(False, description="Log to Weights & Biases")
    mlflow: bool = Field(False, description="Log to MLflow")
    project: str | None = Field(None, description="W&B project, MLflow experiment")
    run: str | None = Field(None, description="Name of the run in W&B or MLflow")
    class_names: list[str] | None = Field(
        None, description="Class names; default: those of the dataset"
    )
    num_workers: Workers = Field(
        "auto", description="Data loader processes per device; auto: the cores of its share"
    )
    pin_memory: bool | None = Field(None, description="Pin memory; default: on CUDA")
    persistent_workers: bool | None = Field(None, description="Keep loader processes; default: yes")
    prefetch_factor: Positive | None = Field(None, description="Batches prefetched per process")
    group_detr: Positive = Field(13, description="Ignored: set it in the model config")
    ia_bce_loss: bool = Field(True, description="Ignored: set it in the model config")
    num_select: Positive = Field(300, description="Ignored: set it in the model config")
    segmentation_head: bool = Field(False, description="Ignored: set it in the model config")

    @model_validator(mode="before")
    @classmethod
    def _other_spellings(cls, data: Any) -> Any:
        """Settings of the public package that are spelled differently here."""
        if not isinstance(data, dict):
            return data
        schedule = data.get("lr_scheduler_kwargs") or {}
        unknown = sorted(set(schedule) - set(SCHEDULE_FIELDS))
        if unknown:
            raise ValueError(
                f"lr_scheduler_kwargs takes {', '.join(SCHEDULE_FIELDS)}; got {', '.join(unknown)}."
                " For another schedule, override RFDETRModule.configure_optimizers."
            )
        data = {name: value for name, value in data.items() if name != "lr_scheduler_kwargs"}
        data |= {SCHEDULE_FIELDS[name]: value for name, value in schedule.items()}
        if data.get("batch_size") == "auto":
            data = {**data, "batch_size": cls.model_fields["batch_size"].default}
            data["auto_batch_size"] = True
        if data.get("compute_val_loss") == "auto":
            del data["compute_val_loss"]
        if data.get("multi_scale") in {"per-batch", "per-sample"}:
            raise ValueError(
                f"multi_scale={data['multi_scale']!r} is not offered: it is true (one resolution "
                "for all images of an optimizer step) or false."
            )
        return data


class SegmentationTrainConfig(TrainConfig):
    """A training run of a segmentation model: TrainConfig plus the mask losses."""

    mask_point_sample_ratio: Positive = Field(16, description="Mask pixels per sampled point")
    mask_ce_loss_coef: NonNegative = Field(5.0, description="Weight of the mask cross-entropy loss")
    mask_dice_loss_coef: NonNegative = Field(5.0, description="Weight of the mask dice loss")
    segmentation_head: bool = Field(True, description="Ignored: set it in the model config")
