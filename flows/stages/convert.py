"""The stage `convert`: starting weights of any origin as a checkpoint of this project, verified."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from flows.config.sections import ConvertSettings, ModelSettings
from flows.core.digest import digest_of
from flows.core.files import copy_atomic, write_json
from flows.project.project import Project
from flows.stages.runner import run_stage
from flows.storage.objects import download
from flows.storage.s3 import is_s3
from rfdetr.checkpoints.record import CheckpointRecord, read_checkpoint
from rfdetr.checkpoints.structure import infer_config, structure_mismatch
from rfdetr.config import MODEL_CONFIGS
from rfdetr.errors import CheckpointError, DownloadError
from rfdetr.files import new_folder, sha256_file

SECTIONS = ["model", "convert"]
WEIGHTS, CARD = "model.ckpt", "model.json"
TRACKED = Path("weights")


def convert(project: Project) -> None:
    """Write models/initial: model.ckpt, and model.json with the result of the verification.

    Raises CheckpointError if the file is damaged, unsafe, or belongs to another network, and
    DownloadError or StorageError if it cannot be fetched.
    """
    params, initial = project.params, project.initial
    source = params.convert.source
    with new_folder(initial) as folder:
        target = folder / WEIGHTS
        if source is None:
            card = _from_scratch(params.model, params.convert, target)
        else:
            card = _from_file(_locate(source, project), source, project, target)
        card = {"weights": WEIGHTS, "weights_sha256": sha256_file(target), "source": source} | card
        write_json(folder / CARD, card | {"variant": params.model.variant})
    print(f"{initial / WEIGHTS}: {card['proof']['summary']}", flush=True)


def _locate(source: str, project: Project) -> Path:
    """The local file for a path, an s3:// address or a published name."""
    from rfdetr.checkpoints.download import resolve_weights

    if is_s3(source):
        name = source.rsplit("/", 1)[-1]
        target = project.env.state_dir / "downloads" / digest_of(source)[:16] / name
        return download(source, target, progress=sys.stderr.isatty())
    path = Path(source)
    if path.exists() and TRACKED.resolve() not in path.resolve().parents:
        print(
            f"warning: convert.source {source} is outside {TRACKED}/, so DVC does not notice when "
            f"it changes. Move it there, or run `dvc repro --force convert` after a change.",
            file=sys.stderr,
        )
    try:
        return resolve_weights(source)
    except FileNotFoundError as error:
        raise CheckpointError(f"convert.source: {error}") from error
    except DownloadError as error:
        raise DownloadError(
            f"convert.source: {error} A path to a downloaded file works too, and "
            "`convert: {source: null}` trains from scratch."
        ) from error


def _from_file(path: Path, source: str, project: Project, target: Path) -> dict[str, Any]:
    from rfdetr.checkpoints.convert import convert_legacy_checkpoint

    params = project.params
    old = read_checkpoint(path, mmap=True)
    problem = structure_mismatch(old, params.model.config())
    if problem:
        raise CheckpointError(
            f"convert.source {source} does not fit the model section: {problem}\n"
            + _ways_out(old, params.model)
        )
    card = _about(old) | {"source_sha256": sha256_file(path)}
    if old.kind == "lightning":
        copy_atomic(path, target)
        proof: dict[str, Any] = {
            "max_abs_difference": 0.0,
            "summary": f"{source} is already in this project's format and was copied unchanged.",
        }
        return card | {"proof": proof}
    report = convert_legacy_checkpoint(path, target)
    if not report.max_abs_difference <= params.convert.tolerance:
        raise CheckpointError(
            f"The converted network gives different results: {report.summary} "
            f"convert.tolerance is {params.convert.tolerance:g}."
        )
    facts = dataclasses.asdict(report) | {
        "old_path": source,
        "new_path": str(project.initial / WEIGHTS),
    }
    summary = report.summary.partition(": ")[2]
    return card | {"proof": facts | {"summary": summary}}


def _ways_out(old: CheckpointRecord, model: ModelSettings) -> str:
    """The parameters that keep the model section, and those that keep the checkpoint."""
    published = MODEL_CONFIGS[model.variant].model_fields["pretrain_weights"].default
    changed = sorted(model.model_dump(exclude={"variant"}, exclude_none=True))
    fields = f" without {', '.join(changed)}" if changed else ""
    ways = [
        f"To train {model.variant}{fields}: `convert: {{source: {published}}}` (published weights) "
        "or `convert: {source: null}` (from scratch)."
    ]
    with contextlib.suppress(CheckpointError):  # of a structure that no configuration describes
        ways.append(f"To keep the checkpoint: `model: {_section_of(old)}`.")
    return "\n".join(f"- {way}" for way in ways)


def _section_of(old: CheckpointRecord) -> str:
    """The model section that fits a checkpoint: its variant, and the fields that differ from it."""
    config = infer_config(old)
    usual = MODEL_CONFIGS[config.variant].model_validate({"pretrain_weights": None})
    names = set(ModelSettings.model_fields) - {"positional_encoding_size"}
    fields = {
        name: value for name, value in config if name in names and value != getattr(usual, name)
    }
    text = json.dumps({"variant": config.variant, **fields})
    return text.replace('"', "")


def _from_scratch(model: ModelSettings, settings: ConvertSettings, target: Path) -> dict[str, Any]:
    """Random weights from the seed, with the public encoder if it fits and can be downloaded."""
    import torch

    from rfdetr.checkpoints.best_file import best_payload
    from rfdetr.checkpoints.convert import as_lightning_checkpoint
    from rfdetr.checkpoints.pretrained import initialise_weights
    from rfdetr.checkpoints.safe_io import save_file
    from rfdetr.model.network import build_network

    config = model.config()
    torch.manual_seed(settings.seed)
    network = build_network(config)
    report = initialise_weights(network, config)
    payload = best_payload(network.state_dict(), config)
    save_file(as_lightning_checkpoint(payload, "The file of initial weights"), target)
    encoder = "" if report is None else f", encoder from {report.path}"
    summary = f"random initial weights of seed {settings.seed}{encoder}."
    return _about(read_checkpoint(target, mmap=True)) | {
        "kind": "scratch",
        "source_sha256": None,
        "proof": {"max_abs_difference": 0.0, "summary": summary},
    }


def _about(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "kind": record.kind,
        "num_classes": record.num_classes,
        "class_names": record.class_names,
        "epoch": record.epoch,
    }


if __name__ == "__main__":
    raise SystemExit(run_stage("convert", SECTIONS, convert, sys.argv[1:]))
