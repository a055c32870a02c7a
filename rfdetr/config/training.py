"""The configuration of a training run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rfdetr import compat
from rfdetr.config.model import ModelConfig
from rfdetr.config.strict import NonNegative, Positive, Probability, StrictConfig, as_text

ProgressBar = Literal["tqdm", "rich"]
Workers = Annotated[int, Field(ge=0)] | Literal["auto"]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# keys of lr_scheduler_kwargs -> fields of Hyperparameters
SCHEDULE_FIELDS = {
    "lr_drop": "lr_drop",
    "min_factor": "lr_min_factor",
    "lr_min_factor": "lr_min_factor",
    "warmup_epochs": "warmup_epochs",
}


def _absolute(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike):
        return value
    if not os.fspath(value):
        raise ValueError("the name of the folder is empty")
    return str(Path(value).expanduser().absolute())


def _resume(value: Any) -> Any:
    if isinstance(value, bool):
        return "last" if value else None
    return as_text(value)


def _progress_bar(value: Any) -> Any:
    if isinstance(value, bool):
        return "tqdm" if value else None
    return value


FolderText = Annotated[str, BeforeValidator(_absolute)]


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

    @classmethod
    def hint_for(cls, name: str) -> str | None:
        if name in compat.TRAINER_ARGUMENTS:
            return f"Pass {name}= to build_trainer instead."
        of_model = compat.SYNONYMS.get(name, name)
        if of_model in ModelConfig.model_fields:
            return (
                f"{of_model} is a setting of the model: RFDETRNano({of_model}=...) or its "
                "configuration."
            )
        return None

    @model_validator(mode="before")
    @classmethod
    def _other_spellings(cls, data: Any) -> Any:
        """Settings of the public package that are spelled differently here."""
        if not isinstance(data, dict):
            return data
        schedule = data.get("lr_scheduler_kwargs") or {}
        if not isinstance(schedule, dict):
            raise ValueError(  # noqa: TRY004
                f"lr_scheduler_kwargs must be a dictionary; got {schedule!r}."
            )
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
        if data.get("multi_scale") in ("per-batch", "per-sample"):
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
