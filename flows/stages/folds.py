"""Out-of-sample scores of a split by k models: each is trained without the part that it scores.

A fold is a dataset folder of its own in the state folder: annotation files or lists that name the
images of the dataset, with the fold as its test split. Its training is that of the stage `fit`,
with the same settings, so it is resumed in the same way and never repeated.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from flows.config.sections import DatasetSettings
from flows.core.digest import digest_of
from flows.core.files import read_object, write_json
from flows.fit_job.job import FitJob
from flows.project.project import Project
from flows.stages.fit import plan, trained
from flows.stages.validate import require_valid
from rfdetr.arrays import Integers
from rfdetr.data.coco import CocoSplits
from rfdetr.data.data_yaml import read_data_yaml
from rfdetr.data.index import AnnotationIndex
from rfdetr.data.layouts import ANNOTATIONS, YAML_NAMES, Layout, detect_layout
from rfdetr.data.yolo import YoloSplits, image_files
from rfdetr.errors import ConfigError
from rfdetr.evaluation.box_table import EvaluationData, concatenate
from rfdetr.files import new_folder, write_text_atomic

SPLITS = {"train": "train", "valid": "val"}


@dataclasses.dataclass(frozen=True)
class FoldScores:
    """Labels of a split, and detections by models that were not trained on them."""

    class_names: list[str]
    columns: EvaluationData


def score_folds(project: Project, split: Literal["train", "valid"], folds: int) -> FoldScores:
    """Train the models that are not trained yet, and score each fold.

    Raises ConfigError if the split has fewer images with boxes than folds, and what the stage
    `fit` raises.
    """
    from flows.gate.scoring import score_model  # slow imports

    require_valid(project)
    job, params = plan(project), project.params
    layout = detect_layout(job.train["dataset_dir"], params.dataset.layout)
    index = _index(layout, SPLITS[split])
    fold_of = assign(index, folds)
    _say_cost(project, folds)
    settings = params.evaluate.model_copy(
        update={"split": "test", "pictures": 0, "operating_point": None}
    )
    parts, names = [], []
    for number in range(folds):
        held = np.flatnonzero(fold_of == number)
        own = _job(project, job, f"{split}-{number + 1}-of-{folds}")
        folder = Path(own.train["dataset_dir"])
        with new_folder(folder) as place:
            write_fold(layout, SPLITS[split], index, held, place)
        print(f"fold {number + 1} of {folds}: {len(held)} images held out", flush=True)
        with trained(project, own) as state:
            for checkpoint in state.folder.glob("*.ckpt"):  # only the best weights are needed
                checkpoint.unlink()
            scored = score_model(
                state.folder / "checkpoint_best_total.pth",
                folder,
                DatasetSettings(name=params.dataset.name, dir=str(folder), layout=_kind(layout)),
                settings,
                accelerator=params.runtime.accelerator,
                num_workers=params.runtime.num_workers,
            )
        names, columns = scored.class_names, scored.columns
        if layout.kind == "yolo":  # there an image is known by its position
            ids = index.image_ids[held][columns.image_ids]
            columns = dataclasses.replace(columns, image_ids=ids)
        parts.append(columns)
    return FoldScores(names, concatenate(parts))


def assign(index: AnnotationIndex, folds: int) -> Integers:
    """The fold (I,) of each image: at random, images with and without boxes in equal shares."""
    boxes = np.diff(index.first)
    if folds > (boxes > 0).sum():
        raise ConfigError(
            f"--folds is {folds}, but only {(boxes > 0).sum()} images of the split have boxes."
        )
    order = np.random.default_rng(0).permutation(len(boxes))
    order = order[np.argsort(boxes[order] == 0, kind="stable")]
    fold = np.empty(len(boxes), dtype=np.int64)
    fold[order] = np.arange(len(boxes)) % folds
    return fold


def _index(layout: Layout, name: str) -> AnnotationIndex:
    if layout.kind == "yolo":
        return YoloSplits(layout).index(name)
    return CocoSplits(layout).index(name)


def _kind(layout: Layout) -> Literal["roboflow", "coco"]:
    return "coco" if layout.kind == "coco" else "roboflow"  # which also reads YOLO


def _job(project: Project, job: FitJob, name: str) -> FitJob:
    """The training of one fold; its run is in an experiment beside that of the dataset."""
    digest = digest_of([job.dataset["digest"], name])
    folder = project.env.state_dir / "folds" / digest[:24]
    layout = detect_layout(job.train["dataset_dir"], project.params.dataset.layout)
    dataset = {**job.dataset, "name": f"{job.dataset['name']}-folds", "digest": digest}
    train = {**job.train, "dataset_dir": str(folder), "dataset_file": _kind(layout)}
    return job.model_copy(
        update={"train": train, "dataset": dataset, "run_name": f"{job.run_name}-{name}"}
    )


def write_fold(
    layout: Layout, split: str, index: AnnotationIndex, held: Integers, folder: Path
) -> None:
    """Write the dataset without the images `held` of `split`, which become its test split."""
    if layout.kind == "yolo":
        _write_yolo(layout, split, index, set(held.tolist()), folder)
        return
    ids = set(index.image_ids[held].tolist())
    for name in SPLITS.values():
        source = layout.require(name)
        assert source.annotations is not None
        document = orjson.loads(source.annotations.read_bytes())
        for image in document["images"]:
            image["file_name"] = str(source.images[0] / image["file_name"])
        if name != split:
            _write_coco(layout, name, document, folder)
            continue
        for target, inside in ((name, False), ("test", True)):
            kept = [image for image in document["images"] if (image["id"] in ids) is inside]
            rows = [row for row in document["annotations"] if (row["image_id"] in ids) is inside]
            part = {**document, "images": kept, "annotations": rows}
            _write_coco(layout, target, part, folder)


def _write_coco(layout: Layout, name: str, document: dict[str, Any], folder: Path) -> None:
    target = folder / {"val": "valid"}.get(name, name) / ANNOTATIONS
    if layout.kind == "coco":
        target = folder / "annotations" / f"instances_{name}2017.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, document)


def _write_yolo(
    layout: Layout, split: str, index: AnnotationIndex, held: set[int], folder: Path
) -> None:
    """A data.yaml (JSON is YAML) with one list of images per split."""
    assert layout.yaml_file is not None
    lists: dict[str, list[Path]] = {
        name: list(image_files(layout.require(name))) for name in SPLITS.values()
    }
    every = [index.path(number) for number in range(len(index))]
    lists[split] = [path for number, path in enumerate(every) if number not in held]
    lists["test"] = [path for number, path in enumerate(every) if number in held]
    content: dict[str, Any] = {"names": list(layout.names)}
    if shape := read_data_yaml(layout.yaml_file).get("kpt_shape"):
        content["kpt_shape"] = shape
    for name, paths in lists.items():
        write_text_atomic(folder / f"{name}.txt", "".join(f"{path}\n" for path in paths))
        content[name] = f"{name}.txt"
    write_text_atomic(folder / YAML_NAMES[0], json.dumps(content))


def _say_cost(project: Project, folds: int) -> None:
    epochs = project.params.fit.epochs
    text = f"{folds} trainings of {epochs} epochs, each on the other {folds - 1} of {folds} parts"
    if project.fit_metrics.is_file():
        seconds = float(read_object(project.fit_metrics, "seconds")["seconds"]) * (folds - 1)
        text += f"; about {max(1, round(seconds / 60))} min, as the last training took"
    print(f"{text}. Run the same command again to resume.", flush=True)
