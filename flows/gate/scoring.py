"""Scores a checkpoint on one split of a dataset, the same way for every model."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.callbacks import Callback

from flows.config.sections import DatasetSettings, EvaluateSettings
from flows.core.quiet import quiet_libraries
from flows.gate.verdict import ClassScore, Scores
from flows.tracking.provenance import cpu_name
from rfdetr.checkpoints.record import CheckpointRecord, read_checkpoint
from rfdetr.checkpoints.structure import infer_config
from rfdetr.config import ModelConfig, TrainConfig, Workers
from rfdetr.data.coco import dataset_categories
from rfdetr.errors import DatasetError
from rfdetr.evaluation import report
from rfdetr.evaluation.box_table import EvaluationData, IouType
from rfdetr.evaluation.evaluator import CocoEvaluator, EvaluationResult, evaluate
from rfdetr.evaluation.evidence import collect_evidence
from rfdetr.evaluation.plots import Sample
from rfdetr.files import sha256_file
from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer
from rfdetr.training.sample_images import take_samples


@dataclasses.dataclass(frozen=True)
class ScoredModel:
    """The results of one model on one split. All labels are those of the dataset.

    `latency_ms` is the median time of a batch, per image, with the device `latency_on`, after a
    warm-up; `size_mb` the file size in 10^6 bytes.
    `settings` is a key of everything that affects the numbers.
    """

    weights_sha256: str
    size_mb: float
    class_names: list[str]
    model_class_names: list[str]
    result: EvaluationResult
    columns: EvaluationData
    samples: list[Sample]
    latency_ms: float
    latency_on: str
    settings: str
    category_ids: dict[int, int]

    def metrics(self) -> dict[str, float]:
        """Named metrics at `max_dets` detections: of boxes, or of masks for segmentation models."""
        part = self.result.segm or self.result.bbox
        assert part is not None
        main = part.summary
        best = self.result.sweep.best
        numbers = {
            "map_50_95": main.ap,
            "map_50": main.ap50,
            "map_75": main.ap75,
            "mar": main.ar,
            "f1": float(self.result.sweep.macro_f1[best]),
            "precision": float(self.result.sweep.macro_precision[best]),
            "recall": float(self.result.sweep.macro_recall[best]),
            "best_threshold": self.result.sweep.best_threshold,
        }
        return {name: float(value) for name, value in numbers.items() if value > -1}

    def per_class(self) -> Iterator[dict[str, Any]]:
        """One row per class of the dataset; AP and AR are None for a class without boxes."""
        part = self.result.segm or self.result.bbox
        assert part is not None
        labels = self.result.class_ids.tolist()
        for k, name in enumerate(report.class_labels(self.class_names, labels)):
            boxes = int(self.result.sweep.positives[k])
            values = {"ap_50_95": part.ap[k], "ap_50": part.ap50[k], "ar": part.ar[k]}
            shown = {key: float(v) if boxes else None for key, v in values.items()}
            yield {"class": name, "label": labels[k], "boxes": boxes, **shown}

    def detections(self, threshold: float = 0.0) -> Iterator[dict[str, Any]]:
        """Detections with a score of at least `threshold`, in the COCO results format."""
        rows = self.columns.detections
        for i in np.flatnonzero(rows.score >= threshold).tolist():
            label = int(rows.label[i])
            row: dict[str, Any] = {
                "image_id": int(self.columns.image_ids[rows.image[i]]),
                "category_id": self.category_ids.get(label, label),
                "bbox": [round(value, 3) for value in rows.box[i].tolist()],
                "score": round(float(rows.score[i]), 6),
            }
            if rows.rle is not None:
                code = rows.rle[i]
                row["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
            yield row

    def scores(self, model: str, dataset_sha256: str) -> Scores:
        """The record that the gate compares."""
        kind: IouType = "bbox" if self.result.segm is None else "segm"
        part = self.result.segm or self.result.bbox
        assert part is not None
        classes = {
            row["class"]: ClassScore(ap=row["ap_50_95"], boxes=row["boxes"])
            for row in self.per_class()
            if row["boxes"]
        }
        return Scores(
            model=model,
            weights_sha256=self.weights_sha256,
            dataset_sha256=dataset_sha256,
            settings=self.settings,
            iou_type=kind,
            class_names=tuple(self.model_class_names),
            images=self.result.images,
            metrics=self.metrics(),
            per_class=classes,
            latency_ms=self.latency_ms,
            latency_on=self.latency_on,
            size_mb=self.size_mb,
            evidence=collect_evidence(
                self.columns,
                self.result.class_ids.tolist(),
                iou_type=kind,
                max_dets=part.summary.max_dets,
            ),
        )


def score_model(
    weights: str | Path,
    dataset_dir: str | Path,
    dataset: DatasetSettings,
    settings: EvaluateSettings,
    *,
    accelerator: str = "auto",
    num_workers: Workers = 0,
) -> ScoredModel:
    """Evaluate the checkpoint `weights` (any supported format) on a split.

    `dataset_dir` is the unpacked dataset. Classes of the model are matched with those of the
    dataset by name; detections of other classes are dropped. Raises CheckpointError or
    DatasetError.
    """
    quiet_libraries()
    record = read_checkpoint(weights, mmap=True)
    model_config = infer_config(record, pretrain_weights=str(weights))
    train_config = TrainConfig.model_validate(
        {
            "dataset_dir": str(dataset_dir),
            "dataset_file": dataset.layout,
            "output_dir": str(Path(weights).parent),
            "batch_size": settings.batch_size,
            "num_workers": num_workers,
            "tensorboard": False,
            "compute_test_loss": False,
        }
    )
    datamodule = RFDETRDataModule(model_config, train_config)
    collector = _run(datamodule, model_config, train_config, settings, accelerator)
    names = datamodule.class_names or []
    columns = collector.evaluator.state()
    if not len(columns.truth):
        raise DatasetError(f"The {settings.split} split of {dataset_dir} has no boxes.")
    table = label_table(record, names)
    columns = relabel(columns, table)
    types: tuple[IouType, ...] = ("bbox", "segm") if model_config.segmentation_head else ("bbox",)
    labels = [*report.named_labels(names), *columns.truth.label.tolist()]
    result = evaluate(columns, labels, iou_types=types, max_dets=settings.max_dets, mask_areas=True)
    return ScoredModel(
        weights_sha256=sha256_file(weights),
        size_mb=round(Path(weights).stat().st_size / 1e6, 3),
        class_names=names,
        model_class_names=list(record.class_names or names),
        result=result,
        columns=columns,
        samples=collector.samples,
        latency_ms=collector.latency_ms,
        latency_on=f"{collector.device}, batches of {settings.batch_size}",
        settings=settings.key(),
        category_ids=dataset_categories(dataset_dir, dataset.layout, settings.split),
    )


def label_table(record: CheckpointRecord, names: list[str]) -> dict[int, int]:
    """Model label -> dataset label, by name; models without names use the dataset's labels.

    Warns if there is no common class: such a model scores 0, which the gate then judges.
    """
    own = record.class_names
    if not own:
        return {label: label for label in range(len(names))}
    known = {name: label for label, name in enumerate(names)}
    offset = record.label_offset
    table = {i + offset: known[name] for i, name in enumerate(own) if name in known}
    if not table:
        warnings.warn(
            f"{record.path} knows the classes {', '.join(own[:8])}; the dataset has "
            f"{', '.join(names[:8])}: no class in common, every score is 0.",
            UserWarning,
            stacklevel=2,
        )
    return table


def relabel(columns: EvaluationData, table: dict[int, int]) -> EvaluationData:
    """The detections with labels of the dataset; detections of other classes are dropped."""
    rows = columns.detections
    mapped = np.array([table.get(label, -1) for label in rows.label.tolist()], dtype=np.int64)
    rows = dataclasses.replace(rows, label=mapped).take(mapped >= 0)
    return dataclasses.replace(columns, detections=rows)


def _run(
    datamodule: RFDETRDataModule,
    model_config: ModelConfig,
    train_config: TrainConfig,
    settings: EvaluateSettings,
    accelerator: str,
) -> _Collector:
    module = RFDETRModule(model_config, train_config)
    collector = _Collector(settings, masks=model_config.segmentation_head)
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
    datamodule.setup("test" if settings.split == "test" else "validate")
    loader = (
        datamodule.test_dataloader() if settings.split == "test" else datamodule.val_dataloader()
    )
    index: Any = getattr(loader.dataset, "index", None)
    if index is not None:
        first = range(min(settings.pictures, len(index)))
        collector.files = {int(index.image_ids[i]): str(index.names[i]) for i in first}
    trainer.test(module, dataloaders=loader, verbose=False)
    return collector


class _Collector(Callback):
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
