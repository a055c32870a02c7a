"""`rfdetr-pipeline labels`: labels of the dataset that are probably wrong."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flows.core.files import write_json
from flows.project.project import Project
from rfdetr.errors import ConfigError

if TYPE_CHECKING:
    from flows.gate.suspected_labels import ScoredLabels

SEEN = {
    "train": "The model was trained on these labels and has learned some of their mistakes: "
    "it finds fewer of them than in data that it has not seen. `--folds 3` scores each third by a "
    "model that was trained without it.",
    "valid": "The best epoch was chosen with these labels, so the model is slightly partial.",
    "test": "",
}

UNSEEN = "Scored by {} models, each trained without the labels that it scored."


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--split", choices=tuple(SEEN), default="test", help="whose labels (default: test)"
    )
    parser.add_argument(
        "--model", type=Path, metavar="FILE", help="weights (default: models/trained)"
    )
    parser.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="train K models, each without the part of the split that it scores (train, valid)",
    )
    parser.add_argument("--limit", type=int, default=200, help="suspects shown (default: 200)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the proposals as a COCO file, which CVAT and Label Studio import",
    )


def review_labels(project: Project, options: argparse.Namespace) -> int:
    """Score the split, and write reports/suspected_labels.html and .json."""
    from flows.gate.suspected_labels import (  # slow imports
        image_files,
        proposals,
        suspected_labels,
        write_page,
    )
    from flows.storage.packs import open_dataset
    from rfdetr.evaluation.suspects import STRONG

    _check(options)
    dataset, split = project.params.dataset, str(options.split)
    root = Path(open_dataset(project.dataset_dir, project.env.state_dir))
    files = image_files(root, dataset, split)
    note = UNSEEN.format(options.folds) if options.folds else SEEN[split]
    scored = _scored(project, options, root)
    suspects = suspected_labels(scored, files, root, options.limit)
    page = project.reports / "suspected_labels.html"
    write_page(page, suspects, root, f"Suspected labels of {dataset.name}, {split} split", note)
    rows = [suspect.model_dump(exclude_none=True) for suspect in suspects]
    write_json(page.with_suffix(".json"), {"split": split, "note": note, "suspects": rows})
    strong = sum(suspect.suspicion >= STRONG for suspect in suspects)
    print(
        f"{len(scored.columns.truth)} labels; of {len(suspects)} suspects, {strong} are strong "
        f"({STRONG} or more); see {page}"
    )
    for suspect in suspects[:10]:
        seen = f" -> {suspect.proposal}" if suspect.proposal else ""
        print(
            f"  {suspect.suspicion:.2f}  {suspect.kind:<12}  {suspect.label or '-'}{seen}  "
            f"{suspect.image}"
        )
    if note:
        print(note)
    if options.out:
        write_json(options.out, proposals(scored, suspects, files))
        print(f"proposals in {options.out}")
    return 0


def _scored(project: Project, options: argparse.Namespace, root: Path) -> ScoredLabels:
    """The labels of the split in the unpacked dataset `root`, and what models detect."""
    from flows.gate.scoring import score_model  # slow imports
    from flows.orchestration.gpus import gpu_of_command
    from flows.stages.evaluate import trained_weights
    from flows.stages.folds import score_folds

    params, split = project.params, options.split
    with gpu_of_command(project, None if options.folds else 1):
        if options.folds:
            return score_folds(project, split, options.folds)
        return score_model(
            options.model or trained_weights(project.trained),
            root,
            params.dataset,
            params.evaluate.model_copy(
                update={"split": split, "pictures": 0, "operating_point": None}
            ),
            accelerator=params.runtime.accelerator,
            num_workers=params.runtime.num_workers,
        )


def _check(options: argparse.Namespace) -> None:
    """Refuse what would fail only after the evaluation. Raises ConfigError."""
    if options.limit < 1:
        raise ConfigError(f"--limit is {options.limit}; it must be at least 1.")
    if options.folds is not None and options.folds < 2:
        raise ConfigError(f"--folds is {options.folds}; it must be at least 2.")
    if options.folds and options.split == "test":
        raise ConfigError(
            "--folds is for --split train and --split valid: the model has not seen the test split."
        )
    if options.folds and options.model:
        raise ConfigError("--folds trains models of its own; leave --model out.")
    if options.out and options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a folder; name a file, such as fixes.json.")
