"""Deformable attention in low precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rfdetr.model.deformable import DeformableAttention

WIDTH = 512  # of the map; bfloat16 positions would be up to one pixel off in its right half


def _copying_attention() -> DeformableAttention:
    """One head whose only point is the centre of the reference, with identity projections."""
    attention = DeformableAttention(4, 1, 1, 1)
    for layer in (attention.sampling_offsets, attention.attention_weights):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer in (attention.value_proj, attention.output_proj):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return attention


@pytest.mark.parametrize("autocast", [False, True])
def test_sampling_locations_stay_exact_under_bfloat16_autocast(autocast: bool) -> None:
    """Every query points at the centre of one pixel and must return exactly that pixel."""
    memory = (torch.arange(WIDTH) % 7).float()[None, :, None].expand(1, WIDTH, 4)
    x = (torch.arange(WIDTH) + 0.5) / WIDTH
    reference = torch.stack([x, torch.full_like(x, 0.5), *[torch.full_like(x, 0.1)] * 2], dim=-1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = _copying_attention()(
            torch.zeros(1, WIDTH, 4), reference[None, :, None], memory, [(1, WIDTH)]
        )
    assert torch.allclose(found.float(), memory, atol=1e-2)


def test_initial_points_end_at_the_edge_of_the_reference_box() -> None:
    """On a map of x coordinates, two points right (and left) of 0.5 in a box of width 0.4."""
    attention = DeformableAttention(dim=4, num_heads=4, num_levels=1, num_points=2)
    attention.initialise()
    for projection in (attention.value_proj, attention.output_proj):
        torch.nn.init.eye_(projection.weight)
    side = 20
    x = (torch.arange(side) + 0.5) / side
    memory = x.repeat(side)[None, :, None].expand(1, side * side, 4)
    box = torch.tensor([0.5, 0.5, 0.4, 0.2])[None, None, None]
    found = attention(torch.zeros(1, 1, 4), box, memory, ((side, side),))
    # right, down, left, up: mean of 0.6 and 0.7, of 0.4 and 0.3
    torch.testing.assert_close(found[0, 0], torch.tensor([0.65, 0.5, 0.35, 0.5]))
