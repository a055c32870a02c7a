"""TensorBoard and W&B loggers whose run is that of the fit: a resumed fit continues its run.

`prepare_fit` is called before a fit opens its loggers, `begin_fit` once its checkpoint is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from rfdetr.files import write_text_atomic

RUN_ID = "run_id.txt"
EVENTS = "events.out.tfevents.*"


class RunTensorBoardLogger(TensorBoardLogger):
    """Writes events into `save_dir`; the events of an earlier run move to `tensorboard_N`."""

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="")

    @rank_zero_only
    def prepare_fit(self, resumed: bool) -> None:
        """Set the events of an earlier run aside unless this fit resumes it."""
        folder = Path(self.log_dir)
        earlier = sorted(folder.glob(EVENTS))
        if resumed or not earlier or self._experiment is not None:
            return
        number = 1
        while (aside := folder / f"tensorboard_{number}").exists():
            number += 1
        aside.mkdir()
        for file in earlier:
            file.rename(aside / file.name)

    @rank_zero_only
    def begin_fit(self, resumed: bool, step: int | None) -> None:
        """Let TensorBoard drop what an interrupted run logged from optimizer step `step` on."""
        if not resumed or step is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        writer = self.experiment.file_writer
        writer.add_event(Event(step=step, file_version="brain.Event:2"))
        writer.add_event(Event(step=step, session_log=start))


class RunWandbLogger(WandbLogger):
    """Keeps the id of the latest fit's run in `save_dir/wandb`, for fits that resume it."""

    _opened: ClassVar[set[str]] = set()  # ids of runs that fits of this process have opened

    def __init__(self, save_dir: str, **settings: Any) -> None:
        super().__init__(save_dir=save_dir, **settings)
        self._record = Path(save_dir) / "wandb" / RUN_ID

    @rank_zero_only
    def prepare_fit(self, resumed: bool) -> None:
        """Continue the recorded run, or end the one that an earlier fit has left open."""
        if self._experiment is not None:
            return
        import wandb

        known = self._record.read_text(encoding="utf-8").strip() if self._record.is_file() else ""
        if resumed and known:
            self._wandb_init["id"] = self._id = known
        open_run = wandb.run.id if wandb.run is not None else None
        if open_run in self._opened and not (resumed and open_run == known):
            wandb.finish()

    @rank_zero_only
    def begin_fit(self, resumed: bool, step: int | None) -> None:
        """Record the run of this fit."""
        run_id = getattr(self.experiment, "id", None)
        if isinstance(run_id, str):
            self._opened.add(run_id)
            self._record.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self._record, f"{run_id}\n")
