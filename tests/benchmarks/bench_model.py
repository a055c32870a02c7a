"""Time the network: training step, eval forward, prediction of one image. Prints one JSON object.

    python tests/benchmarks/bench_model.py --variant nano --batch 4 --threads 2

Random weights, no multi-scale, no averaging, float32 unless --amp. `of_matmul_rate` compares the
floating point operations that the step counts with the rate of a large matrix product measured in
the same process. `cpu_s` is processor time, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rfdetr.config import MODEL_CONFIGS, ModelConfig
from rfdetr.model.criterion import build_criterion
from rfdetr.model.network import RFDETRNetwork, build_network
from rfdetr.model.postprocess import PostProcess


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
    """Floating point operations per second of a product of the decoder's largest kind."""
    a = torch.randn(4096, 512, device=args.device)
    b = torch.randn(512, 2048, device=args.device)
    return 2 * 4096 * 512 * 2048 / timed(lambda: a @ b, args)["s"]


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


def prediction(model: RFDETRNetwork, args: argparse.Namespace) -> Callable[[], object]:
    """One 640 x 480 image: tensor, resize, normalise, forward, postprocess."""
    from rfdetr.data.transforms import preprocess

    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    postprocess = PostProcess(model.config.num_select)
    size = torch.tensor([[480, 640]], device=args.device)

    @torch.inference_mode()
    def predict() -> None:
        image = preprocess(picture, model.config.resolution).to(args.device)
        postprocess(model(image[None]), size)

    return predict


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
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = MODEL_CONFIGS[args.variant](pretrain_weights=None)
    model = build_network(config).to(args.device)
    images = torch.randn(args.batch, 3, config.resolution, config.resolution, device=args.device)
    targets = make_targets(config, args.batch, args.objects, args.device)
    rate = matmul_rate(args)

    result: dict[str, Any] = {"variant": args.variant, "batch": args.batch, "device": args.device}
    result |= {"threads": args.threads, "amp": args.amp, "matmul_gflops": round(rate / 1e9, 1)}
    model.train()
    work = {"train_step": training_step(model, images, targets, args)}
    result["train_step"] = measure(work["train_step"], args.batch, rate, args)
    result["train_peak_rss_mib"] = peak_mib(args.device)
    model.eval()
    with torch.inference_mode():
        forward = measure(lambda: model(images), args.batch, rate, args)
    result["eval_forward"] = forward
    result["predict"] = measure(prediction(model, args), 1, rate, args)
    print(json.dumps(result))


def measure(
    run: Callable[[], object], images: int, rate: float, args: argparse.Namespace
) -> dict[str, float]:
    """Images per second, processor seconds, and the share of the matrix product's rate."""
    with FlopCounterMode(display=False) as counter:
        run()
    spent = timed(run, args)
    return {
        "img_s": round(images / spent["s"], 4),
        "s": round(spent["s"], 4),
        "cpu_s": round(spent["cpu_s"], 4),
        "gflop": round(counter.get_total_flops() / 1e9, 2),
        "of_matmul_rate": round(counter.get_total_flops() / spent["s"] / rate, 3),
    }


def peak_mib(device: str) -> float:
    """Peak memory so far: of the device, or of this process."""
    if device != "cpu":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
