"""What a detector says about its weights, and what it is after a call that failed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import rfdetr
from rfdetr.checkpoints.best_file import best_payload
from rfdetr.checkpoints.safe_io import save_file
from rfdetr.errors import ConfigError, DatasetError, InputError
from tests.datasets import make_roboflow
from tests.unit.detector.small import pixels, small

TRAIN: dict[str, Any] = {
    "epochs": 2, "batch_size": 2, "grad_accum_steps": 1, "num_workers": 0, "multi_scale": False,
    "tensorboard": False, "seed": 1, "device": "cpu",
}  # fmt: skip


class Stop(pl.Callback):
    """Interrupts a fit after `step` optimizer steps, or before the first batch."""

    def __init__(self, step: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.step = step
        self.error = error

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error("stopped by the test")


@pytest.fixture
def known(tmp_path: Path) -> rfdetr.RFDETR:
    """A detector of the classes x, y from a file."""
    first = small(num_classes=2)
    payload = best_payload(
        first.model.model.state_dict(), first.model_config, class_names=["x", "y"],
        averaged=True, weights_epoch=7,
    )  # fmt: skip
    save_file(payload, tmp_path / "known.pth")
    return rfdetr.RFDETR.from_checkpoint(tmp_path / "known.pth", device="cpu")


def snapshot(detector: rfdetr.RFDETR) -> Any:
    weights = {name: v.clone() for name, v in detector.model.model.state_dict().items()}
    return weights, detector.class_names, detector.model_config.num_classes, repr(detector)


def assert_unchanged(detector: rfdetr.RFDETR, before: Any) -> None:
    weights, *rest = snapshot(detector)
    assert rest == list(before[1:])
    assert weights.keys() == before[0].keys()
    for name, value in weights.items():
        assert torch.equal(value, before[0][name]), name


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_training_leaves_its_classes(
    known: rfdetr.RFDETR, error: type[BaseException], tmp_path: Path
) -> None:
    data = make_roboflow(tmp_path / "data")
    with pytest.raises((SystemExit, error)):
        known.train(
            dataset_dir=data, output_dir=tmp_path / "out", callbacks=[Stop(6, error)], **TRAIN
        )
    assert known.class_names == ["washer", "bolt", "nut"]
    assert known.model_config.num_classes == 3
    found = known.predict(pixels(), threshold=0.0)
    assert set(found.data["class_name"]) <= {"washer", "bolt", "nut", "3"}
    assert "live weights of epoch 1 from the interrupted training in" in repr(known)
    assert not known.model.model.training


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_fails_before_its_first_step_changes_nothing(
    known: rfdetr.RFDETR, tmp_path: Path
) -> None:
    data = make_roboflow(tmp_path / "data")
    known.optimize_for_inference()
    before = snapshot(known)
    out = {"output_dir": tmp_path / "out"}
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        known.train(dataset_dir=data, callbacks=[Stop(0)], **out, **TRAIN)
    assert_unchanged(known, before)
    with pytest.raises(DatasetError):
        known.train(dataset_dir=tmp_path / "missing", **out, **TRAIN)
    with pytest.raises(FileNotFoundError):
        known.train(dataset_dir=data, resume=tmp_path / "missing.ckpt", **out, **TRAIN)
    with pytest.raises(ValueError, match="precision"):
        known.train(dataset_dir=data, precision=3, **out, **TRAIN)
    with pytest.raises(ConfigError, match="list of Lightning callbacks; got 'x'"):
        known.train(dataset_dir=data, callbacks="x", **out, **TRAIN)
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        known.train(dataset_dir=data, output_dir=__file__, **TRAIN)
    with pytest.raises(InputError, match="batch_size must be an integer"):
        known.optimize_for_inference(batch_size="2")  # type: ignore[arg-type]
    assert_unchanged(known, before)
    assert known.model.optimized is not None
    few = small(num_classes=1)
    before = snapshot(few)
    with pytest.raises(ConfigError, match="num_classes is 1"):
        few.train(dataset_dir=data, **out, **TRAIN)
    assert_unchanged(few, before)


@pytest.mark.filterwarnings("ignore")
def test_a_detector_says_which_weights_it_has(known: rfdetr.RFDETR, tmp_path: Path) -> None:
    assert "2 classes: x, y; EMA weights of epoch 7 from " in repr(known)
    data, out = make_roboflow(tmp_path / "data"), tmp_path / "out"
    assert "random initialisation" in repr(small())
    known.optimize_for_inference()
    assert repr(known).endswith("64 pixels, cpu, optimized copy)")
    known.train(dataset_dir=data, output_dir=out, **TRAIN)
    assert f"EMA weights of epoch 1 from the training in {out}" in repr(known)
    assert known.model.optimized is None
    last = rfdetr.RFDETR.from_checkpoint(out / "last.ckpt")
    assert "live weights of epoch 1 from" in repr(last)
    total = rfdetr.RFDETR.from_checkpoint(out / "checkpoint_best_total.pth")
    assert " weights of epoch " in repr(total)
    assert total.model.origin.averaged in {True, False}
    longer = TRAIN | {"epochs": TRAIN["epochs"] + 1}
    known.train(dataset_dir=data, output_dir=out, resume=True, callbacks=Stop(-1), **longer)
    assert f"EMA weights of epoch 2 from the training in {out}" in repr(known)
    known.train(dataset_dir=data, output_dir=tmp_path / "b", use_ema=False, **TRAIN)
    assert "live weights of epoch 1" in repr(known)


@pytest.mark.parametrize("number", [1, 5])
def test_a_class_count_other_than_the_file_s_warns_until_trained(
    known: rfdetr.RFDETR, number: int, tmp_path: Path
) -> None:
    file = tmp_path / "known.pth"
    for make in (
        lambda: small(pretrain_weights=str(file), num_classes=number),
        lambda: rfdetr.RFDETR.from_checkpoint(file, num_classes=number, device="cpu"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # before fine-tuning, another number is normal
            detector = make()
        for use in (
            lambda: detector.predict(pixels()),  # noqa: B023
            lambda: detector.export(tmp_path / "onnx", check=False),  # noqa: B023
        ):
            with pytest.warns(UserWarning, match=f"has 2 classes, num_classes is {number}"):
                use()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known.predict(pixels())


def test_names_of_number_formats() -> None:
    detector = small(device=torch.device("cpu"))
    assert detector.model_config.device == "cpu"
    detector.optimize_for_inference(dtype="bfloat16")
    optimized = detector.model.optimized
    assert optimized is not None
    assert optimized.dtype == torch.bfloat16
    for wrong in ("int8", torch.int8, "float17"):
        with pytest.raises(InputError, match="use float32, float16, bfloat16, float64"):
            detector.optimize_for_inference(dtype=wrong)
        assert detector.model.optimized is optimized


def test_a_checkpoint_never_needs_trust(known: rfdetr.RFDETR, tmp_path: Path) -> None:
    file = tmp_path / "known.pth"
    with pytest.warns(UserWarning, match="trust_checkpoint is ignored"):
        again = rfdetr.RFDETR.from_checkpoint(file, trust_checkpoint=True, device="cpu")
    with pytest.warns(UserWarning, match="trust_checkpoint is ignored"):
        other = small(pretrain_weights=str(file), trust_checkpoint=False)
    assert again.class_names == other.class_names == known.class_names


class FailsAtTheEnd(pl.Callback):
    def on_train_end(self, *_: Any) -> None:
        raise RuntimeError("stopped by the test")


def test_a_failure_after_the_last_epoch_names_that_epoch(
    known: rfdetr.RFDETR, tmp_path: Path
) -> None:
    data = make_roboflow(tmp_path / "data", splits={"train": 2, "valid": 1})
    settings = {**TRAIN, "epochs": 1, "callbacks": [FailsAtTheEnd()]}
    with pytest.raises(RuntimeError, match="stopped by the test"):
        known.train(dataset_dir=data, output_dir=tmp_path / "out", **settings)
    assert "live weights of epoch 0 from the interrupted training in" in repr(known)
