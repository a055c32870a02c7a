"""Encoder maps to the feature levels of the decoder. See docs/model.md, "Projector".

Maps are (B, C, h, w) in channels-last memory, where the channel norm needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.config import ModelConfig


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, h, w), eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        x = x.permute(0, 2, 3, 1).to(self.weight.dtype)  # (B, h, w, C)
        with torch.autocast(x.device.type, enabled=False):  # it would convert to float32
            x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)
        return x.permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution without bias, channel norm (named `bn` in weight files), activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        act: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = ChannelNorm(out_channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) to (B, C_out, h/stride, w/stride)."""
        if self.conv.kernel_size == (1, 1):  # one matrix product over channels-last rows
            x = F.linear(x.permute(0, 2, 3, 1), self.conv.weight.flatten(1))  # (B, h, w, C_out)
            return self.act(self.bn(x.permute(0, 3, 1, 2)))
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions without a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(channels, channels, 3)
        self.cv2 = ConvNorm(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        y: Tensor = self.cv2(self.cv1(x))
        return y


class C2f(nn.Module):
    """The C2f block of YOLOv8: split the channels, chain bottlenecks, fuse all results."""

    def __init__(self, in_channels: int, out_channels: int, num_bottlenecks: int = 3) -> None:
        super().__init__()
        self.channels = out_channels // 2
        self.cv1 = ConvNorm(in_channels, 2 * self.channels, 1)
        self.cv2 = ConvNorm((2 + num_bottlenecks) * self.channels, out_channels, 1)
        self.m = nn.ModuleList(Bottleneck(self.channels) for _ in range(num_bottlenecks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) to (B, C_out, h, w)."""
        x = self.cv1(x)
        parts = [x[:, : self.channels], x[:, self.channels :]]  # two (B, C_out/2, h, w)
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        y: Tensor = self.cv2(torch.cat(parts, dim=1))
        return y


def _resampler(level: str, dim: int) -> nn.Sequential:
    """The module that brings one encoder map (B, D, h, w) to the scale of a level."""
    if level == "P3":
        return nn.Sequential(nn.ConvTranspose2d(dim, dim // 2, 2, 2))  # (B, D/2, 2h, 2w)
    if level == "P5":
        return nn.Sequential(ConvNorm(dim, dim, 3, stride=2, act=F.relu))  # (B, D, h/2, w/2)
    return nn.Sequential()


class Projector(nn.Module):
    """All encoder maps fused into one feature map per level (P3, P4, P5) of the config."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, num_maps = config.encoder_size[0], len(config.out_feature_indexes)
        self.stages_sampling = nn.ModuleList(
            nn.ModuleList(_resampler(level, dim) for _ in range(num_maps))
            for level in config.projector_scale
        )
        self.stages = nn.ModuleList()
        for level in config.projector_scale:
            channels = num_maps * (dim // 2 if level == "P3" else dim)
            block = C2f(channels, config.hidden_dim)
            self.stages.append(nn.Sequential(block, ChannelNorm(config.hidden_dim)))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Encoder maps, each (B, D, h, w), to one map (B, C, h_l, w_l) per level."""
        features = []
        for resamplers, stage in zip(self.stages_sampling, self.stages, strict=True):
            assert isinstance(resamplers, nn.ModuleList)
            resampled = [resample(x) for resample, x in zip(resamplers, maps, strict=True)]
            features.append(stage(torch.cat(resampled, dim=1)))
        return features
