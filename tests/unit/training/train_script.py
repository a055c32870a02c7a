"""A training program for tests that need processes of their own.

Usage: python train_script.py '{"dataset": ..., "output": ..., "config": {}, "trainer": {},
"do": ["fit", "validate", "test"]}'. Writes the metrics of every stage and rank to `output`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch

from tests.unit.training.helpers import Run, tiny_masks, tiny_model, tiny_run, with_masks


class Report(pl.Callback):
    """Says when a step is done; optionally waits, poisons a loss or kills its rank."""

    def __init__(self, job: dict) -> None:
        self.job = job

    def on_train_batch_start(self, trainer: pl.Trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == self.job.get("nan_step") and trainer.is_global_zero:
            batch[0].tensors.fill_(float("nan"))

    def on_train_batch_end(self, trainer: pl.Trainer, *args) -> None:
        print(f"step {trainer.global_step} rank {trainer.global_rank}", flush=True)
        time.sleep(self.job.get("pause", 0))
        if trainer.global_step == self.job.get("stop_step"):
            raise RuntimeError("stopped by the test")
        if trainer.global_step == self.job.get("kill_step") and trainer.global_rank == 1:
            os.kill(os.getpid(), 9)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args) -> None:
        print(f"validated rank {trainer.global_rank}", flush=True)
        time.sleep(self.job.get("validation_pause", 0))


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    output = Path(job["output"])
    os.environ.update(job.get("environment", {}))
    config = tiny_run(job["dataset"], output, **job["config"])
    if job.get("masks"):
        run = Run(tiny_masks(**job.get("model", {})), with_masks(config), **job["trainer"])
    else:
        run = Run(tiny_model(**job.get("model", {})), config, **job["trainer"])
    run.trainer.callbacks.append(Report(job))
    for stage in job["do"]:
        extra = {"ckpt_path": job.get("resume")} if stage == "fit" else {}
        getattr(run.trainer, stage)(run.module, run.data, **extra)
        file = output / f"{stage}_{run.trainer.global_rank}.json"
        file.write_text(json.dumps(run.metrics()))
    print("finished", flush=True)


if __name__ == "__main__":
    main()
