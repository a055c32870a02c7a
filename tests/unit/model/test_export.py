"""The eval forward as a graph: torch.compile, ONNX, low precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfdetr.export.frozen import FinalOutputs
from rfdetr.model.criterion import build_criterion
from tests.unit.model.parity_case import config, network
from tests.unit.model.small import images, small_network, targets, weighted


def _largest_difference(found: Any, expected: Any) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


@pytest.mark.parametrize("masks", [False, True])
def test_the_forward_is_one_graph(masks: bool) -> None:
    model = FinalOutputs(small_network(masks=masks)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert _largest_difference(compiled(images()), model(images())) < 1e-5


@pytest.mark.slow
def test_compiled_code_computes_the_same() -> None:
    model = FinalOutputs(network("tiny")).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        image = images(2, 128)
        assert _largest_difference(compiled(image), model(image)) < 1e-4


@pytest.mark.parametrize(
    ("variant", "dynamo"),
    [
        ("tiny-seg", False),
        ("tiny-ms", False),
        pytest.param("tiny", True, marks=pytest.mark.slow),
        pytest.param("nano", False, marks=pytest.mark.slow),
        pytest.param("seg-nano", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_onnx_agrees_for_any_batch(variant: str, dynamo: bool, tmp_path: Path) -> None:
    """tiny-ms has a position table of another size: fix_resolution removes the resampling."""
    onnxruntime = pytest.importorskip("onnxruntime")
    side = config(variant).resolution
    inner = network(variant)
    inner.fix_resolution(side, side)
    model = FinalOutputs(inner).eval()
    names = ["dets", "labels", *(["masks"] if inner.segmentation_head is not None else [])]
    axes: dict[str, Any] = {"dynamic_axes": {name: {0: "batch"} for name in ["input", *names]}}
    if dynamo:
        axes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (images(2, side),),
        path,
        input_names=["input"],
        output_names=names,
        opset_version=17,
        dynamo=dynamo,
        **axes,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        image = images(count, side)
        with torch.no_grad():
            expected = model(image)
        assert _largest_difference(session.run(None, {"input": image.numpy()}), expected) < 1e-4


@pytest.mark.parametrize("masks", [False, True])
def test_training_step_under_bfloat16_autocast(masks: bool) -> None:
    model = small_network(masks=masks).train()
    criterion = build_criterion(model.config).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = criterion(model(images()), targets(masks=masks))
    assert all(value.dtype == torch.float32 for value in losses.values())
    total = weighted(losses, criterion.weight_dict)
    total.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, grad in grads.items() if grad is None or not grad.isfinite().all()] == []
    plain = weighted(criterion(model(images()), targets(masks=masks)), criterion.weight_dict)
    assert total.item() == pytest.approx(plain.item(), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_precision(dtype: torch.dtype) -> None:
    model = FinalOutputs(small_network(masks=True)).eval().to(dtype)
    with torch.no_grad():
        assert {out.dtype for out in model(images().to(dtype))} == {dtype}
