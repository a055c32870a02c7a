"""ONNX export: names, opset, parity, dynamic batch, clear refusals, nothing changed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from rfdetr.errors import InputError, MissingDependencyError
from rfdetr.export import onnx as module
from rfdetr.export.onnx import FILE_NAME, export_onnx
from tests.unit.detector.small import small, small_segmentation


def _run(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(part) for part in session.run(None, {"input": images.numpy()})]


@pytest.mark.parametrize("build", [small, small_segmentation])
def test_the_file_has_the_documented_interface(build: Any, tmp_path: Path) -> None:
    detector = build(num_classes=3)
    masks = detector.model_config.segmentation_head
    result = detector.export(tmp_path / "out")
    assert result.path == tmp_path / "out" / FILE_NAME
    graph = onnx.load(result.path)
    onnx.checker.check_model(graph)
    assert graph.opset_import[0].version == result.opset == 17
    assert [i.name for i in graph.graph.input] == ["input"]
    names = ["dets", "labels", "masks"][: 3 if masks else 2]
    assert [o.name for o in graph.graph.output] == names == list(result.outputs)
    side = detector.model.resolution
    shapes = [[d.dim_value for d in o.type.tensor_type.shape.dim] for o in graph.graph.output]
    expected = [[1, 10, 4], [1, 10, 4], [1, 10, side // 4, side // 4]]
    assert shapes == expected[: len(names)]
    assert result.max_difference is not None
    assert result.max_difference < 1e-4
    assert [p.name for p in (tmp_path / "out").iterdir()] == [FILE_NAME]
    facts = {item.key: json.loads(item.value) for item in graph.metadata_props}
    names = {str(label): name for label, name in detector.model.label_names().items()}
    assert facts == {
        "class_names": names,
        "input_size": [side, side],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


def test_a_dynamic_batch_takes_any_number(tmp_path: Path) -> None:
    detector = small(num_classes=3)
    result = detector.export(tmp_path, dynamic_batch=True, batch_size=2)
    assert result.batch_size is None
    for count in (1, 3):
        images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = detector.model.model(images)
        boxes, logits = _run(result.path, images)
        torch.testing.assert_close(boxes, expected["pred_boxes"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits, expected["pred_logits"], atol=1e-4, rtol=1e-4)


def test_another_shape_is_exported_with_its_own_position_table(tmp_path: Path) -> None:
    result = small(num_classes=3).export(tmp_path, shape=(64, 96))
    assert result.shape == (64, 96)
    assert result.max_difference < 1e-4
    assert [tuple(part.shape) for part in _run(result.path, torch.zeros(1, 3, 64, 96))] == [
        (1, 10, 4), (1, 10, 4),
    ]  # fmt: skip


def test_the_network_is_unchanged_and_can_train(tmp_path: Path) -> None:
    network = small(num_classes=3).model.model.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    export_onnx(network, tmp_path)
    assert network.training
    assert all(torch.equal(before[n], v) for n, v in network.state_dict().items())
    network(torch.randn(1, 3, 64, 64))["pred_logits"].sum().backward()
    assert network.class_embed.weight.grad is not None
    assert network.query_feat.weight.requires_grad


@pytest.mark.parametrize("shape", [(65, 64), (64, 33), (0, 64), (-32, 32)])
def test_a_shape_that_does_not_divide_is_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"multiples of patch_size \* num_windows = 32, for ex"):
        small().export(tmp_path, shape=shape)
    assert not list(tmp_path.iterdir())


def test_a_shape_that_is_not_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shape must be \(height, width\).*; got 64\."):
        small().export(tmp_path, shape=64)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find(name: str, *args: Any) -> Any:
        return None if name in ("onnx", "onnxruntime") else real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(
        MissingDependencyError, match=r"onnx and onnxruntime.*rfdetr-pipeline\[onnx"
    ):
        small().export(tmp_path)


def test_a_difference_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._probe

    def shifted(*args: Any) -> Any:
        images, outputs = real(*args)
        return images, [part + 0.5 for part in outputs]

    monkeypatch.setattr(module, "_probe", shifted)
    with pytest.warns(UserWarning, match="differs from the network by up to 0.5"):
        result = small(num_classes=3).export(tmp_path)
    assert result.max_difference == pytest.approx(0.5, abs=1e-3)
    assert small(num_classes=3).export(tmp_path, check=False).max_difference is None


def test_an_interrupted_export_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = small(num_classes=3)
    kept = detector.export(tmp_path).path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(OSError, match="no space"):
        detector.export(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["nano", "seg-nano"])
def test_full_size_models_agree(variant: str, tmp_path: Path) -> None:
    from rfdetr.config import MODEL_CONFIGS
    from rfdetr.model.network import build_network

    torch.manual_seed(0)
    network = build_network(MODEL_CONFIGS[variant](pretrain_weights=None)).eval()
    result = export_onnx(network, tmp_path, dynamic_batch=True)
    assert result.max_difference is not None
    assert result.max_difference < 1e-4


@pytest.mark.parametrize("opset", [13, 15, 21, 99, 17.0])
def test_an_opset_that_cannot_hold_the_network_names_the_range(
    opset: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="opset 16 or higher, and 20 is the highest"):
        small().export(tmp_path, opset=opset)
    assert capfd.readouterr().out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [16, 20])
def test_the_lowest_and_the_highest_opset_agree(opset: int, tmp_path: Path) -> None:
    result = small(num_classes=3).export(tmp_path, opset=opset)
    assert result.max_difference is not None
    assert result.max_difference < 1e-4


def test_the_names_of_the_public_package(tmp_path: Path) -> None:
    detector = small(num_classes=3)
    result = detector.export(tmp_path, format="onnx", opset_version=16)
    assert result.opset == 16
    assert Path(result) == Path(str(result)) == result.path
    with pytest.raises(InputError, match="'tensorrt' is not offered: export writes ONNX"):
        detector.export(tmp_path, format="tensorrt")
    detector.inference(batch_size=2)
    assert detector.model.optimized is not None
    assert detector.model.optimized.batch_size == 2
