"""A vision transformer block with timm's parameter names, so that DINOv2 weights fit.

Axes: W windows of the batch, N tokens per window, D encoder width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.model.feedforward import feed_forward
from rfdetr.model.lora import DoRALinear


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to query, key and value.

    The block applies `proj`, because in training it folds the layer scale into it.
    """

    qkv: nn.Linear | DoRALinear

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) to the concatenated heads (B, N, D), before `proj`."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D/heads)
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

    def folded_into(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias that compute gamma * layer(x)."""
        return layer.weight * self.gamma[:, None], layer.bias * self.gamma


def drop_path(branch: Tensor, rate: Tensor | None) -> Tensor:
    """Stochastic depth (Huang et al., ECCV 2016): zero the branch (W, N, D) of random windows.

    Windows are dropped, not complete images, each with the probability `rate`, and the others are
    scaled up. The rate is a 0-d tensor, so that compiled code is valid for all rates; None drops
    nothing and draws no random numbers.
    """
    if rate is None:
        return branch
    keep = 1 - rate
    kept = torch.rand(len(branch), 1, 1, device=branch.device) < keep
    return branch * (kept / keep.clamp(min=1e-6)).to(branch.dtype)


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
        attention, all windows of an image for global attention. See `drop_path` for `drop_rate`.
        """
        W, N, D = x.shape
        y = self.norm1(x).reshape(-1, windows_per_sequence * N, D)
        y = self.attn(y).reshape(W, N, D)
        if not self.training and not torch.is_grad_enabled():
            x = self.ls1(x, self.attn.proj(y))
            return self.ls2(x, self.mlp(self.norm2(x)))  # type: ignore[no-any-return]
        # The gradient of a separate layer scale would keep the branch (W, N, D) in memory; folded
        # into the linear layer, it keeps a weight matrix.
        y = F.linear(y, *self.ls1.folded_into(self.attn.proj))
        x = x + drop_path(y, drop_rate)
        fc1, fc2 = self.mlp.fc1, self.ls2.folded_into(self.mlp.fc2)
        y = feed_forward(self.norm2(x), (fc1.weight, fc1.bias), fc2, "gelu")
        return x + drop_path(y, drop_rate)
