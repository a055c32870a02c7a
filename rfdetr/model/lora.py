"""Low-rank adapters with magnitude (DoRA, Liu et al., ICML 2024) for a fused linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK, ALPHA = 16, 16.0
_ADAPTER = ("lora_a", "lora_b", "magnitude")


class DoRALinear(nn.Module):
    """A frozen linear layer of `parts` stacked projections, each with its own rank-16 adapter.

    `weight` and `bias` keep their names, so that checkpoints without adapters load; the magnitude
    is then computed from the loaded weight. The row norm of the weight is treated as a constant in
    the gradient, which saves memory (proposed in the paper). `out_features` must be a multiple of
    `parts`.
    """

    def __init__(self, in_features: int, out_features: int, *, parts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)
        self.lora_a = nn.Parameter(torch.empty(parts, RANK, in_features))
        self.lora_b = nn.Parameter(torch.zeros(parts, out_features // parts, RANK))
        self.magnitude = nn.Parameter(torch.empty(out_features))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)
        self.register_load_state_dict_pre_hook(_reset_missing_adapter)  # type: ignore[no-untyped-call]

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, parts: int) -> Self:
        """Wrap a layer; the result computes the same until the adapters are trained."""
        wrapped = cls(linear.in_features, linear.out_features, parts=parts)
        wrapped.to(linear.weight.device)
        with torch.no_grad():
            wrapped.weight.copy_(linear.weight)
            wrapped.bias.copy_(linear.bias)
            wrapped.reset_magnitude(wrapped.weight, wrapped.lora_a, wrapped.lora_b)
        return wrapped

    @torch.no_grad()
    def reset_magnitude(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
        """Set the magnitude with which the adapted weight equals weight + delta."""
        self.magnitude.copy_(_direction(weight, lora_a, lora_b).norm(dim=1))

    def merged_weight(self) -> Tensor:
        """The (out_features, in_features) weight with the adapter folded in."""
        return _merge(self.weight, self.lora_a, self.lora_b, self.magnitude)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(x, self.merged_weight(), self.bias)


def _reset_missing_adapter(
    module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Before weights are loaded: reset what a state dict without adapters does not contain."""
    assert isinstance(module, DoRALinear)
    weight = state_dict.get(prefix + "weight")
    if weight is None or weight.shape != module.weight.shape:
        return
    if prefix + "lora_b" not in state_dict:
        nn.init.zeros_(module.lora_b)
    if prefix + "magnitude" not in state_dict:
        lora_a, lora_b = (
            state_dict.get(prefix + name, getattr(module, name)) for name in ("lora_a", "lora_b")
        )
        module.reset_magnitude(weight, lora_a, lora_b)


def merge_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without adapters: each is folded into its weight. Other entries are kept."""
    merged = {name: t for name, t in state.items() if name.rpartition(".")[2] not in _ADAPTER}
    for name in state:
        if name.endswith(".lora_a"):
            prefix = name.removesuffix("lora_a")
            parts = (state[prefix + part] for part in ("weight", *_ADAPTER))
            merged[prefix + "weight"] = _merge(*parts).detach()
    return merged


def _direction(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Weight + alpha/rank * B A, (out, in); A is (parts, rank, in), B (parts, out/parts, rank)."""
    return weight + ALPHA / RANK * torch.bmm(lora_b, lora_a).reshape(weight.shape)


def _merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor) -> Tensor:
    direction = _direction(weight, lora_a, lora_b)
    scale: Tensor = magnitude / direction.detach().norm(dim=1)  # (out,)
    return scale[:, None] * direction
