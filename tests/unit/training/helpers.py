"""A small detector and its configurations for training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from rfdetr.config import (
    ModelConfig,
    RFDETRNanoConfig,
    RFDETRSegNanoConfig,
    SegmentationTrainConfig,
    TrainConfig,
)
from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer


def tiny_model(**fields: Any) -> ModelConfig:
    """Two encoder blocks, one decoder layer, ten queries, 64 pixels."""
    settings: dict[str, Any] = {
        "pretrain_weights": None,
        "encoder_dim": 48,
        "encoder_depth": 2,
        "encoder_heads": 3,
        "out_feature_indexes": [1, 2],
        "resolution": 64,
        "hidden_dim": 32,
        "dec_layers": 1,
        "dim_feedforward": 64,
        "num_queries": 10,
        "num_select": 10,
        "group_detr": 1,
        "num_classes": 3,
    }
    return RFDETRNanoConfig(**settings | fields)


def tiny_run(dataset: Path, output: Path, **fields: Any) -> TrainConfig:
    """Two epochs in one process, without anything that is not under test."""
    settings: dict[str, Any] = {
        "dataset_dir": dataset,
        "output_dir": output,
        "epochs": 2,
        "batch_size": 2,
        "grad_accum_steps": 1,
        "lr": 1e-3,
        "lr_encoder": 1e-3,
        "num_workers": 0,
        "multi_scale": False,
        "tensorboard": False,
        "seed": 1,
        "accelerator": "cpu",
    }
    return TrainConfig(**settings | fields)


def tiny_masks(**fields: Any) -> RFDETRSegNanoConfig:
    """`tiny_model` with a mask head, 48 pixels."""
    known = tiny_model()
    own = known.model_dump(include=set(known.model_fields_set)) | {"resolution": 48}
    return RFDETRSegNanoConfig(**own | fields)


def with_masks(config: TrainConfig) -> SegmentationTrainConfig:
    """The same run for a segmentation model."""
    return SegmentationTrainConfig(**config.model_dump(include=set(config.model_fields_set)))


class Run:
    """Module, data and trainer of one run; `trainer_kwargs` go to build_trainer."""

    def __init__(
        self, model: ModelConfig, config: TrainConfig, seed: int = 0, **trainer_kwargs: Any
    ) -> None:
        torch.manual_seed(seed)
        self.config = config
        self.module = RFDETRModule(model, config)
        self.data = RFDETRDataModule(model, config)
        self.trainer = build_trainer(config, model, enable_model_summary=False, **trainer_kwargs)

    def fit(self, ckpt_path: str | Path | None = None) -> Run:
        self.trainer.fit(self.module, self.data, ckpt_path=ckpt_path)
        return self

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    def metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}


class StopAt(pl.Callback):
    """Ends the process's fit as a crash does, after `step` optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stopped by the test")
