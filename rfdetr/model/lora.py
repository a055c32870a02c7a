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

    `weight` and `bias` keep their names, so checkpoints without adapters load; the magnitude is
    then taken from the loaded weight. The column norm is detached, as in section 4.3 of the paper.
    """

    def __init__(self, inputs: int, outputs: int, *, parts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False)
        self.lora_a = nn.Parameter(torch.empty(parts, RANK, inputs))
        self.lora_b = nn.Parameter(torch.zeros(parts, outputs // parts, RANK))
        self.magnitude = nn.Parameter(torch.empty(outputs))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, parts: int) -> Self:
        """Wrap a layer; the result computes the same until the adapters are trained."""
        wrapped = cls(linear.in_features, linear.out_features, parts=parts)
        wrapped.to(linear.weight.device)
        with torch.no_grad():
            wrapped.weight.copy_(linear.weight)
            wrapped.bias.copy_(linear.bias)
            wrapped.reset_magnitude()
        return wrapped

    def reset_magnitude(self) -> None:
        """Set the magnitude so that the adapted weight equals weight + delta."""
        with torch.no_grad():
            self.magnitude.copy_(_direction(self.weight, self.lora_a, self.lora_b).norm(dim=1))

    def merged_weight(self) -> Tensor:
        """The (outputs, inputs) weight with the adapter folded in."""
        return _merge(self.weight, self.lora_a, self.lora_b, self.magnitude)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged_weight(), self.bias)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" not in state_dict:
            return
        if prefix + "lora_b" not in state_dict:  # the loaded weight stands alone
            nn.init.zeros_(self.lora_b)
        if prefix + "magnitude" not in state_dict:
            self.reset_magnitude()


def merge_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without adapters: each is folded into its weight. Others pass unchanged."""
    merged = {name: t for name, t in state.items() if name.rpartition(".")[2] not in _ADAPTER}
    for name in state:
        if name.endswith(".lora_a"):
            prefix = name.removesuffix("lora_a")
            parts = (state[prefix + part] for part in ("weight", *_ADAPTER))
            merged[prefix + "weight"] = _merge(*parts).detach()
    return merged


def _direction(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return weight + ALPHA / RANK * torch.bmm(lora_b, lora_a).reshape(weight.shape)


def _merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor) -> Tensor:
    direction = _direction(weight, lora_a, lora_b)
    scale: Tensor = magnitude / direction.detach().norm(dim=1)
    return scale[:, None] * direction
