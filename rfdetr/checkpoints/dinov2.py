"""DINOv2 weights for a fresh encoder, fetched through timm when the network can be reached."""

from __future__ import annotations

import logging
import urllib.error
import urllib.request
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rfdetr.config import ModelConfig
from rfdetr.errors import CheckpointError

if TYPE_CHECKING:
    from rfdetr.checkpoints.load import LoadReport
    from rfdetr.model.network import RFDETRNetwork

logger = logging.getLogger(__name__)

PREFIX = "backbone.0.encoder."
NATIVE_PATCH, NATIVE_SIDE = 14, 37
TIMEOUT_S = 5.0
TIMM_NAMES = {
    "dinov2_windowed_small": "vit_small_patch14_dinov2",
    "dinov2_windowed_base": "vit_base_patch14_dinov2",
    "dinov2_registers_windowed_small": "vit_small_patch14_reg4_dinov2",
}


def wants_dinov2(config: ModelConfig) -> bool:
    """Whether the published encoder fits as it is (model specification, section 2)."""
    native = (config.patch_size, config.positional_encoding_size) == (NATIVE_PATCH, NATIVE_SIDE)
    custom = config.encoder_dim or config.encoder_depth or config.encoder_heads
    return native and not custom


def load_dinov2(network: RFDETRNetwork, config: ModelConfig) -> LoadReport | None:
    """Load DINOv2 into the encoder; without network a UserWarning and None."""
    from rfdetr.checkpoints.load import LoadReport

    name = TIMM_NAMES[config.encoder]
    try:
        weights = encoder_weights(_fetch(name))
    except Exception as error:  # noqa: BLE001  # timm and its hub client raise many kinds
        warnings.warn(
            f"DINOv2 encoder weights ({name}) are not available: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''} The encoder starts from random "
            "weights.",
            UserWarning,
            stacklevel=3,
        )
        return None
    expected = [n for n in network.state_dict() if n.startswith(PREFIX)]
    missing = tuple(n for n in expected if n not in weights and not n.endswith(".mask_token"))
    result = network.load_state_dict(weights, strict=False)
    logger.info("Encoder starts from DINOv2 (%s).", name)
    return LoadReport(name, len(weights), missing, tuple(result.unexpected_keys))


def encoder_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The DINOv2 state of timm under our names, with the class entry in the position table.

    timm's register models fold that entry into the class token; it becomes zero here, which
    computes the same (model specification, section 2).
    """
    table = state["pos_embed"]
    if table.shape[1] == NATIVE_SIDE**2:
        table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    if table.shape[1] != NATIVE_SIDE**2 + 1:
        raise CheckpointError(f"The DINOv2 position table has {table.shape[1]} entries, not 1370.")
    return {PREFIX + name: value for name, value in {**state, "pos_embed": table}.items()}


def _fetch(name: str) -> dict[str, Tensor]:
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
    """Fail within seconds where the hub's own retries would take minutes."""
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310
            pass
    except urllib.error.HTTPError:
        return  # any answer will do
