"""A small registered champion for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from flows.registry.logged_model import log_model
from flows.registry.model_folder import ModelFiles
from flows.registry.registry import Registry
from flows.release.champion import promote
from rfdetr.checkpoints.legacy_names import to_legacy
from rfdetr.checkpoints.safe_io import save_file
from rfdetr.config import RFDETRNanoConfig
from rfdetr.model.network import build_network
from rfdetr.tracking.client import experiment_id

NAMES = ["zero", "one", "four"]
CATEGORY_IDS = [4, 7, 9]  # of the dataset's annotation files


def write_model(folder: Path) -> ModelFiles:
    """A checkpoint of the demo-sized network with its card."""
    torch.manual_seed(0)
    config = RFDETRNanoConfig(
        encoder_dim=48, encoder_depth=3, encoder_heads=3, out_feature_indexes=[1, 2, 3],
        resolution=64, hidden_dim=32, dec_layers=2, dim_feedforward=64, num_queries=30,
        num_select=30, group_detr=1, num_classes=len(NAMES), pretrain_weights=None,
    )  # fmt: skip
    network = build_network(config).eval()
    network.class_embed.bias.data[-1] = -20.0  # means no class: low in a trained network
    save_file(
        {
            "model": to_legacy(network.state_dict()),
            "args": {"class_names": NAMES, "num_classes": len(NAMES)},
            "model_name": "RFDETRNano",
            "model_config": config.model_dump(mode="json"),
        },
        folder / "best.pth",
    )
    (folder / "model.json").write_text(
        json.dumps({"variant": "nano", "class_names": NAMES, "category_ids": CATEGORY_IDS})
    )
    (folder / "model.onnx").write_bytes(b"an export")
    (folder / "parity.json").write_text('{"max_difference": 1e-6}')
    return ModelFiles(
        weights=folder / "best.pth",
        card=folder / "model.json",
        onnx=folder / "model.onnx",
        parity=folder / "parity.json",
    )


def register_champion(uri: str, files: ModelFiles, name: str = "rfdetr-demo") -> Registry:
    """A registry in which these files are version 1 and champion."""
    registry = Registry(name, uri)
    where = experiment_id(registry.client, "rfdetr/demo", uri)
    run_id = registry.client.create_run(where).info.run_id
    model_id = log_model(registry, files, experiment="rfdetr/demo", run_id=run_id)
    version = registry.register(model_id, run_id=run_id)
    promote(registry, version.number, reason="first", by="test")
    return registry
