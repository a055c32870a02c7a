"""Which network a checkpoint contains: sizes read from its tensors, and the configuration they fit.

Class count, query count and resolution may differ from a configuration (`adapt` changes them);
everything else here must be equal.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from rfdetr.checkpoints.legacy_names import ENCODER_PREFIX
from rfdetr.checkpoints.record import CheckpointRecord, Weights
from rfdetr.config import MODEL_CONFIGS, STRUCTURE_FIELDS, ModelConfig
from rfdetr.errors import CheckpointError

POSITION_TABLE = f"{ENCODER_PREFIX}pos_embed"

# Settings in a file that rebuild its network. Old writers store many more, about training.
_NETWORK_FIELDS = (
    *STRUCTURE_FIELDS,
    "num_windows",
    "resolution",
    "positional_encoding_size",
    "num_queries",
    "num_select",
    "group_detr",
    "mask_downsample_ratio",
    "grey_levels",
)
# Settings that change what the network computes but leave no trace in any tensor.
_INVISIBLE_FIELDS = ("num_windows", "out_feature_indexes")
# Configuration fields whose value in the tensors overrides the one in the file's settings.
_FIELDS_IN_TENSORS = ("patch_size", "hidden_dim", "dim_feedforward")


def infer_config(
    record: CheckpointRecord, config_class: type[ModelConfig] | None = None, **overrides: Any
) -> ModelConfig:
    """The configuration that rebuilds the network of a checkpoint, with `overrides` on top.

    Numbers come from the file's settings and tensors (tensors win), the class from
    `infer_config_class`. Raises CheckpointError when no configuration fits.
    """
    cls = config_class or infer_config_class(record)
    values = {name: record.setting(name) for name in _NETWORK_FIELDS}
    values = {name: value for name, value in values.items() if value is not None}
    sizes = tensor_sizes(record.weights)
    values |= {name: sizes[name] for name in _FIELDS_IN_TENSORS if name in sizes}
    side = position_grid_side(record.weights)
    if side is not None:
        values["positional_encoding_size"] = side
    values.setdefault("resolution", _native_resolution(cls, values))
    if record.num_classes is not None:
        values["num_classes"] = max(1, record.num_classes)
    if "resolution" in overrides and "positional_encoding_size" not in overrides:
        values.pop("positional_encoding_size", None)
    try:
        return cls(**{"pretrain_weights": None, **values, **overrides})
    except ValueError as error:
        raise CheckpointError(
            f"{record.path}: its settings are not a valid {cls.__name__}: {error}"
        ) from error


def infer_config_class(record: CheckpointRecord) -> type[ModelConfig]:
    """The configuration class of a checkpoint's size.

    Decided by the model name in the file, else by the published name in its settings, else by its
    file name, else by the shapes of its tensors. Raises CheckpointError when none of them tells.
    """
    matching = matching_configs(record)
    by_name = {cls.__name__: cls for cls in MODEL_CONFIGS.values()}
    for name in (record.model_name, f"{record.model_name}Config"):
        if name in by_name:
            return by_name[name]
    for name in (record.setting("pretrain_weights"), record.path):
        cls = _class_of_published_name(name)
        if cls is not None and (cls in matching or not matching):
            return cls
    if matching:
        return matching[0]
    raise CheckpointError(
        f"{record.path} does not name a model size, and its tensors do not fit a released one. "
        "Load it with the class it was trained with: RFDETRNano(pretrain_weights=...), or another "
        "size."
    )


def structure_mismatch(record: CheckpointRecord, config: ModelConfig) -> str | None:
    """Why the checkpoint cannot fit `config`, and which configuration it fits; None if it can."""
    found, wanted = _structure_of_file(record), _structure_of_config(config)
    differences = [
        f"{name} is {value} in the file, {wanted[name]} in the configuration"
        for name, value in found.items()
        if value != wanted[name]
    ]
    if not differences:
        return None
    names = [cls.__name__ for cls in matching_configs(record)]
    advice = (
        f"The file fits {' or '.join(names)}."
        if names
        else "No released size fits; set these fields of a configuration to the file's values."
    )
    return f"{record.path} does not fit {type(config).__name__}: {'; '.join(differences)}. {advice}"


def warn_differing_settings(record: CheckpointRecord, config: ModelConfig) -> None:
    """UserWarning for settings that differ from the checkpoint's and that no tensor shows."""
    saved = {name: record.setting(name) for name in _INVISIBLE_FIELDS}
    differing = [
        f"{name}={value} (the configuration has {getattr(config, name)})"
        for name, value in saved.items()
        if value is not None and value != getattr(config, name)
    ]
    if differing:
        warnings.warn(
            f"{record.path} was trained with {', '.join(differing)}: its weights load, but the "
            "network computes something else with them. Use the same values in the configuration, "
            "or RFDETR.from_checkpoint, which takes them from the file.",
            UserWarning,
            stacklevel=2,
        )


def matching_configs(record: CheckpointRecord) -> list[type[ModelConfig]]:
    """Released configurations of the file's structure; only those of its resolution, if any."""
    found, side = _structure_of_file(record), position_grid_side(record.weights)
    same_structure, same_resolution = [], []
    for cls in MODEL_CONFIGS.values():
        config = cls(pretrain_weights=None)  # type: ignore[call-arg]
        wanted = _structure_of_config(config)
        if any(found[name] != wanted[name] for name in found):
            continue
        same_structure.append(cls)
        if side == config.positional_encoding_size:
            same_resolution.append(cls)
    return same_resolution or same_structure


def position_grid_side(weights: Weights) -> int | None:
    """Side of the encoder's square position grid, in patches; None without a position table.

    The table is (1, 1 + side * side, width), the class token first.
    """
    if POSITION_TABLE not in weights:
        return None
    entries = weights[POSITION_TABLE].shape[1]
    side: int = round((entries - 1) ** 0.5)
    if entries != 1 + side * side:
        raise CheckpointError(f"The position table of {entries} entries is not a square grid.")
    return side


def tensor_sizes(weights: Weights) -> dict[str, Any]:
    """Every size of the network that its tensors show; sizes of missing parts are left out."""
    sizes: dict[str, Any] = {}
    patches = weights.get(f"{ENCODER_PREFIX}patch_embed.proj.weight")  # (width, 3, patch, patch)
    if patches is not None:
        sizes |= {"patch_size": patches.shape[-1], "encoder width": patches.shape[0]}
    layers = {
        "encoder blocks": _count(weights, rf"{re.escape(ENCODER_PREFIX)}blocks\.(\d+)\."),
        "dec_layers": _count(weights, r"transformer\.decoder\.layers\.(\d+)\."),
    }
    sizes |= {name: number for name, number in layers.items() if number}
    lengths = {
        "hidden_dim": "transformer.decoder.norm.weight",
        "dim_feedforward": "transformer.decoder.layers.0.linear1.bias",
        "levels * ca_nheads * dec_n_points": (
            "transformer.decoder.layers.0.cross_attn.attention_weights.bias"
        ),
    }
    sizes |= {name: len(weights[key]) for name, key in lengths.items() if key in weights}
    if f"{ENCODER_PREFIX}norm.weight" in weights:
        registers = weights.get(f"{ENCODER_PREFIX}reg_token")  # (1, registers, width)
        sizes["register tokens"] = 0 if registers is None else registers.shape[1]
    levels = _count(weights, r"backbone\.0\.projector\.stages\.(\d+)\.0\.")
    if levels:
        sizes["projector_scale"] = [_projector_level(weights, index) for index in range(levels)]
    return sizes


def _structure_of_file(record: CheckpointRecord) -> dict[str, Any]:
    found = tensor_sizes(record.weights)
    if isinstance(record.setting("patch_size"), int):
        found["patch_size"] = record.setting("patch_size")  # the settings must agree as well
    masks = any(name.startswith("segmentation_head.") for name in record.weights)
    found["segmentation_head"] = masks or bool(record.setting("segmentation_head"))
    return found


def _structure_of_config(config: ModelConfig) -> dict[str, Any]:
    width, depth, _, registers = config.encoder_size
    levels = len(config.projector_scale)
    return {
        "patch_size": config.patch_size,
        "encoder width": width,
        "encoder blocks": depth,
        "register tokens": registers,
        "dec_layers": config.dec_layers,
        "hidden_dim": config.hidden_dim,
        "dim_feedforward": config.dim_feedforward,
        "levels * ca_nheads * dec_n_points": levels * config.ca_nheads * config.dec_n_points,
        "projector_scale": list(config.projector_scale),
        "segmentation_head": config.segmentation_head,
    }


def _class_of_published_name(name: Any) -> type[ModelConfig] | None:
    if not isinstance(name, str):
        return None
    file_name = Path(name).name
    for cls in MODEL_CONFIGS.values():
        if cls.model_fields["pretrain_weights"].default == file_name:
            return cls
    return None


def _native_resolution(cls: type[ModelConfig], values: dict[str, Any]) -> int:
    """The resolution in pixels that belongs to the position table, for a file without one."""
    fields = cls.model_fields
    native, patch = fields["resolution"].default, fields["patch_size"].default
    if fields["positional_encoding_size"].default_factory is None:  # DINOv2's table, any input
        return int(native)
    side = values.get("positional_encoding_size", native // patch)
    return int(side * values.get("patch_size", patch))


def _projector_level(weights: Weights, index: int) -> str:
    """P3 (upsampled), P4 (the encoder's own stride) or P5 (downsampled)."""
    prefix = f"backbone.0.projector.stages_sampling.{index}.0.0."
    if prefix + "weight" in weights:
        return "P3"
    return "P5" if prefix + "conv.weight" in weights else "P4"


def _count(weights: Weights, pattern: str) -> int:
    """How many different numbers the group of `pattern` matches in the tensor names."""
    matches = (re.match(pattern, name) for name in weights)
    return len({match.group(1) for match in matches if match})
