"""The image encoder: a DINOv2 vision transformer in which most blocks attend inside windows.

Axes: B images, n = num_windows per side, h and w patches per side, D encoder width. Parameter
names are timm's, so that published DINOv2 weights fit. See docs/model.md, "Encoder".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rfdetr.config import ModelConfig
from rfdetr.errors import ConfigError, InputError
from rfdetr.model.encoder_block import EncoderBlock
from rfdetr.model.lora import DoRALinear
from rfdetr.model.precision import call_with_cast_weights, cast_together
from rfdetr.model.projector import Projector


def resize_pos_embed(pos_embed: Tensor, h: int, w: int) -> Tensor:
    """Resample position embeddings (1, 1 + S*S, D) to (1, 1 + h*w, D); the class entry is kept.

    Bicubic with antialias (except on MPS, which lacks it), computed in float32 as one matrix
    product per axis: in training, the gradient costs no more than two others.
    """
    S = math.isqrt(int(pos_embed.shape[1]) - 1)
    if h == w == S:
        return pos_embed
    device = pos_embed.device
    with torch.autocast(device.type, enabled=False):
        grid = pos_embed[0, 1:].float().reshape(S, -1)  # (S, S*D)
        grid = (_resampling(S, h, device) @ grid).reshape(h, S, -1)  # (h, S, D)
        grid = _resampling(S, w, device) @ grid  # (h, w, D)
    patches = grid.reshape(1, h * w, -1).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def _resampling(side: int, size: int, device: torch.device) -> Tensor:
    """The matrix (size, side) that resamples an axis; computed once unless in compiled code."""
    if torch.compiler.is_compiling():
        return _bicubic_matrix(side, size, device)
    return _cached_bicubic_matrix(side, size, device)


def _bicubic_matrix(side: int, size: int, device: torch.device) -> Tensor:
    # A second axis of `side` equal columns: torch 2.11 resamples maps of width 1 wrongly.
    unit_vectors = torch.eye(side, device=device)[None, :, :, None].repeat(1, 1, 1, side)
    antialias = device.type != "mps"
    maps = F.interpolate(unit_vectors, (size, side), mode="bicubic", antialias=antialias)
    return maps[0, :, :, 0].t().contiguous()


@functools.lru_cache(maxsize=256)
def _cached_bicubic_matrix(side: int, size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # the matrix is used in training as well
        return _bicubic_matrix(side, size, device)


def split_windows(x: Tensor, n: int) -> Tensor:
    """(B, h, w, D) to (B*n*n, h/n * w/n, D), row-major over the windows and inside each one."""
    B, h, w, D = x.shape
    if n == 1:
        return x.reshape(B, h * w, D)
    x = x.reshape(B, n, h // n, n, w // n, D).transpose(2, 3)  # (B, n, n, h/n, w/n, D)
    return x.reshape(B * n**2, (h // n) * (w // n), D)


def join_windows(x: Tensor, n: int, h: int, w: int) -> Tensor:
    """The inverse of `split_windows`: (B*n*n, h/n * w/n, D) to (B, h, w, D)."""
    D = x.shape[-1]
    x = x.reshape(-1, n, n, h // n, w // n, D).transpose(2, 3)  # (B, n, h/n, n, w/n, D)
    return x.reshape(-1, h, w, D)


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping patches."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, H/patch, W/patch, D)."""
        patches: Tensor = self.proj(images.to(self.proj.weight.dtype))  # (B, D, h, w)
        return patches.permute(0, 2, 3, 1)


class WindowedEncoder(nn.Module):
    """DINOv2 (Oquab et al., 2023) with windowed attention as in ViTDet (Li et al., ECCV 2022).

    Every window has its own class token, and register tokens if the encoder has any.
    """

    mask_token: Tensor
    drop_path_rates: Tensor
    resized_pos_embed: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, depth, num_heads, num_registers = config.encoder_size
        self.num_windows = config.num_windows
        self.patch_size = config.patch_size
        self.out_feature_indexes = list(config.out_feature_indexes)
        self.gradient_checkpointing = config.gradient_checkpointing
        self.num_prefix_tokens = 1 + num_registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, dim)) if num_registers else None
        side = config.positional_encoding_size
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.register_buffer("mask_token", torch.zeros(1, dim))  # unused, but in every weight file
        self.resized_for: tuple[int, int] | None = None
        self.register_buffer("resized_pos_embed", None, persistent=False)
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.blocks = nn.ModuleList(EncoderBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("drop_path_rates", torch.zeros(depth), persistent=False)
        self.set_drop_path([config.drop_path] * depth)
        self.initialise()
        if config.backbone_lora:
            self.requires_grad_(False)
            for block in self._blocks():
                assert isinstance(block.attn.qkv, nn.Linear)
                block.attn.qkv = DoRALinear.from_linear(block.attn.qkv, parts=3)
        # Blocks after the last feature never run: a trainable one would stall DDP.
        for unused in self.blocks[self.out_feature_indexes[-1] :]:
            unused.requires_grad_(False)
        if config.freeze_encoder:
            self.requires_grad_(False)

    def initialise(self) -> None:
        """Random weights: truncated normal with a standard deviation of 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def set_drop_path(self, rates: Sequence[float]) -> None:
        """Set the drop path rate of every block; it only acts in training mode.

        Compiled code remains valid as long as the same blocks have a rate above 0.
        """
        if len(rates) != len(self.blocks):
            raise ConfigError(f"{len(rates)} drop path rates for {len(self.blocks)} blocks.")
        self.drop_path_rates.copy_(torch.tensor(rates))
        self.drops_path = [rate > 0 for rate in rates]

    def fix_resolution(self, height: int, width: int) -> None:
        """Resample the position embeddings once, for images of height x width pixels.

        For a copy that is exported: the result does not follow `pos_embed` any more.
        """
        h, w = height // self.patch_size, width // self.patch_size
        self.resized_pos_embed = resize_pos_embed(self.pos_embed.detach(), h, w)
        self.resized_for = (h, w)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B*n*n, prefix + h/n * w/n, D), the class token first."""
        patches = self.patch_embed(images)  # (B, h, w, D)
        h, w, D = (int(size) for size in patches.shape[1:])
        pos_embed = self._pos_embed_for(h, w)  # (1, 1 + h*w, D)
        patches = patches + pos_embed[:, 1:].reshape(1, h, w, D).to(patches.dtype)
        tokens = split_windows(patches, self.num_windows)
        prefix = [self.cls_token + pos_embed[:, :1]]
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        head = torch.cat(prefix, dim=1).to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([head, tokens], dim=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) to one map (B, D, H/patch, W/patch) per entry of the config.

        The maps are in channels-last memory. Raises InputError for images that do not fit.
        """
        self.check_size(images)
        h, w = (int(side) // self.patch_size for side in images.shape[-2:])
        x = self.embed(images)
        maps = []
        gain, shift = cast_together(x.dtype, self.norm.weight, self.norm.bias)
        # An index f in out_feature_indexes means two things: the output of the first f blocks is a
        # map, and the next block (number f, counted from 0) attends globally.
        for i, block in enumerate(self._blocks()[: self.out_feature_indexes[-1]]):
            windows = self.num_windows**2 if i in self.out_feature_indexes else 1
            rate = self.drop_path_rates[i] if self.training and self.drops_path[i] else None
            x = self._run(block, x, windows, rate)
            if i + 1 in self.out_feature_indexes:
                with torch.autocast(x.device.type, enabled=False):  # it would convert to float32
                    y = F.layer_norm(x, gain.shape, gain, shift, self.norm.eps)
                patches = y[:, self.num_prefix_tokens :]
                patches = join_windows(patches, self.num_windows, h, w)  # (B, h, w, D)
                maps.append(patches.permute(0, 3, 1, 2))
        return maps

    def check_size(self, images: Tensor) -> None:
        """Raise InputError unless images are (B >= 1, 3, H, W) with sides that fit the windows."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"The network takes images as (batch, 3, height, width); got "
                f"{tuple(images.shape)}. Convert grey or RGBA images to RGB."
            )
        height, width = (int(side) for side in images.shape[-2:])
        block = self.patch_size * self.num_windows
        if images.shape[0] == 0:
            raise InputError("The batch contains no images; pass at least one.")
        if height % block or width % block or not height or not width:
            up = [max(1, -(-side // block)) * block for side in (height, width)]
            raise InputError(
                f"Images of {height} x {width} pixels do not fit: both sides must be multiples of "
                f"patch_size * num_windows = {self.patch_size} * {self.num_windows} = {block}. "
                f"Resize or pad them, for example to {up[0]} x {up[1]}."
            )

    def _blocks(self) -> list[EncoderBlock]:
        return [block for block in self.blocks if isinstance(block, EncoderBlock)]

    def _pos_embed_for(self, h: int, w: int) -> Tensor:
        if self.resized_pos_embed is not None and self.resized_for == (h, w):
            return self.resized_pos_embed
        return resize_pos_embed(self.pos_embed, h, w)

    def _run(self, block: EncoderBlock, x: Tensor, windows: int, rate: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and self.training:
            y: Tensor = checkpoint(block, x, windows, rate, use_reentrant=False)
        else:
            y = block(x, windows, rate)
        return y


class Backbone(nn.Module):
    """Encoder and projector."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = WindowedEncoder(config)
        self.projector = Projector(config)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) to one feature map (B, C, h_l, w_l) per level of the config."""
        features: list[Tensor] = call_with_cast_weights(self.projector, self.encoder(images))
        return features
