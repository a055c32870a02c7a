"""What a validation asks of the device, the host's memory and the training thread."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rfdetr.evaluation import batches
from rfdetr.evaluation.batches import data_from_batch, encode_masks, encode_on_device
from rfdetr.evaluation.box_table import EvaluationData
from rfdetr.evaluation.evaluator import CocoEvaluator
from rfdetr.evaluation.exchange import from_bytes, to_bytes
from rfdetr.model.postprocess import PostProcess
from rfdetr.training.beside import Beside
from rfdetr.training.callbacks.coco_eval import COCOEvalCallback
from rfdetr.training.callbacks.ema import RFDETREMACallback
from tests.unit.model.host_transfers import HostTransfers
from tests.unit.training.helpers import Run, tiny_model, tiny_run
from tests.unit.training.replay import ReplayModule, make_job, make_loader, make_trainer, numbers


def outputs_of(images: int, queries: int, side: int = 24, classes: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blobs = torch.randn(images, queries, 4, 4, generator=generator)
    masks = torch.nn.functional.interpolate(blobs, (side, side), mode="bilinear")
    return {
        "pred_logits": torch.randn(images, queries, classes, generator=generator),
        "pred_boxes": torch.rand(images, queries, 4, generator=generator) * 0.5 + 0.1,
        "pred_masks": masks - 0.5,
    }


def targets_of(images: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    return [
        {
            "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]),
            "labels": torch.tensor([1]),
            "image_id": torch.tensor([i]),
            "orig_size": torch.tensor(size),
            "masks": torch.ones(1, 4, 4, dtype=torch.bool),
        }
        for i in range(images)
    ]


def tables_are_equal(one: EvaluationData, other: EvaluationData) -> None:
    np.testing.assert_array_equal(one.image_ids, other.image_ids)
    for a, b in ((one.detections, other.detections), (one.truth, other.truth)):
        for name in ("image", "label", "box", "area", "score", "crowd"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        assert (a.rle is None) == (b.rle is None)
        if a.rle is not None:
            assert a.rle.tolist() == b.rle.tolist()


def test_a_validation_step_copies_its_detections_once(shapes: Path, tmp_path: Path) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, compute_val_loss=False))
    batch = next(iter(run.data.val_dataloader()))
    module = run.module.eval()
    samples, targets = module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    with HostTransfers() as transfers:
        module.validation_step((samples, targets), 0)
    assert transfers.to_host.count("cpu") == 1
    assert not {"item", "_local_scalar_dense", "__bool__", "nonzero"} & set(transfers.to_host)


def test_masks_from_logits_are_those_of_full_size() -> None:
    outputs, targets = outputs_of(3, 20), targets_of(3, (37, 53))
    postprocess, sizes = PostProcess(60), torch.tensor([[37, 53]] * 3)
    full = data_from_batch(postprocess(outputs, sizes), targets, max_dets=5, masks=True)
    small = postprocess.on_host(outputs, sizes)
    tables_are_equal(data_from_batch(small, targets, max_dets=5, masks=True), full)
    assert len(full.detections) < 3 * 60  # some are beyond the limit


@pytest.mark.parametrize("shape", [(1, 5, 7), (9, 40, 30), (5, 1, 1)])
def test_runs_found_on_a_device_are_those_of_pycocotools(shape: tuple[int, int, int]) -> None:
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.6
    if len(masks) > 3:
        masks[0], masks[1] = False, True
        masks[2], masks[2, 0, 0] = False, True
    assert encode_on_device(masks) == encode_masks(masks)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_the_masks_of_a_large_batch() -> None:
    """64 images x 300 queries: 236 MB as masks of the images' size, which are 96 x 128."""
    size = (96, 128)
    outputs, targets = outputs_of(64, 300), targets_of(64, size)
    postprocess, sizes = PostProcess(300), torch.tensor([size] * 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the current size
    before = peak()
    found = postprocess.on_host(outputs, sizes)
    data = data_from_batch(found, targets, max_dets=500, masks=True)
    assert peak() - before < 120
    assert data.detections.rle is not None
    assert len(data.detections.rle) == 64 * 300


def peak() -> int:
    """Peak resident memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


@pytest.mark.parametrize("masks", [False, True])
def test_what_ranks_exchange_comes_back_as_it_was(masks: bool) -> None:
    outputs, targets = outputs_of(3, 6), targets_of(3, (20, 30))
    targets[1] |= {"image_id": torch.tensor([(1 << 53) + 1])}  # a float64 could not hold it
    if not masks:
        del outputs["pred_masks"]
    results = PostProcess(6).on_host(outputs, torch.tensor([[20, 30]] * 3))
    evaluator = CocoEvaluator(("bbox", "segm") if masks else ("bbox",))
    for given in (evaluator.state(), data_from_batch([], [], max_dets=9, masks=masks)):
        tables_are_equal(from_bytes(to_bytes(given)), given)
    evaluator.update(results, targets)
    tables_are_equal(from_bytes(to_bytes(evaluator.state())), evaluator.state())


def test_the_truth_is_read_once_and_beside_the_training_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, pairs = make_job(4, images=6)
    reading = batches._truth
    threads: list[threading.Thread] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread())
        return reading(*args, **kwargs)

    monkeypatch.setattr(batches, "_truth", counted)
    trainer = make_trainer(RFDETREMACallback(tau=0), COCOEvalCallback(plots=False), max_epochs=1)
    loader = make_loader(pairs, batch_size=2)
    trainer.fit(ReplayModule(pairs, speed=0.0), loader, loader)
    assert len(threads) == 3  # three batches, live and EMA
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)
    found = numbers(trainer)
    assert found["val/ema_mAP_50_95"] == found["val/mAP_50_95"]


def test_an_error_beside_the_training_thread_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, pairs = make_job(4, images=6)

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("from the other thread")

    monkeypatch.setattr(batches, "_truth", broken)
    trainer = make_trainer(COCOEvalCallback(plots=False))
    with pytest.raises(ValueError, match="from the other thread"):
        trainer.validate(ReplayModule(pairs), make_loader(pairs, batch_size=2), verbose=False)
    assert not [t for t in threading.enumerate() if t.name.startswith("metrics")]


def test_beside_is_one_call_behind_at_most() -> None:
    beside, gate, done = Beside("test"), threading.Event(), []
    beside.run(lambda: (gate.wait(5), done.append(1)))
    threading.Timer(0.1, gate.set).start()
    beside.run(done.append, 2)  # waits for the first call
    assert done[0] == 1
    beside.finish()
    assert done == [1, 2]
    beside.run(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        beside.finish()
    beside.finish()
