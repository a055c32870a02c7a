"""Maps tensor names of our network to those in legacy `.pth` files, and back.

Only the encoder differs: timm's names here, Hugging Face's in legacy files, with query, key and
value in one tensor here and in three there. Everything also works on partial dictionaries and on
anything with the shapes of the weights, for example gradients.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

ENCODER_PREFIX = "backbone.0.encoder."
LEGACY_ENCODER_PREFIX = "backbone.0.encoder.encoder."
QKV = ("query", "key", "value")
# How tensor names of RF-DETR begin in every generation, without prefixes of wrappers.
TENSOR_NAME_PREFIXES = (
    "backbone.0.encoder.",
    "backbone.0.projector.",
    "transformer.decoder.",
    "transformer.enc_out",
    "refpoint_embed.",
    "query_feat.",
    "class_embed.",
    "bbox_embed.",
    "segmentation_head.",
)

# legacy name -> our name, after the prefixes
_TENSORS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
}
_MODULES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_BLOCK_MODULES = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BLOCK_TENSORS = {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
_LEGACY_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)$")
_OUR_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")
_LEGACY_QKV = re.compile(r"attention\.attention\.(query|key|value)\.(weight|bias)$")
_OUR_QKV = re.compile(r"attn\.qkv\.(weight|bias)$")


def _both(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{a}.{k}": f"{b}.{k}" for a, b in modules.items() for k in ("weight", "bias")}


_TO_OURS = {**_TENSORS, **_both(_MODULES)}
_TO_LEGACY = {ours: legacy for legacy, ours in _TO_OURS.items()}
_BLOCK_TO_OURS = {**_BLOCK_TENSORS, **_both(_BLOCK_MODULES)}
_BLOCK_TO_LEGACY = {ours: legacy for legacy, ours in _BLOCK_TO_OURS.items()}


def legacy_names(name: str) -> tuple[str, ...]:
    """Legacy names that hold our tensor `name`: three for a fused qkv tensor, otherwise one."""
    if not name.startswith(ENCODER_PREFIX):
        return (name,)
    tail = name[len(ENCODER_PREFIX) :]
    block = _OUR_BLOCK.match(tail)
    if block is None:
        return (LEGACY_ENCODER_PREFIX + _TO_LEGACY[tail],) if tail in _TO_LEGACY else (name,)
    prefix, tail = f"{LEGACY_ENCODER_PREFIX}encoder.layer.{block.group(1)}.", block.group(2)
    fused = _OUR_QKV.match(tail)
    if fused is not None:
        return tuple(f"{prefix}attention.attention.{part}.{fused.group(1)}" for part in QKV)
    return (prefix + _BLOCK_TO_LEGACY[tail],) if tail in _BLOCK_TO_LEGACY else (name,)


def legacy_name(name: str) -> str:
    """The legacy name of our tensor `name` (the query's for a fused qkv tensor)."""
    return legacy_names(name)[0]


def our_name(name: str) -> str:
    """Our name of the tensor that holds the legacy entry `name`; other names are unchanged."""
    if not name.startswith(LEGACY_ENCODER_PREFIX):
        return name
    tail = name[len(LEGACY_ENCODER_PREFIX) :]
    block = _LEGACY_BLOCK.match(tail)
    if block is None:
        return ENCODER_PREFIX + _TO_OURS[tail] if tail in _TO_OURS else name
    prefix, tail = f"{ENCODER_PREFIX}blocks.{block.group(1)}.", block.group(2)
    part = _LEGACY_QKV.match(tail)
    if part is not None:
        return f"{prefix}attn.qkv.{part.group(2)}"
    return prefix + _BLOCK_TO_OURS[tail] if tail in _BLOCK_TO_OURS else name


def to_legacy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under legacy names, in legacy order; split tensors are views, not copies."""
    return dict(_legacy_entries(state))


def _legacy_entries(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    mask, first = ENCODER_PREFIX + "mask_token", ENCODER_PREFIX + "cls_token"
    for name, value in state.items():
        names = legacy_names(name)
        if name == mask and first in state:
            continue  # last in our state dict (a buffer), but second in a legacy file
        if len(names) == 1:
            yield names[0], value
        elif name.endswith("weight"):
            yield from _split_qkv(state, name)
        elif name.removesuffix("bias") + "weight" not in state:
            yield from zip(names, value.chunk(len(names)), strict=True)
        if name == first and mask in state:
            yield legacy_name(mask), state[mask]


def _split_qkv(state: Mapping[str, Tensor], weight: str) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias of the query, then of the key, then of the value: the legacy order."""
    pair = [n for n in (weight, weight.removesuffix("weight") + "bias") if n in state]
    parts = {name: state[name].chunk(len(QKV)) for name in pair}
    for i in range(len(QKV)):
        for name in pair:
            yield legacy_names(name)[i], parts[name][i]


def from_legacy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A legacy state dict under our names; entries already under our names are kept.

    Query, key and value are joined where all three are present. An incomplete triple keeps its
    legacy names, so that the loader reports it.
    """
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        ours = our_name(name)
        parts = legacy_names(ours)
        if len(parts) == 1 or name == ours:
            result[ours] = value
        elif not all(part in state for part in parts):
            result[name] = value
        elif name == parts[0]:
            result[ours] = torch.cat([state[part] for part in parts])
    return result
