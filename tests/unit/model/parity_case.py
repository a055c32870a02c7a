"""Reference numbers of one variant: its network with the reference weights, inputs, captures."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rfdetr.config
from rfdetr.checkpoints.legacy_names import from_legacy, to_legacy
from rfdetr.config import ModelConfig
from rfdetr.data.batch import NestedTensor
from rfdetr.model.network import RFDETRNetwork

PARITY = Path(__file__).parents[2] / "parity"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"parity_{name}", PARITY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fill = _load("fill")
compare = _load("compare")


@cache
def manifest(variant: str) -> dict[str, Any]:
    return fill.load_manifest(PARITY / f"{variant}.manifest.json")


def expected(variant: str) -> Any:
    return np.load(PARITY / f"{variant}.expected.npz")


def config(variant: str) -> ModelConfig:
    entry = manifest(variant)
    cls = getattr(rfdetr.config, entry["config_class"])
    return cls(pretrain_weights=None, **entry["config_overrides"])


def network(variant: str) -> RFDETRNetwork:
    """A network with the reference weights of the variant."""
    with torch.device("meta"):
        model = RFDETRNetwork(config(variant))
    state = from_legacy(fill.state_dict(manifest(variant)))
    model.load_state_dict(state, strict=True, assign=True)
    return model


def samples(case: dict[str, Any]) -> NestedTensor:
    return NestedTensor(*fill.batch(case))


def run(model: RFDETRNetwork, case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Outputs of the network, and its intermediate values under the names of the reference."""
    inner: dict[str, Tensor] = {}
    handles = []

    def keep(module: torch.nn.Module, write: Any) -> None:
        handles.append(module.register_forward_hook(lambda _m, _i, out: write(out)))

    def transformer(out: Any) -> None:
        inner["proposal_index"] = out.selection.indices
        inner["proposal_memory"] = out.selection.memory
        inner["proposal_boxes"] = out.selection.boxes
        inner["reference"] = out.reference_points
        inner.update({f"hidden_{i}": hidden for i, hidden in enumerate(out.hidden_states)})

    keep(model.encoder, lambda out: inner.update({f"feature_{i}": x for i, x in enumerate(out)}))
    keep(
        model.backbone[0].projector,
        lambda out: inner.update({f"projected_{i}": x for i, x in enumerate(out)}),
    )
    keep(model.transformer, transformer)
    for i, layer in enumerate(model.transformer.decoder.layers):
        keep(layer, lambda out, i=i: inner.update({f"decoder_layer_{i}": out}))
    batch = samples(case)
    outputs = model(batch)
    for handle in handles:
        handle.remove()
    inner["embeddings"] = model.encoder.embed(batch.tensors)
    return outputs, inner


def flat_outputs(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs under the names of the reference, sparse masks included."""
    parts = {"": outputs, "enc/": outputs["enc_outputs"]}
    parts |= {f"aux_{i}/": part for i, part in enumerate(outputs["aux_outputs"])}
    flat = {}
    for prefix, part in parts.items():
        flat[prefix + "pred_logits"] = part["pred_logits"]
        flat[prefix + "pred_boxes"] = part["pred_boxes"]
        masks = part.get("pred_masks")
        if isinstance(masks, dict):
            flat[prefix + "mask_spatial_features"] = masks["spatial_features"]
            flat[prefix + "mask_query_features"] = masks["query_features"]
        elif masks is not None:
            flat[prefix + "pred_masks"] = masks
    return flat


def matches(matcher: Any, outputs: dict[str, Any], targets: Any, groups: int) -> dict[str, Any]:
    """Assignments of every layer under the names of the reference."""
    parts = {"final": outputs, "enc": outputs["enc_outputs"]}
    parts |= {f"aux_{i}": part for i, part in enumerate(outputs["aux_outputs"])}
    found = {}
    for name, part in parts.items():
        for i, pair in enumerate(matcher(part, targets, group_detr=groups)):
            found[f"match/{name}/{i}"] = torch.stack(list(pair))
    return found


def gradients(model: RFDETRNetwork) -> dict[str, Tensor]:
    """Gradients under legacy names."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {f"grad/{name}": value for name, value in to_legacy(grads).items()}
