"""Training and evaluating a detector."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

from rfdetr.config import ModelConfig, device_text
from rfdetr.detector.public_names import PublicNames
from rfdetr.detector.state import Origin, torch_device
from rfdetr.errors import ConfigError
from rfdetr.model.network import RFDETRNetwork

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from rfdetr.training.datamodule import RFDETRDataModule

logger = logging.getLogger(__name__)

ANY_NUMBER = 1_000_000  # of classes, until the dataset has been read


class Training(PublicNames):
    """`train` and `evaluate` of `RFDETR`."""

    def train(self, **settings: Any) -> None:
        """Train on a dataset; keywords are the fields of TrainConfig.

        Also takes `device` ("cpu", "cuda:1", ...) and `callbacks` (a list, added to the default
        ones). Afterwards this object predicts and exports with the trained (EMA) weights. If
        training is interrupted after its first step, it has the live weights of that moment and
        the classes of the dataset; if it fails earlier, it stays as it was. Without a progress bar,
        and outside a terminal, prints how long it will take and a line per epoch. Raises ValueError
        for an unknown keyword, and the errors of dataset and training.
        """
        from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer
        from rfdetr.training.callbacks.progress_lines import ProgressLines

        callbacks = _take_retired(settings)
        train_config = self.get_train_config(**settings)
        datamodule = RFDETRDataModule(self._any_classes(), train_config)
        datamodule.setup("fit")
        network = copy.deepcopy(self.model.model)
        _take_classes(network, datamodule.num_classes)
        network.config.grey_levels = datamodule.model_config.grey_levels
        datamodule.model_config = network.config
        module = RFDETRModule(network.config, train_config, network=network)
        trainer = build_trainer(train_config, network.config)
        if train_config.progress_bar is None or not sys.stdout.isatty():
            kind = "segm_mAP_50_95" if network.config.segmentation_head else "mAP_50_95"
            callbacks = [ProgressLines(kind), *callbacks]
        trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
        complete = False
        try:
            trainer.fit(module, datamodule, ckpt_path=train_config.resume or None)
            complete = True
        finally:
            if complete or trainer.global_step:
                self._take_trained(trainer, datamodule, complete)

    def _take_trained(
        self, trainer: pl.Trainer, datamodule: RFDETRDataModule, complete: bool
    ) -> None:
        """Predict with the network of a training, with the classes of its data."""
        from rfdetr.training.callbacks.ema import ema_network

        module: Any = trainer.lightning_module
        fit: Any = trainer.fit_loop
        state, train_config = self.model, module.train_config
        state.model = module.model.to(state.device).eval()
        self.model_config = state.config = module.model_config
        state.class_names = train_config.class_names or datamodule.class_names
        state.label_offset = 0
        state.square = train_config.square_resize_div_64
        state.optimized = None
        state.dataset_dir = train_config.dataset_dir
        state.weights = None
        state.origin = Origin(
            f"the {'' if complete else 'interrupted '}training in {train_config.output_dir}",
            averaged=complete and ema_network(trainer) is not None,
            epoch=max(0, fit.epoch_progress.current.started - 1),
        )

    def _any_classes(self) -> ModelConfig:
        return self.model_config.model_copy(update={"num_classes": ANY_NUMBER})

    def evaluate(self, split: str = "test", **settings: Any) -> dict[str, float]:
        """COCO metrics on a split of a dataset: "val/mAP_50_95" or "test/mAP_50_95", ...

        `split` is "test" or "val"; `settings` are fields of TrainConfig, `device`, and `callbacks`
        (a list). `dataset_dir` defaults to that of the last training. Classes are matched by name,
        or by label if the detector has no names. Raises ConfigError for a class that the detector
        does not have, and the errors of the dataset.
        """
        from rfdetr.training.standalone import evaluate_network

        settings.setdefault("device", str(self.model.device))
        settings.setdefault("square_resize_div_64", self.model.square)
        callbacks = _take_retired(settings)
        if settings.setdefault("dataset_dir", self.model.dataset_dir) is None:
            raise ConfigError("This detector was not trained here: pass dataset_dir to evaluate().")
        train_config = self.get_train_config(**settings)
        self.model.warn_of_resized_head()
        names = self.model.label_names() if self.model.has_names else None
        return evaluate_network(self.model.model, names, train_config, split, callbacks)


def _take_classes(network: RFDETRNetwork, found: int | None) -> None:
    """Give the network the dataset's class count, unless the user chose a sufficient one."""
    config = network.config
    if found is None or found == config.num_classes:
        return
    if config.num_classes_is_explicit:
        if found > config.num_classes:
            raise ConfigError(
                f"The dataset has {found} classes, num_classes is {config.num_classes}: omit "
                f"num_classes or set it to {found}."
            )
        warnings.warn(
            f"num_classes is {config.num_classes}, the dataset has {found}: the extra outputs "
            "stay unused.",
            UserWarning,
            stacklevel=3,
        )
        return
    logger.info("Class count %d taken from the dataset.", found)
    network.resize_head(found + 1)
    config.infer_num_classes(found)


def _take_retired(settings: dict[str, Any]) -> list[Any]:
    """Translate `device`, drop arguments without an effect with a warning, return callbacks."""
    name = device_text(settings.pop("device", None))
    if name == "auto":
        settings.setdefault("accelerator", "auto")
    elif name is not None:
        device = torch_device(name)
        settings.setdefault("accelerator", {"cuda": "gpu"}.get(device.type, device.type))
        if device.type == "cuda" and device.index is not None:
            settings.setdefault("devices", f"{device.index},")
    retired = [name for name in ("start_epoch", "do_benchmark") if settings.pop(name, None)]
    callbacks = settings.pop("callbacks", None) or []
    if _is_callback(callbacks):
        callbacks = [callbacks]
    if isinstance(callbacks, dict):
        retired.append("callbacks as a dictionary (give a list of Lightning callbacks)")
        callbacks = []
    if retired:
        warnings.warn(
            f"Ignored in train(): {', '.join(retired)}. Use resume= to continue from a checkpoint.",
            UserWarning,
            stacklevel=3,
        )
    if not isinstance(callbacks, list | tuple) or not all(map(_is_callback, callbacks)):
        raise ConfigError(f"callbacks must be a list of Lightning callbacks; got {callbacks!r}.")
    return list(callbacks)


def _is_callback(value: Any) -> bool:
    from pytorch_lightning.callbacks import Callback

    return isinstance(value, Callback)
