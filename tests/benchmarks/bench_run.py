"""Time a fit and its validation through the public classes. Prints one JSON object.

    python tests/benchmarks/bench_run.py --variant nano --batch 16 --workers 12     on a GPU
    python tests/benchmarks/bench_run.py --tiny --images 200 --tree ../old          on a CPU

Two epochs on generated 640x480 JPEG files with 7 boxes each (polygons for segmentation), EMA on.
`train_img_s` leaves out the first epoch's first 20 batches, `validation_s` is of the second epoch.
--tiny takes a small network, so that the data, validation and checkpoints are what is timed.
--tree FOLDER runs this script on another checkout of this repository in turns and prints the
medians of the ratios; above 1 is in favour of this one.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from turns import in_turns

from rfdetr.config import MODEL_CONFIGS, SegmentationTrainConfig, TrainConfig
from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer

HEIGHT, WIDTH, OBJECTS, CLASSES = 480, 640, 7, 10
TINY: dict[str, Any] = {
    "encoder_dim": 48,
    "encoder_depth": 2,
    "encoder_heads": 3,
    "out_feature_indexes": [1, 2],
    "hidden_dim": 32,
    "dec_layers": 1,
    "dim_feedforward": 64,
    "group_detr": 1,
}


def make_data(root: Path, images: int) -> None:
    """A Roboflow export: `images` to train on, half as many to validate on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("valid", images // 2)):
        (root / split).mkdir(parents=True)
        annotations: list[dict[str, Any]] = []
        listed = []
        for number in range(count):
            coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((WIDTH, HEIGHT))
            picture.save(root / split / f"{number}.jpg", quality=90)
            name = f"{number}.jpg"
            listed.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for _ in range(OBJECTS):
                w, h = rng.uniform(30, 200, 2)
                x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
                ring = [x, y, x + w, y, x + w, y + h, x, y + h]
                row = {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0}
                row |= {"category_id": int(rng.integers(1, CLASSES + 1)), "bbox": [x, y, w, h]}
                annotations.append(row | {"area": w * h, "segmentation": [ring]})
        names = [{"id": 0, "name": "all", "supercategory": "none"}]
        names += [{"id": i, "name": f"c{i}", "supercategory": "all"} for i in range(1, CLASSES + 1)]
        document = {"images": listed, "annotations": annotations, "categories": names}
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))


class Clock(pl.Callback):
    def __init__(self) -> None:
        self.marks: dict[str, float] = {}

    def _mark(self, trainer: pl.Trainer, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks[f"{name} {trainer.current_epoch}"] = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int) -> None:
        if i == min(19, trainer.num_training_batches // 2):
            self._mark(trainer, "warm")
        if i == trainer.num_training_batches - 1:
            self._mark(trainer, "trained")

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._mark(trainer, "validate")

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._mark(trainer, "validated")


def report(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    fields = TINY | {"resolution": 96 if "seg" in args.variant else 128} if args.tiny else {}
    model = MODEL_CONFIGS[args.variant](pretrain_weights=None, num_classes=CLASSES, **fields)
    kind = SegmentationTrainConfig if model.segmentation_head else TrainConfig
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder) / "data", args.images)
        config = kind(
            dataset_dir=f"{folder}/data",
            output_dir=f"{folder}/out",
            epochs=2,
            batch_size=args.batch,
            grad_accum_steps=1,
            num_workers=args.workers,
            tensorboard=False,
            seed=0,
        )
        trainer = build_trainer(config, model, enable_model_summary=False)
        trainer.callbacks.append(clock := Clock())  # type: ignore[attr-defined]
        cpu = time.process_time()
        trainer.fit(RFDETRModule(model, config), RFDETRDataModule(model, config))
        cpu = time.process_time() - cpu
    marks, batches = clock.marks, int(trainer.num_training_batches)
    counted = (batches - min(19, batches // 2) - 1) * args.batch
    found = {
        "variant": args.variant,
        "train_img_s": counted / (marks["trained 1"] - marks["warm 1"]),
        "validation_s": marks["validated 1"] - marks["validate 1"],
        "main_process_cpu_s": cpu,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["peak_device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def compare(args: argparse.Namespace) -> dict[str, Any]:
    rounds = []
    for new, old in in_turns(args):
        numbers = [name for name, value in new.items() if isinstance(value, float)]
        ratios = {name: old[name] / new[name] for name in numbers}
        rounds.append(ratios | {"train_img_s": 1 / ratios["train_img_s"]})
    median = {n: round(statistics.median(r[n] for r in rounds), 3) for n in rounds[0]}
    return {"in favour of this one": median, "new": new, "old": old}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="nano", choices=sorted(MODEL_CONFIGS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a small network")
    parser.add_argument("--tree", help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=3, help="turns with --tree")
    args = parser.parse_args()
    print(json.dumps(compare(args) if args.tree else report(args)))


if __name__ == "__main__":
    main()
