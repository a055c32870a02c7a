"""The page's section on RFDETRModule: one test per statement."""

from __future__ import annotations

import random

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import rfdetr
from rfdetr.config import RFDETRMediumConfig, TrainConfig
from rfdetr.data.batch import NestedTensor
from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer
from tests.unit.training.helpers import Run, tiny_model, tiny_run

SIZES = {
    "encoder_dim": 48,
    "encoder_depth": 2,
    "encoder_heads": 3,
    "out_feature_indexes": [1, 2],
    "resolution": 64,
    "hidden_dim": 32,
    "dec_layers": 1,
    "dim_feedforward": 64,
    "num_queries": 10,
    "group_detr": 2,
}


@pytest.fixture
def run(shapes, tmp_path) -> Run:
    return Run(tiny_model(), tiny_run(shapes, tmp_path))


def a_batch(run: Run):
    samples, targets = next(iter(run.data.train_dataloader()))
    return run.module.transfer_batch_to_device((samples, targets), torch.device("cpu"), 0)


def test_objects_are_standard_lightning_classes(run):
    assert isinstance(run.module, pl.LightningModule)
    assert isinstance(run.data, pl.LightningDataModule)
    assert type(run.trainer) is pl.Trainer


def test_config_classes_live_in_rfdetr_config_not_the_top_level():
    assert not hasattr(rfdetr, "TrainConfig")
    assert not hasattr(rfdetr, "RFDETRMediumConfig")


def test_construction_block(tmp_path):
    model_config = RFDETRMediumConfig(num_classes=10, **SIZES)
    train_config = TrainConfig(
        dataset_dir="path/to/dataset",
        epochs=50,
        batch_size=4,
        grad_accum_steps=4,
        lr=1e-4,
        output_dir=tmp_path / "output",
    )
    module = RFDETRModule(model_config, train_config)
    assert module.model.class_embed.out_features == 11


def test_module_owns_weights_criterion_postprocessor_and_optimizer_configuration(run):
    module = run.module
    assert isinstance(module.model, nn.Module)
    outputs = module.model.eval()(torch.zeros(1, 3, 64, 64))
    target = {"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]), "labels": torch.tensor([1])}
    assert set(module.criterion.weight_dict) <= set(module.criterion(outputs, [target]))
    assert module.criterion.matcher(outputs, [target], group_detr=1)
    results = module.postprocess(outputs, torch.tensor([[64, 64]]))
    assert set(results[0]) == {"scores", "labels", "boxes"}
    assert {"model_config", "train_config"} <= set(vars(module))


def test_model_takes_a_float_tensor_or_a_nested_tensor(run):
    images = torch.rand(2, 3, 64, 64)
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    network = run.module.model.eval()
    plain, nested = network(images), network(NestedTensor(images, mask))
    assert torch.allclose(plain["pred_logits"], nested["pred_logits"], atol=1e-5)


def numbers() -> list[float]:
    return [random.random(), torch.rand(1).item()]


def test_on_fit_start_seeds_when_a_seed_is_set(run):
    run.module.trainer = run.trainer
    drawn = []
    for _ in range(2):
        run.module.on_fit_start()
        drawn.append(numbers())
    pl.seed_everything(run.config.seed)
    assert drawn == [numbers()] * 2


def test_on_fit_start_leaves_generators_alone_without_a_seed(run):
    run.module.trainer = run.trainer
    run.config.seed = None
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run.module.on_fit_start()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("multi_scale", "sizes"), [(True, {64, 96, 128, 160, 192, 224}), (False, {64})]
)
def test_on_train_batch_start_applies_the_multi_scale_resize(run, multi_scale, sizes):
    run.config.multi_scale = multi_scale
    run.module.trainer = run.trainer
    batch = (NestedTensor(torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)), [{}])
    seen = set()
    step = run.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    for step.total.completed in range(40):
        run.module.on_train_batch_start(batch, 0)
        assert batch[0].tensors.shape[-2:] == batch[0].mask.shape[-2:]
        seen.add(batch[0].tensors.shape[-1])
    assert seen == sizes


def test_transfer_batch_to_device_moves_nested_tensors_and_targets(run):
    samples, targets = next(iter(run.data.train_dataloader()))
    moved, on_device = run.module.transfer_batch_to_device(
        (samples, targets), torch.device("meta"), 0
    )
    assert moved.tensors.device.type == "meta"
    assert moved.tensors.dtype == torch.float32
    assert moved.mask is None
    assert isinstance(on_device, list)
    assert all(v.device.type == "meta" for target in on_device for v in target.values())
    assert "transfer_batch_to_device" not in vars(RFDETRDataModule)


def test_transfer_batch_to_device_takes_the_batches_of_other_loaders(run):
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    given = (NestedTensor(torch.rand(1, 3, 8, 8), mask), ({"labels": torch.ones(2), "note": "a"},))
    moved, targets = run.module.transfer_batch_to_device(given, torch.device("meta"), 0)
    assert moved.tensors.device.type == moved.mask.device.type == "meta"
    assert targets[0]["labels"].device.type == "meta"
    assert targets[0]["note"] == "a"


def test_targets_stay_on_the_host_in_evaluation(run):
    samples, targets = next(iter(run.data.val_dataloader()))
    run.module.eval()
    moved, kept = run.module.transfer_batch_to_device((samples, targets), torch.device("meta"), 0)
    assert moved.tensors.device.type == "meta"
    assert isinstance(kept, list)
    assert all(v.device.type == "cpu" for target in kept for v in target.values())


def test_training_step_divides_the_loss_and_logs_it_undivided(run):
    run.trainer.accumulate_grad_batches = 4
    logged = {}
    run.module.log = lambda name, value, **_: logged.update({name: value})
    run.module.log_dict = lambda values, **_: logged.update(values)
    run.module.trainer = run.trainer
    run.trainer.strategy._lightning_optimizers = []
    run.trainer.strategy.optimizers = [torch.optim.SGD(run.module.parameters(), 1e-3)]
    run.module.eval()  # no dropout: both calls see the same network
    batch = a_batch(run)
    loss = run.module.training_step(batch, 0)
    terms = run.module.criterion(run.module.model(*batch), batch[1])
    weights = run.module.criterion.weight_dict
    undivided = sum(terms[name] * weight for name, weight in weights.items())
    assert torch.allclose(loss * 4, undivided, rtol=1e-5)
    assert torch.allclose(logged["train/loss"], undivided, rtol=1e-5)
    assert {f"train/{name}" for name in terms} <= set(logged)
    assert logged["train/lr"] == 1e-3


def test_validation_and_test_steps_return_results_and_targets(finished, shapes):
    data = RFDETRDataModule(tiny_model(), finished.config)
    batch = next(iter(data.val_dataloader()))
    module = RFDETRModule(tiny_model(), finished.config).eval()
    module.log = lambda *_, **__: None
    for step in (module.validation_step, module.test_step):
        found = step(batch, 0)
        assert set(found) == {"results", "targets"}
        assert len(found["results"]) == len(found["targets"]) == 2


def test_predict_step_returns_postprocessed_detections(run):
    batch = next(iter(run.data.val_dataloader()))
    found = run.module.eval().predict_step(batch, 0)
    assert len(found) == 2
    assert not found[0]["boxes"].requires_grad
    height, width = batch[1][0]["orig_size"].tolist()
    assert found[0]["boxes"].shape == (10, 4)
    assert found[0]["boxes"].max() <= max(height, width)


def test_configure_optimizers_builds_adamw_with_layer_wise_decay_and_a_lambda_schedule(finished):
    optimizer = finished.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert len({group["initial_lr"] for group in optimizer.param_groups}) > 3
    scheduler = finished.trainer.lr_scheduler_configs[0]
    assert isinstance(scheduler.scheduler, torch.optim.lr_scheduler.LambdaLR)
    assert scheduler.interval == "step"


def test_on_load_checkpoint_converts_a_legacy_dictionary(run):
    from rfdetr.checkpoints.legacy_names import to_legacy

    state = run.module.model.state_dict()
    checkpoint = {"model": to_legacy(state), "ema_model": to_legacy(state), "epoch": 3}
    run.module.on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == {f"model.{name}" for name in state}
    assert checkpoint["legacy_ema_state_dict"].keys() == state.keys()


def test_build_trainer_gives_a_trainer(run):
    assert isinstance(build_trainer(run.config, tiny_model()), pl.Trainer)
