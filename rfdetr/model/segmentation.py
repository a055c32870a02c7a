"""Instance masks as inner products of pixel and query features (specification, section 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.config import ModelConfig

SparseMasks = dict[str, Tensor]


class PixelBlock(nn.Module):
    """Depthwise 3x3 convolution, channel norm, linear, GELU, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y: Tensor = x + F.gelu(self.pwconv1(rows)).permute(0, 3, 1, 2)
        return y


class QueryBlock(nn.Module):
    """x + MLP(LayerNorm(x)) with one hidden layer of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm_in(x)
        for layer in self.layers:
            y = layer(y)
        return x + y


class SegmentationHead(nn.Module):
    """Mask features per decoder layer, from the first level and the hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.downsample = config.mask_downsample_ratio
        self.bias = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList(PixelBlock(width) for _ in range(config.dec_layers))
        self.spatial_features_proj = nn.Conv2d(width, width, 1)
        self.query_features_block = QueryBlock(width)
        self.query_features_proj = nn.Linear(width, width)

    def forward(
        self, level: Tensor, hidden: list[Tensor], selected: Tensor, image_size: tuple[int, int]
    ) -> tuple[list[SparseMasks], SparseMasks]:
        """Features of each layer, and of the selected cells ("encoder level").

        level (B, C, h, w); hidden per layer and selected (B, Q, C); image_size (H, W) in pixels.
        """
        size = (image_size[0] // self.downsample, image_size[1] // self.downsample)
        pixels = F.interpolate(level, size, mode="bilinear", align_corners=False)
        encoder = self._features(pixels, selected)
        layers = []
        for block, state in zip(self.blocks, hidden, strict=True):
            pixels = block(pixels)
            layers.append(self._features(pixels, state))
        return layers, encoder

    def _features(self, pixels: Tensor, queries: Tensor) -> SparseMasks:
        return {
            "spatial_features": self.spatial_features_proj(pixels),
            "query_features": self.query_features_proj(self.query_features_block(queries)),
            "bias": self.bias,
        }


def dense_masks(masks: SparseMasks) -> Tensor:
    """Mask logits (B, Q, h, w) of the sparse form."""
    spatial = masks["spatial_features"]
    logits = masks["query_features"] @ spatial.flatten(2) + masks["bias"]
    return logits.reshape(*logits.shape[:2], *spatial.shape[2:])
