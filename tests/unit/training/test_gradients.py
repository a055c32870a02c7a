"""Accumulation, clipping and numeric safety of the training step."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from rfdetr.errors import DatasetError, NonFiniteLossError
from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer
from tests.datasets import make_roboflow
from tests.unit.model.host_transfers import HostTransfers
from tests.unit.training.helpers import Run, tiny_model, tiny_run


class Gradients(pl.Callback):
    """Gradients just before the first optimizer step, before clipping."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if not self.found:
            self.found = {
                name: parameter.grad.clone()
                for name, parameter in module.model.named_parameters()
                if parameter.grad is not None
            }


class SameBatch(RFDETRDataModule):
    """The first training batch again and again."""

    def train_dataloader(self):
        batch = next(iter(super().train_dataloader()))
        return torch.utils.data.DataLoader([batch] * 8, batch_size=None)


def gradients_of(dataset: Path, output: Path, window: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = tiny_run(dataset, output, epochs=1, grad_accum_steps=window)
    module, gradients = RFDETRModule(tiny_model(), config), Gradients()
    data = SameBatch(tiny_model(), config)
    trainer = build_trainer(config, tiny_model(), callbacks=[gradients], max_steps=1, logger=False)
    trainer.fit(module, data)
    return gradients.found


def test_gradients_of_a_window_equal_those_of_one_batch(shapes, tmp_path):
    one, four = (gradients_of(shapes, tmp_path / str(n), n) for n in (1, 4))
    assert one.keys() == four.keys()
    for name, gradient in one.items():
        assert torch.allclose(gradient, four[name], atol=1e-6, rtol=1e-5), name


def test_every_trainable_parameter_gets_a_gradient_without_any_label(tmp_path):
    dataset = make_roboflow(tmp_path / "data", splits={"train": 4, "valid": 2}, background=1)
    for model in ({}, {"segmentation_head": True}):
        torch.manual_seed(0)
        module = RFDETRModule(tiny_model(**model), tiny_run(dataset, tmp_path))
        target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        target["masks"] = torch.zeros(0, 64, 64, dtype=torch.bool)
        loss = module.training_step((torch.rand(2, 3, 64, 64), [target, target]), 0)
        loss.backward()
        without = [n for n, p in module.model.named_parameters() if p.grad is None]
        assert without == []
        assert torch.isfinite(loss)


@pytest.mark.parametrize("fused", [True, False])
def test_clipping_bounds_the_global_norm(shapes, tmp_path, fused):
    config = tiny_run(shapes, tmp_path, epochs=1, clip_max_norm=0.05)
    run = Run(tiny_model(fused_optimizer=fused), config)
    norms = []

    class Norm(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer) -> None:
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            if grads:
                norms.append(torch.stack([g.norm() for g in grads]).norm().item())

    run.trainer.callbacks.append(Norm())
    run.fit()
    assert norms
    assert all(norm == pytest.approx(0.05, rel=1e-3) for norm in norms)
    assert bool(run.trainer.optimizers[0].param_groups[0]["fused"]) is fused


def test_a_loss_that_is_not_finite_names_terms_step_and_images(shapes, tmp_path):
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))

    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if trainer.global_step == 2:
                self.ids = [int(target["image_id"]) for target in batch[1]]
                batch[0].tensors.fill_(float("nan"))

    poison = Poison()
    run.trainer.callbacks.append(poison)
    with pytest.raises(NonFiniteLossError) as caught:
        run.fit()
    text = str(caught.value)
    assert "step 2" in text
    assert str(poison.ids) in text
    assert "loss_bbox = nan" in text


def test_weights_that_are_not_finite_are_reported_too(shapes, tmp_path):
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))
    torch.nn.init.constant_(run.module.model.class_embed.weight, float("inf"))
    with pytest.raises(NonFiniteLossError, match="Image ids"):
        run.fit()


@pytest.mark.parametrize(
    ("splits", "names", "fields"),
    [
        ({"train": 1, "valid": 1}, ("washer", "bolt"), {}),
        ({"train": 3, "valid": 2}, ("washer",), {}),
        ({"train": 2, "valid": 1}, ("washer",), {"grad_accum_steps": 8, "batch_size": 1}),
        ({"train": 2, "valid": 2}, ("washer", "bolt"), {"background": 2, "batch_size": 1}),
    ],
    ids=["one image", "one class", "window longer than the data", "batches without labels"],
)
def test_unusual_datasets_train(tmp_path, splits, names, fields):
    background = fields.pop("background", 5)
    dataset = make_roboflow(tmp_path / "data", splits=splits, names=names, background=background)
    config = tiny_run(dataset, tmp_path / "out", epochs=1, **fields)
    run = Run(tiny_model(num_classes=len(names)), config).fit()
    assert run.trainer.global_step == 5
    assert torch.isfinite(run.trainer.callback_metrics["train/loss"])


def test_a_dataset_without_labels_is_refused(tmp_path):
    dataset = make_roboflow(tmp_path / "data", splits={"train": 3, "valid": 2}, background=1)
    with pytest.raises(DatasetError, match="has no object to train"):
        Run(tiny_model(), tiny_run(dataset, tmp_path / "out", epochs=1)).fit()


def test_repeated_model_settings_in_the_training_configuration_are_ignored_with_a_warning(
    shapes, tmp_path
):
    config = tiny_run(shapes, tmp_path, group_detr=5, num_select=7)
    with pytest.warns(UserWarning, match=r"group_detr=5 \(the model has 1\), num_select=7"):
        module = RFDETRModule(tiny_model(), config)
    assert module.criterion.group_detr == 1
    assert module.postprocess.num_select == 10


def test_nothing_is_saved_after_a_loss_that_is_not_finite(shapes, tmp_path):
    """Step 1 is not logged, so its loss is first read before the checkpoint is written."""
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))
    file = tmp_path / "user.ckpt"

    class PoisonAndSave(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if trainer.global_step == 1:
                batch[0].tensors.fill_(float("nan"))

        def on_train_batch_end(self, trainer, *args) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(file)

    run.trainer.callbacks.append(PoisonAndSave())
    with pytest.raises(NonFiniteLossError, match="not finite at step 1"):
        run.fit()
    assert run.trainer.global_step == 2
    assert not file.exists()


def test_a_step_of_a_fit_reads_once_from_the_device(shapes, tmp_path):
    """The matcher's copy; losses are read, checked and logged in other steps."""
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1))
    found: dict[int, list[str]] = {}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            self.transfers = HostTransfers()
            self.transfers.__enter__()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            self.transfers.__exit__(None, None, None)
            found[batch_idx] = self.transfers.to_host

    run.trainer.callbacks.append(Watch())
    run.fit()
    assert [len(found[step]) for step in range(5)] == [2, 1, 1, 1, 2]  # first and last are logged
