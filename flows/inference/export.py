"""A registered model, or a model file, as an ONNX file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from flows.core.files import copy_atomic
from flows.inference.predict import find_version, weights_in
from flows.project.project import Project
from flows.registry.onnx_export import Exported, export_once
from flows.registry.registry import Registry


def export_model(project: Project, model: str | None, target: Path) -> Exported:
    """Write the ONNX file `target` of a version (number or alias, default: champion) or a file.

    Raises ConfigError if there is no such version, CheckpointError for a file that is not a model.
    """
    if model is not None and Path(model).is_file():
        exported = export_once(Path(model), project.env.state_dir)
    else:
        registry = Registry(project.params.registry.name, project.tracking_uri)
        version = find_version(registry, model)
        with tempfile.TemporaryDirectory(prefix="rfdetr-export-") as folder:
            artifacts = registry.fetch(version, Path(folder)) / "artifacts"
            exported = export_once(weights_in(artifacts), project.env.state_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    copy_atomic(exported.onnx, target)
    return exported
