"""The image encoder: a DINOv2 transformer on timm blocks, part of which attend inside windows.

Model specification, section 2. Names follow timm, so published DINOv2 weights fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rfdetr.config import ModelConfig
from rfdetr.errors import ConfigError, InputError
from rfdetr.model.feedforward import feed_forward
from rfdetr.model.lora import DoRALinear
from rfdetr.model.projector import Projector


def resize_position_table(table: Tensor, height: int, width: int) -> Tensor:
    """Resample a (1, 1 + S*S, D) table to (1, 1 + height*width, D); the class entry is kept.

    Bicubic with antialias, in float32 (model specification, sections 2 and 10).
    """
    cells = int(table.shape[1]) - 1
    side = math.isqrt(cells)
    if height == width == side:
        return table
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(
        grid.float(), (height, width), mode="bicubic", antialias=table.device.type != "mps"
    )
    patches = grid.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :1], patches], dim=1)


def split_windows(grid: Tensor, windows: int) -> Tensor:
    """(B, H, W, D) -> (B * windows^2, H/windows * W/windows, D), row-major inside and outside."""
    batch, height, width, channels = grid.shape
    if windows == 1:
        return grid.reshape(batch, height * width, channels)
    rows, columns = height // windows, width // windows
    grid = grid.reshape(batch, windows, rows, windows, columns, channels)
    return grid.transpose(2, 3).reshape(batch * windows**2, rows * columns, channels)


def join_windows(tokens: Tensor, windows: int, height: int, width: int) -> Tensor:
    """The inverse of `split_windows`: (B * windows^2, T, D) -> (B, height, width, D)."""
    channels = tokens.shape[-1]
    rows, columns = height // windows, width // windows
    grid = tokens.reshape(-1, windows, windows, rows, columns, channels)
    return grid.transpose(2, 3).reshape(-1, height, width, channels)


class WindowedEncoder(nn.Module):
    """Windowed DINOv2: images (B, 3, H, W) to maps (B, D, H/patch, W/patch), one per index."""

    mask_token: Tensor
    fixed_table: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, depth, heads, registers = config.encoder_size
        self.windows = config.num_windows
        self.patch_size = config.patch_size
        self.out_feature_indexes = list(config.out_feature_indexes)
        self.gradient_checkpointing = config.gradient_checkpointing
        self.prefix_tokens = 1 + registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        side = config.positional_encoding_size
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        self.register_buffer("mask_token", torch.zeros(1, width))
        self.fixed_size: tuple[int, int] | None = None
        self.register_buffer("fixed_table", None, persistent=False)
        self.patch_embed = PatchEmbed(None, config.patch_size, embed_dim=width, flatten=False)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, init_values=1.0, norm_layer=norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.set_drop_path([config.drop_path] * depth)
        self.initialise()
        if config.backbone_lora:
            self.requires_grad_(False)
            for block in self.blocks:
                attention: Any = block.attn
                attention.qkv = DoRALinear.from_linear(attention.qkv, parts=3)
        # Blocks behind the last feature never run: a trainable one would stall DDP.
        for block in self.blocks[self.out_feature_indexes[-1] :]:
            block.requires_grad_(False)
        if config.freeze_encoder:
            self.requires_grad_(False)

    def initialise(self) -> None:
        """Random initial weights (model specification, section 9)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def set_drop_path(self, rates: Sequence[float]) -> None:
        """Set the drop path rate of every block; active in training mode only."""
        if len(rates) != len(self.blocks):
            raise ConfigError(f"{len(rates)} drop path rates for {len(self.blocks)} blocks.")
        for block, rate in zip(self.blocks, rates, strict=True):
            block.drop_path1 = DropPath(rate) if rate > 0 else nn.Identity()
            block.drop_path2 = DropPath(rate) if rate > 0 else nn.Identity()

    def fix_table(self, height: int, width: int) -> None:
        """Resample the position table once, for images of height x width pixels.

        For a copy that is exported: the table no longer follows its parameter.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        self.fixed_table = resize_position_table(self.pos_embed.detach(), rows, columns)
        self.fixed_size = (rows, columns)

    def position_table(self, rows: int, columns: int) -> Tensor:
        """The table (1, 1 + rows * columns, D) for a grid of patches."""
        if self.fixed_table is not None and self.fixed_size == (rows, columns):
            return self.fixed_table
        return resize_position_table(self.pos_embed, rows, columns)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B * windows^2, prefix + T, D), class token first."""
        projection = self.patch_embed.proj
        patches = projection(images.to(projection.weight.dtype)).permute(0, 2, 3, 1)
        rows, columns, channels = (int(size) for size in patches.shape[1:])
        table = self.position_table(rows, columns)
        patches = patches + table[:, 1:].reshape(1, rows, columns, channels).to(patches.dtype)
        tokens = split_windows(patches, self.windows)
        prefix = [self.cls_token + table[:, :1]]
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        head = torch.cat(prefix, dim=1).to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([head, tokens], dim=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, D, H/patch, W/patch) in channels-last memory, one per selected block."""
        self.check_size(images)
        rows, columns = (int(side) // self.patch_size for side in images.shape[-2:])
        tokens = self.embed(images)
        maps = []
        for done in range(1, self.out_feature_indexes[-1] + 1):
            tokens = self._run_block(done - 1, tokens)
            if done in self.out_feature_indexes:
                patches = self.norm(tokens)[:, self.prefix_tokens :]
                grid = join_windows(patches, self.windows, rows, columns)
                maps.append(grid.permute(0, 3, 1, 2))
        return maps

    def check_size(self, images: Tensor) -> None:
        """Raise InputError unless images are (B >= 1, 3, H, W) with sides that fit the windows."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"The network takes images as (batch, 3, height, width); got "
                f"{tuple(images.shape)}. Convert grey or RGBA images to RGB."
            )
        height, width = (int(side) for side in images.shape[-2:])
        block = self.patch_size * self.windows
        if images.shape[0] == 0:
            raise InputError("The batch holds no images; give at least one.")
        if height % block or width % block or not height or not width:
            up = [max(1, -(-side // block)) * block for side in (height, width)]
            raise InputError(
                f"Images of {height} x {width} pixels do not fit: both sides must be multiples of "
                f"patch_size * num_windows = {self.patch_size} * {self.windows} = {block}. "
                f"Resize or pad them, for example to {up[0]} x {up[1]}."
            )

    def _run_block(self, index: int, tokens: Tensor) -> Tensor:
        whole_image = index in self.out_feature_indexes
        merged = self.windows**2 if whole_image else 1
        block: Any = self.blocks[index]
        if self.gradient_checkpointing and self.training:
            result = checkpoint(_block_forward, block, tokens, merged, use_reentrant=False)
            assert isinstance(result, Tensor)
            return result
        return _block_forward(block, tokens, merged)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Own tensors in the order of legacy files, where the mask token comes second."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("cls_token", "mask_token", "reg_token", "pos_embed"):
            if prefix + name in destination:
                destination.move_to_end(prefix + name)


def _block_forward(block: Any, tokens: Tensor, merged: int) -> Tensor:
    """One pre-norm block; `merged` windows are joined into one sequence for the attention."""
    joined = block.norm1(tokens).reshape(-1, merged * tokens.shape[1], tokens.shape[2])
    mixed = _attend(block.attn, joined).reshape(tokens.shape)
    if not block.training and not torch.is_grad_enabled():
        tokens = torch.addcmul(tokens, block.attn.proj(mixed), block.ls1.gamma.to(mixed.dtype))
        branch = block.mlp(block.norm2(tokens))
        return torch.addcmul(tokens, branch, block.ls2.gamma.to(branch.dtype))
    # A gradient of the layer scale would keep and read the whole branch: weights are smaller.
    branch = F.linear(mixed, *_scaled(block.attn.proj, block.ls1.gamma))
    tokens = tokens + block.drop_path1(branch)
    first, second = block.mlp.fc1, _scaled(block.mlp.fc2, block.ls2.gamma)
    branch = feed_forward(block.norm2(tokens), (first.weight, first.bias), second, "gelu")
    output: Tensor = tokens + block.drop_path2(branch)
    return output


def _attend(attention: Any, x: Tensor) -> Tensor:
    """Multi-head self attention of x (B, N, D), without the output's projection."""
    batch, length, width = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).reshape(batch, length, 3, heads, width // heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value)
    return mixed.transpose(1, 2).reshape(batch, length, width)


def _scaled(layer: nn.Linear, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer whose outputs are multiplied by `scale`."""
    return layer.weight * scale[:, None], layer.bias * scale


class Backbone(nn.Module):
    """Encoder and projector: images (B, 3, H, W) to one map (B, C, h, w) per level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = WindowedEncoder(config)
        self.projector = Projector(config)

    def forward(self, images: Tensor) -> list[Tensor]:
        levels: list[Tensor] = self.projector(self.encoder(images))
        return levels
