"""Instance masks as inner products of pixel and query features. See docs/model.md, "Masks"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.config import ModelConfig
from rfdetr.model.precision import layer_norm
from rfdetr.model.types import SparseMasks


class PixelBlock(nn.Module):
    """Depthwise 3x3 convolution, channel norm, linear, GELU, residual (cf. ConvNeXt)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        y = layer_norm(self.dwconv(x).permute(0, 2, 3, 1), self.norm)  # (B, h, w, C)
        return x + F.gelu(self.pwconv1(y)).permute(0, 3, 1, 2)


class QueryBlock(nn.Module):
    """x + MLP(LayerNorm(x)) with one hidden layer of four times the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(dim)
        self.layers = nn.ModuleList([nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        y = layer_norm(x, self.norm_in)
        for layer in self.layers:
            y = layer(y)
        return x + y


class SegmentationHead(nn.Module):
    """Factors of the mask logits for every decoder layer and for the selected tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.downsample = config.mask_downsample_ratio
        self.bias = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList(PixelBlock(C) for _ in range(config.dec_layers))
        self.spatial_features_proj = nn.Conv2d(C, C, 1)
        self.query_features_block = QueryBlock(C)
        self.query_features_proj = nn.Linear(C, C)

    def forward(
        self,
        src: Tensor,
        hidden_states: list[Tensor],
        selected: Tensor,
        image_size: tuple[int, int],
    ) -> list[SparseMasks]:
        """Masks of every decoder layer, then of the selected tokens.

        src (B, C, h, w) is the first feature level; every entry of hidden_states, and selected, is
        (B, Q, C); image_size is (H, W) in pixels. Masks have H/4 x W/4 pixels (`downsample`).
        """
        size = (image_size[0] // self.downsample, image_size[1] // self.downsample)
        pixels = F.interpolate(src, size, mode="bilinear", align_corners=False)  # (B, C, H/4, W/4)
        encoder = self._factors(pixels, selected)
        masks = []
        for block, queries in zip(self.blocks, hidden_states, strict=True):
            pixels = block(pixels)
            masks.append(self._factors(pixels, queries))
        return [*masks, encoder]

    def _factors(self, pixels: Tensor, queries: Tensor) -> SparseMasks:
        return {
            "spatial_features": self.spatial_features_proj(pixels),
            "query_features": self.query_features_proj(self.query_features_block(queries)),
            "bias": self.bias,
        }


def dense_masks(masks: SparseMasks) -> Tensor:
    """Mask logits (B, Q, h, w) from their factors."""
    spatial = masks["spatial_features"]
    # A product instead of an einsum: exported graphs then contain a plain MatMul.
    logits = masks["query_features"] @ spatial.flatten(2) + masks["bias"]  # (B, Q, h*w)
    return logits.reshape(*logits.shape[:2], *spatial.shape[2:])
