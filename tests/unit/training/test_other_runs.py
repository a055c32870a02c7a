"""Checkpoints and loaders that meet another run: other groups, other data, another call."""

from __future__ import annotations

import pytest
import torch

from rfdetr import RFDETR, RFDETRSegNano
from rfdetr.checkpoints.safe_io import load_file
from rfdetr.data.batch import NestedTensor
from rfdetr.errors import CheckpointError, ConfigError, InputError
from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer
from rfdetr.training.callbacks import (
    BestModelCallback,
    RFDETREarlyStopping,
    RFDETREMACallback,
)
from tests.datasets import make_roboflow
from tests.unit.training.helpers import Run, tiny_model, tiny_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_roboflow(tmp_path_factory.mktemp("data"), splits={"train": 6, "valid": 2})


@pytest.fixture(scope="module")
def done(dataset, tmp_path_factory):
    """A finished run of two epochs."""
    return Run(tiny_model(), tiny_run(dataset, tmp_path_factory.mktemp("done"))).fit()


@pytest.mark.parametrize(
    "changes", [{"weight_decay": 0.0}, {"lr_vit_layer_decay": 1.0}, {"lr_encoder": 0.0}]
)
def test_resume_under_fewer_parameter_groups(done, dataset, tmp_path, changes):
    config = tiny_run(dataset, tmp_path, epochs=3, **changes)
    run = Run(tiny_model(), config).fit(done.output / "last.ckpt")
    before = len(done.trainer.optimizers[0].param_groups)
    assert len(run.trainer.optimizers[0].param_groups) < before
    assert run.trainer.global_step == done.trainer.global_step // 2 * 3


def test_resume_with_adapters_has_other_groups(done, dataset, tmp_path):
    model = tiny_model(backbone_lora=True)
    run = Run(model, tiny_run(dataset, tmp_path, epochs=3)).fit(done.output / "last.ckpt")
    assert run.trainer.current_epoch == 3


def with_loaders(run: Run) -> Run:
    run.data.setup("fit")
    loaders = run.data.train_dataloader(), run.data.val_dataloader()
    run.trainer.fit(run.module, *loaders)
    return run


def test_loaders_name_the_classes_of_the_best_file(done, dataset, tmp_path):
    names = done.data.class_names
    run = with_loaders(Run(tiny_model(), tiny_run(dataset, tmp_path)))
    for file in ("checkpoint_best_total.pth", "last.ckpt"):
        assert load_file(tmp_path / file)["class_names"] == names
    assert run.module.class_names == names


def test_names_of_the_data_win_over_those_of_the_weights(done, dataset, tmp_path):
    content = load_file(done.output / "last.ckpt")
    content["class_names"] = content["hyper_parameters"]["class_names"] = ["x", "y", "z"]
    torch.save(content, tmp_path / "other.ckpt")
    model = tiny_model(pretrain_weights=str(tmp_path / "other.ckpt"))
    run = with_loaders(Run(model, tiny_run(dataset, tmp_path / "out")))
    assert run.module.class_names == done.data.class_names


def test_a_module_loaded_from_a_checkpoint_has_its_names(done):
    module = RFDETRModule.load_from_checkpoint(done.output / "last.ckpt")
    assert module.class_names == done.data.class_names


@pytest.fixture(scope="module")
def adapted(dataset, tmp_path_factory):
    """A run whose adapters have moved."""
    rates = {"lr_encoder": 0.3, "lr_component_decay": 1.0, "lr_vit_layer_decay": 1.0}
    output = tmp_path_factory.mktemp("adapted")
    run = Run(tiny_model(backbone_lora=True), tiny_run(dataset, output, use_ema=False, **rates))
    return run.fit()


def logits(network, images):
    with torch.inference_mode():
        return network.eval()(images)["pred_logits"]


@pytest.mark.parametrize("adapters", [False, True])
def test_adapters_of_last_ckpt_travel(adapted, adapters):
    images = torch.randn(1, 3, 64, 64)
    wanted = logits(adapted.module.model, images)
    path = adapted.output / "last.ckpt"
    found = RFDETR.from_checkpoint(path, backbone_lora=adapters, device="cpu").model.model
    torch.testing.assert_close(logits(found, images), wanted, rtol=0, atol=1e-4)
    plain = {n: v for n, v in adapted.module.model.state_dict().items() if ".lora_" not in n}
    found.load_state_dict(plain, strict=False)
    if not adapters:
        assert (logits(found, images) - wanted).abs().max() > 1e-3  # without them it is another


def test_resume_without_adapters_folds_them_in(adapted, dataset, tmp_path):
    run = Run(tiny_model(), tiny_run(dataset, tmp_path, use_ema=False))
    images = torch.randn(1, 3, 64, 64)
    run.trainer.validate(run.module, run.data, ckpt_path=adapted.output / "last.ckpt")
    wanted = logits(adapted.module.model, images)
    torch.testing.assert_close(logits(run.module.model, images), wanted, rtol=0, atol=1e-4)


STOPPING = {"early_stopping": True, "early_stopping_patience": 1}


def fit_freshly(run: Run) -> Run:
    torch.manual_seed(0)
    run.module = RFDETRModule(tiny_model(), run.config)
    return run.fit()


@pytest.fixture(scope="module")
def ended(dataset, tmp_path_factory):
    """A run that early stopping has ended."""
    output = tmp_path_factory.mktemp("ended")
    run = Run(tiny_model(), tiny_run(dataset, output, epochs=6, **STOPPING))
    callback = next(c for c in run.trainer.callbacks if isinstance(c, RFDETREarlyStopping))
    callback.min_delta = 2.0  # nothing is a gain
    run.fit()
    assert run.trainer.current_epoch < 6
    return run


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """A fit of a trainer that has done nothing before."""
    output = tmp_path_factory.mktemp("alone")
    return fit_freshly(Run(tiny_model(), tiny_run(dataset, output, **STOPPING)))


@pytest.mark.parametrize("call", ["validate", "predict", "test"])
def test_a_checkpoint_that_is_only_evaluated_leaves_the_next_fit_alone(
    ended, alone, dataset, tmp_path, call
):
    after = Run(tiny_model(), tiny_run(dataset, tmp_path, **STOPPING))
    after.data.setup("fit")
    other = RFDETRModule(tiny_model(), after.config)
    evaluate = getattr(after.trainer, call)
    evaluate(other, after.data.val_dataloader(), ckpt_path=ended.output / "last.ckpt")
    fit_freshly(after)
    assert after.trainer.global_step == alone.trainer.global_step > 0
    best, ema = (
        [next(c for c in run.trainer.callbacks if isinstance(c, kind)) for run in (alone, after)]
        for kind in (BestModelCallback, RFDETREMACallback)
    )
    assert best[0].state_dict() == best[1].state_dict()
    assert ema[0].updates == ema[1].updates
    for one, two in zip(ema[0].ema_model.parameters(), ema[1].ema_model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_run_test_with_loaders_warns(dataset, tmp_path):
    run = Run(tiny_model(), tiny_run(dataset, tmp_path, epochs=1, run_test=True))
    with pytest.warns(UserWarning, match="run_test needs the data module"):
        with_loaders(run)


def test_of_several_loaders_the_first_is_measured(done, dataset, tmp_path):
    def validate(*loaders):
        config = tiny_run(dataset, tmp_path, compute_val_loss=True)
        trainer = build_trainer(config, tiny_model(), enable_model_summary=False)
        return trainer.validate(done.module, list(loaders), verbose=False)

    done.data.setup("fit")
    valid, train = done.data.val_dataloader(), done.data.train_dataloader()
    (alone,) = validate(valid)
    with pytest.warns(UserWarning, match="first of the given dataloaders"):
        first, *_ = validate(valid, train)
    assert first == pytest.approx(alone)
    assert "val/loss" in alone


def test_batches_of_plain_tensors_train(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path, epochs=1, multi_scale=True)
    module, data = RFDETRModule(tiny_model(), config), RFDETRDataModule(tiny_model(), config)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = [(samples.tensors, targets) for samples, targets in loader]
    assert not any(isinstance(samples, NestedTensor) for samples, _ in batches)
    trainer = build_trainer(config, tiny_model(), limit_val_batches=0, callbacks=[])
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert trainer.global_step == len(batches)


def test_a_sized_class_refuses_the_file_of_another(done):
    with pytest.raises(CheckpointError, match="checkpoint of RFDETRNano, not of RFDETRSegNano"):
        RFDETRSegNano.from_checkpoint(done.output / "checkpoint_best_total.pth", device="cpu")


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_predict_needs_a_batch_size(done, size):
    detector = RFDETR.from_checkpoint(done.output / "checkpoint_best_total.pth", device="cpu")
    with pytest.raises(InputError, match="batch_size"):
        detector.predict([torch.zeros(3, 8, 8)], batch_size=size)


@pytest.mark.parametrize("name", ["Normalize", "ToFloat"])
def test_augmentation_that_gives_no_image(dataset, tmp_path, name):
    pytest.importorskip("albumentations")
    config = tiny_run(dataset, tmp_path, aug_config={name: {}})
    with pytest.raises(ConfigError, match=r"uint8 \(height, width, 3\)"):
        RFDETRDataModule(tiny_model(), config).setup("fit")
