"""Encoder maps to decoder levels: resampling, a C2f block, a norm (model specification, section 3).

Maps travel as (B, C, H, W) in channels-last memory, where the channel norm needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.config import ModelConfig

Activation = Callable[[Tensor], Tensor]


class ChannelNorm(nn.Module):
    """LayerNorm over the channel axis of (B, C, H, W), eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        return F.layer_norm(rows, self.weight.shape, self.weight, self.bias, 1e-6).permute(
            0, 3, 1, 2
        )


class ConvNorm(nn.Module):
    """Convolution without bias, channel norm (named `bn` in the files), activation.

    A 1x1 convolution is computed as a product over channels-last rows.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, act: Activation = F.silu
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = ChannelNorm(outputs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.kernel_size == (1, 1):
            rows = F.linear(x.permute(0, 2, 3, 1), self.conv.weight.flatten(1))
            return self.act(self.bn(rows.permute(0, 3, 1, 2)))
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, no residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(channels, channels, 3)
        self.cv2 = ConvNorm(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv2(self.cv1(x))
        return y


class C2f(nn.Module):
    """Split, three chained bottlenecks, concatenate everything, mix."""

    def __init__(self, inputs: int, outputs: int, bottlenecks: int = 3) -> None:
        super().__init__()
        self.part = outputs // 2
        self.cv1 = ConvNorm(inputs, 2 * self.part, 1)
        self.cv2 = ConvNorm((2 + bottlenecks) * self.part, outputs, 1)
        self.m = nn.ModuleList(Bottleneck(self.part) for _ in range(bottlenecks))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.cv1(x)
        parts = [mixed[:, : self.part], mixed[:, self.part :]]
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        y: Tensor = self.cv2(torch.cat(parts, dim=1))
        return y


def _sampler(level: str, width: int) -> nn.Sequential:
    """The module that brings one encoder map to the scale of a level."""
    if level == "P3":
        return nn.Sequential(nn.ConvTranspose2d(width, width // 2, 2, 2))
    if level == "P5":
        return nn.Sequential(ConvNorm(width, width, 3, stride=2, act=F.relu))
    return nn.Sequential()


class Projector(nn.Module):
    """Encoder maps (B, D, h, w) to one map (B, C, h_l, w_l) for each level of the config."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, maps = config.encoder_size[0], len(config.out_feature_indexes)
        self.stages_sampling = nn.ModuleList(
            nn.ModuleList(_sampler(level, width) for _ in range(maps))
            for level in config.projector_scale
        )
        self.stages = nn.ModuleList()
        for level in config.projector_scale:
            channels = maps * (width // 2 if level == "P3" else width)
            block = C2f(channels, config.hidden_dim)
            self.stages.append(nn.Sequential(block, ChannelNorm(config.hidden_dim)))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        levels = []
        for samplers, stage in zip(self.stages_sampling, self.stages, strict=True):
            assert isinstance(samplers, nn.ModuleList)
            sampled = [sampler(m) for sampler, m in zip(samplers, maps, strict=True)]
            levels.append(stage(torch.cat(sampled, dim=1)))
        return levels
