"""Plots of an evaluation as PNG files: confusion matrix, curves, sample predictions."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rfdetr.evaluation.accumulate import RECALL_POINTS
from rfdetr.evaluation.box_table import BoxTable, EvaluationData
from rfdetr.evaluation.evaluator import EvaluationResult
from rfdetr.evaluation.f1 import SCORE_THRESHOLDS
from rfdetr.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES_IN_LEGEND = 10
CELLS_WITH_NUMBERS = 16
TICKS = 40
CELL_PIXELS, CAPTION_PIXELS, GAP_PIXELS = 288, 14, 8
HISTORY_LOSSES = ("train/loss", "val/loss")
HISTORY_METRICS = ("val/mAP_50_95", "val/ema_mAP_50_95", "val/mAP_50", "val/F1")
TRUTH_COLOUR = (0, 170, 60)
DETECTION_COLOUR = (220, 30, 30)
CROWD_COLOUR = (150, 150, 150)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A validation image to draw on: `pixels` (h, w, 3) uint8, `size` = original (H, W)."""

    image_id: int
    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    name: str = ""  # of the file


def draw_evaluation(
    result: EvaluationResult,
    data: EvaluationData,
    names: Sequence[str],
    samples: Sequence[Sample],
    folder: Path,
) -> dict[str, Path]:
    """Write all plots to `folder` and return their paths by name.

    `names` are the class names in the order of `result.class_ids`. Requires matplotlib.
    """
    drawn = {
        "confusion_matrix": _confusion(result, names),
        "precision_recall": _precision_recall(result, names),
        "f1_threshold": _f1_threshold(result),
    }
    paths = {name: folder / f"{name}.png" for name in drawn}
    for name, figure in drawn.items():
        with atomic_path(paths[name]) as temporary, _without_glyph_warnings():
            figure.savefig(temporary, format="png", dpi=90)
    if samples:
        paths["samples"] = folder / "samples.png"
        sheet = sample_sheet(result, data, names, samples)
        with atomic_path(paths["samples"]) as temporary:
            sheet.quantize(128).save(temporary, format="png", optimize=True)
    return paths


@contextlib.contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Class names can be in any script; glyphs missing from the font are drawn as boxes.

    Filters belong to the process: a thread leaves them alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def draw_history(rows: Sequence[Mapping[str, float]], file: Path) -> None:
    """Draw losses and mAP over the epochs; `rows` hold `epoch` and values by metric name."""
    from matplotlib.ticker import MaxNLocator

    losses, losses_axes = _axes(10, 4, title="Loss", xlabel="epoch")
    losses_axes.set_position((0.07, 0.13, 0.4, 0.77))
    quality_axes = losses.add_axes((0.56, 0.13, 0.4, 0.77))
    quality_axes.set(title="Validation", xlabel="epoch")
    for axes, wanted in ((losses_axes, HISTORY_LOSSES), (quality_axes, HISTORY_METRICS)):
        for name in wanted:
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(fontsize="small")
    with atomic_path(file) as temporary:
        losses.savefig(temporary, format="png", dpi=90)


def draw_class_precision(precision: Mapping[str, float], file: Path) -> None:
    """Write average precision by class name as bars, the lowest at the top; of many, the lowest."""
    lowest = sorted(precision.items(), key=lambda item: item[1])[:TICKS]
    title = "Average precision (IoU 0.50 to 0.95) of each class"
    if len(lowest) < len(precision):
        title += f": the lowest {TICKS} of {len(precision)}"
    figure, axes = _axes(8, 1.5 + 0.25 * len(lowest), title=title)
    figure.set_layout_engine("tight")
    axes.set_xlim(0, 1)
    bars = axes.barh(range(len(lowest)), [value for _, value in lowest])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_yticks(range(len(lowest)), [_shown(name) for name, _ in lowest])
    axes.invert_yaxis()
    with atomic_path(file) as temporary, _without_glyph_warnings():
        figure.savefig(temporary, format="png", dpi=90)


def _axes(width: float, height: float, **settings: Any) -> tuple[Figure, Any]:
    # Without pyplot: no global state, no window, no effect on the user's own figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(**settings)
    return figure, axes


def _confusion(result: EvaluationResult, names: Sequence[str]) -> Figure:
    counts = result.confusion
    size = len(counts)
    side = min(14.0, 4.0 + 0.35 * size)
    title = f"Boxes at score >= {result.sweep.best_threshold:.2f}, IoU >= 0.5"
    figure, axes = _axes(side, side, title=title, xlabel="detected as", ylabel="truth")
    figure.set_layout_engine("tight")  # long class names need room
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    step = -(-size // TICKS)
    labels = [_shown(name) for name in names] + ["background"]
    ticks = list(range(0, size, step))
    axes.set_xticks(ticks, [labels[i] for i in ticks], rotation=90)
    axes.set_yticks(ticks, [labels[i] for i in ticks])
    if size <= CELLS_WITH_NUMBERS:
        for i, j in np.argwhere(counts > 0):
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour)
    return figure


def _precision_recall(result: EvaluationResult, names: Sequence[str]) -> Figure:
    figure, axes = _axes(7, 5, title="Precision over recall at IoU 0.5", xlabel="recall")
    axes.set(ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    part = result.segm or result.bbox
    if part is None:
        return figure
    present = np.flatnonzero(part.ap > -1)
    often = present[np.argsort(-result.sweep.positives[present], kind="stable")]
    for k in often[:CLASSES_IN_LEGEND]:
        label = f"{_shown(names[k])} {part.ap50[k]:.3f}"
        axes.plot(RECALL_POINTS, part.precision_curve[k], linewidth=1, label=label)
    if len(present):
        mean = part.precision_curve[present].mean(axis=0)
        label = f"mean of {len(present)} classes {part.summary.ap50:.3f}"
        axes.plot(RECALL_POINTS, mean, color="black", linewidth=2.5, label=label)
        axes.legend(fontsize="small")
    return figure


def _f1_threshold(result: EvaluationResult) -> Figure:
    sweep = result.sweep
    title = f"Best macro F1 {sweep.macro_f1[sweep.best]:.3f} at score {sweep.best_threshold:.2f}"
    figure, axes = _axes(7, 5, title=title, xlabel="score threshold", ylabel="mean over classes")
    axes.plot(SCORE_THRESHOLDS, sweep.macro_f1, label="F1", linewidth=2.5)
    axes.plot(SCORE_THRESHOLDS, sweep.macro_precision, label="precision")
    axes.plot(SCORE_THRESHOLDS, sweep.macro_recall, label="recall")
    axes.axvline(sweep.best_threshold, color="gray", linestyle=":")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend()
    return figure


def sample_sheet(
    result: EvaluationResult, data: EvaluationData, names: Sequence[str], samples: Sequence[Sample]
) -> Image.Image:
    """A grid of image pairs: left the ground truth in green, right the detections in red.

    Detections are those above the best threshold. Below each pair are file name and counts.
    """
    across = min(2, len(samples))
    down = -(-len(samples) // across)
    width, height = 2 * CELL_PIXELS + GAP_PIXELS, CELL_PIXELS + CAPTION_PIXELS
    sheet = Image.new("RGB", (across * width, down * height), "white")
    labels = dict(zip(result.class_ids.tolist(), names, strict=True))
    for number, sample in enumerate(samples):
        pair = _pair(sample, data, labels, result.sweep.best_threshold)
        sheet.paste(pair, (number % across * width, number // across * height))
    return sheet


def _pair(
    sample: Sample, data: EvaluationData, labels: dict[int, str], threshold: float
) -> Image.Image:
    height, width = sample.size
    scale = CELL_PIXELS / max(height, width)
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    left = Image.fromarray(sample.pixels).resize(small)
    right = left.copy()
    place = int(np.searchsorted(data.image_ids, sample.image_id))
    truth = data.truth.take(data.truth.image == place)
    detections = data.detections.take(data.detections.image == place)
    score = detections.score.astype(np.float32).astype(np.float64)
    detections = detections.take(score >= threshold)
    colours = [CROWD_COLOUR if crowd else TRUTH_COLOUR for crowd in truth.crowd]
    _draw(left, truth, colours, [labels.get(i, str(i)) for i in truth.label], scale)
    texts = [
        f"{labels.get(label, str(label))} {value:.2f}"
        for label, value in zip(detections.label, detections.score, strict=True)
    ]
    _draw(right, detections, [DETECTION_COLOUR] * len(texts), texts, scale)
    pair = Image.new("RGB", (2 * CELL_PIXELS, CELL_PIXELS + CAPTION_PIXELS), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (CELL_PIXELS, 0))
    draw, top = ImageDraw.Draw(pair), CELL_PIXELS + 1
    name = _plain(sample.name.rpartition("/")[2] or f"image {sample.image_id}")
    draw.text((2, top), f"{name}: {len(truth)} true", fill=TRUTH_COLOUR)
    found = f"{len(texts)} predicted at score >= {threshold:.2f}"
    draw.text((CELL_PIXELS + 2, top), found, fill=DETECTION_COLOUR)
    return pair


def _draw(
    image: Image.Image,
    table: BoxTable,
    colours: Sequence[tuple[int, int, int]],
    texts: Sequence[str],
    scale: float,
) -> None:
    from pycocotools import mask as mask_api

    draw = ImageDraw.Draw(image)
    for number, (colour, text) in enumerate(zip(colours, texts, strict=True)):
        if table.rle is not None:
            opacity = Image.fromarray(mask_api.decode(table.rle[number]) * np.uint8(90))
            image.paste(colour, (0, 0), opacity.resize(image.size))
        x, y, w, h = table.box[number] * scale
        corner = (max(x, x + w), max(y, y + h))
        draw.rectangle((x, y, *corner), outline=colour, width=2)
        # Label ground truth above its box and detections inside, so that both stay legible.
        above = colour != DETECTION_COLOUR
        draw.text((x + 2, max(0, y - 11) if above else y + 1), _plain(text), fill=colour)


def _plain(text: str) -> str:
    """The text in Latin-1, all that Pillow's built-in font supports."""
    return _shown(text).encode("latin-1", "replace").decode("latin-1")


def _shown(name: str) -> str:
    """A short name in which matplotlib finds no formula between dollar signs."""
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")
