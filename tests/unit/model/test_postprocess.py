"""Selection of the best pairs: order of ties, and one transfer to the host."""

from __future__ import annotations

import pytest
import torch

from rfdetr.model.postprocess import PostProcess, _stable_topk
from tests.unit.model.host_transfers import HostTransfers


@pytest.mark.parametrize("k", [1, 30, 999, 1000, 2000])
def test_order_is_that_of_a_stable_sort(k: int) -> None:
    torch.manual_seed(0)
    rows = [
        torch.rand(1000),
        torch.randint(0, 5, (1000,)) / 4,  # many ties, also 0 and 1
        torch.zeros(1000),
        torch.randn(1000).mul(30).sigmoid(),
        torch.full((1000,), 1e-42),  # subnormal
        torch.rand(1000).masked_fill(
            torch.arange(1000) % 7 == 0, -1.0
        ),  # NaN as post-processing marks it,
    ]
    scores = torch.stack(rows)
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(_stable_topk(scores, k), expected)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_batch_needs_one_transfer_to_the_host(masks: bool, threshold: float | None) -> None:
    torch.manual_seed(0)
    outputs = {"pred_logits": torch.randn(4, 20, 6), "pred_boxes": torch.rand(4, 20, 4)}
    if masks:
        outputs["pred_masks"] = torch.randn(4, 20, 8, 8)
    sizes = torch.tensor([[10, 20], [30, 40], [50, 60], [70, 80]])
    with HostTransfers() as transfers:
        results = PostProcess(30)(outputs, sizes, threshold)
    assert transfers.to_host == ["tolist"]
    complete = PostProcess(30)(outputs, sizes)
    for result, everything in zip(results, complete, strict=True):
        kept = len(result["scores"])
        assert threshold is None or (everything["scores"] > threshold).sum() == kept
        for name, value in result.items():
            assert torch.equal(value, everything[name][:kept])
