"""The profile of the images that a model was validated on, made once per weights and dataset."""

from __future__ import annotations

from pathlib import Path

from flows.digest import digest_of
from flows.pack import open_dataset
from flows.sections import DatasetSettings
from flows.settings import Environment, Params
from rfdetr.files import sha256_file

PROFILE = "profile.npz"


def profile_once(root: Path, params: Params, weights: Path, dataset_digest: str) -> Path:
    """Profile the held-out images into the state folder, or find the profile that is there."""
    state = Environment.read().state_dir
    key = digest_of([sha256_file(weights), dataset_digest])[:32]
    file = state / "profiles" / key / PROFILE
    if not file.exists():
        from rfdetr import RFDETR
        from rfdetr.evaluation.profile import profile_images

        images = held_out_images(open_dataset(root / params.dataset.dir, state), params.dataset)
        profile_images(RFDETR.from_checkpoint(str(weights)), images).save(file)
    return file


def held_out_images(folder: Path, dataset: DatasetSettings) -> list[Path]:
    """The images of the validation and test splits: those that the model was not fitted to."""
    from rfdetr.data.coco import CocoSplits
    from rfdetr.data.layouts import detect_layout
    from rfdetr.data.yolo import image_files

    layout = detect_layout(folder, dataset.layout)
    images: list[Path] = []
    for name in ("val", "test"):
        if name not in layout.splits:
            continue
        if layout.kind == "yolo":
            images += image_files(layout.splits[name])
        else:
            index = CocoSplits(layout, check_files=False).index(name)
            images += [index.path(i) for i in range(len(index))]
    return images
