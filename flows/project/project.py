"""The project folder of a process: its parameters, environment, and the paths of its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from flows.config.environment import Environment
from flows.config.overrides import write_overrides
from flows.config.params import PARAMS_FILE, Params, load_params
from flows.core.digest import path_digest
from flows.tracking.provenance import Provenance, collect_provenance


class Project:
    """One project folder; made once at the command line and passed down.

    Reads params.yaml, the environment and git on first use and keeps what it found. Every path is
    absolute.
    """

    def __init__(self, root: Path | None = None, env: Environment | None = None) -> None:
        self.root = (root or Path.cwd()).absolute()
        self.env = env or Environment.read()

    @cached_property
    def params(self) -> Params:
        """The checked params.yaml. Raises ConfigError that lists all mistakes."""
        return load_params(self.params_file)

    def override(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Write changes into params.yaml. Raises ConfigError and writes nothing if one is wrong."""
        write_overrides(self.root, changes)
        self.reload()

    def reload(self) -> None:
        """Forget the parameters and the git commit, after the files have changed."""
        for name in ("params", "provenance"):
            self.__dict__.pop(name, None)

    @cached_property
    def provenance(self) -> Provenance:
        """Git commit, uncommitted changes, packages and hardware."""
        return collect_provenance(self.root)

    @property
    def tracking_uri(self) -> str:
        """The MLflow server of the environment, else a SQLite file in the project folder."""
        return self.env.tracking_uri or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def dataset_dir(self) -> Path:
        return self.root / self.params.dataset.dir

    def dataset_digest(self) -> str:
        """Content hash of the dataset folder; files that have not changed are not read again."""
        return path_digest(self.dataset_dir, self.digests)

    @property
    def digests(self) -> Path:
        """The database of file hashes that `flows.core.digest` keeps."""
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
        return self.trained / "model.json"

    @property
    def fit_metrics(self) -> Path:
        return self.root / "metrics/fit.json"

    @property
    def fit_curves(self) -> Path:
        return self.root / "plots/fit.csv"

    @property
    def test_metrics(self) -> Path:
        return self.root / "metrics/test.json"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def registered(self) -> Path:
        """The version that the last `register` made, as JSON."""
        return self.reports / "registered.json"

    @property
    def verdict(self) -> Path:
        """The gate's last verdict, as JSON."""
        return self.reports / "verdict.json"
