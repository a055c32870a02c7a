"""The feed-forward block with its own gradient, against the plain layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rfdetr.model import feedforward
from rfdetr.model.feedforward import Activation, feed_forward


def _tensors(rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, rows, 4), (6, 4), (6,), (5, 6), (5,)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_gradients_over_several_chunks(
    act: Activation, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedforward, "_CPU_ROWS", 4)
    x, w1, b1, w2, b2 = _tensors(rows)
    plain = F.linear(getattr(F, act)(F.linear(x, w1, b1)), w2, b2)
    found = feed_forward(x, (w1, b1), (w2, b2), act)
    assert torch.allclose(found, plain)
    weight = torch.randn_like(plain)
    leaves = [x, w1, b1, w2, b2]
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, weight),
        torch.autograd.grad(plain, leaves, weight),
        strict=True,
    ):
        assert torch.allclose(mine, theirs)


def test_frozen_layers_still_propagate_the_gradient() -> None:
    x, w1, b1, w2, b2 = _tensors(3)
    for frozen in (w1, b1, w2, b2):
        frozen.requires_grad_(False)
    feed_forward(x, (w1, b1), (w2, b2), "gelu").sum().backward()
    assert x.grad is not None
    assert w1.grad is None
