"""Published DINOv2 weights for a new encoder, downloaded through timm."""

from __future__ import annotations

import urllib.error
import urllib.request
import warnings

import torch
from torch import Tensor

from rfdetr.checkpoints.legacy_names import ENCODER_PREFIX
from rfdetr.config import ModelConfig
from rfdetr.errors import CheckpointError

NATIVE_PATCH, NATIVE_SIDE = 14, 37  # pixels; patches along one side of DINOv2's position grid
TIMEOUT_S = 5.0
TIMM_NAMES = {
    "dinov2_windowed_small": "vit_small_patch14_dinov2",
    "dinov2_windowed_base": "vit_base_patch14_dinov2",
    "dinov2_registers_windowed_small": "vit_small_patch14_reg4_dinov2",
}


def fits(config: ModelConfig) -> bool:
    """Whether the published encoder can be used unchanged."""
    native = (config.patch_size, config.positional_encoding_size) == (NATIVE_PATCH, NATIVE_SIDE)
    custom = config.encoder_dim or config.encoder_depth or config.encoder_heads
    return native and not custom


def fetch(config: ModelConfig) -> dict[str, Tensor] | None:
    """The encoder's weights under our names; a UserWarning and None if they are unavailable."""
    name = TIMM_NAMES[config.encoder]
    try:
        return encoder_weights(_download(name))
    except Exception as error:  # noqa: BLE001  # timm and its hub client raise many kinds
        warnings.warn(
            f"DINOv2 encoder weights ({name}) are not available: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''} The encoder starts from random "
            "weights.",
            UserWarning,
            stacklevel=4,
        )
        return None


def encoder_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Timm's DINOv2 state dict under our names, with the class entry in the position table.

    timm's register models fold that entry into the class token; here it becomes zero, which is
    equivalent. The position table is (1, 1 + 37 * 37, width).
    """
    table = state["pos_embed"]
    if table.shape[1] == NATIVE_SIDE**2:
        table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    if table.shape[1] != NATIVE_SIDE**2 + 1:
        raise CheckpointError(f"The DINOv2 position table has {table.shape[1]} entries, not 1370.")
    return {ENCODER_PREFIX + name: value for name, value in {**state, "pos_embed": table}.items()}


def _download(name: str) -> dict[str, Tensor]:
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    published = timm.get_pretrained_cfg(name)
    repository = published.hf_hub_id if published else None
    cached = try_to_load_from_cache(repository, "model.safetensors") if repository else None
    if not isinstance(cached, str):
        _require_reachable(constants.ENDPOINT)
    model = timm.create_model(name, pretrained=True, num_classes=0)
    return dict(model.state_dict())


def _require_reachable(url: str) -> None:
    """Fail within seconds where the hub client's own retries would take minutes."""
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310
            pass
    except urllib.error.HTTPError:
        return  # any response means that the server is reachable
