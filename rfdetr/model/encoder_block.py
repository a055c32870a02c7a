"""A vision transformer block with timm's parameter names, so that DINOv2 weights fit.

Axes: W windows of the batch, N tokens per window, D encoder width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.model.block_gradients import finish_block, norm_linear
from rfdetr.model.lora import DoRALinear
from rfdetr.model.precision import own_gradients


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to query, key and value.

    The block applies `qkv` and `proj`, in training together with their neighbours.
    """

    qkv: nn.Linear | DoRALinear

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values (B, N, 3*D) to the concatenated heads (B, N, D)."""
        B, N, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        split = qkv.reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = (part.transpose(1, 2) for part in split.unbind(2))  # (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D/heads)
        return x.transpose(1, 2).reshape(B, N, D)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., ICCV 2021), initially 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Returns x + gamma * branch, all (..., D)."""
        return torch.addcmul(x, branch, self.gamma.to(branch.dtype))


def draw_kept(x: Tensor, rate: Tensor | None) -> Tensor | None:
    """Factors (W, 1, 1) for a branch of x (W, N, D): stochastic depth (Huang et al., ECCV 2016).

    Windows are dropped, not complete images, each with the probability `rate`, and the others are
    scaled up. The rate is a 0-d tensor, so that compiled code is valid for all rates; None drops
    nothing and draws no random numbers.
    """
    if rate is None:
        return None
    keep = 1 - rate
    kept = torch.rand(len(x), 1, 1, device=x.device) < keep
    return (kept / keep.clamp(min=1e-6)).to(x.dtype)


class EncoderBlock(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), with drop path on both branches."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = LayerScale(dim)

    def forward(
        self, x: Tensor, windows_per_sequence: int = 1, drop_rate: Tensor | None = None
    ) -> Tensor:
        """Tokens (W, N, D) to (W, N, D).

        Attention sees `windows_per_sequence` consecutive windows as one sequence: 1 for windowed
        attention, all windows of an image for global attention. See `draw_kept` for `drop_rate`.
        """
        W, N, D = x.shape
        kept = draw_kept(x, drop_rate), draw_kept(x, drop_rate)
        fused = own_gradients()
        if fused and isinstance(self.attn.qkv, nn.Linear):
            qkv = norm_linear(x, self.norm1, self.attn.qkv)
        else:
            qkv = self.attn.qkv(self.norm1(x))
        heads = self.attn(qkv.reshape(-1, windows_per_sequence * N, 3 * D)).reshape(W, N, D)
        if fused:
            return finish_block(self, x, heads, kept)
        x = self.ls1(x, _scale(self.attn.proj(heads), kept[0]))
        return self.ls2(x, _scale(self.mlp(self.norm2(x)), kept[1]))  # type: ignore[no-any-return]


def _scale(branch: Tensor, kept: Tensor | None) -> Tensor:
    return branch if kept is None else branch * kept
