from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from rfdetr.checkpoints.legacy_names import our_name
from rfdetr.config import RFDETRBaseConfig, RFDETRNanoConfig, TrainConfig
from rfdetr.training.optimizer import build_optimizer, parameter_groups
from rfdetr.training.schedule import lr_factor

BUFFER = "backbone.0.encoder.mask_token"


def groups_of(names, config_class):
    pairs = [(name, nn.Parameter(torch.zeros(1))) for name in names]
    return parameter_groups(
        pairs, config_class(pretrain_weights=None), TrainConfig(dataset_dir=".")
    )


@pytest.mark.parametrize(
    ("variant", "config_class"), [("nano", RFDETRNanoConfig), ("base", RFDETRBaseConfig)]
)
def test_groups_equal_the_reference(parity: Path, variant, config_class):
    reference = json.loads((parity / f"training/param_groups_{variant}.json").read_text())
    expected = {}
    for group in reference["groups"]:
        for legacy in group["params"]:
            expected[our_name(legacy)] = (group["lr"], group["weight_decay"])
    del expected[BUFFER]
    groups = groups_of(expected, config_class)
    assert len(groups) == len(reference["groups"])
    actual = {n: (g["lr"], g["weight_decay"]) for g in groups for n, _ in g["params"]}
    assert actual.keys() == expected.keys()
    for name, (rate, decay) in expected.items():
        assert actual[name][0] == pytest.approx(rate, rel=1e-12), name
        assert actual[name][1] == pytest.approx(decay, rel=1e-12), name


def test_group_order_is_rest_encoder_by_depth_decoder():
    names = [
        "transformer.decoder.norm.weight",
        "backbone.0.encoder.blocks.3.norm1.weight",
        "backbone.0.encoder.blocks.0.norm1.weight",
        "class_embed.weight",
    ]
    order = [group["params"][0][0] for group in groups_of(names, RFDETRNanoConfig)]
    assert order == [names[3], names[2], names[1], names[0]]


def test_frozen_parameters_are_left_out():
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    groups = parameter_groups(
        [("a", frozen)], RFDETRNanoConfig(pretrain_weights=None), TrainConfig(dataset_dir=".")
    )
    assert groups == []


def test_schedule_equals_the_reference(parity: Path):
    cases = json.loads((parity / "training/lr_schedule.json").read_text())["cases"]
    fields = ("lr_scheduler", "warmup_epochs", "lr_drop", "lr_min_factor")
    for case in cases:
        config = TrainConfig(dataset_dir=".", **{name: case[name] for name in fields})
        for step, factor in case["samples"]:
            actual = lr_factor(
                step,
                total_steps=case["total_steps"],
                steps_per_epoch=case["steps_per_epoch"],
                train_config=config,
            )
            assert actual == pytest.approx(factor, abs=1e-9), (case, step)


class Net(nn.Module):
    def __init__(self, names=("first", "second")):
        super().__init__()
        for index, name in enumerate(names):
            self.register_module(name, nn.Linear(3, 2 if name == "first" else 3))
            nn.init.constant_(self.get_parameter(f"{name}.weight"), 0.1 * (index + 1))

    def forward(self, x):
        return sum(module(x).sum() for module in self.children())


def trained(names=("first", "second"), **fields):
    network = Net(names)
    config = TrainConfig(dataset_dir=".", lr=0.1, **fields)
    model_config = RFDETRNanoConfig(pretrain_weights=None)
    optimizer = build_optimizer(network, model_config, config, fused=False)
    for step in range(3):
        optimizer.zero_grad()
        network(torch.full((1, 3), float(step + 1))).backward()
        optimizer.step()
    return network, optimizer


def test_optimizer_state_follows_names_not_positions():
    _, saved = trained()
    network, other = trained(("second", "first"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved.state_dict())
    group = saved.param_groups[0]
    by_name = dict(zip(group["param_names"], group["params"], strict=True))
    for name, parameter in network.named_parameters():
        expected = saved.state[by_name[name]]["exp_avg"]
        assert torch.equal(other.state[parameter]["exp_avg"], expected), name


def test_optimizer_state_without_names_is_not_loaded_by_position():
    _, saved = trained()
    state = saved.state_dict()
    for group in state["param_groups"]:
        del group["param_names"]
    _, other = trained()
    with pytest.warns(UserWarning, match=r"fresh AdamW moments"):
        other.load_state_dict(state)
    assert not other.state


def test_missing_and_misshapen_moments_start_fresh():
    _, saved = trained(("first", "second"))
    state = saved.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(7)
    del state["state"][2]
    network, other = trained(("first", "second"))
    with pytest.warns(UserWarning, match=r"2 parameters \(first.weight, second.weight\)"):
        other.load_state_dict(state)
    assert set(other.state) == {network.first.bias, network.second.bias}


def test_present_configuration_wins_over_saved_group_options():
    _, saved = trained(weight_decay=0.5)
    _, other = trained(weight_decay=0.25)
    other.load_state_dict(saved.state_dict())
    assert other.param_groups[0]["weight_decay"] == 0.25


def test_fused_state_loads_into_plain_and_back():
    model_config, config = RFDETRNanoConfig(pretrain_weights=None), TrainConfig(dataset_dir=".")
    plain = trained()[1]
    fused = build_optimizer(Net(), model_config, config, fused=True)
    fused.load_state_dict(plain.state_dict())
    assert fused.param_groups[0]["fused"] is True
    for parameter in fused.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    fused.step()
    plain.load_state_dict(fused.state_dict())
    assert not plain.param_groups[0]["fused"]
