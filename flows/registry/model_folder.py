"""Builds the MLflow model folder: code, weights, card, ONNX export. It contains no pickle."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from flows.core.digest import digest_of
from rfdetr.errors import CheckpointError
from rfdetr.files import sha256_file

CODE = Path(__file__).with_name("served_model.py")
REQUIREMENTS = ("rfdetr-pipeline", "mlflow", "torch", "torchvision", "timm", "pillow", "pandas")
DEFAULT_THRESHOLD, DEFAULT_MAX_DETECTIONS = 0.5, 300


class ModelFiles(BaseModel):
    """The files of one model: weights (.pth or .ckpt), model.json and optional additions.

    `onnx` needs `parity`, the JSON file with its difference from the weights. `profile` is the
    image profile that the drift check compares with.
    """

    model_config = ConfigDict(frozen=True)

    weights: Path
    card: Path
    onnx: Path | None = None
    parity: Path | None = None
    profile: Path | None = None

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights. Raises CheckpointError if the file is missing."""
        if not self.weights.is_file():
            raise CheckpointError(f"{self.weights} is missing; run the fit stage.")
        return sha256_file(self.weights)

    @cached_property
    def details(self) -> dict[str, Any]:
        """The content of model.json."""
        try:
            return dict(json.loads(self.card.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.card} cannot be read: {error}") from None

    @property
    def operating_point(self) -> str | None:
        """Target and digest of the operating point, None without one."""
        point = self.details.get("operating_point")
        return point and f"{point['target']} {digest_of(point)[:12]}"

    def params(self) -> dict[str, str]:
        """Parameters of the logged model."""
        known = ("variant", "resolution", "class_names", "num_classes", "epochs", "best_epoch")
        given = {key: str(self.details[key]) for key in known if key in self.details}
        return {**given, "weights_sha256": self.weights_sha256, "weights_file": self.weights.name}

    def artifacts(self) -> dict[str, str]:
        """Name -> path of every file of the model folder."""
        if (self.onnx is None) != (self.parity is None):
            raise CheckpointError("an ONNX file needs its parity file, and the reverse; give both.")
        files = {"weights": self.weights, "card": self.card, "onnx": self.onnx}
        files |= {"parity": self.parity, "profile": self.profile}
        return {name: str(path) for name, path in files.items() if path is not None}


def signature(threshold: float | None = DEFAULT_THRESHOLD) -> Any:
    """Input column `image`; output boxes, scores, labels, names; two parameters.

    `threshold` is the default of that parameter; None stands for the operating point.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array

    anything: Any = AnyType  # text or an array
    numbers = Array(DataType.double)
    return ModelSignature(
        inputs=Schema([ColSpec(anything(), "image")]),
        outputs=Schema(
            [
                ColSpec(Array(numbers), "boxes"),
                ColSpec(numbers, "scores"),
                ColSpec(Array(DataType.long), "labels"),
                ColSpec(Array(DataType.string), "names"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("threshold", DataType.double, threshold),
                ParamSpec("max_detections", DataType.long, DEFAULT_MAX_DETECTIONS),
            ]
        ),
    )


def input_example() -> Any:
    """A valid request: one small image as base64 text."""
    import pandas as pd
    from PIL import Image

    stream = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(stream, "PNG")
    return pd.DataFrame({"image": [base64.b64encode(stream.getvalue()).decode("ascii")]})


@contextlib.contextmanager
def _without_type_hint_advice() -> Iterator[None]:
    """Drop MLflow's advice to add type hints, which would disable the inference parameters.

    A warning filter does not work: MLflow puts its own filter in front.
    """
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        for item in caught:
            if "Add type hints" not in str(item.message):
                warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


def build_model(path: Path, files: ModelFiles, *, model_id: str, run_id: str | None) -> None:
    """Write the model folder `path`, which loads wherever `rfdetr` is installed."""
    import mlflow.pyfunc
    from mlflow.models import Model

    requirements = [f"{name}=={metadata.version(name)}" for name in REQUIREMENTS]
    if files.onnx is not None:
        requirements.append(f"onnxruntime=={metadata.version('onnxruntime')}")
    with _without_type_hint_advice():
        mlflow.pyfunc.save_model(
            path=str(path),
            python_model=str(CODE),
            artifacts=files.artifacts(),
            signature=signature(None if files.operating_point else DEFAULT_THRESHOLD),
            input_example=input_example(),
            pip_requirements=requirements,
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            metadata=files.params(),
        )
