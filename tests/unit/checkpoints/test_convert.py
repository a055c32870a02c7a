"""Conversion and resume: every kind of file becomes a dictionary that Lightning resumes from."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from rfdetr.checkpoints.best_file import best_payload, stripped_payload
from rfdetr.checkpoints.convert import as_lightning_checkpoint, convert_legacy_checkpoint
from rfdetr.checkpoints.legacy_names import from_legacy, to_legacy
from rfdetr.checkpoints.lightning_io import LegacyCheckpointIO
from rfdetr.checkpoints.record import read_checkpoint
from rfdetr.checkpoints.safe_io import save_file
from rfdetr.config import RFDETRNanoConfig, TrainConfig
from rfdetr.errors import CheckpointError
from rfdetr.model.network import build_network

FOLDER = Path(__file__).parents[2] / "parity" / "training" / "checkpoints"
ENTRIES = json.loads((FOLDER / "manifest.json").read_text())
CONVERTIBLE = [e for e in ENTRIES if e["generation"] in ("a", "b", "c")]
REFUSED = [e for e in ENTRIES if e["generation"] in ("invalid", "malicious", "corrupt")]
SMALL: dict[str, Any] = {
    "encoder_dim": 32, "encoder_depth": 2, "encoder_heads": 2, "out_feature_indexes": [1, 2],
    "resolution": 64, "hidden_dim": 32, "dec_layers": 1, "dim_feedforward": 16, "num_queries": 4,
    "num_select": 4, "group_detr": 2, "num_classes": 3, "pretrain_weights": None,
}  # fmt: skip


def _files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("entry", CONVERTIBLE, ids=lambda e: e["file"])
def test_every_legacy_generation_converts(entry: dict[str, Any], tmp_path: Path) -> None:
    new, expect = tmp_path / "made" / "new.ckpt", entry["expect"]
    report = convert_legacy_checkpoint(FOLDER / entry["file"], new)
    made = torch.load(new, weights_only=True)
    names = {n.removeprefix("model.") for n in made["state_dict"]}
    assert all(n.startswith("model.") for n in made["state_dict"])
    back = to_legacy({n: made["state_dict"]["model." + n] for n in names})
    for name, (shape, total) in entry["model_sums"].items():
        assert list(back[name].shape) == shape
        assert back[name].double().sum().item() == pytest.approx(total, abs=1e-4)
    assert made["epoch"] == (expect.get("epoch") or 0)
    assert made["optimizer_states"] == made["lr_schedulers"] == []
    assert ("legacy_ema_state_dict" in made) == expect["has_ema"]
    for name, value in expect.get("hyper_parameters_is_dict_with", {}).items():
        assert made["hyper_parameters"][name] == value
    assert (report.max_abs_difference, report.compared) == (0.0, "tensors")
    assert report.reason
    assert _files(new.parent) == ["new.ckpt"]


@pytest.mark.parametrize("entry", REFUSED, ids=lambda e: e["file"])
def test_bad_files_are_refused_leave_nothing_and_run_nothing(
    entry: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, target = tmp_path / "empty", tmp_path / "target"
    empty.mkdir()
    target.mkdir()
    monkeypatch.setenv("TMPDIR", str(empty))
    source = FOLDER / entry["file"]
    with pytest.raises(ValueError, match=entry["file"]):
        convert_legacy_checkpoint(source, target / "new.ckpt")
    with pytest.raises(CheckpointError, match=entry["file"]):
        LegacyCheckpointIO().load_checkpoint(source, weights_only=False)
    assert _files(empty) == _files(target) == []


def test_a_flipped_bit_is_found_and_not_converted(tmp_path: Path) -> None:
    old, new = tmp_path / "old.pth", tmp_path / "made" / "new.ckpt"
    state = to_legacy(build_network(RFDETRNanoConfig(**SMALL)).state_dict())
    for name in ("query_feat.weight", next(n for n in state if n.endswith("query.weight"))):
        save_file({"model": state}, old)
        damaged = bytearray(old.read_bytes())
        place = damaged.find(state[name].contiguous().numpy().tobytes()[:64])
        assert place > 0
        damaged[place + 5] ^= 16
        old.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"old\.pth is corrupt: the stored checksum"):
            convert_legacy_checkpoint(old, new)
        assert _files(new.parent) == []


def test_refusals_that_protect_files(tmp_path: Path) -> None:
    source = tmp_path / "old.pth"
    source.write_bytes((FOLDER / "b_published_model_only.pth").read_bytes())
    with pytest.raises(CheckpointError, match="overwrite"):
        convert_legacy_checkpoint(source, tmp_path / "." / "old.pth")
    with pytest.raises(CheckpointError, match="Lightning file already"):
        convert_legacy_checkpoint(FOLDER / "ptl_last_ckpt_layout.ckpt", tmp_path / "new.ckpt")
    with pytest.raises(FileNotFoundError):
        convert_legacy_checkpoint(tmp_path / "none.pth", tmp_path / "new.ckpt")
    assert _files(tmp_path) == ["old.pth"]


def test_the_proof_compares_outputs_where_a_network_can_be_built(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = RFDETRNanoConfig(**SMALL)
    state = to_legacy(build_network(config).state_dict())
    args = argparse.Namespace(**{**SMALL, "pretrain_weights": "rf-detr-nano.pth"})
    save_file({"model": state, "args": args, "epoch": 1, "ema_model": state}, tmp_path / "old.pth")
    threads = torch.get_num_threads()
    with caplog.at_level(logging.INFO):
        report = convert_legacy_checkpoint(tmp_path / "old.pth", tmp_path / "new.ckpt")
    assert (report.compared, report.max_abs_difference, report.reason) == ("outputs", 0.0, "")
    assert (report.tensors, report.joined) == (len(from_legacy(state)), 4)
    assert report.renamed == 5 + 12 * 2 + 2  # embeddings, two blocks, norm
    assert "largest difference of outputs 0" in caplog.text
    assert report.epoch == 1
    assert torch.get_num_threads() == threads
    written = read_checkpoint(tmp_path / "new.ckpt")
    assert all(torch.equal(written.weights[n], v) for n, v in from_legacy(state).items())


def test_a_conversion_that_changes_a_value_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rfdetr.checkpoints import convert

    real = convert.write_torch

    def damaged(content: dict[str, Any], path: Path) -> None:
        content["state_dict"]["model.class_embed.bias"] = torch.full((4,), 7.0)
        real(content, path)

    monkeypatch.setattr(convert, "write_torch", damaged)
    with pytest.warns(UserWarning, match="not exact"):
        report = convert_legacy_checkpoint(
            FOLDER / "c_stripped_best_total_legacy.pth", tmp_path / "new.ckpt"
        )
    assert report.max_abs_difference > 6


class Tiny(pl.LightningModule):
    """Stands for the training module where only Lightning's counters matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.epochs: list[int] = []
        self.strict_loading = False

    def on_train_epoch_start(self) -> None:
        self.epochs.append(self.current_epoch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch).sum()
        return loss

    def test_step(self, batch: Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def _trainer(folder: Path, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        plugins=[LegacyCheckpointIO()],
    )  # fmt: skip


RESUME = [
    ("a_engine_checkpoint_namespace.pth", 12, "optimizer starts fresh"),
    ("a_engine_checkpoint_pathlib_args.pth", 12, "optimizer starts fresh"),
    ("a_old_torch_container.pth", 12, "optimizer starts fresh"),
    ("b_published_full_training_state.pth", 12, "optimizer starts fresh"),
    ("b_published_model_only.pth", 0, "starting from these weights"),
    ("c_stripped_best_total_legacy.pth", 0, "starting from these weights"),
    ("c_stripped_best_total_1_11.pth", 0, "starting from these weights"),
    ("ptl_last_ckpt_layout.ckpt", 12, "optimizer starts fresh"),
    ("ptl_compiled_prefix.ckpt", 2, "optimizer starts fresh"),
]


@pytest.mark.parametrize(
    ("name", "first", "text", "converted"),
    [(*case, False) for case in RESUME]
    + [(*case, True) for case in RESUME if not case[0].startswith("ptl")],
)
def test_lightning_continues_with_the_next_epoch(
    name: str, first: int, text: str, converted: bool, tmp_path: Path
) -> None:
    path = FOLDER / name
    if converted:
        path = tmp_path / "new.ckpt"
        convert_legacy_checkpoint(FOLDER / name, path)
    module, trainer = Tiny(), _trainer(tmp_path, first + 2)
    loader = torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)
    with pytest.warns(UserWarning, match=text):
        trainer.fit(module, loader, ckpt_path=path)
    assert module.epochs == [first, first + 1]
    with pytest.warns(UserWarning, match=text):
        _trainer(tmp_path, 1).test(Tiny(), loader, ckpt_path=path, verbose=False)


def test_our_own_checkpoints_pass_through_untouched(tmp_path: Path) -> None:
    checkpoint = {
        "state_dict": {"model.backbone.0.encoder.cls_token": torch.ones(1)},
        "loops": {"fit_loop": {}},
        "optimizer_states": [{"state": {0: torch.ones(2)}}],
        "callbacks": {"x": {"best": 0.5}},
    }
    io = LegacyCheckpointIO()
    io.save_checkpoint(checkpoint, tmp_path / "deep" / "last.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = io.load_checkpoint(tmp_path / "deep" / "last.ckpt")
    assert list(back) == list(checkpoint)
    assert "legacy_checkpoint_format" not in back
    assert back["optimizer_states"][0]["state"][0].tolist() == [1, 1]
    assert _files(tmp_path / "deep") == ["last.ckpt"]
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint(checkpoint, tmp_path / "x.ckpt", storage_options={})


def test_normalising_twice_changes_nothing() -> None:
    raw = torch.load(FOLDER / "c_stripped_best_total_1_11.pth", weights_only=True)
    once = as_lightning_checkpoint(raw)
    assert once["legacy_checkpoint_format"] is True
    assert as_lightning_checkpoint(once).keys() == once.keys()


def test_ema_weights_are_kept() -> None:
    once = LegacyCheckpointIO()
    with pytest.warns(UserWarning, match="EMA weights"):
        checkpoint = once.load_checkpoint(FOLDER / "a_ema_with_module_prefix.pth")
    ema = from_legacy(checkpoint["legacy_ema_state_dict"])
    assert {"model." + name for name in ema} == set(checkpoint["state_dict"])
    with pytest.warns(UserWarning, match="category ids 1..N"):
        without = once.load_checkpoint(FOLDER / "a_best_regular_no_ema_key.pth")
    assert "legacy_ema_state_dict" not in without


@pytest.mark.parametrize("lora", [False, True])
def test_a_best_file_loads_plainly_under_legacy_names(tmp_path: Path, lora: bool) -> None:
    config = RFDETRNanoConfig(**SMALL, backbone_lora=lora)
    network = build_network(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_b" in name:
                parameter.normal_(std=0.1)
    train = TrainConfig(dataset_dir=tmp_path / "data")
    payload = best_payload(
        network.state_dict(),
        config,
        train,
        ["a", "b", "c"],
        4,
        best_total_source="ema",
        at=tmp_path,
    )
    save_file(payload, tmp_path / "best.pth")
    loaded = torch.load(tmp_path / "best.pth", weights_only=True)
    reference = build_network(RFDETRNanoConfig(**SMALL))
    assert list(loaded["model"]) == list(to_legacy(reference.state_dict()))
    assert loaded["args"]["dataset_dir"] == str(tmp_path / "data")
    assert loaded["args"]["class_names"] == loaded["class_names"] == ["a", "b", "c"]
    wanted = {"num_classes": 3, "resolution": 64, "patch_size": 16, "num_windows": 2}
    assert {k: loaded["args"][k] for k in wanted} == wanted
    assert (loaded["epoch"], loaded["model_name"], loaded["at"]) == (4, "RFDETRNano", str(tmp_path))
    record = read_checkpoint(tmp_path / "best.pth")
    reference.load_state_dict(record.weights)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            reference.eval()(images)["pred_logits"], network(images)["pred_logits"]
        )
    assert "epoch" not in stripped_payload(loaded)
    assert set(stripped_payload(loaded)) == set(loaded) - {"epoch"}


def test_a_missing_mask_token_is_written_as_zeros() -> None:
    config = RFDETRNanoConfig(**SMALL)
    state = build_network(config).state_dict()
    without = {n: v for n, v in state.items() if not n.endswith("mask_token")}
    model = best_payload(without, config)["model"]
    assert list(model) == list(to_legacy(state))
    assert not model["backbone.0.encoder.encoder.embeddings.mask_token"].any()
