"""Runs a checkpoint over one split: detections, ground truth, sample images, time per image."""

from __future__ import annotations

import statistics
import time
from typing import Any, Literal

import torch
from pytorch_lightning.callbacks import Callback

from flows.config.sections import EvaluateSettings
from flows.tracking.provenance import cpu_name
from rfdetr.config import ModelConfig, TrainConfig
from rfdetr.evaluation.evaluator import CocoEvaluator
from rfdetr.evaluation.plots import Sample
from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer
from rfdetr.training.sample_images import take_samples


def run_split(
    datamodule: RFDETRDataModule,
    model_config: ModelConfig,
    train_config: TrainConfig,
    settings: EvaluateSettings,
    split: Literal["test", "valid", "train"],
    *,
    accelerator: str,
) -> Collector:
    """Run the weights of `model_config` over a split of the dataset."""
    module = RFDETRModule(model_config, train_config)
    collector = Collector(settings, masks=model_config.segmentation_head)
    trainer = build_trainer(
        train_config,
        model_config,
        accelerator=accelerator,
        devices=1,
        callbacks=[collector],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    datamodule.setup({"test": "test", "valid": "validate", "train": "fit"}[split])
    loaders = {
        "test": datamodule.test_dataloader,
        "valid": datamodule.val_dataloader,
        "train": datamodule.train_dataloader_in_order,
    }
    loader = loaders[split]()
    index: Any = getattr(loader.dataset, "index", None)
    if index is not None:
        first = range(min(settings.pictures, len(index)))
        collector.files = {int(index.image_ids[i]): str(index.names[i]) for i in first}
    trainer.test(module, dataloaders=loader, verbose=False)
    return collector


class Collector(Callback):
    """Collects detections, ground truth, sample images and the time of each batch."""

    def __init__(self, settings: EvaluateSettings, *, masks: bool) -> None:
        self.evaluator = CocoEvaluator(("bbox", "segm") if masks else ("bbox",), settings.max_dets)
        self.samples: list[Sample] = []
        self.files: dict[int, str] = {}  # image id -> file name
        self.device = ""
        self._wanted = settings.pictures
        self._times: list[float] = []
        self._started = 0.0

    @property
    def latency_ms(self) -> float:
        """Median over the batches, per image."""
        return round(1000 * statistics.median(self._times), 3)

    def on_test_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        if not self._times:
            self.device = device_name(module.device)
            with trainer.precision_plugin.test_step_context():
                module.test_step(batch, 0)  # warm-up: first kernels, memory and caches
        synchronize(module.device)
        self._started = time.perf_counter()

    def on_test_batch_end(
        self, _trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        synchronize(module.device)  # or only the kernel launches would be timed
        self._times.append((time.perf_counter() - self._started) / max(1, len(outputs["targets"])))
        self.evaluator.update(outputs["results"], outputs["targets"])
        missing = self._wanted - len(self.samples)
        if missing > 0:
            self.samples += take_samples(batch[0], outputs["targets"], missing, self.files)


def synchronize(device: torch.device) -> None:
    """Wait for everything that was queued on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """A device as latencies are compared by: the model of the GPU, or of the CPU with threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{cpu_name()} with {torch.get_num_threads()} threads"
    return device.type
