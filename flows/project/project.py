"""The project folder of a process: its parameters, its environment, and where its outputs are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flows.config.environment import Environment
from flows.config.overrides import write_overrides
from flows.config.params import PARAMS_FILE, Params, load_params, read_graph
from flows.core.digest import path_digest
from flows.core.files import read_object
from flows.tracking.provenance import Provenance, collect_provenance
from rfdetr.data.text import read_text
from rfdetr.errors import ConfigError
from rfdetr.evaluation.slice_rules import SliceRule, parse_rule, read_listed
from rfdetr.tracking.client import local_store

CARD = {"weights", "weights_sha256", "dataset", "class_names", "variant", "resolution", "epochs"}


class Project:
    """One project folder: made once per process, at the command line, and passed down.

    params.yaml, dvc.yaml and git are read on first use and kept. Paths start with `root`; a stage,
    which DVC starts in the project folder, uses the relative root `Path()`.
    """

    def __init__(self, root: Path = Path(), env: Environment | None = None) -> None:
        self.root = root
        self.env = env or Environment.read()

    @cached_property
    def params(self) -> Params:
        """The checked params.yaml. Raises ConfigError that lists all mistakes."""
        return load_params(self.params_file)

    @cached_property
    def graph(self) -> dict[str, Any]:
        """The stages of dvc.yaml."""
        return read_graph(self.graph_file)

    @cached_property
    def provenance(self) -> Provenance:
        """Git commit, uncommitted changes, packages and hardware."""
        return collect_provenance(self.root)

    @cached_property
    def slices(self) -> tuple[SliceRule, ...]:
        """The rules of `slices`, with their list files read.

        A list file is relative to the project folder, or else to the dataset folder. Raises
        ConfigError that names every one that is missing or unreadable.
        """
        rules, problems = [], []
        for name, text in self.params.slices.items():
            rule = parse_rule(name, text)
            if rule.kind == "file":
                places = (self.root / rule.value, self.dataset_dir / rule.value)
                file = next((place for place in places if place.is_file()), None)
                if file is None:
                    problems.append(f"slices.{name}: neither {places[0]} nor {places[1]} exists.")
                    continue
                try:
                    listed = read_listed(read_text(file), self.dataset_dir)
                except OSError as error:
                    reason = error.strerror or error
                    problems.append(f"slices.{name}: {file} cannot be read: {reason}.")
                    continue
                except UnicodeError as error:
                    problems.append(f"slices.{name}: {file} is {error}.")
                    continue
                rule = dataclasses.replace(rule, listed=listed)
            rules.append(rule)
        if problems:
            raise ConfigError("\n".join([*problems, "Write one image path per line in the file."]))
        return tuple(rules)

    def override(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Write changes into params.yaml. Raises ConfigError and writes nothing if one is wrong."""
        write_overrides(self.root, changes)
        for name in ("params", "slices"):
            self.__dict__.pop(name, None)

    def reload(self) -> None:
        """Forget what was read, after a checkout has changed the files."""
        for name in ("params", "slices", "graph", "provenance"):
            self.__dict__.pop(name, None)

    def run_name(self, changes: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> str:
        """The name of a run that starts now, in MLflow and Prefect: dataset, variant and time.

        `changes` are those that the run will make to the parameters.
        """
        dataset = changes.get("dataset", {}).get("name") or self.params.dataset.name
        variant = changes.get("model", {}).get("variant") or self.params.model.variant
        return f"{dataset}-{variant}-{datetime.now().astimezone():%Y-%m-%d-%H%M}"

    @property
    def tracking_uri(self) -> str:
        """The MLflow server of the environment, else a SQLite file in the project folder."""
        return self.env.tracking_uri or local_store(self.root)

    @property
    def dataset_dir(self) -> Path:
        return self.root / self.params.dataset.dir

    def dataset_digest(self) -> str:
        """Content hash of the dataset folder; unchanged files are not read again."""
        return path_digest(self.dataset_dir, self.digests)

    @property
    def digests(self) -> Path:
        """The database in which `flows.core.digest` keeps the hashes of files."""
        return self.env.state_dir / "digests.db"

    @property
    def params_file(self) -> Path:
        return self.root / PARAMS_FILE

    @property
    def graph_file(self) -> Path:
        return self.root / "dvc.yaml"

    @property
    def lock_file(self) -> Path:
        return self.root / "dvc.lock"

    @property
    def initial(self) -> Path:
        """Folder of the starting weights: `model.ckpt` and `model.json`."""
        return self.root / "models/initial"

    @property
    def trained(self) -> Path:
        """Folder of the trained model: `model.pth` and `model.json`."""
        return self.root / "models/trained"

    @property
    def model_card(self) -> Path:
        """Description of the trained model."""
        return self.trained / "model.json"

    def read_card(self) -> dict[str, Any]:
        """The description of the trained model. Raises ConfigError if it is missing or edited."""
        return read_object(self.model_card, *sorted(CARD))

    @property
    def registered_card(self) -> Path:
        """Description of the registered model, if it has an operating point."""
        return self.root / "models/registered/model.json"

    @property
    def fit_metrics(self) -> Path:
        return self.root / "metrics/fit.json"

    @property
    def fit_curves(self) -> Path:
        return self.root / "plots/fit.csv"

    @property
    def fit_picture(self) -> Path:
        """Losses and mAP per epoch."""
        return self.reports / "training_curves.png"

    @property
    def test_metrics(self) -> Path:
        return self.root / "metrics/test.json"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def validation(self) -> Path:
        """The dataset report; a Markdown and an HTML version lie beside it."""
        return self.reports / "validation.json"

    @property
    def evaluation(self) -> Path:
        """The evaluation report in Markdown; an HTML version lies beside it."""
        return self.reports / "evaluation.md"

    @property
    def operating_point(self) -> Path:
        """The operating point of the trained model, or null if none is asked for."""
        return self.reports / "operating_point.json"

    @property
    def registered(self) -> Path:
        """The version that the last `register` created."""
        return self.reports / "registered.json"

    @property
    def verdict(self) -> Path:
        """The last verdict of the gate."""
        return self.reports / "verdict.json"
