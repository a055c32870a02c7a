"""The encoder block with its own gradients, against one autograd node per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rfdetr.model import encoder_block, feedforward
from rfdetr.model.encoder_block import EncoderBlock
from rfdetr.model.lora import DoRALinear
from rfdetr.model.precision import cast_together, stack_together


def _block(dtype: torch.dtype = torch.float64) -> EncoderBlock:
    torch.manual_seed(0)
    block = EncoderBlock(12, 3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.to(dtype)


def _run(block: EncoderBlock, x: Tensor, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # drop path
    y = block(x, **settings)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    (y * weight).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **grads}


@pytest.mark.parametrize("drop_rate", [None, 0.5])
@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("variant", ["plain", "dora", "frozen", "zero_scale"])
def test_gradients_equal_those_of_the_layers(
    variant: str, windows: int, drop_rate: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = _block()
    if variant == "zero_scale":
        with torch.no_grad():
            block.ls1.gamma.zero_()
            block.ls2.gamma[3] = 0
    if variant in ("dora", "frozen"):
        block.requires_grad_(False)
    if variant == "dora":
        assert isinstance(block.attn.qkv, torch.nn.Linear)
        block.attn.qkv = DoRALinear.from_linear(block.attn.qkv, parts=3).double()
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    rate = None if drop_rate is None else torch.tensor(drop_rate)
    settings = {"windows_per_sequence": windows, "drop_rate": rate}
    monkeypatch.setattr(feedforward, "_CPU_ROWS", 7)
    found, found_grads = _run(block, x, **settings)
    monkeypatch.setattr(encoder_block, "own_gradients", lambda: False)
    plain, plain_grads = _run(block, x, **settings)
    assert torch.allclose(found, plain)
    assert found_grads.keys() == plain_grads.keys()
    for name, grad in plain_grads.items():
        assert torch.allclose(found_grads[name], grad), name
    assert len(plain_grads) == {"dora": 4, "frozen": 1}.get(variant, 15)


def test_under_autocast_they_are_as_close_as_those_of_the_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = _block(torch.float32)
    x = torch.randn(4, 5, 12)
    exact, exact_grads = _run(block, x)
    with torch.autocast("cpu", torch.bfloat16):
        found, found_grads = _run(block, x.bfloat16())
        monkeypatch.setattr(encoder_block, "own_gradients", lambda: False)
        plain, plain_grads = _run(block, x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert _error(found, exact) < 2 * _error(plain, exact) + 1e-3
    for name, grad in found_grads.items():
        assert grad.dtype == (torch.bfloat16 if name == "x" else torch.float32)
        exact_grad = exact_grads[name]
        assert _error(grad, exact_grad) < 2 * _error(plain_grads[name], exact_grad) + 5e-3, name


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def test_weights_are_cast_and_stacked_together() -> None:
    first, second = torch.randn(3, 5, requires_grad=True), torch.randn(7, requires_grad=True)
    unused = torch.randn(2, requires_grad=True)
    cast = cast_together(torch.bfloat16, first, second, unused)
    assert torch.equal(cast[0], first.bfloat16())
    assert torch.equal(cast[1], second.bfloat16())
    (cast[0].sum() * 2 + cast[1].sum() * 3).backward()
    assert torch.equal(first.grad, torch.full((3, 5), 2.0))  # type: ignore[arg-type]
    assert torch.equal(second.grad, torch.full((7,), 3.0))  # type: ignore[arg-type]
    assert unused.grad is None
    assert cast_together(torch.float32, first)[0] is first

    groups = [torch.randn(3, 5, requires_grad=True) for _ in range(4)]
    biases = [torch.randn(3, requires_grad=True) for _ in range(4)]
    weight, bias = stack_together(torch.float32, [groups, biases])
    assert torch.equal(weight, torch.stack(groups))
    assert torch.equal(bias, torch.stack(biases))
    (weight * torch.arange(4.0)[:, None, None]).sum().backward()
    assert [group.grad.unique().tolist() for group in groups] == [[0], [1], [2], [3]]  # type: ignore[union-attr]
    assert biases[0].grad is None
