"""A registered model over images: COCO results, resumable, with drawn pictures if wanted."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.registry import CHAMPION, Registry, Version
from flows.s3 import is_s3
from flows.settings import load_params
from flows.stage import write_json
from flows.tracking import default_tracking_uri
from rfdetr.errors import ConfigError, DatasetError
from rfdetr.files import atomic_path

if TYPE_CHECKING:
    from rfdetr import RFDETR

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
DONE, RESULTS = "detections.jsonl", "detections.json"
BATCH = 8


def predict_folder(
    root: Path,
    sources: Sequence[str],
    out: Path,
    *,
    model: str | None = None,
    threshold: float = 0.5,
    draw: bool = True,
) -> int:
    """Detect on files, folders and s3:// prefixes; the number of images.

    Writes `out/detections.json` (COCO: images, annotations with score, categories) and drawn
    pictures. Interrupted, the same call goes on after the last finished image; another model or
    threshold starts anew.
    """
    registry = Registry(load_params(root / "params.yaml").registry.name, default_tracking_uri(root))
    version = find_version(registry, model)
    with tempfile.TemporaryDirectory(prefix="rfdetr-predict-") as folder:
        files = list(_files(sources, Path(folder)))
        if not files:
            raise DatasetError(
                f"No images in {', '.join(sources)}. Known: {', '.join(sorted(IMAGES))}."
            )
        header = {"model": registry.name, "version": version.number, "threshold": threshold}
        finished = _finished(out / DONE, header)
        waiting = [item for item in files if item[0] not in finished]
        if waiting:
            detector = load_version(registry, version, Path(folder))
            _detect(detector, waiting, out, threshold, draw=draw)
        _write_coco(out, header, [name for name, _ in files])
    return len(files)


def find_version(registry: Registry, model: str | None) -> Version:
    """A version by number or alias (default: champion). Raises ConfigError when there is none."""
    if model is not None and model.isdecimal():
        return registry.version(int(model))
    version = registry.by_alias(model or CHAMPION)
    if version is None:
        known = ", ".join(registry.aliases()) or "none"
        raise ConfigError(
            f"{registry.name} has no version with the alias '{model or CHAMPION}' (aliases: "
            f"{known}). Run `rfdetr-pipeline retrain` first."
        )
    return version


def load_version(registry: Registry, version: Version, folder: Path) -> RFDETR:
    """The detector of a registered version."""
    from rfdetr import RFDETR

    artifacts = registry.fetch(version, folder) / "artifacts"
    weights = next((f for f in artifacts.iterdir() if f.suffix in {".pth", ".ckpt"}), None)
    if weights is None:
        raise ConfigError(f"{registry.name} version {version.number} holds no weights.")
    return RFDETR.from_checkpoint(str(weights))


def _files(sources: Sequence[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of every image; S3 prefixes are downloaded."""
    from flows.trees import download_tree

    for number, source in enumerate(sources):
        base = Path(source)
        if is_s3(source):
            base = download_tree(source, folder / f"source-{number}")
        if base.is_file():
            yield base.name, base
        elif base.is_dir():
            for file in sorted(base.rglob("*")):
                if file.suffix.lower() in IMAGES:
                    yield file.relative_to(base).as_posix(), file
        else:
            raise DatasetError(f"{source} does not exist.")


def _finished(file: Path, header: dict[str, Any]) -> set[str]:
    """Names of the images that an earlier, equal call has finished; a torn last line is dropped."""
    if not file.exists():
        _begin(file, header)
        return set()
    lines = file.read_text(encoding="utf-8").split("\n")
    whole = lines[:-1]
    if not whole or json.loads(whole[0]) != header:
        _begin(file, header)
        return set()
    if lines[-1]:
        with atomic_path(file) as temporary:
            temporary.write_text("\n".join(whole) + "\n", encoding="utf-8")
    return {json.loads(line)["file_name"] for line in whole[1:]}


def _begin(file: Path, header: dict[str, Any]) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(header) + "\n", encoding="utf-8")


def _detect(
    detector: RFDETR, files: Sequence[tuple[str, Path]], out: Path, threshold: float, *, draw: bool
) -> None:
    from tqdm import tqdm

    bar = tqdm(total=len(files), unit="image", disable=not sys.stderr.isatty())
    with open(out / DONE, "a", encoding="utf-8") as stream, bar:
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            found = detector.predict([str(file) for _, file in batch], threshold=threshold)
            for (name, file), detections in zip(batch, found, strict=True):
                stream.write(json.dumps(_row(name, file, detections)) + "\n")
                if draw:
                    _draw(file, detections, out / "pictures" / f"{Path(name).stem}.jpg")
            stream.flush()
            bar.update(len(batch))


def _row(name: str, file: Path, detections: Any) -> dict[str, Any]:
    from PIL import Image

    with Image.open(file) as image:
        width, height = image.size
    names = detections.data.get("class_name", [])
    return {
        "file_name": name,
        "width": width,
        "height": height,
        "boxes": [[round(float(v), 2) for v in box] for box in detections.xyxy],
        "scores": [round(float(score), 5) for score in detections.confidence],
        "labels": [int(label) for label in detections.class_id],
        "names": [str(n) for n in names],
    }


def _draw(file: Path, detections: Any, target: Path) -> None:
    import supervision
    from PIL import Image

    with Image.open(file) as image:
        picture = image.convert("RGB")
    names = detections.data.get("class_name", detections.class_id)
    labels = [f"{n} {c:.2f}" for n, c in zip(names, detections.confidence, strict=True)]
    picture = supervision.BoxAnnotator(thickness=1).annotate(picture, detections)
    picture = supervision.LabelAnnotator(text_scale=0.3, text_padding=1).annotate(
        picture, detections, labels=labels
    )
    with atomic_path(target) as temporary:
        picture.save(temporary, "JPEG", quality=90)


def _write_coco(out: Path, header: dict[str, Any], names: Iterable[str]) -> None:
    """The finished images as one COCO file, in the order in which they were given."""
    lines = (out / DONE).read_text(encoding="utf-8").splitlines()[1:]
    rows = {row["file_name"]: row for row in map(json.loads, lines)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    categories: dict[int, str] = {}
    for number, name in enumerate(names, start=1):
        row = rows[name]
        images.append({"id": number, **{k: row[k] for k in ("file_name", "width", "height")}})
        for box, score, label, text in zip(
            row["boxes"], row["scores"], row["labels"], row["names"], strict=True
        ):
            x0, y0, x1, y1 = box
            size = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
            categories[label] = text
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": size,
                    "area": round(size[2] * size[3], 2),
                    "iscrowd": 0,
                    "score": score,
                }
            )
    named = [{"id": label, "name": categories[label]} for label in sorted(categories)]
    data = {"info": header, "images": images, "annotations": annotations, "categories": named}
    write_json(out / RESULTS, data)
