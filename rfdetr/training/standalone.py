"""Metrics of a network on a split, outside of a training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from pytorch_lightning.callbacks import Callback

from rfdetr.config import TrainConfig
from rfdetr.data.categories import UNUSED
from rfdetr.errors import ConfigError
from rfdetr.model.network import RFDETRNetwork
from rfdetr.training.callbacks.coco_eval import COCOEvalCallback
from rfdetr.training.datamodule import RFDETRDataModule
from rfdetr.training.module import RFDETRModule
from rfdetr.training.trainer import build_trainer

SHOWN_NAMES = 10
NEVER = -100.0  # logit of a class that is never detected
SPLITS = {"test": "test", "val": "validate", "valid": "validate"}


def evaluate_network(
    network: RFDETRNetwork,
    names: Mapping[int, str] | None,
    train_config: TrainConfig,
    split: str,
    callbacks: Sequence[Callback] = (),
) -> dict[str, float]:
    """Metrics of a copy of `network`, under the names that validation and testing log; no loss.

    `names` are the classes of the network by label; they are matched with those of the dataset by
    name, or by label if they are None. Writes nothing. Raises ConfigError for an unknown split and
    for classes of the dataset that the network does not have.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is unknown: use {' or '.join(map(repr, SPLITS))}.")
    stage = SPLITS[split]
    quiet = {"compute_val_loss": False, "compute_test_loss": False}
    train_config = train_config.model_copy(update=quiet)
    datamodule = RFDETRDataModule(network.config, train_config)
    datamodule.setup(stage)
    if names is None:
        evaluated = copy.deepcopy(network)
    else:
        evaluated = relabelled(network, names, datamodule.class_names or [])
    module = RFDETRModule(network.config, train_config, network=evaluated)
    metrics = COCOEvalCallback(
        train_config.eval_max_dets,
        log_per_class_metrics=train_config.log_per_class_metrics,
        plots=False,
    )
    trainer = build_trainer(
        train_config,
        network.config,
        callbacks=[metrics, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    run = trainer.validate if stage == "validate" else trainer.test
    (logged,) = run(module, datamodule=datamodule, verbose=False)
    return dict(logged)


def relabelled(
    network: RFDETRNetwork, names: Mapping[int, str], wanted: Sequence[str]
) -> RFDETRNetwork:
    """A copy whose output i is the class `wanted[i]`; other classes are never detected."""
    labels = {name: label for label, name in names.items()}
    used = [name for name in wanted if name != UNUSED]
    missing = [name for name in used if name not in labels]
    if missing:
        more = ", ..." if len(labels) > SHOWN_NAMES else ""
        raise ConfigError(
            f"The detector has no class {', '.join(map(repr, missing[:SHOWN_NAMES]))}, which the "
            f"dataset has. Its classes: {', '.join(list(labels)[:SHOWN_NAMES])}{more}. Train it on "
            "this data first."
        )
    copied = copy.deepcopy(network)
    own, head = network.class_embed, copied.class_embed
    with torch.no_grad():
        head.bias.fill_(NEVER)
        for i, name in enumerate(wanted[: len(head.bias)]):
            if name == UNUSED:
                continue
            label = i if names.get(i) == name else labels[name]
            head.weight[i], head.bias[i] = own.weight[label], own.bias[label]
    return copied
