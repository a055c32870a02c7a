"""Exports a trained model to ONNX, once per weights file, and measures the difference."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from flows.core.digest import digest_of
from flows.core.files import read_json, write_json
from rfdetr.files import new_folder, sha256_file

FORMAT = 2  # of the exported files; 2: with metadata


@dataclass(frozen=True)
class Exported:
    """An ONNX file, and the JSON file with its difference from the weights."""

    onnx: Path
    parity: Path
    agrees: bool
    difference: float


def export_once(weights: Path, state_dir: Path) -> Exported:
    """Export `weights` into the state folder, unless they were exported before."""
    folder = state_dir / "exports" / digest_of([sha256_file(weights), FORMAT])[:32]
    if not (folder / "parity.json").exists():
        _export(weights, folder)
    os.utime(folder)  # `doctor` deletes exports that have not been used for long
    parity = folder / "parity.json"
    proof = read_json(parity)
    return Exported(folder / "model.onnx", parity, proof["agrees"], proof["max_difference"])


def _export(weights: Path, folder: Path) -> None:
    from rfdetr import RFDETR
    from rfdetr.export.onnx import TOLERANCE

    detector = RFDETR.from_checkpoint(weights, device="cpu")
    with new_folder(folder) as work:
        result = detector.export(work, dynamic_batch=True)
        result.path.replace(work / "model.onnx")
        difference = math.inf if result.max_difference is None else result.max_difference
        proof = {
            "max_difference": difference,
            "tolerance": TOLERANCE,
            "agrees": difference <= TOLERANCE,
            "opset": result.opset,
        }
        write_json(work / "parity.json", proof)
