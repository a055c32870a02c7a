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

# Our names -> legacy names, both after the encoder's prefix; {} is the number of a block.
_TENSORS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "blocks.{}.ls1.gamma": "encoder.layer.{}.layer_scale1.lambda1",
    "blocks.{}.ls2.gamma": "encoder.layer.{}.layer_scale2.lambda1",
}
_MODULES = {  # with a weight and a bias
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
    "blocks.{}.norm1": ("encoder.layer.{}.norm1",),
    "blocks.{}.norm2": ("encoder.layer.{}.norm2",),
    "blocks.{}.mlp.fc1": ("encoder.layer.{}.mlp.fc1",),
    "blocks.{}.mlp.fc2": ("encoder.layer.{}.mlp.fc2",),
    "blocks.{}.attn.proj": ("encoder.layer.{}.attention.output.dense",),
    "blocks.{}.attn.qkv": tuple(
        f"encoder.layer.{{}}.attention.attention.{part}" for part in ("query", "key", "value")
    ),
}
_TO_LEGACY = {ours: (legacy,) for ours, legacy in _TENSORS.items()} | {
    f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in legacy)
    for ours, legacy in _MODULES.items()
    for kind in ("weight", "bias")
}
_TO_OURS = {legacy: ours for ours, parts in _TO_LEGACY.items() for legacy in parts}
_BLOCK = re.compile(r"^(blocks|encoder\.layer)\.(\d+)\.")


def legacy_names(name: str) -> tuple[str, ...]:
    """Legacy names that contain our tensor `name`: three for a fused qkv tensor, otherwise one."""
    tail, block = _split_block(name, ENCODER_PREFIX)
    if tail not in _TO_LEGACY:
        return (name,)
    return tuple(LEGACY_ENCODER_PREFIX + part.format(block) for part in _TO_LEGACY[tail])


def legacy_name(name: str) -> str:
    """The legacy name of our tensor `name` (the query's for a fused qkv tensor)."""
    return legacy_names(name)[0]


def our_name(name: str) -> str:
    """Our name of the tensor that contains the legacy entry `name`; other names are unchanged."""
    tail, block = _split_block(name, LEGACY_ENCODER_PREFIX)
    return ENCODER_PREFIX + _TO_OURS[tail].format(block) if tail in _TO_OURS else name


def _split_block(name: str, prefix: str) -> tuple[str, str]:
    """(name after `prefix` with {} for the block number, that number); empty for other names."""
    tail = name.removeprefix(prefix) if name.startswith(prefix) else ""
    block = _BLOCK.match(tail)
    return _BLOCK.sub(r"\1.{}.", tail), block.group(2) if block else ""


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
    parts = [zip(legacy_names(n), state[n].chunk(3), strict=True) for n in pair]
    for entries in zip(*parts, strict=True):
        yield from entries


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
