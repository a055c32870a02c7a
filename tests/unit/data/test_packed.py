"""Targets travel as one tensor per key and stay dictionaries."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from rfdetr.config import RFDETRNanoConfig, TrainConfig
from rfdetr.data.packed import PackedTargets, Target
from rfdetr.training import RFDETRDataModule
from tests.datasets import make_roboflow


def some_targets(masks: bool = True) -> list[Target]:
    made = []
    for number, count in enumerate((2, 0, 3)):
        target: Target = {
            "boxes": torch.rand(count, 4),
            "labels": torch.arange(count),
            "image_id": torch.tensor([number]),
            "scale": torch.tensor(0.5 + number),  # no axes
            "codes": [{"size": [2, 2], "counts": b"x"}] * count,
        }
        if masks:
            target["masks"] = torch.rand(count, 5 + number, 7) > 0.5  # of different sizes
        if number == 2:
            target["crowd_boxes"] = torch.rand(1, 4)  # only some images have it
        made.append(target)
    return made


def same(found: list[Target], expected: list[Target]) -> None:
    assert isinstance(found, list)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, Tensor):
                assert one[name].dtype == value.dtype
                assert torch.equal(one[name], value), name
            else:
                assert one[name] == value


def storages(targets: list[Target]) -> int:
    tensors = [v for target in targets for v in target.values() if isinstance(v, Tensor)]
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()})


def test_values_are_kept_in_one_tensor_per_key() -> None:
    given = some_targets()
    packed = PackedTargets(given)
    same(packed, given)
    assert storages(packed) == 6
    for copied in (
        pickle.loads(pickle.dumps(packed)),
        copy.deepcopy(packed),
        packed.map(lambda tensor: tensor.clone()),
    ):
        same(copied, given)
        assert storages(copied) == 6


def test_values_of_different_types_stay_apart() -> None:
    given: list[Target] = [{"a": torch.ones(1), "b": None}, {"a": torch.ones(1).long(), "b": "x"}]
    packed = PackedTargets(given)
    same(packed, given)
    moved = packed.map(lambda tensor: tensor + 1)
    assert [target["a"].item() for target in moved] == [2, 2]
    assert [target["b"] for target in moved] == [None, "x"]


def test_collections_that_lightning_converts_are_packed_again() -> None:
    """Lightning's precision plugins make a list of the same type from converted elements."""
    packed = PackedTargets(some_targets())
    converted = apply_to_collection(packed, Tensor, lambda tensor: tensor.double())
    same(converted, [dict(target) for target in packed.map(lambda tensor: tensor.double())])
    assert isinstance(converted, PackedTargets)
    assert storages(converted) == 6


def test_changed_dictionaries_move_as_they_are() -> None:
    packed = PackedTargets(some_targets())
    packed[0]["labels"] = torch.tensor([7, 8])
    packed[1]["new"] = torch.ones(2)
    del packed[2]["scale"]
    packed[2]["boxes"].zero_()  # in place
    expected = copy.deepcopy(list(packed))
    same(packed.map(lambda tensor: tensor.clone()), expected)
    same(pickle.loads(pickle.dumps(packed)), expected)
    packed.pop()
    same(packed.map(lambda tensor: tensor.clone()), expected[:2])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_roboflow(tmp_path_factory.mktemp("data"), splits={"train": 16, "valid": 2})


def loader(root: Path, batch: int, workers: int, window: int = 1) -> torch.utils.data.DataLoader:
    model = RFDETRNanoConfig(resolution=64, num_classes=3, pretrain_weights=None)
    config = TrainConfig(
        dataset_dir=root,
        batch_size=batch,
        grad_accum_steps=window,
        num_workers=workers,
        multi_scale=False,
        seed=0,
    )
    return RFDETRDataModule(model, config).train_dataloader()


def test_a_batch_takes_few_blocks_of_shared_memory(exported: Path) -> None:
    """One for the images and one per key; each takes a descriptor in every process that has it."""
    samples, targets = next(iter(loader(exported, 64, 0)))
    assert samples.tensors.dtype == torch.uint8
    assert samples.mask is None
    assert storages(targets) <= 7
    shared = pickle.loads(ForkingPickler.dumps((samples, targets)))
    assert storages(shared[1]) <= 7
    same(shared[1], targets)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "workers"), [(256, 8), (64, 2)])
def test_large_batches_load_at_1024_open_files(exported: Path, batch: int, workers: int) -> None:
    """Every queue is full before the first batch is taken."""
    code = f"""
import resource, time
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
from tests.unit.data.test_packed import loader
found = iter(loader(Path({str(exported)!r}), {batch}, {workers}, window=4))
kept = [next(found)]
time.sleep(10)
kept += list(found)
print(len(kept), sum(len(targets) for _, targets in kept))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["20", str(20 * batch)]
