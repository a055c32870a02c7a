from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import SequentialSampler

from rfdetr.config import ModelConfig, RFDETRNanoConfig, RFDETRSegNanoConfig, TrainConfig
from rfdetr.data import spawn
from rfdetr.data.batch import NestedTensor
from rfdetr.errors import DatasetError
from rfdetr.training.datamodule import RFDETRDataModule
from tests.datasets import make_coco, make_roboflow, make_yolo


def model(**options: Any) -> ModelConfig:
    given = {"resolution": 64, "num_classes": 3, "pretrain_weights": None} | options
    return RFDETRNanoConfig(**given)


def module(root: Path, config: ModelConfig | None = None, **options: Any) -> RFDETRDataModule:
    given = {"batch_size": 2, "grad_accum_steps": 1, "num_workers": 0, "seed": 5} | options
    return RFDETRDataModule(config or model(), TrainConfig(dataset_dir=root, **given))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": 13, "valid": 3, "test": 2}
    return make_roboflow(tmp_path_factory.mktemp("exported"), splits=splits, crowd=True)


def test_stages_build_what_they_need_once(exported: Path) -> None:
    for stage, expected in (
        ("fit", {"train", "val"}),
        ("validate", {"val"}),
        ("test", {"test"}),
        ("predict", set()),
        (None, set()),
    ):
        data = module(exported)
        assert data.class_names is None
        assert data.num_classes is None
        data.setup(stage)
        assert set(data._datasets) == expected
        before = dict(data._datasets)
        data.setup(stage)
        assert all(data._datasets[name] is kept for name, kept in before.items())
    assert module(exported).val_dataloader().dataset.class_names == ["washer", "bolt", "nut"]


def test_class_names(exported: Path) -> None:
    data = module(exported)
    data.setup("fit")
    assert data.class_names == ["washer", "bolt", "nut"]
    assert data.num_classes == 3


def test_batches(exported: Path) -> None:
    data = module(exported, batch_size=4)
    batch, targets = next(iter(data.train_dataloader()))  # before setup
    assert isinstance(batch, NestedTensor)
    largest = 64 // 32 * 32 + 5 * 32
    assert batch.tensors.shape == (4, 3, largest, largest)
    assert len(targets) == 4
    assert all(t["boxes"].min() >= 0 and t["boxes"].max() <= 1 for t in targets if len(t["boxes"]))
    assert not any("crowd_boxes" in t for t in targets)
    sizes = [b.tensors.shape for b, _ in data.val_dataloader()]
    assert sizes == [(3, 3, 64, 64)]
    _, targets = next(iter(data.val_dataloader()))
    assert any("crowd_boxes" in t for t in targets)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"multi_scale": False}, {64}),
        ({"expanded_scales": False}, {192}),
        ({"do_random_resize_via_padding": True}, {64, 96, 128, 160, 192, 224}),
    ],
)
def test_sizes_of_training_images(exported: Path, options: dict, sizes: set[int]) -> None:
    data = module(exported, **options)
    data.setup("fit")
    seen = {int(data._datasets["train"][i % 13][1]["size"][0]) for i in range(13)}
    assert seen <= sizes
    assert set(data._datasets["train"].transform.sizes) == sizes
    for batch, targets in data.train_dataloader():
        side = max(int(t["size"].max()) for t in targets)
        assert batch.tensors.shape[2:] == (side, side)


def test_images_that_keep_their_aspect_ratio_are_padded_to_blocks(exported: Path) -> None:
    data = module(exported, square_resize_div_64=False, multi_scale=False)
    batch, targets = next(iter(data.val_dataloader()))
    assert targets[0]["size"].tolist() == [64, 96]
    assert batch.tensors.shape[2:] == (64, 96)
    for batch, _ in data.train_dataloader():
        assert batch.tensors.shape[2] % 32 == batch.tensors.shape[3] % 32 == 0


@pytest.mark.parametrize(
    ("options", "length", "last"),
    [({"batch_size": 2}, 6, 2), ({"batch_size": 3}, 5, 3), ({"grad_accum_steps": 4}, 20, 2)],
)
def test_length_of_an_epoch(
    exported: Path, options: dict, length: int, last: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rfdetr.training.datamodule")
    loader = module(exported, **options).train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == length
    assert len(batches[-1][1]) == last
    assert ("repeats them" in caplog.text) == (length != 6)
    assert isinstance(module(exported).val_dataloader().sampler, SequentialSampler)


def digest(loader: Any) -> list[float]:
    return [float(b.tensors.double().sum()) for b, _ in loader]


def test_samples_depend_on_seed_epoch_and_draw_alone(exported: Path) -> None:
    loaders = [module(exported, num_workers=n).train_dataloader() for n in (0, 2)]
    torch.manual_seed(0)
    first = digest(loaders[0])
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is the point
    assert digest(loaders[1]) == first
    for loader in loaders:
        loader.sampler.set_epoch(1)
    second = digest(loaders[0])
    assert digest(loaders[1]) == second
    assert sorted(second) != sorted(first)
    assert digest(module(exported, seed=6).train_dataloader()) != first


def test_global_random_state_is_left_alone(exported: Path) -> None:
    def states() -> tuple:
        legacy = np.random.get_state()  # noqa: NPY002 - the global state is the point
        return torch.get_rng_state().tolist(), random.getstate(), str(legacy)

    before = states()
    data = module(exported, seed=None)
    data.setup("fit")
    data.setup("test")
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert states() == before


def test_a_run_without_a_seed_keeps_its_own_when_resumed(exported: Path) -> None:
    first, second = module(exported, seed=None), module(exported, seed=None)
    assert first.order_seed != second.order_seed
    second.setup("fit")
    second.load_state_dict(first.state_dict())
    assert digest(second.train_dataloader()) == digest(first.train_dataloader())
    fixed = module(exported, seed=3)
    fixed.load_state_dict(first.state_dict())
    assert fixed.order_seed == 3


def test_loader_arguments(exported: Path) -> None:
    plain = module(exported).val_dataloader()
    assert (plain.num_workers, plain.prefetch_factor, plain.persistent_workers) == (0, None, False)
    asked = {"prefetch_factor": 4, "persistent_workers": True}
    assert module(exported, **asked).val_dataloader().prefetch_factor is None
    busy = module(exported, num_workers=1, pin_memory=False).val_dataloader()
    assert (busy.prefetch_factor, busy.persistent_workers, busy.pin_memory) == (2, True, False)
    busy = module(exported, num_workers=1, **asked).val_dataloader()
    assert (busy.prefetch_factor, busy.persistent_workers) == (4, True)


@pytest.mark.parametrize(
    ("cores", "trainings", "batch_size", "workers"),
    [(2, None, 1, 2), (64, None, 1, 12), (64, 8, 1, 8), (4, 8, 1, 1), (64, 1, 3, 5)],
)
def test_automatic_workers_follow_cores_processes_and_batches(
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    trainings: int | None,
    batch_size: int,
    workers: int,
) -> None:
    monkeypatch.setattr(spawn, "usable_cores", lambda: cores)
    data = module(exported, num_workers="auto", batch_size=batch_size)
    if trainings is not None:
        strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda seed: seed)
        data.trainer = SimpleNamespace(
            strategy=strategy,
            world_size=1,
            global_rank=0,
            num_devices=trainings,
            accumulate_grad_batches=1,
        )
    assert data.train_dataloader().num_workers == workers
    assert TrainConfig(dataset_dir=exported).num_workers == "auto"


@pytest.mark.parametrize(
    ("accelerator", "available", "pinned"),
    [
        ("auto", True, True),
        ("gpu", True, True),
        ("cuda", True, True),
        ("cpu", True, False),
        ("auto", False, False),
    ],
)
def test_memory_is_pinned_where_cuda_is_used(
    exported: Path, monkeypatch: pytest.MonkeyPatch, accelerator: str, available: bool, pinned: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    loader = module(exported, accelerator=accelerator).val_dataloader()
    assert loader.pin_memory is pinned
    unpinned = module(exported, accelerator=accelerator, pin_memory=False).val_dataloader()
    assert unpinned.pin_memory is False


@pytest.mark.parametrize(("device", "pinned"), [("cuda:0", True), ("cpu", False)])
def test_memory_is_pinned_for_the_device_of_the_trainer(
    exported: Path, monkeypatch: pytest.MonkeyPatch, device: str, pinned: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not pinned)
    data = module(exported)
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(strategy=strategy, world_size=1, global_rank=0)
    assert data.val_dataloader().pin_memory is pinned


def test_missing_test_split_uses_validation(tmp_path: Path) -> None:
    data = module(make_roboflow(tmp_path / "a", splits={"train": 2, "valid": 1}))
    data.setup("validate")
    with pytest.warns(UserWarning, match="no test split"):
        data.setup("test")
    assert data.test_dataloader().dataset is data.val_dataloader().dataset
    plain = module(make_coco(tmp_path / "b"), dataset_file="coco")
    assert len(plain.test_dataloader().dataset) == 3
    assert plain.class_names == ["N/A", "washer", "bolt", "nut"]


def test_too_many_classes_for_the_model(exported: Path) -> None:
    data = module(exported, model(num_classes=2))
    data.setup("fit")
    with pytest.raises(DatasetError, match="num_classes=3"):
        data.train_dataloader()


@pytest.mark.parametrize("make", [make_roboflow, make_coco])
def test_segmentation(tmp_path: Path, make: Any) -> None:
    root = make(tmp_path, segmentation=True, crowd=True)
    kind = "coco" if make is make_coco else "roboflow"
    config = RFDETRSegNanoConfig(num_classes=3, resolution=72, pretrain_weights=None)
    data = module(root, config, dataset_file=kind, num_workers=1)
    checked = 0
    for batch, targets in data.train_dataloader():
        for target in targets:
            size = tuple(batch.tensors.shape[2:])
            assert target["masks"].shape == (len(target["boxes"]), *size)
            checked += check_masks(target)
    assert checked > 10
    _, targets = next(iter(data.val_dataloader()))
    assert any(t.get("crowd_masks") for t in targets)
    assert sum(len(t["boxes"]) for t in targets) > 0


def test_yolo_segmentation(tmp_path: Path) -> None:
    config = RFDETRSegNanoConfig(num_classes=3, resolution=72, pretrain_weights=None)
    data = module(make_yolo(tmp_path, polygons=True), config)
    targets = [target for _, batch in data.train_dataloader() for target in batch]
    assert sum(map(check_masks, targets)) > 10


def check_masks(target: dict) -> int:
    """Masks fill their boxes up to the resize; the number of masks checked."""
    height, width = target["size"].tolist()
    checked = 0
    for box, mask in zip(target["boxes"].tolist(), target["masks"].numpy(), strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if box[2] * width < 8 or box[3] * height < 8:
            continue  # a corner of the shape at the border of a crop
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        cx, cy, w, h = box
        expected = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        inside = np.array(found) / [width, height, width, height]
        assert (inside[:2] >= expected[:2] - 0.04).all()
        assert (inside[2:] <= expected[2:] + 0.04).all()
        checked += 1
    return checked


class Counting(pl.LightningModule):
    def predict_step(self, batch: Any, _index: int) -> int:
        return len(batch[1])

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch


def test_prediction_needs_a_loader(exported: Path) -> None:
    data = module(exported)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(Exception, match="predict_dataloader"):
        trainer.predict(Counting(), datamodule=data)
    assert trainer.predict(Counting(), dataloaders=data.val_dataloader()) == [2, 1]
