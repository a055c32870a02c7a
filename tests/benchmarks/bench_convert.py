"""Time and memory of convert_legacy_checkpoint against torch.load + torch.save of the same file.

    python tests/benchmarks/bench_convert.py --variant nano --ema

Prints one JSON object. `ratio` is the median time divided by that of torch.load(weights_only=True)
+ torch.save, both warm and in this process; `cpu_ratio` is the same for processor time, which
ignores that conversion uses two cores and what else the machine does. `memory_ratio` is the peak
growth of resident memory divided by the size of the file, in a process that has converted a small
file before, so that loading libraries does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rfdetr.checkpoints.convert import convert_legacy_checkpoint
from rfdetr.checkpoints.legacy_names import to_legacy
from rfdetr.config import MODEL_CONFIGS
from rfdetr.model.network import build_network

MEMORY = """
import sys, threading, psutil, torch
from rfdetr.checkpoints.convert import convert_legacy_checkpoint
process, peak, done = psutil.Process(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, process.memory_info().rss)
        done.wait(0.002)
convert_legacy_checkpoint(sys.argv[3], sys.argv[2])
before = process.memory_info().rss
watcher = threading.Thread(target=watch)
watcher.start()
convert_legacy_checkpoint(sys.argv[1], sys.argv[2])
done.set()
watcher.join()
print(peak - before)
"""


SMALL = {"encoder_dim": 48, "encoder_depth": 2, "encoder_heads": 3, "out_feature_indexes": [1, 2]}


def legacy_file(path: Path, variant: str, *, ema: bool, optimizer: bool, **changes: Any) -> None:
    """A file as the legacy training loop wrote it: weights, Namespace, optimizer, EMA weights."""
    config = MODEL_CONFIGS[variant](pretrain_weights=None, **changes)
    network = build_network(config)
    content: dict[str, Any] = {"model": to_legacy(network.state_dict()), "epoch": 3}
    content["args"] = argparse.Namespace(**config.model_dump())
    content["args"].pretrain_weights = type(config).model_fields["pretrain_weights"].default
    if ema:
        content["ema_model"] = {n: v.clone() for n, v in content["model"].items()}
    if optimizer:
        adam = torch.optim.AdamW(network.parameters())
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        adam.step()
        content["optimizer"] = adam.state_dict()
    torch.save(content, path)


def seconds(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """(median wall time, median processor time) of `repeats` calls after one warm-up."""
    function()
    wall, cpu = [], []
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
    return statistics.median(wall), statistics.median(cpu)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the file, convert it, and compare time and memory with the plain round trip."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        names = ("old.pth", "new.ckpt", "copy.pth", "small.pth")
        old, new, copy, small = (Path(folder) / name for name in names)
        legacy_file(small, "nano", ema=False, optimizer=False, **SMALL)
        legacy_file(old, arguments.variant, ema=arguments.ema, optimizer=arguments.optimizer)
        plain, plain_cpu = seconds(lambda: torch.save(_plain_load(old), copy), arguments.repeats)
        ours, ours_cpu = seconds(lambda: convert_legacy_checkpoint(old, new), arguments.repeats)
        report = convert_legacy_checkpoint(old, new)
        command = [sys.executable, "-c", MEMORY, str(old), str(new), str(small)]
        grown = int(subprocess.run(command, check=True, capture_output=True).stdout.split()[-1])
        size = old.stat().st_size
    return {
        "variant": arguments.variant,
        "threads": arguments.threads,
        "file_mb": round(size / 1e6, 1),
        "load_save_s": round(plain, 3),
        "convert_s": round(ours, 3),
        "ratio": round(ours / plain, 2),
        "cpu_ratio": round(ours_cpu / plain_cpu, 2),
        "peak_mb": round(grown / 1e6, 1),
        "memory_ratio": round(grown / size, 2),
        "compared": report.compared,
        "max_abs_difference": report.max_abs_difference,
    }


def _plain_load(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="nano", choices=sorted(MODEL_CONFIGS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--optimizer", action="store_true")
    print(json.dumps(measure(parser.parse_args())))
