"""RFDETR and its sized classes: construction, checkpoints, training, import time."""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import rfdetr
import rfdetr.training
from rfdetr.checkpoints.best_file import best_payload
from rfdetr.checkpoints.legacy_names import to_legacy
from rfdetr.checkpoints.safe_io import save_file
from rfdetr.config import MODEL_CONFIGS
from rfdetr.detector import DETECTOR_CLASSES
from rfdetr.errors import CheckpointError, ConfigError
from rfdetr.installation import warn_about_public_distribution
from rfdetr.progress import EpochProgress
from tests.datasets import make_roboflow, make_yolo
from tests.unit.detector.small import SMALL, pixels, small, small_segmentation

CHECKPOINTS = Path(__file__).parents[2] / "parity" / "training" / "checkpoints"
TRAIN: dict[str, Any] = {
    "epochs": 1, "batch_size": 2, "grad_accum_steps": 1, "num_workers": 0, "multi_scale": False,
    "tensorboard": False, "seed": 1, "device": "cpu",
}  # fmt: skip


def test_every_variant_has_its_class() -> None:
    assert set(DETECTOR_CLASSES) == set(MODEL_CONFIGS.values())
    for config_class, detector_class in DETECTOR_CLASSES.items():
        assert config_class.__name__ == f"{detector_class.__name__}Config"
        assert getattr(rfdetr, detector_class.__name__) is detector_class
    named = {cls.__name__ for cls in DETECTOR_CLASSES.values()}
    assert named | {"RFDETR", "from_checkpoint"} == set(rfdetr.__all__)
    assert set(rfdetr.__all__) <= set(dir(rfdetr))


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'resolution'"):
        small(resolutoin=64)
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        small().train(dataset_dir="x", epoch=1)
    with pytest.raises(ConfigError, match="RFDETRNano"):
        rfdetr.RFDETR()
    with pytest.raises(AttributeError, match="RFDETRHuge"):
        rfdetr.RFDETRHuge  # noqa: B018


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'gpu' is unknown: use auto, cpu, cuda"):
        small(device="gpu")


def test_a_device_that_is_missing_is_refused_with_the_way() -> None:
    unavailable = f"cuda:{torch.cuda.device_count()}"
    for device in (unavailable, torch.cuda.device_count()):
        with pytest.raises(ConfigError, match=f"'{unavailable}' cannot be used here: .*Use cpu"):
            small(device=device)


def test_the_state_has_what_users_read() -> None:
    state = small(num_classes=3).model
    assert (state.resolution, state.device.type, state.model.training) == (64, "cpu", False)
    assert isinstance(state.model, torch.nn.Module)
    assert state.postprocess.num_select == 10


@pytest.mark.parametrize("build", [small, small_segmentation])
def test_a_best_file_comes_back_with_class_and_names(build: Any, tmp_path: Path) -> None:
    detector = build(num_classes=3)
    payload = best_payload(
        detector.model.model.state_dict(), detector.model_config, class_names=["a", "b", "c"]
    )
    save_file(payload, tmp_path / "best.pth")
    again = rfdetr.RFDETR.from_checkpoint(tmp_path / "best.pth", device="cpu")
    assert type(again) is type(detector)
    assert again.class_names == ["a", "b", "c"]
    found, wanted = (d.predict(pixels(), threshold=0.0) for d in (again, detector))
    np.testing.assert_allclose(found.xyxy, wanted.xyxy, atol=1e-5)
    assert "num_classes" not in again.model_config.model_fields_set
    same = type(detector).from_checkpoint(tmp_path / "best.pth")
    assert type(same) is type(detector)


def test_overrides_of_a_checkpoint(tmp_path: Path) -> None:
    detector = small(num_classes=3)
    payload = best_payload(detector.model.model.state_dict(), detector.model_config)
    save_file(payload, tmp_path / "best.pth")
    other = rfdetr.RFDETR.from_checkpoint(tmp_path / "best.pth", num_classes=7, resolution=128)
    assert (other.model_config.num_classes, other.model.resolution) == (7, 128)
    assert other.model_config.positional_encoding_size == 8
    assert len(other.model.model.class_embed.bias) == 8
    with pytest.raises(ValueError, match="no field"):
        rfdetr.RFDETR.from_checkpoint(tmp_path / "best.pth", unknown=1)
    with pytest.raises(CheckpointError, match="patch_size"):
        rfdetr.RFDETR.from_checkpoint(tmp_path / "best.pth", patch_size=8)


def test_a_legacy_file_is_recognised_and_its_names_count_from_one(tmp_path: Path) -> None:
    detector = small(num_classes=3)
    args = argparse.Namespace(
        **SMALL | {"pretrain_weights": "rf-detr-nano.pth"}, class_names={1: "a", 2: "b", 3: "c"}
    )
    content = {"model": to_legacy(detector.model.model.state_dict()), "args": args, "epoch": 3}
    torch.save(content, tmp_path / "checkpoint.pth")
    again = rfdetr.RFDETR.from_checkpoint(tmp_path / "checkpoint.pth")
    assert type(again) is rfdetr.RFDETRNano
    found = again.predict(pixels(), threshold=0.0)
    wanted = [{1: "a", 2: "b", 3: "c"}.get(int(i), str(i)) for i in found.class_id]
    assert found.data["class_name"].tolist() == wanted
    assert again.class_names == ["a", "b", "c"]


def test_an_old_file_of_one_class_predicts_every_object_once(tmp_path: Path) -> None:
    network = small(num_classes=1).model.model
    network.resize_head(1)
    with torch.inference_mode():
        outputs = network(torch.zeros(1, 3, 64, 64))
    args = argparse.Namespace(dataset_file="yolo", class_names=["bolt"])
    torch.save({"model": to_legacy(network.state_dict()), "args": args}, tmp_path / "old.pth")
    again = small(pretrain_weights=str(tmp_path / "old.pth"))
    with torch.inference_mode():
        found = again.model.model(torch.zeros(1, 3, 64, 64))
    assert torch.allclose(found["pred_boxes"], outputs["pred_boxes"], atol=1e-5)
    assert torch.allclose(found["pred_logits"][..., :1], outputs["pred_logits"], atol=1e-5)
    detections = again.predict(pixels(), threshold=0.0)
    assert detections.data["class_name"].tolist() == ["bolt"] * SMALL["num_select"]


@pytest.mark.parametrize(
    "name", ["evil_reduce_in_args.pth", "evil_reduce_inside_namespace.pth", "truncated.pth"]
)
def test_bad_files_are_refused_and_run_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(CheckpointError, match=name):
        rfdetr.RFDETR.from_checkpoint(CHECKPOINTS / name)
    with pytest.raises(CheckpointError, match=name):
        small(pretrain_weights=str(CHECKPOINTS / name))
    assert not list(tmp_path.iterdir())


def test_a_full_size_file_without_settings_is_recognised_by_its_tensors() -> None:
    from rfdetr.checkpoints.record import parse_checkpoint
    from rfdetr.checkpoints.structure import infer_config, infer_config_class
    from rfdetr.model.network import build_network

    config_class = MODEL_CONFIGS["small"]
    with torch.device("meta"):
        state = build_network(config_class(pretrain_weights=None)).state_dict()
    container = parse_checkpoint({"model": to_legacy(state)}, "mine.pth")
    assert infer_config_class(container) is config_class
    assert infer_config(container).resolution == 512
    named = parse_checkpoint({"model": to_legacy(state)}, "models/rf-detr-small.pth")
    assert infer_config_class(named) is config_class


class Seen(pl.Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


@pytest.mark.filterwarnings("ignore")
def test_training_leaves_the_trained_network_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_roboflow(tmp_path / "data")
    detector = small()
    before = {n: v.clone() for n, v in detector.model.model.state_dict().items()}
    seen = Seen()
    detector.train(dataset_dir=data, output_dir=tmp_path / "out", callbacks=[seen], **TRAIN)
    told = [p for p in map(EpochProgress.parse, capsys.readouterr().out.splitlines()) if p]
    assert [(p.epoch, p.of) for p in told] == [(i + 1, TRAIN["epochs"]) for i in range(len(told))]
    assert len(told) == TRAIN["epochs"]
    assert told[-1].loss is not None
    names = detector.class_names
    assert detector.model_config.num_classes == len(names) == detector.model.class_names.__len__()
    state = detector.model.model.state_dict()
    assert len(state["class_embed.bias"]) == len(names) + 1
    assert not torch.equal(state["query_feat.weight"], before["query_feat.weight"])
    assert seen.steps > 0
    assert not detector.model.model.training
    found = detector.predict(pixels(), threshold=0.0)
    assert set(found.data["class_name"]) <= {*names, str(len(names))}
    best = rfdetr.RFDETR.from_checkpoint(tmp_path / "out" / "checkpoint_best_total.pth")
    assert best.class_names == names
    assert type(best) is rfdetr.RFDETRNano
    again = {n: v.clone() for n, v in state.items()}
    detector.train(
        dataset_dir=data, output_dir=tmp_path / "again", **TRAIN | {"lr": 0, "lr_encoder": 0}
    )
    for name, value in detector.model.model.state_dict().items():
        torch.testing.assert_close(value, again[name], msg=name)
    last = rfdetr.RFDETR.from_checkpoint(tmp_path / "out" / "last.ckpt")
    assert (last.class_names, type(last)) == (names, rfdetr.RFDETRNano)


@pytest.mark.filterwarnings("ignore")
def test_a_chosen_class_count_is_kept_with_a_warning(tmp_path: Path) -> None:
    data = make_yolo(tmp_path / "data")
    detector = small(num_classes=9)
    with pytest.warns(UserWarning, match="num_classes is 9, the dataset has"):
        detector.train(
            dataset_dir=data, dataset_file="yolo", output_dir=tmp_path / "out", start_epoch=3,
            **TRAIN,
        )  # fmt: skip
    assert len(detector.model.model.class_embed.bias) == 10
    few = small(num_classes=1)
    with pytest.raises(ConfigError, match="num_classes is 1"):
        few.train(dataset_dir=data, dataset_file="yolo", output_dir=tmp_path / "few", **TRAIN)


def test_retired_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from rfdetr.detector.train import _take_retired

    monkeypatch.setattr("rfdetr.detector.train.torch_device", torch.device)  # as if it were there

    settings = {"device": "cuda:1", "do_benchmark": True, "callbacks": {"on_train_end": []}}
    with pytest.warns(UserWarning, match="do_benchmark, callbacks as a dictionary"):
        assert _take_retired(settings) == []
    assert settings == {"accelerator": "gpu", "devices": "1,"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _take_retired({"device": "cpu"}) == []


def test_importing_the_package_is_light() -> None:
    """Only what is measured: modules that `import rfdetr` and its configuration pull in."""
    code = "import sys, rfdetr, rfdetr.config, rfdetr.training; print(sorted(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = ("torch", "timm", "pytorch_lightning", "supervision", "numpy", "PIL", "mlflow", "cv2")
    assert not [name for name in heavy if f"'{name}'" in output.stdout]


def test_the_public_distribution_beside_ours_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metadata(name: str, version: str) -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}")

    monkeypatch.setattr(sys, "path", [str(tmp_path), "/does/not/exist"])
    metadata("rfdetr_pipeline", "0.1.0")
    warn_about_public_distribution.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rfdetr.RFDETRNano
    metadata("rfdetr", "1.6.0")
    warn_about_public_distribution.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"rfdetr 1\.6\.0.*pip uninstall") as caught:
        assert rfdetr.RFDETRNano
        assert rfdetr.training.RFDETRModule
    assert [Path(w.filename).name for w in caught] == ["test_detector.py"]
    warn_about_public_distribution.cache_clear()


@pytest.mark.filterwarnings("ignore")
def test_train_trains_every_query_group(tmp_path: Path) -> None:
    """The network of a detector is in eval mode, with one group, until it is trained."""
    data = make_roboflow(tmp_path / "data")
    detector = small(group_detr=2)
    before = {n: p.clone() for n, p in detector.model.model.named_parameters()}
    for run in ("first", "second"):
        detector.train(dataset_dir=data, output_dir=tmp_path / run, **TRAIN)
        after = dict(detector.model.model.named_parameters())
        for name in ("transformer.enc_output.1.weight", "transformer.enc_output.0.weight"):
            assert not torch.equal(before[name].cpu(), after[name].cpu()), name
        before = {n: p.detach().clone() for n, p in after.items()}
    assert not detector.model.model.training
