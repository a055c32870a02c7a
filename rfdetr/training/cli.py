"""`RFDETRCli`: Lightning's command line for this training stack."""

from __future__ import annotations

import inspect
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from rfdetr.training.datamodule import RFDETRDataModule
from rfdetr.training.module import RFDETRModule
from rfdetr.training.trainer import build_trainer


class RFDETRCli(LightningCLI):
    """A LightningCLI whose trainer is that of `build_trainer`.

    `python -m rfdetr.training.cli fit --config run.yaml`, where the section `model` has
    `model_name`, `model_config` and `train_config`. The section `trainer` overrides them as
    arguments of `build_trainer` do, except that its callbacks are added. Needs
    jsonargparse[signatures].
    """

    def __init__(self, **settings: Any) -> None:
        settings = {"save_config_callback": None, **settings}
        super().__init__(RFDETRModule, RFDETRDataModule, **settings)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the data module the configurations of the module."""
        for name in ("model_config", "train_config"):
            parser.link_arguments(
                "model", f"data.{name}", lambda m, name=name: getattr(m, name),
                apply_on="instantiate",
            )  # fmt: skip

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer of the configurations, with what the section `trainer` changes."""
        model: Any = self.model
        config = self.config_init
        chosen = {**(config[self.subcommand] if self.subcommand else config).trainer, **kwargs}
        defaults = inspect.signature(pl.Trainer).parameters
        given = {name: v for name, v in chosen.items() if v != defaults[name].default}
        callbacks = given.pop("callbacks", [])
        trainer: Any = build_trainer(model.train_config, model.model_config, **given)
        trainer.callbacks.extend(callbacks if isinstance(callbacks, list) else [callbacks])
        return trainer  # type: ignore[no-any-return]


if __name__ == "__main__":
    RFDETRCli()
