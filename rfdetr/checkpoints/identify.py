"""Which configuration a checkpoint belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rfdetr.checkpoints.adapt import POSITIONS, fitting_configs
from rfdetr.checkpoints.legacy_names import OURS
from rfdetr.checkpoints.record import Container
from rfdetr.config import MODEL_CONFIGS, STRUCTURE_FIELDS, ModelConfig
from rfdetr.errors import CheckpointError

# Settings of the file that rebuild its network. Old writers store many more; those are of training.
_FIELDS = (
    *STRUCTURE_FIELDS,
    "num_windows",
    "resolution",
    "positional_encoding_size",
    "num_queries",
    "num_select",
    "group_detr",
    "mask_downsample_ratio",
)


def config_of(
    container: Container, config_class: type[ModelConfig] | None = None, **overrides: Any
) -> ModelConfig:
    """The configuration that rebuilds the network of a checkpoint, with `overrides` on top.

    Numbers come from the file's settings and tensors, the class from `config_class_of`. Raises
    CheckpointError when none fits.
    """
    cls = config_class or config_class_of(container)
    values = {name: container.setting(name) for name in _FIELDS}
    values = {name: value for name, value in values.items() if value is not None}
    values |= _by_tensors(container)
    values.setdefault("resolution", _native_resolution(cls, values))
    if container.num_classes is not None:
        values["num_classes"] = max(1, container.num_classes)
    if "resolution" in overrides and "positional_encoding_size" not in overrides:
        values.pop("positional_encoding_size", None)
    try:
        return cls(**{"pretrain_weights": None, **values, **overrides})
    except ValueError as error:
        raise CheckpointError(
            f"{container.path}: its settings make no {cls.__name__}: {error}"
        ) from error


def config_class_of(container: Container) -> type[ModelConfig]:
    """The sized configuration class of a checkpoint; CheckpointError when nothing tells.

    By the file's model name, else the published name in its settings, else the file name, else the
    shapes of its tensors.
    """
    fitting = fitting_configs(container)
    by_name = {cls.__name__: cls for cls in MODEL_CONFIGS.values()}
    for name in (container.model_name, f"{container.model_name}Config"):
        if name in by_name:
            return by_name[name]
    for name in (container.setting("pretrain_weights"), container.path):
        cls = _by_published_name(name)
        if cls is not None and (cls in fitting or not fitting):
            return cls
    if fitting:
        return fitting[0]
    raise CheckpointError(
        f"{container.path} names no variant and its tensors fit none. Load it with the class it "
        "was trained with: RFDETRNano(pretrain_weights=...), or another size."
    )


def _by_published_name(name: Any) -> type[ModelConfig] | None:
    if not isinstance(name, str):
        return None
    stem = Path(name).name
    for cls in MODEL_CONFIGS.values():
        if cls.model_fields["pretrain_weights"].default == stem:
            return cls
    return None


def _native_resolution(cls: type[ModelConfig], values: dict[str, Any]) -> int:
    """The resolution that belongs to the position table, for a file that does not say."""
    fields = cls.model_fields
    native, patch = fields["resolution"].default, fields["patch_size"].default
    if fields["positional_encoding_size"].default_factory is None:  # a table of fixed size
        return int(native)
    side = values.get("positional_encoding_size", native // patch)
    return int(side * values.get("patch_size", patch))


def _by_tensors(container: Container) -> dict[str, Any]:
    """Sizes that the tensors show, which wins over what the settings say."""
    weights = container.weights
    found: dict[str, Any] = {}
    table = weights.get(POSITIONS)
    if table is not None:
        found["positional_encoding_size"] = round((table.shape[1] - 1) ** 0.5)
    patches = weights.get(f"{OURS}patch_embed.proj.weight")
    if patches is not None:
        found["patch_size"] = patches.shape[-1]
    norm = weights.get("transformer.decoder.norm.weight")
    if norm is not None:
        found["hidden_dim"] = len(norm)
    feed = weights.get("transformer.decoder.layers.0.linear1.bias")
    if feed is not None:
        found["dim_feedforward"] = len(feed)
    return found
