"""One measurement of `bench_goals.py`, with the `rfdetr` package that this Python imports.

Only names that this package and the public one share, so both run the same work. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

import rfdetr
import rfdetr.config as configs
from rfdetr.training import RFDETRDataModule, build_trainer

try:
    from rfdetr.training import RFDETRModule as Module

    OURS = True
except ImportError:
    from rfdetr.training import RFDETRModelModule as Module

    OURS = False

GPU = torch.cuda.is_available()
CLASSES = 10


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def peak_mib() -> float:
    if GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def finish(found: dict[str, Any]) -> None:
    """Print the result and leave at once, whatever loaders still do."""
    print(json.dumps(found | {"device": torch.cuda.get_device_name() if GPU else "CPU"}))
    sys.stdout.flush()
    os._exit(0)


class Steps(pl.Callback):
    """Times steps that wait for the device, from their batch being there to their end."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps, self.times = warmup, steps, [0.0]
        self.times.clear()

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        wait()
        self.started = time.perf_counter()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        wait()
        self.times.append(time.perf_counter() - self.started)
        if len(self.times) == self.warmup and GPU:
            torch.cuda.reset_peak_memory_stats()
        if len(self.times) == self.warmup + self.steps:
            seconds = statistics.median(self.times[self.warmup :])
            finish({"step_ms": 1000 * seconds, "peak_mib": peak_mib()})


class Epochs(pl.Callback):
    """Times the second epoch and its validation."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}

    def mark(self, trainer: pl.Trainer, name: str) -> None:
        wait()
        self.marks[f"{name} {trainer.current_epoch}"] = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int) -> None:
        if i == 0:
            self.mark(trainer, "first")
        if i == trainer.num_training_batches - 1:
            self.batches = i
            self.mark(trainer, "trained")

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.mark(trainer, "validate")

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.mark(trainer, "validated")

    def result(self, batch: int) -> dict[str, float]:
        marks = self.marks
        return {
            "fit_img_s": self.batches * batch / (marks["trained 1"] - marks["first 1"]),
            "validation_s": marks["validated 1"] - marks["validate 1"],
        }


def train(args: argparse.Namespace) -> None:
    """A fit of two epochs, or the steps of its first one at one size."""
    steps = args.part == "step"
    fields = json.loads(args.fields)
    if not OURS and args.mode != "eager":
        fields |= {"compile": True} if args.mode == "compile" else {"cuda_graphs": True}
    name = args.variant.title().replace("-", "")
    model = getattr(configs, f"RFDETR{name}Config")(
        pretrain_weights=None, num_classes=CLASSES, **fields
    )
    kind = "SegmentationTrainConfig" if "seg" in args.variant else "TrainConfig"
    own = {"accelerate": {"eager": "off"}.get(args.mode, args.mode)} if OURS else {}
    config = getattr(configs, kind)(
        dataset_dir=args.data,
        output_dir=args.output,
        epochs=2,
        batch_size=args.batch,
        grad_accum_steps=1,
        num_workers=args.workers,
        tensorboard=False,
        seed=0,
        **({"multi_scale": False} if steps else {}),
        **own,
    )
    trainer = build_trainer(config, model)
    clock = Steps(args.warmup, args.steps) if steps else Epochs()
    trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    trainer.fit(Module(model, config), RFDETRDataModule(model, config))
    if isinstance(clock, Steps):
        raise SystemExit(f"The data has fewer than {args.warmup + args.steps} batches.")
    finish(clock.result(args.batch))


def predict(args: argparse.Namespace) -> None:
    fields = json.loads(args.fields) | {"device": "cuda" if GPU else "cpu"}
    detector = getattr(rfdetr, f"RFDETR{args.variant.title()}")(pretrain_weights=None, **fields)
    image = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    found = {}
    for name, given in (("predict_ms", image), ("predict_16_ms", [image] * 16)):
        times = []
        for _ in range(args.warmup + args.steps):
            wait()
            started = time.perf_counter()
            detector.predict(given, threshold=0.3)
            wait()
            times.append(time.perf_counter() - started)
        found[name] = 1000 * statistics.median(times[args.warmup :])
    finish(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["step", "fit", "predict"])
    parser.add_argument("--variant", default="nano")
    parser.add_argument("--mode", default="eager", choices=["eager", "graphs", "compile"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--fields", default="{}", help="JSON, further fields of the model")
    parser.add_argument("--data", default="")
    parser.add_argument("--output", default="")
    args = parser.parse_args()
    predict(args) if args.part == "predict" else train(args)


if __name__ == "__main__":
    main()
