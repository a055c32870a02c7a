"""Time the network: training step, eval forward, postprocess, predict(). Prints one JSON object.

    python tests/benchmarks/bench_model.py --variant nano --batch 4 --threads 2
    python tests/benchmarks/bench_model.py --against "PYTHON reference_step.py" --rounds 3

Random weights, no multi-scale, no averaging, float32 unless --amp. The training step has the whole
batch; eval forward, postprocess and predict() have one image. `of_matmul_rate` compares the
floating point operations of the step with the rate of a large matrix product measured in the same
process. `cpu_s` is processor time, which other processes on the machine disturb less.

--tree FOLDER runs this script on another checkout of this repository in turns, for example
`git worktree add ../old b84fa7c`; printed are the medians of old / new times and memory.

--against times another package in turns: a command that takes --variant --batch --steps --threads
--device and prints JSON with images_per_s, forward_ms, predict_ms and peak_rss_mb. Printed are the
medians of the ratios: speeds above 1 and memory below 1 are better than the other's.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from turns import in_turns

from rfdetr.config import MODEL_CONFIGS, ModelConfig
from rfdetr.detector import DETECTOR_CLASSES
from rfdetr.export.frozen import FINAL_OUTPUTS
from rfdetr.model.criterion import build_criterion
from rfdetr.model.network import RFDETRNetwork, build_network
from rfdetr.model.postprocess import PostProcess
from rfdetr.training.allocator import keep_freed_memory


class Operations(TorchDispatchMode):
    """Counts the floating point operations of products, convolutions and attention."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        packet = torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def make_targets(config: ModelConfig, batch: int, per_image: int, device: str) -> list[Any]:
    draw = np.random.default_rng(0)
    made = []
    for _ in range(batch):
        size = draw.uniform(0.05, 0.4, (per_image, 2))
        centre = size / 2 + draw.uniform(size=(per_image, 2)) * (1 - size)
        boxes = torch.tensor(np.concatenate([centre, size], 1), dtype=torch.float32)
        labels = torch.from_numpy(draw.integers(0, config.num_classes, per_image))
        target = {"boxes": boxes.to(device), "labels": labels.to(device)}
        if config.segmentation_head:
            side = config.resolution
            target["masks"] = torch.zeros(per_image, side, side, dtype=torch.bool, device=device)
            target["masks"][:, side // 4 : side // 2, side // 4 : side // 2] = True
        made.append(target)
    return made


def timed(run: Callable[[], object], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds and processor seconds of a call."""
    walls, cpus = [], []
    for i in range(args.warmup + args.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if args.device != "cpu":
            torch.cuda.synchronize()
        if i >= args.warmup:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    return {"s": statistics.median(walls), "cpu_s": statistics.median(cpus)}


def matmul_rate(args: argparse.Namespace) -> float:
    """Floating point operations per second of a large matrix product."""
    a = torch.randn(2048, 2048, device=args.device)
    return 2 * 2048**3 / busy_seconds(timed(lambda: a @ a, args), args)


def busy_seconds(spent: dict[str, float], args: argparse.Namespace) -> float:
    """Processor seconds per thread on a CPU, seconds elsewhere."""
    return spent["cpu_s"] / args.threads if args.device == "cpu" else spent["s"]


def training_step(
    model: RFDETRNetwork, images: Tensor, targets: list[Any], args: argparse.Namespace
) -> Callable[[], object]:
    criterion = build_criterion(model.config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            losses = criterion(model(images), targets)
        total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Every figure of this package; one network lives at a time, for the peak memory."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = MODEL_CONFIGS[args.variant](pretrain_weights=None)
    rate = matmul_rate(args)
    result: dict[str, Any] = {"variant": args.variant, "batch": args.batch, "device": args.device}
    result |= {"threads": args.threads, "amp": args.amp, "matmul_gflops": round(rate / 1e9, 1)}
    result |= predict_figures(config, args)
    if not args.host:
        result |= network_figures(config, rate, args)
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if args.device != "cpu":
        result["peak_device_mib"] = torch.cuda.max_memory_allocated() // 2**20
    return result


def predict_figures(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """predict() on one image, on 16 arrays, on 8 JPEG files of full HD, and its host work alone."""
    detector = DETECTOR_CLASSES[type(config)](pretrain_weights=None, device=args.device)
    image = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jpg" for i in range(8)]
        for file in files:
            Image.fromarray(image).resize((1920, 1080)).save(file, quality=90)
        work: dict[str, tuple[Any, int]] = {
            "predict": (image, 1),
            "predict_16_arrays": ([image] * 16, 16),
            "predict_8_files": (files, 8),
        }
        found = {
            name: measure(lambda given=given: detector.predict(given, threshold=0.3), n, args)
            for name, (given, n) in work.items()
            if not args.host
        }
        with torch.no_grad():
            outputs = detector.model.model(
                torch.zeros(1, 3, *[config.resolution] * 2, device=args.device)
            )
        detector.model.model.forward = lambda images: {
            name: outputs[name].expand(len(images), *outputs[name].shape[1:])
            for name in FINAL_OUTPUTS
            if name in outputs
        }
        for name, (given, n) in work.items():
            call = lambda given=given: detector.predict(given, threshold=0.3)  # noqa: E731
            found[f"{name}_host"] = measure(call, n, args)
    return found


def network_figures(config: ModelConfig, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Eval forward, postprocess, and then the training step with the allocator as a fit sets it."""
    model = build_network(config).to(args.device).eval()
    if hasattr(model, "graphs"):  # not in older checkouts
        model.graphs.use = "never" if args.eager else "always"
    images = torch.randn(args.batch, 3, config.resolution, config.resolution, device=args.device)
    one, size = images[:1], torch.tensor([[480, 640]], device=args.device)
    with torch.no_grad():
        work = operations(lambda: model(one))
    with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
        result = {"eval_forward": measure(lambda: model(one), 1, args, work, rate)}
        outputs, postprocess = model(one), PostProcess(config.num_select)
        result["postprocess"] = measure(lambda: postprocess(outputs, size), 1, args)
    keep_freed_memory()
    targets = make_targets(config, args.batch, args.objects, args.device)
    step = training_step(model.train(), images, targets, args)
    result["train_step"] = measure(step, args.batch, args, operations(step), rate)
    return result


def operations(run: Callable[[], object]) -> int:
    """Floating point operations of a call outside of inference mode, which hides them."""
    with Operations() as counter:
        run()
    return counter.total


def measure(
    run: Callable[[], object],
    images: int,
    args: argparse.Namespace,
    work: int = 0,
    rate: float = 1.0,
) -> dict[str, float]:
    """Images per second, processor seconds, and the share of the matrix product's rate."""
    spent = timed(run, args)
    result = {
        "img_s": round(images / spent["s"], 4),
        "s": round(spent["s"], 4),
        "cpu_s": round(spent["cpu_s"], 4),
    }
    if work:
        result["gflop"] = round(work / 1e9, 2)
        result["of_matmul_rate"] = round(work / busy_seconds(spent, args) / rate, 3)
    return result


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Both packages in turns, each in a process of its own; medians of the ratios."""
    options = f"--batch {args.batch} --steps {args.steps} --threads {args.threads} "
    options += f"--device {args.device}"
    ours = [sys.executable, __file__, "--variant", args.variant, *shlex.split(options)]
    other = [*shlex.split(args.against), "--variant", args.variant.title(), *shlex.split(options)]
    rounds = []
    for _ in range(args.rounds):
        mine, its = (
            json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            for command in (ours, other)
        )
        rounds.append(
            {
                "train_step": mine["train_step"]["img_s"] / its["images_per_s"],
                "eval_forward": its["forward_ms"] / 1000 / mine["eval_forward"]["s"],
                "predict": its["predict_ms"] / 1000 / mine["predict"]["s"],
                "peak_memory": mine["peak_rss_mib"] / its["peak_rss_mb"],
            }
        )
    ratios = {name: round(statistics.median(r[name] for r in rounds), 3) for name in rounds[0]}
    return {"ratios": ratios, "rounds": rounds, "ours": mine, "other": its}


def compare_trees(args: argparse.Namespace) -> dict[str, Any]:
    """This checkout and another in turns; ratios above 1 are in favour of this one."""
    rounds = []
    for new, old in in_turns(args):
        kind = "cpu_s" if args.device == "cpu" else "s"
        ratios = {n: old[n][kind] / new[n][kind] for n in new if isinstance(new[n], dict)}
        memory = "peak_rss_mib" if args.device == "cpu" else "peak_device_mib"
        rounds.append(ratios | {"memory": old[memory] / new[memory]})
    median = {n: round(statistics.median(r[n] for r in rounds), 3) for n in rounds[0]}
    return {"old / new": median, "rounds": rounds, "new": new, "old": old}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="nano", choices=sorted(MODEL_CONFIGS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--objects", type=int, default=7, help="targets per image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--against", help="command that times another package")
    parser.add_argument("--host", action="store_true", help="only the host work of predict()")
    parser.add_argument("--tree", help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=3, help="turns with --against or --tree")
    args = parser.parse_args()
    if args.tree:
        print(json.dumps(compare_trees(args)))
    else:
        print(json.dumps(compare(args) if args.against else report(args)))


if __name__ == "__main__":
    main()
