"""Profiles the images of the training dataset, once per weights and dataset."""

from __future__ import annotations

from pathlib import Path

from flows.config.sections import DatasetSettings
from flows.core.digest import digest_of
from flows.storage.packs import open_dataset
from rfdetr.evaluation.operating_point import OperatingPoint
from rfdetr.files import sha256_file

PROFILE = "profile.npz"


def profile_once(
    data: Path,
    dataset: DatasetSettings,
    weights: Path,
    digest: str,
    state_dir: Path,
    *,
    point: OperatingPoint | None = None,
) -> Path:
    """The profile of a sample of every split, cached in the state folder.

    `data` is the dataset folder, `digest` its content hash. Boxes above the operating point count.
    """
    seen = [sha256_file(weights), digest, *([point.to_dict()] if point else [])]
    key = digest_of(seen)[:32]
    file = state_dir / "profiles" / key / PROFILE
    if not file.exists():
        from rfdetr import RFDETR
        from rfdetr.monitoring.image_profile import IMAGES
        from rfdetr.monitoring.profiling import profile_images

        splits = split_images(open_dataset(data, state_dir), dataset)
        share = IMAGES // len(splits)
        sample = [path for paths in splits.values() for path in spread(paths, share)]
        detector = RFDETR.from_checkpoint(str(weights))
        fitted = splits.get("train", ())
        profile_images(detector, sample, fitted=fitted, point=point).save(file)
    return file


def split_images(folder: Path, dataset: DatasetSettings) -> dict[str, list[Path]]:
    """The image files of every split."""
    from rfdetr.data.coco import CocoSplits
    from rfdetr.data.layouts import detect_layout
    from rfdetr.data.yolo import image_files

    layout = detect_layout(folder, dataset.layout)
    if layout.kind == "yolo":
        return {name: list(image_files(split)) for name, split in layout.splits.items()}
    coco = CocoSplits(layout, check_files=False)
    indexes = {name: coco.index(name) for name in layout.splits}
    return {name: [i.path(n) for n in range(len(i))] for name, i in indexes.items()}


def spread(paths: list[Path], limit: int) -> list[Path]:
    """At most `limit` of the paths, evenly spread."""
    step = max(1.0, len(paths) / limit)
    return [paths[int(n * step)] for n in range(min(limit, len(paths)))]
