"""Speed and memory of the data layer, with the ratios that the project promises.

    python tests/benchmarks/bench_data.py index      an annotation file as large as COCO train2017
    python tests/benchmarks/bench_data.py pipeline   training images per second on one core
    python tests/benchmarks/bench_data.py kernels    resize, masks and targets, former / now

Times are processor seconds of one thread, which other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

IMAGES, ANNOTATIONS, CATEGORIES = 118_287, 860_001, 80


def write_large_annotations(path: Path, images: int = IMAGES, rows: int = ANNOTATIONS) -> None:
    """A file shaped like COCO's instances_train2017.json: same counts, about 450 MB of polygons."""
    rng = np.random.default_rng(0)
    owner = np.sort(rng.integers(0, images, rows))
    corner = rng.uniform(0, 400, (rows, 2)).round(2)
    side = rng.uniform(8, 220, (rows, 2)).round(2) * [1, 0.36]
    category = rng.integers(1, CATEGORIES + 1, rows)
    points = np.clip(rng.gamma(1.6, 16.4, rows), 4, 400).astype(int)
    outline = rng.uniform(0, 1, (1000, 2)).round(3)
    with open(path, "w") as stream:
        stream.write('{"info": {"description": "generated"}, "licenses": [], "images": [')
        for i in range(images):
            end = ", " if i + 1 < images else "], "
            name = f"{i:012d}.jpg"
            stream.write(
                f'{{"license": 3, "file_name": "{name}", "coco_url": "http://images/{name}", '
                f'"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", '
                f'"flickr_url": "http://flickr/{name}", "id": {i}}}{end}'
            )
        stream.write('"annotations": [')
        for i in range(rows):
            first = i % 500
            ring = corner[i] + outline[first : first + points[i]] * side[i]
            polygon = ",".join(map("{:.2f}".format, ring.ravel().tolist()))
            (x, y), (w, h) = corner[i].tolist(), side[i].round(2).tolist()
            end = ", " if i + 1 < rows else "], "
            stream.write(
                f'{{"segmentation": [[{polygon}]],"area": {w * h:.4f},"iscrowd": 0,'
                f'"image_id": {owner[i]},"bbox": [{x},{y},{w},{h}],'
                f'"category_id": {category[i]},"id": {i + 1}}}{end}'
            )
        listed = [
            {"supercategory": "thing", "id": i, "name": f"class {i}"}
            for i in range(1, CATEGORIES + 1)
        ]
        stream.write(f'"categories": {json.dumps(listed)}}}')


def large_file(given: Path | None) -> Path:
    """The generated file; made once, and kept where `--file` says."""
    path = given or Path(tempfile.gettempdir()) / "generated_train2017.json"
    if not path.exists():
        write_large_annotations(path)
    return path


def in_own_process(task: Callable[[Path], Any], path: Path) -> tuple[float, float, Any]:
    """(processor seconds, peak GB, result) of a task in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (task, path))


def _measured(task: Callable[[Path], Any], path: Path) -> tuple[float, float, Any]:
    start = time.process_time()
    result = task(path)
    seconds = time.process_time() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, result


def load_pycocotools(path: Path) -> int:
    from pycocotools.coco import COCO

    return len(COCO(str(path)).anns)


def load_reader(path: Path) -> int:
    from rfdetr.data.coco_json import read_coco

    return len(read_coco(path).annotations.ids)


def load_index(path: Path) -> int:
    from rfdetr.data.categories import raw_table
    from rfdetr.data.coco import build_index
    from rfdetr.data.coco_json import read_coco

    coco = read_coco(path)
    table = raw_table(coco.categories)
    return len(build_index(coco, path.parent, table, masks=True, check_files=False).labels)


def bench_index(path: Path) -> None:
    """Reader and index against pycocotools.COCO(file)."""
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")
    reference = in_own_process(load_pycocotools, path)[:2]
    print(f"pycocotools.COCO    {reference[0]:6.2f} s  {reference[1]:.2f} GB")
    for name, task in (("read_coco", load_reader), ("dataset index", load_index)):
        seconds, memory, rows = in_own_process(task, path)
        assert rows == ANNOTATIONS
        share = seconds / reference[0]
        print(f"{name:19s} {seconds:6.2f} s  {memory:.2f} GB  {share:.3f} of pycocotools")


def write_photos(folder: Path, count: int = 40) -> Path:
    """JPEG photos of 640 x 480 with boxes, in Roboflow's layout."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    images, annotations = [], []
    (folder / "train").mkdir(parents=True)
    for i in range(count):
        x, y = rng.uniform(0, 160), rng.uniform(0, 100)
        photo = photos[i % 2].resize((640, 480), Image.Resampling.BICUBIC, (x, y, x + 480, y + 320))
        name = f"{i}.jpg"
        photo.save(folder / "train" / name, quality=92)
        images.append({"id": i, "file_name": name, "width": 640, "height": 480})
        for _ in range(7):
            x, y, w, h = rng.uniform([0, 0, 20, 20], [400, 300, 200, 150]).tolist()
            row = {"id": len(annotations) + 1, "image_id": i, "category_id": 1}
            annotations.append(row | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
    document = {"images": images, "annotations": annotations}
    document["categories"] = [{"id": 1, "name": "thing"}]
    (folder / "train" / "_annotations.coco.json").write_text(json.dumps(document))
    return folder


class PlainPipeline:
    """The same work written with torchvision v2 alone, decoder included."""

    def __init__(self, dataset: Any, side: int) -> None:
        import torch
        from torchvision.transforms import v2

        self.index, self.side = dataset.index, side
        self.flip = v2.RandomHorizontalFlip(0.5)
        self.sizes = [v2.Resize(n, antialias=True) for n in (400, 500, 600)]
        self.resize = v2.Resize((side, side), antialias=True)
        self.finish = v2.Compose(
            [
                v2.SanitizeBoundingBoxes(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
                v2.ConvertBoundingBoxFormat("CXCYWH"),
            ]
        )

    def __getitem__(self, i: int) -> Any:
        import random

        import torch
        from torchvision import tv_tensors
        from torchvision.io import ImageReadMode, decode_image, read_file
        from torchvision.transforms import v2

        data = read_file(str(self.index.path(i)))
        image = tv_tensors.Image(decode_image(data, mode=ImageReadMode.RGB))
        rows = self.index.rows(i)
        boxes = tv_tensors.BoundingBoxes(
            self.index.boxes[rows], format="XYXY", canvas_size=image.shape[-2:]
        )
        sample = {"image": image, "boxes": boxes, "labels": torch.tensor(self.index.labels[rows])}
        if random.random() < 0.5:
            sample = random.choice(self.sizes)(sample)
            short = min(sample["image"].shape[-2:])
            side = random.randint(min(384, short), min(600, short))
            sample = v2.RandomCrop(side)(sample)
        return self.finish(self.flip(self.resize(sample)))


def images_per_second(items: Any, count: int, seconds: float = 6.0) -> float:
    """Items per processor second, round and round."""
    for i in range(count // 4):
        items[i]
    start, done = time.process_time(), 0
    while time.process_time() - start < seconds:
        items[done % count]
        done += 1
    return done / (time.process_time() - start)


def bench_pipeline() -> None:
    """Training images per second and core on 640 x 480 JPEGs."""
    import torch

    from rfdetr.config import RFDETRNanoConfig, TrainConfig
    from rfdetr.data.sampler import SampleKey
    from rfdetr.training.datamodule import RFDETRDataModule

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = write_photos(Path(folder) / "photos")
        for multi_scale in (True, False):
            config = TrainConfig(dataset_dir=root, num_workers=0, multi_scale=multi_scale, seed=0)
            module = RFDETRDataModule(RFDETRNanoConfig(pretrain_weights=None), config)
            dataset: Any = module.train_dataloader().dataset
            side = dataset.transform.sizes[0]
            keys = [SampleKey(i % len(dataset), i, i) for i in range(10 * len(dataset))]
            ours = images_per_second(_Keyed(dataset, keys), len(keys))
            plain = images_per_second(PlainPipeline(dataset, side), len(dataset))
            print(
                f"640 x 480 JPEG to {side} x {side}: {ours:.0f} images/s/core, plain torchvision "
                f"v2 {plain:.0f}, ratio {ours / plain:.2f}"
            )


def bench_kernels() -> None:
    """The parts of the data layer against what they replaced, in the same process."""
    import torch
    from PIL import Image

    from rfdetr.data.geometry import View, show_mask, show_points
    from rfdetr.data.masks import rasterise
    from rfdetr.data.packed import PackedTargets
    from rfdetr.data.transforms import as_tensor, resize

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for height, width in ((480, 640), (1080, 1920)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        former = milliseconds(
            lambda p=pixels: np.asarray(
                Image.fromarray(p).resize((384, 384), Image.Resampling.BILINEAR)
            )
        )
        now = milliseconds(lambda p=pixels: resize(as_tensor(p), (384, 384)))
        say(f"resize {width} x {height} to 384 x 384", former, now)
    height, width = 3000, 4000
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1) * 700 + [2000, 1500]
    view = View(0, 0, height, width, 544, 544)
    former = milliseconds(
        lambda: show_mask(rasterise([ring.ravel().tolist()], height, width), view)
    )
    now = milliseconds(lambda: rasterise([show_points(ring, view).ravel().tolist()], 544, 544))
    say("training mask of a polygon at 12 MP", former, now)
    targets = [
        {"boxes": torch.rand(7, 4), "labels": torch.ones(7).long(), "image_id": torch.tensor([i])}
        for i in range(64)
    ]
    packed = PackedTargets(targets)
    former = milliseconds(lambda: [{k: v.clone() for k, v in t.items()} for t in targets])
    say("copy of the targets of 64 images", former, milliseconds(lambda: packed.map(torch.clone)))


def milliseconds(run: Callable[[], Any], rounds: int = 15) -> float:
    """Smallest processor time of a call."""
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        spent.append(time.process_time() - start)
    return 1000 * min(spent)


def say(what: str, former: float, now: float) -> None:
    print(f"{what}: {former:.2f} -> {now:.2f} ms, ratio {former / now:.2f}")


class _Keyed:
    def __init__(self, dataset: Any, keys: list[Any]) -> None:
        self.dataset, self.keys = dataset, keys

    def __getitem__(self, i: int) -> Any:
        return self.dataset[self.keys[i]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["index", "pipeline", "kernels"])
    parser.add_argument("--file", type=Path, help="where the large annotation file is kept")
    given = parser.parse_args()
    if given.part == "index":
        bench_index(large_file(given.file))
    elif given.part == "kernels":
        bench_kernels()
    else:
        bench_pipeline()


if __name__ == "__main__":
    main()
