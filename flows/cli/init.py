"""`rfdetr-pipeline init`: sets the project up for someone's own dataset."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.cli.commands import project_here
from flows.cli.import_data import split_options
from flows.config.params import PARAMS_FILE, parse_params
from flows.config.starter import (
    Choices,
    DatasetFacts,
    choose,
    published_weights,
    starter_text,
)
from flows.core.errors import OK
from flows.core.files import parse_yaml
from flows.project.project import Project
from rfdetr.config import MODEL_CONFIGS
from rfdetr.errors import ConfigError
from rfdetr.files import write_text_atomic

DEMO_FOLDER = "data/demo"
KEPT = ("runtime", "sources", "demo")  # sections that do not belong to the dataset


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("data", type=Path, metavar="DATA", help="folder or zip of the dataset")
    parser.add_argument(
        "--variant", choices=MODEL_CONFIGS, help="size of the network (default: medium)"
    )
    parser.add_argument("--name", help="of the dataset and the model (default: the folder's)")
    parser.add_argument(
        "--weights",
        help="starting weights: a file, a published name, or none (default: the variant's)",
    )
    split_options(parser)
    parser.add_argument(
        "--force", action="store_true", help="replace changed parameters and copied data"
    )


def init_command(options: argparse.Namespace) -> int:
    """Take the dataset in, write params.yaml, and print what was chosen and what to run next."""
    from flows.project import adopt
    from rfdetr.importers import Shares

    source, weights = _from_here(options)
    project = project_here()
    name = adopt.dataset_name(options.name, source)
    before = _Former(project)
    before.require_replaceable(name, force=options.force)
    shares = Shares.parse(options.split) if options.split else None
    adopted = adopt.adopt(
        project,
        source,
        name,
        shares=shares,
        seed=options.seed,
        force=options.force,
        progress=sys.stderr.isatty(),
    )
    facts = adopted.facts
    variant = options.variant or "medium"
    if MODEL_CONFIGS[variant].model_fields["segmentation_head"].default and not facts.masks:
        raise ConfigError(f"{variant} learns masks, and {facts.dir} has boxes only: use medium.")
    chosen = choose(facts, variant, _weights(weights, variant, project.root))
    text = starter_text(facts, chosen, before.kept())
    parse_params(parse_yaml(text, origin=PARAMS_FILE))
    kept = before.replace(text, force=options.force)
    project.reload()
    tracked = adopt.track(project, facts.dir)
    print("\n".join(_told(facts, chosen, told=f"{adopted.told}; {tracked}", kept=kept)))
    for line in _warnings(facts, chosen, masks_possible=options.variant is None):
        print(f"note     {line}")
    print("next:    rfdetr-pipeline validate    # then look at reports/validation.html")
    print("         rfdetr-pipeline retrain")
    return OK


def _from_here(options: argparse.Namespace) -> tuple[Path, str | None]:
    """The folder and the weights as paths that stay valid in another current folder."""
    if str(options.data).startswith("s3:"):
        raise ConfigError(
            "init takes a folder or a zip. Name a dataset on S3 under `sources` in params.yaml: "
            '`sources: {mine: {uri: "s3://bucket/mine"}}` and `dataset: {dir: data/mine}`.'
        )
    weights = options.weights
    if weights is not None and Path(weights).is_file():
        weights = str(Path(weights).absolute())
    return Path(os.path.normpath(options.data.absolute())), weights


class _Former:
    """The params.yaml that is replaced."""

    def __init__(self, project: Project) -> None:
        self.file = project.params_file
        try:
            self.text = self.file.read_text("utf-8") if self.file.exists() else ""
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self.file} is not UTF-8 text ({error}). Restore it with `git checkout "
                f"{self.file.name}`, or move it away: `init` writes a new one."
            ) from None
        try:
            data = parse_yaml(self.text, origin=str(self.file))
        except ConfigError:
            data = None
        self.data: Mapping[str, Any] = data if isinstance(data, dict) else {}
        dataset = self.data.get("dataset")
        self.dataset: Mapping[str, Any] = dataset if isinstance(dataset, dict) else {}

    @property
    def replaceable(self) -> bool:
        """Whether nothing of the user's is lost: the demo's parameters, or none."""
        demo = os.path.normpath(str(self.dataset.get("dir"))) == DEMO_FOLDER
        return not self.text.strip() or demo

    def require_replaceable(self, name: str, *, force: bool) -> None:
        """Raise ConfigError before any work if the file belongs to another dataset."""
        other = self.dataset.get("name")
        if not (force or self.replaceable or other == name):
            raise ConfigError(
                f"{self.file} is set up for the dataset {other}. --force writes new parameters and "
                f"keeps these as {self.backup().name}."
            )

    def kept(self) -> dict[str, Any]:
        """The sections that the new file keeps."""
        return {name: self.data[name] for name in KEPT if isinstance(self.data.get(name), dict)}

    def replace(self, text: str, *, force: bool) -> Path | None:
        """Write the new file and return the copy of the previous one, None if nothing was lost."""
        if text == self.text:
            return None
        if not (force or self.replaceable):
            raise ConfigError(
                f"{self.file} was changed after `init`, or the data or the options differ; nothing "
                f"was written. --force writes new parameters and keeps these as "
                f"{self.backup().name}. New data needs no `init`: `dvc add` it and retrain."
            )
        if not self.text.strip():
            write_text_atomic(self.file, text)
            return None
        backup = self.backup()
        write_text_atomic(backup, self.text)
        write_text_atomic(self.file, text)
        return backup

    def backup(self) -> Path:
        """A free name beside params.yaml, or the one that has this text already."""
        name = str(self.dataset.get("name") or "before")
        safe = "".join(c for c in name if c.isalnum() or c in "._-").strip(".") or "before"
        number = 1
        while True:
            end = "" if number == 1 else f"-{number}"
            file = self.file.with_name(f"params.{safe}{end}.yaml")
            if not file.exists() or file.read_bytes() == self.text.encode():
                return file
            number += 1


def _weights(given: str | None, variant: str, root: Path) -> str | None:
    """The value of convert.source: files of the project by their path in it."""
    if given is None:
        return published_weights(variant)
    if Path(given).is_relative_to(root):
        return Path(given).relative_to(root).as_posix()
    if given.lower() in ("none", "null"):
        return None
    from rfdetr.checkpoints.download import PUBLISHED

    if given in PUBLISHED or given.startswith("s3://") or Path(given).is_file():
        return given
    raise ConfigError(
        f"--weights {given}: no such file, and not a published name ({', '.join(PUBLISHED)})."
    )


def _told(facts: DatasetFacts, chosen: Choices, *, told: str, kept: Path | None) -> list[str]:
    """What was read and chosen, one line per subject."""
    counts = ", ".join(
        f"{split} {count} images with {facts.objects[split]} objects"
        for split, count in facts.images.items()
    )
    names = ", ".join(facts.class_names[:8]) + (", ..." if len(facts.class_names) > 8 else "")
    first, *more = told.split("\n")
    way = "fine-tuning" if chosen.source else "training from scratch"
    lines = [f"data     {facts.dir} ({facts.layout}): {first}", *(f"         {m}" for m in more)]
    lines += [
        f"splits   {counts}",
        f"classes  {len(facts.class_names)}: {names}",
        f"model    {chosen.variant}, {chosen.resolution} pixels, starting from "
        f"{chosen.source or 'scratch'}",
        f"fit      up to {chosen.epochs} epochs of {chosen.steps_per_epoch} steps with "
        f"{chosen.effective_batch_size} images, learning rates for {way}; EMA, multi-scale, early "
        "stopping",
        f"gate     mAP 50-95 on the {facts.test_images} images of {facts.test_split}",
        f"registry {facts.name}: one registered model per dataset (registry.name changes it)",
    ]
    if kept is not None:
        back = f"cp {shlex.quote(kept.name)} {PARAMS_FILE}"
        lines.append(f"kept     the previous parameters as {kept.name} (`{back}` restores them)")
    lines.append(f"wrote    {PARAMS_FILE}: every value there has its reason")
    return lines


def _warnings(facts: DatasetFacts, chosen: Choices, *, masks_possible: bool) -> list[str]:
    """What may go wrong later, told now."""
    from flows.orchestration.gpus import visible_gpus
    from rfdetr.checkpoints.download import PUBLISHED, unavailable

    lines = []
    if chosen.source in PUBLISHED and (problem := unavailable(str(chosen.source))):
        lines.append(
            f"{problem} Or run this again with --weights FILE, or --weights none (from scratch)."
        )
    if masks_possible and facts.masks > 0.5:
        lines.append("objects have outlines: --variant seg-medium trains masks as well as boxes")
    if not visible_gpus():
        smaller = "" if chosen.variant == "nano" else "--variant nano --force, then "
        lines.append(
            f"no GPU: {chosen.variant} on a CPU takes seconds per image and step. For a trial: "
            f"{smaller}`rfdetr-pipeline retrain --set fit.epochs=1`"
        )
    if facts.images.get("train", 0) < 20:
        lines.append("fewer than 20 training images: good for a trial, not for a model")
    if facts.test_images < 50:
        lines.append(
            f"{facts.test_images} test images: the gate accepts them (gate.min_images), but small "
            "differences are chance"
        )
    return lines
