"""What a process needs while it trains or evaluates: its allocator and its warning filters."""

from __future__ import annotations

import contextlib
import warnings

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn

from rfdetr.training.allocator import keep_freed_memory
from rfdetr.training.callbacks.coco_eval import COCOEvalCallback
from rfdetr.training.failure import lift_limit, limit_failure
from rfdetr.training.lightning_adapter import finds_checkpoints

# what Lightning and torch warn about although it is intended
EXPECTED = (
    "You have overridden `transfer_batch_to_device` in `LightningModule`",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # averaging over processes costs a collective per step: train_log_sync_dist
    r"It is recommended to use `self.log\('(train|val|test)/",
    "Glyph",  # in plots: class names can be in any script
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class ProcessSettings(Callback):
    """Applies settings of the process when a trainer runs, never at import or at construction.

    Warning filters last until the run ends. A fit also sets the allocator, for the rest of the
    process. After a failure the process ends in time (`rfdetr.training.failure`).
    `RFDETRModule.configure_callbacks` adds this callback to every trainer.
    """

    def __init__(self) -> None:
        self._filters = contextlib.ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        lift_limit()
        if stage == "fit":
            keep_freed_memory()
            _warn_of_plain_trainer(trainer)
        self._filters.enter_context(warnings.catch_warnings())
        for message in EXPECTED:
            warnings.filterwarnings("ignore", message=message)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._filters.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Lightning skips `teardown` after an exception."""
        self._filters.close()
        limit_failure(trainer, exception)


def _warn_of_plain_trainer(trainer: pl.Trainer) -> None:
    """A Trainer of the user's own, or of LightningCLI, lacks the callbacks of `build_trainer`."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if finds_checkpoints(trainer) or any(isinstance(c, COCOEvalCallback) for c in callbacks):
        return
    rank_zero_warn(
        "This Trainer was not made by build_trainer: it has no EMA, logs no COCO metrics, writes "
        "no best files. Use build_trainer(train_config, model_config), or add the callbacks of "
        "rfdetr.training.callbacks. docs/training.md shows it for LightningCLI."
    )
