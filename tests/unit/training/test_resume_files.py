"""Which files a run can resume from: foreign, incomplete and old YOLO-format ones."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rfdetr.checkpoints.adapt import SILENT_BIAS
from rfdetr.checkpoints.convert import as_lightning_checkpoint
from rfdetr.checkpoints.legacy_names import to_legacy
from rfdetr.errors import CheckpointError
from rfdetr.model.network import build_network
from rfdetr.training import convert_legacy_checkpoint
from tests.unit.training.helpers import Run, tiny_model, tiny_run

FOREIGN = {"stem.weight": torch.zeros(1), "stem.bias": torch.zeros(1)}


def test_a_foreign_file_is_refused(shapes: Path, tmp_path: Path) -> None:
    torch.save({"model": FOREIGN}, tmp_path / "foreign.pth")
    run = Run(tiny_model(), tiny_run(shapes, tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"2 are not of this model: stem.weight, stem.bias"):
        run.fit(tmp_path / "foreign.pth")


def test_a_full_checkpoint_must_be_complete(finished: Run, shapes: Path, tmp_path: Path) -> None:
    content = torch.load(finished.output / "last.ckpt", weights_only=True)
    names = [name for name in content["state_dict"] if ".backbone." in name]
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if k not in names}
    torch.save(content, tmp_path / "part.ckpt")
    run = Run(tiny_model(), tiny_run(shapes, tmp_path / "out", epochs=3))
    with pytest.raises(CheckpointError, match="missing in it") as caught:
        run.fit(tmp_path / "part.ckpt")
    assert all(n.removeprefix("model.") in str(caught.value) for n in names if "mask_" not in n)


def test_a_legacy_file_may_lack_tensors_and_all_are_named(
    finished: Run, shapes: Path, tmp_path: Path
) -> None:
    state = to_legacy(finished.module.model.state_dict())
    lost = [name for name in state if name.startswith("transformer.decoder")]
    torch.save({"model": {k: v for k, v in state.items() if k not in lost}}, tmp_path / "x.pth")
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1))
    with pytest.warns(UserWarning, match=f"{len(lost)} tensors of the model are missing") as seen:
        run.fit(tmp_path / "x.pth")
    assert any(all(name in str(w.message) for name in lost) for w in seen)


def test_empty_loops_start_at_the_beginning() -> None:
    content = {"state_dict": {"model.class_embed.bias": torch.zeros(4)}, "loops": {}}
    assert (
        as_lightning_checkpoint(content)["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"]
        == 0
    )


def test_a_foreign_file_is_not_converted(tmp_path: Path) -> None:
    torch.save({"model": FOREIGN}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=r"none of its 2 tensors.*stem.weight, stem.bias"):
        convert_legacy_checkpoint(tmp_path / "foreign.pth", tmp_path / "new.ckpt")
    assert not (tmp_path / "new.ckpt").exists()


def old_yolo_file(path: Path, classes: int = 3, **args: Any) -> dict[str, torch.Tensor]:
    """As old trainings on YOLO-format data wrote it: N rows for N classes."""
    network = build_network(tiny_model(num_classes=classes))
    network.resize_head(classes)
    state = to_legacy(network.state_dict())
    content = {
        "model": state,
        "ema_model": state,
        "args": argparse.Namespace(**args),
        "epoch": 0,
    }
    torch.save(content, path)
    return state


@pytest.mark.parametrize("args", [{"dataset_file": "yolo"}, {"class_names": ["a", "b", "c"]}])
def test_old_yolo_runs_resume(shapes: Path, tmp_path: Path, args: dict[str, Any]) -> None:
    state = old_yolo_file(tmp_path / "old.pth", **args)
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=2, lr=0.0))
    with pytest.warns(UserWarning, match="the extra row of the current layout is added"):
        run.fit(tmp_path / "old.pth")
    assert run.trainer.current_epoch == 2
    bias = run.module.model.class_embed.bias.detach()
    assert torch.allclose(bias[:3], state["class_embed.bias"])
    assert bias[3].item() == pytest.approx(SILENT_BIAS)


def test_another_class_count_is_not_padded(shapes: Path, tmp_path: Path) -> None:
    old_yolo_file(tmp_path / "old.pth", dataset_file="yolo", class_names=["a", "b"])
    run = Run(tiny_model(), tiny_run(shapes, tmp_path / "out"))
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="has 2 classes"):
        warnings.simplefilter("ignore")
        run.fit(tmp_path / "old.pth")
