from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn

from rfdetr.checkpoints.convert import LEGACY_EMA_KEY
from rfdetr.training.callbacks.ema import RFDETREMACallback, effective_decay


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))


def fake_trainer(step=0, ckpt_path=None, scaler=None):
    plugin, state = SimpleNamespace(scaler=scaler), SimpleNamespace(fn=TrainerFn.FITTING)
    return SimpleNamespace(
        global_step=step, ckpt_path=ckpt_path, precision_plugin=plugin, state=state
    )


def started(callback, ckpt_path=None):
    module = SimpleNamespace(model=Net())
    callback.on_fit_start(fake_trainer(ckpt_path=ckpt_path), module)
    callback.on_train_start(fake_trainer(), module)
    return module


def test_decay_equals_the_reference(parity: Path):
    for case in json.loads((parity / "training/ema.json").read_text())["cases"]:
        for update, decay in zip(
            case["update_number_1based"], case["effective_decay"], strict=True
        ):
            assert effective_decay(update, case["decay"], case["tau"]) == pytest.approx(
                decay, abs=1e-6
            )


def test_sequences_equal_the_formula_from_the_first_update_on(parity: Path):
    for case in json.loads((parity / "training/ema.json").read_text())["sequences"]:
        callback = RFDETREMACallback(case["decay"], case["tau"])
        module = SimpleNamespace(model=Net())
        module.model.weight.data = torch.tensor(case["initial"])
        callback.on_fit_start(fake_trainer(), module)
        for live, expected in zip(
            case["live_after_each_step"], case["ema_after_each_update"], strict=True
        ):
            module.model.weight.data.copy_(torch.tensor(live))
            callback.update()
            assert torch.allclose(callback.ema_model.weight, torch.tensor(expected), atol=1e-6)


def test_updates_follow_optimizer_steps_and_the_interval():
    callback = RFDETREMACallback(update_interval=2)
    started(callback)
    counts = []
    for step in (0, 0, 1, 1, 2, 2, 3, 4):  # 0, 0: inside the first accumulation window
        callback.on_train_batch_end(fake_trainer(step))
        counts.append(callback.updates)
    assert counts == [0, 0, 0, 0, 1, 1, 1, 2]


def test_a_step_that_the_gradient_scaler_skipped_does_not_count():
    callback = RFDETREMACallback()
    started(callback)
    for step, scale in ((1, 8.0), (2, 4.0), (3, 4.0)):
        scaler = SimpleNamespace(get_scale=lambda scale=scale: scale)
        callback.on_train_batch_end(fake_trainer(step, scaler=scaler))
    assert callback.updates == 2


def test_ema_model_is_frozen_in_eval_mode_with_integer_buffers_copied():
    callback = RFDETREMACallback(decay=0.5, tau=0)
    module = started(callback)
    module.model.count += 7
    module.model.scale += 1
    callback.update()
    ema = callback.ema_model
    assert not ema.training
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert ema.count.item() == 7
    assert ema.scale.tolist() == [1.5, 1.5]


def test_fit_end_copies_the_ema_weights_into_the_module():
    callback = RFDETREMACallback(decay=0.5, tau=0)
    module = started(callback)
    with torch.no_grad():
        module.model.weight += 2
    callback.update()
    callback.on_fit_end(fake_trainer(), module)
    assert module.model.weight.tolist() == [1.0, 1.0, 1.0]


def test_state_restores_weights_and_counter():
    first = RFDETREMACallback()
    module = started(first)
    with torch.no_grad():
        module.model.weight += 2
    first.update()
    second = RFDETREMACallback()
    second.load_state_dict(first.state_dict())
    started(second, ckpt_path="last.ckpt")
    assert second.updates == 1
    assert torch.equal(second.ema_model.weight, first.ema_model.weight)


def test_resume_without_ema_weights_starts_from_live_weights_and_warns():
    with pytest.warns(UserWarning, match="no EMA weights"):
        started(RFDETREMACallback(), ckpt_path="other.ckpt")


def test_ema_weights_of_a_legacy_checkpoint_start_the_fit():
    callback = RFDETREMACallback()
    module = SimpleNamespace(model=Net())
    trainer = fake_trainer(ckpt_path="checkpoint.pth")
    weights = {**Net().state_dict(), "weight": torch.ones(3)}
    callback.on_load_checkpoint(trainer, module, {LEGACY_EMA_KEY: weights})
    callback.on_fit_start(trainer, module)
    assert callback.ema_model.weight.tolist() == [1.0, 1.0, 1.0]
    assert callback.updates == 0


def test_a_test_of_a_restored_checkpoint_uses_ema_weights_and_restores_the_live_ones():
    source = RFDETREMACallback(decay=0.5, tau=0)
    module = started(source)
    with torch.no_grad():
        module.model.weight += 2
    source.update()
    callback = RFDETREMACallback()
    callback.load_state_dict(source.state_dict())
    callback.on_test_start(fake_trainer(), module)
    assert module.model.weight.tolist() == [1.0, 1.0, 1.0]
    callback.on_test_end(fake_trainer(), module)
    assert module.model.weight.tolist() == [2.0, 2.0, 2.0]
    callback.on_test_start(fake_trainer(), module)  # nothing restored: the module's own weights
    assert module.model.weight.tolist() == [2.0, 2.0, 2.0]
