"""Low-rank adapters with magnitude (DoRA, Liu et al., ICML 2024) for a fused linear layer."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoRALinear(nn.Module):
    """A frozen linear layer of `parts` stacked projections, each with its own rank-16 adapter.

    `weight` and `bias` keep their names, so checkpoints without adapters load; the magnitude is
    then taken from the loaded weight. The column norm is detached, as in section 4.3 of the paper.
    """

    def __init__(
        self, inputs: int, outputs: int, *, parts: int, rank: int = 16, alpha: float = 16
    ) -> None:
        super().__init__()
        self.scaling = alpha / rank
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False)
        self.lora_a = nn.Parameter(torch.empty(parts, rank, inputs))
        self.lora_b = nn.Parameter(torch.zeros(parts, outputs // parts, rank))
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
            self.magnitude.copy_(self._direction().norm(dim=1))

    def merged_weight(self) -> Tensor:
        """The (outputs, inputs) weight with the adapter folded in."""
        direction = self._direction()
        scale: Tensor = self.magnitude / direction.detach().norm(dim=1)
        return scale[:, None] * direction

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged_weight(), self.bias)

    def _direction(self) -> Tensor:
        delta = torch.bmm(self.lora_b, self.lora_a).reshape(self.weight.shape)
        return self.weight + self.scaling * delta

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict and prefix + "magnitude" not in state_dict:
            self.reset_magnitude()
