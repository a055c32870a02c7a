"""A training program for tests that need processes of their own.

Usage: python train_script.py '{"dataset": ..., "output": ..., "config": {}, "trainer": {},
"do": ["fit", "validate", "test"]}'. Writes the metrics of every stage and rank to `output`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import get_worker_info

from rfdetr.data.dataset import DetectionDataset
from tests.unit.training.helpers import Run, tiny_masks, tiny_model, tiny_run, with_masks


class Report(pl.Callback):
    """Says when a step is done; optionally waits, poisons a loss, fails or kills its rank."""

    def __init__(self, job: dict) -> None:
        self.job = job
        self.seen: list[int] = []  # ids of the images of this rank
        self.seed = 0

    def on_train_start(self, trainer: pl.Trainer, module) -> None:
        self.seed = torch.initial_seed()

    def on_train_batch_start(self, trainer: pl.Trainer, module, batch, batch_idx) -> None:
        self.seen += [int(target["image_id"]) for target in batch[1]]
        if trainer.global_step == self.job.get("nan_step") and trainer.is_global_zero:
            batch[0].tensors.fill_(float("nan"))

    def on_train_batch_end(self, trainer: pl.Trainer, *args) -> None:
        print(f"step {trainer.global_step} rank {trainer.global_rank}", flush=True)
        time.sleep(self.job.get("pause", 0))
        if trainer.global_step == self.job.get("stop_step"):
            print(f"failing {time.time()}", flush=True)
            raise RuntimeError("stopped by the test")
        if trainer.global_step == self.job.get("kill_step") and trainer.global_rank == 1:
            os.kill(os.getpid(), 9)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args) -> None:
        print(f"validated rank {trainer.global_rank}", flush=True)
        time.sleep(self.job.get("validation_pause", 0))


class HangingLogger(CSVLogger):
    """Ends as a client does that waits for its server, and leaves a thread behind."""

    def finalize(self, status: str) -> None:
        threading.Thread(target=time.sleep, args=(120,)).start()
        time.sleep(120)


def hang_in_workers(job: dict) -> None:
    """Let loader workers read for a long time once the first steps have their images."""
    read = DetectionDataset._item
    count = 0

    def slow(self, key):
        nonlocal count
        count += 1
        if get_worker_info() is not None and count > job["hang_after"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(120)
        return read(self, key)

    DetectionDataset._item = slow


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
    run.trainer.callbacks.append(report := Report(job))
    if job.get("own_order_seed"):  # as without a seed, where every rank draws its own
        run.data.order_seed += int(os.environ["RANK"])
    if "hang_after" in job:
        run.trainer.loggers = [HangingLogger(output)]
        hang_in_workers(job)
    for stage in job["do"]:
        extra = {"ckpt_path": job.get("resume")} if stage == "fit" else {}
        getattr(run.trainer, stage)(run.module, run.data, **extra)
        file = output / f"{stage}_{run.trainer.global_rank}.json"
        file.write_text(json.dumps(run.metrics()))
    order = {"seen": report.seen, "seed": report.seed}
    (output / f"order_{run.trainer.global_rank}.json").write_text(json.dumps(order))
    print("finished", flush=True)


if __name__ == "__main__":
    main()
