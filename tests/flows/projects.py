"""A copy of the project with a tiny model and dataset, in which stages run as children."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "demo": {"train": 24, "valid": 6, "test": 8},
    "sources": {},
    "dataset": {"name": "demo", "dir": "data/demo", "layout": "roboflow"},
    "model": {
        "variant": "nano",
        "resolution": 64,
        "encoder_dim": 48,
        "encoder_depth": 2,
        "encoder_heads": 3,
        "out_feature_indexes": [1, 2],
        "hidden_dim": 32,
        "sa_nheads": 4,
        "ca_nheads": 4,
        "dim_feedforward": 64,
        "num_queries": 10,
        "num_select": 10,
        "group_detr": 1,
    },
    "validate": {"min_images": 10},
    "convert": {"source": None},
    "fit": {
        "epochs": 2,
        "effective_batch_size": 4,
        "batch_size": 4,
        "lr": 1e-3,
        "lr_encoder": 1e-3,
        "multi_scale": False,
        "use_ema": False,
    },
    "evaluate": {"score_threshold": 0.0},
    "slices": {},
    "gate": {"floor": 0.0, "min_images": 5, "class_min_boxes": 1000},
    "registry": {"name": "tiny"},
    "runtime": {"accelerator": "cpu", "num_workers": 0, "grace_s": 20},
}


def environment(root: Path, **more: str) -> dict[str, str]:
    """The environment of a child: this Python first, state and caches beside the project."""
    beside = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",
        "RFDETR_STATE_DIR": str(root.parent / "state"),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def make_project(root: Path, **changes: dict[str, Any]) -> Path:
    """Copy code and pipeline files to `root`; `changes` update sections of the tiny params."""
    for name in ("flows", "rfdetr"):
        shutil.copytree(ROOT / name, root / name)  # with byte code: stages start faster
    for name in ("dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore",
                 "data/.gitignore", "weights/README.md"):  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    write_params(root, **changes)
    return root


def write_params(root: Path, **changes: dict[str, Any]) -> None:
    """params.yaml of the tiny project with `changes` per section."""
    sections = {name: {**section, **changes.get(name, {})} for name, section in TINY.items()}
    (root / "params.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))


def set_params(root: Path, **changes: dict[str, Any]) -> None:
    """Update fields of sections of the project's params.yaml."""
    file = root / "params.yaml"
    data = yaml.safe_load(file.read_text())
    for section, fields in changes.items():
        data.setdefault(section, {}).update(fields)
    file.write_text(yaml.safe_dump(data, sort_keys=False))


def run(root: Path, *command: str, check: bool = True, **more: str) -> subprocess.CompletedProcess:
    """Run a command in the project; `python` and `dvc` are those of this environment."""
    done = subprocess.run(
        command, cwd=root, env=environment(root, **more), capture_output=True, text=True
    )
    if check and done.returncode:
        raise AssertionError(f"{command} -> {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
