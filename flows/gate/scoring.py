"""Scores a checkpoint on one split of a dataset, the same way for every model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from flows.config.sections import DatasetSettings, EvaluateSettings
from flows.core.quiet import quiet_libraries
from flows.gate.scored_model import ScoredModel
from flows.gate.slice_images import images_of, scored_split
from flows.gate.split_run import Collector, run_split
from rfdetr.arrays import Bools
from rfdetr.checkpoints.record import CheckpointRecord, read_checkpoint
from rfdetr.checkpoints.structure import infer_config
from rfdetr.config import TrainConfig, Workers
from rfdetr.data.coco import dataset_categories
from rfdetr.data.layouts import detect_layout
from rfdetr.errors import ConfigError, DatasetError, InputError
from rfdetr.evaluation import report
from rfdetr.evaluation.box_table import BoxTable, EvaluationData, IouType
from rfdetr.evaluation.evaluator import EvaluationResult, evaluate
from rfdetr.evaluation.evidence import EVERY_AREA, MatchEvidence, evidence_by_area
from rfdetr.evaluation.operating_point import OperatingPoint, choose_point
from rfdetr.evaluation.slice_rules import SliceRule
from rfdetr.evaluation.slices import Slice, area_ranges, score_slices
from rfdetr.files import sha256_file
from rfdetr.training import RFDETRDataModule

Split = Literal["test", "valid", "train"]


def score_model(
    weights: str | Path,
    dataset_dir: str | Path,
    dataset: DatasetSettings,
    settings: EvaluateSettings,
    *,
    slices: Sequence[SliceRule] = (),
    accelerator: str = "auto",
    num_workers: Workers = 0,
) -> ScoredModel:
    """Evaluate the checkpoint `weights` (any supported format) on a split.

    `dataset_dir` is the unpacked dataset. Classes of the model are matched with those of the
    dataset by name; detections of other classes are dropped. With `settings.operating_point`, the
    validation split is run too. Raises CheckpointError or DatasetError, and ConfigError for a slice
    rule that does not fit the dataset.
    """
    quiet_libraries()
    scorer = _Scorer(
        weights, dataset_dir, dataset, settings, accelerator=accelerator, num_workers=num_workers
    )
    collector, columns, result = scorer.run(settings.split)
    point, accepted = None, None
    if settings.operating_point is not None:
        point = scorer.choose(settings.operating_point, columns, result)
        accepted = point.accepts(columns.detections.label, columns.detections.score)
    evidence, *by_area = scorer.evidence(columns, result, accepted, area_ranges(slices))
    return ScoredModel(
        weights_sha256=sha256_file(weights),
        size_mb=round(Path(weights).stat().st_size / 1e6, 3),
        class_names=scorer.names,
        model_class_names=list(scorer.record.class_names or scorer.names),
        result=result,
        columns=columns,
        samples=collector.samples,
        latency_ms=collector.latency_ms,
        latency_on=f"{collector.device}, batches of {settings.batch_size}",
        settings=settings.key(slices),
        category_ids=dataset_categories(dataset_dir, dataset.layout, settings.split),
        evidence=evidence,
        slices=scorer.slices(slices, evidence, by_area),
        point=point,
        model_point=point and scorer.for_model(point),
        chosen_here=point is not None and scorer.chosen_here,
    )


class _Scorer:
    """One model and one dataset, whose splits are run and matched."""

    def __init__(
        self,
        weights: str | Path,
        dataset_dir: str | Path,
        dataset: DatasetSettings,
        settings: EvaluateSettings,
        *,
        accelerator: str,
        num_workers: Workers,
    ) -> None:
        self.dataset_dir, self.dataset, self.settings = Path(dataset_dir), dataset, settings
        self.accelerator = accelerator
        self.record = read_checkpoint(weights, mmap=True)
        self.model_config = infer_config(self.record, pretrain_weights=str(weights))
        self.train_config = TrainConfig.model_validate(
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
        self.datamodule = RFDETRDataModule(self.model_config, self.train_config)
        self.names: list[str] = []
        self.labels: dict[int, int] = {}  # model label -> dataset label
        self.kind: IouType = "segm" if self.model_config.segmentation_head else "bbox"

    def run(self, split: Split) -> tuple[Collector, EvaluationData, EvaluationResult]:
        """Run the model over a split and evaluate it, with labels of the dataset."""
        configs = (self.datamodule, self.model_config, self.train_config)
        collector = run_split(*configs, self.settings, split, accelerator=self.accelerator)
        columns = collector.evaluator.state()
        if columns.truth.crowd.all():
            only = "only crowd regions" if len(columns.truth) else "no boxes"
            raise DatasetError(f"The {split} split of {self.dataset_dir} has {only}.")
        if not self.labels:
            self.names = self.datamodule.class_names or []
            self.labels = label_table(self.record, self.names)
        columns = relabel(columns, self.labels)
        types: tuple[IouType, ...] = ("bbox", "segm") if self.kind == "segm" else ("bbox",)
        labels = [*report.named_labels(self.names), *columns.truth.label.tolist()]
        most = self.settings.max_dets
        result = evaluate(columns, labels, iou_types=types, max_dets=most, mask_areas=True)
        return collector, columns, result

    def evidence(
        self,
        columns: EvaluationData,
        result: EvaluationResult,
        accepted: Bools | None = None,
        areas: Sequence[tuple[float, float]] = (),
    ) -> list[MatchEvidence]:
        """The matches of all boxes, and those of each range of `areas`.

        Without an operating point, `accepted` is from the best F1 on.
        """
        if accepted is None:
            score = columns.detections.score.astype(np.float32).astype(np.float64)
            accepted = score >= result.sweep.best_threshold
        if areas and self.kind == "segm":
            detections: BoxTable = columns.detections.with_mask_areas()
            columns = dataclasses.replace(columns, detections=detections)
        return evidence_by_area(
            columns,
            result.class_ids.tolist(),
            [EVERY_AREA, *areas],
            iou_type=self.kind,
            max_dets=self.settings.max_dets,
            accepted=accepted,
        )

    def choose(
        self, target: str, columns: EvaluationData, result: EvaluationResult
    ) -> OperatingPoint:
        """The operating point, chosen on the validation split."""
        if not self.chosen_here:
            _, columns, result = self.run("valid")
        labels = result.class_ids.tolist()
        names = report.class_labels(self.names, labels)
        return choose_point(self.evidence(columns, result)[0], labels, names, target, "valid")

    @property
    def chosen_here(self) -> bool:
        """Whether the split that is scored is the one that operating points are chosen on."""
        if self.settings.split == "test":
            return scored_split(detect_layout(self.dataset_dir, self.dataset.layout)) == "val"
        return self.settings.split == "valid"

    def for_model(self, point: OperatingPoint) -> OperatingPoint:
        """The point for the labels of the model, also of classes that the dataset lacks."""
        return point.relabelled(self.labels, self.own_names())

    def own_names(self) -> dict[int, str]:
        """Label -> name of every class of the model."""
        own = self.record.class_names or self.names
        offset = self.record.label_offset if self.record.class_names else 0
        return {number + offset: name for number, name in enumerate(own)}

    def slices(
        self,
        rules: Sequence[SliceRule],
        evidence: MatchEvidence,
        by_area: Sequence[MatchEvidence],
    ) -> dict[str, Slice]:
        """The numbers of each slice of the split that was evaluated."""
        if not rules:
            return {}
        try:
            images = images_of(self.dataset_dir, self.dataset, self.settings.split, rules)
            return score_slices(rules, images, evidence, by_area)
        except InputError as error:
            raise ConfigError(f"{error}.") from None


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
