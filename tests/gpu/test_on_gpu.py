"""What only a GPU shows, against the CPU. `make test-gpu`; without a GPU the same code runs twice
on the CPU, which checks the tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rfdetr import RFDETRNano
from rfdetr.config import RFDETRNanoConfig
from rfdetr.data import upload
from rfdetr.evaluation.batches import encode_masks
from rfdetr.model.criterion import build_criterion
from rfdetr.model.network import build_network
from rfdetr.training import build_trainer
from tests.datasets import make_roboflow
from tests.unit.detector.small import SMALL, pixels, small, small_segmentation
from tests.unit.model.small import targets
from tests.unit.training.helpers import Run, tiny_model, tiny_run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_float32")]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": 16, "valid": 6, "test": 2}
    return make_roboflow(tmp_path_factory.mktemp("data"), splits=splits, crowd=True)


def move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: move(part, device) for name, part in value.items()}
    return [move(part, device) for part in value] if isinstance(value, list) else value


def test_losses_of_a_float32_step_equal_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    network = build_network(RFDETRNanoConfig(pretrain_weights=None, num_queries=30)).train()
    images, given = torch.randn(2, 3, 128, 128), targets((5, 2))
    losses = []
    for device in (torch.device("cpu"), DEVICE):
        model = copy.deepcopy(network).to(device)
        criterion = build_criterion(model.config).to(device).train()
        found = criterion(model(images.to(device)), move(given, device))
        losses.append({name: value.item() for name, value in found.items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-4)


def test_images_are_resized_within_one_grey_level_of_the_cpu() -> None:
    from sklearn.datasets import load_sample_images

    photos = [np.ascontiguousarray(photo) for photo in load_sample_images().images]
    other = [np.ascontiguousarray(photos[0][:300]), photos[1]]
    for images in (photos, other):
        sizes = [(384, 384), (384, 384)]
        on_cpu = upload.resized(images, sizes, torch.device("cpu"))
        found = upload.resized(images, sizes, DEVICE)
        for one, same in zip(found, on_cpu, strict=True):
            assert one.device.type == DEVICE.type
            assert one.dtype == torch.uint8
            assert (one.cpu().int() - same.int()).abs().max() <= 1


@pytest.mark.parametrize("make", [small, small_segmentation])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_predict_equals_the_cpu(make: Any, dtype: str) -> None:
    torch.manual_seed(0)
    detector = make(num_classes=3)
    images = [pixels(50, 70, seed=i) for i in range(3)] + [pixels(64, 48, seed=9)]
    expected = detector.predict(images, threshold=0.0, batch_size=4)
    detector.model.model.to(DEVICE)
    found = detector.predict(images, threshold=0.0, batch_size=4, dtype=dtype)
    tolerance = 5e-3 if dtype == "float32" else 5e-2
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        np.testing.assert_allclose(one.confidence, other.confidence, atol=tolerance)
        assert (one.mask is None) == (other.mask is None)


def test_masks_are_encoded_on_the_device_as_on_the_cpu() -> None:
    masks = torch.rand(7, 40, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    assert encode_masks(masks.to(DEVICE)) == encode_masks(masks)


def test_a_fit_trains_validates_resumes_and_predicts(dataset: Path, tmp_path: Path) -> None:
    fields = {"accelerator": "auto", "num_workers": 2, "multi_scale": True, "batch_size": 4}
    run = Run(tiny_model(group_detr=2), tiny_run(dataset, tmp_path, **fields)).fit()
    assert run.trainer.strategy.root_device.type == DEVICE.type
    assert run.data.train_dataloader().pin_memory is GPU
    metrics = run.metrics()
    assert 0 <= metrics["val/ema_mAP_50_95"] <= 1
    again = Run(tiny_model(group_detr=2), tiny_run(dataset, tmp_path, **fields | {"epochs": 3}))
    again.fit(tmp_path / "last.ckpt")
    assert again.trainer.current_epoch == 3
    image = next((dataset / "valid").glob("*.jpg"))
    detector = RFDETRNano(
        **SMALL
        | {"device": "auto", "pretrain_weights": str(tmp_path / "checkpoint_best_total.pth")}
    )
    assert detector.model.device.type == DEVICE.type
    with Image.open(image) as opened:
        assert detector.predict(opened, threshold=0.0).xyxy.shape[1] == 4


@pytest.mark.parametrize("fp16_eval", [False, True])
def test_validation_in_half_precision(dataset: Path, tmp_path: Path, fp16_eval: bool) -> None:
    config = tiny_run(dataset, tmp_path, accelerator="auto", fp16_eval=fp16_eval)
    run = Run(tiny_model(amp=False), config)
    seen: list[torch.dtype] = []
    layer = run.module.model.class_embed
    layer.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    run.trainer.validate(run.module, run.data, verbose=False)
    assert set(seen) == {torch.float16 if fp16_eval and GPU else torch.float32}


def test_precision_follows_the_device(dataset: Path, tmp_path: Path) -> None:
    config = tiny_run(dataset, tmp_path, accelerator="auto")
    precision = build_trainer(config, tiny_model()).precision
    expected = {"bf16-mixed", "16-mixed"} if GPU else {"32-true", "16-mixed"}
    assert precision in expected
