"""The matches of a detector on a test set, image by image: what comparisons are computed from."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import core_schema

from rfdetr.arrays import Bools, Integers
from rfdetr.errors import InputError
from rfdetr.evaluation.box_table import EvaluationData, IouType
from rfdetr.evaluation.matching import AREA_RANGES, IOU_THRESHOLDS, match

EVERY_AREA = (float(AREA_RANGES[0, 0]), float(AREA_RANGES[0, 1]))

_FIELDS = ("positives", "image", "label", "score", "matched", "ignored", "accepted")


@dataclass(frozen=True, eq=False)
class MatchEvidence:
    """The matches of one detector on one test set, image by image.

    positives: (I, K) ground-truth boxes that count, per image and class.
    image, label: (D,) image and class index of each detection, by class and descending score.
    score: (D,). matched, ignored: (D,) bit t is set when the detection matched (or is ignored,
    e.g. because of a crowd region) at IoU 0.5 + 0.05 t. accepted: (D,) whether the detection is
    above the operating point, or without one reaches the threshold of the best F1.
    """

    positives: NDArray[np.int32]
    image: NDArray[np.int32]
    label: NDArray[np.int32]
    score: NDArray[np.float32]
    matched: NDArray[np.uint16]
    ignored: NDArray[np.uint16]
    accepted: NDArray[np.bool_]

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, name)) for name in _FIELDS[1:]}
        if self.positives.ndim != 2 or len(lengths) != 1:
            raise InputError(
                "match evidence needs positives (images, classes) and six arrays of one length; "
                f"found positives {self.positives.shape} and arrays of lengths {sorted(lengths)}"
            )
        for name, limit in (("image", self.positives.shape[0]), ("label", self.positives.shape[1])):
            column = getattr(self, name)
            if len(column) and (column.min() < 0 or column.max() >= limit):
                raise InputError(f"match evidence: {name} index outside 0..{limit - 1}")

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: object) -> core_schema.CoreSchema:
        """In a pydantic record: the text of `encode`."""
        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else cls.decode(value),
            serialization=core_schema.plain_serializer_function_ser_schema(
                cls.encode, return_schema=core_schema.str_schema()
            ),
        )

    @property
    def images(self) -> int:
        """Number of images of the test set, images without boxes included."""
        return int(self.positives.shape[0])

    def take(self, images: Integers) -> MatchEvidence:
        """The evidence of the images at these positions, in that order."""
        new = np.full(self.images, -1)
        new[images] = np.arange(len(images))
        kept = np.flatnonzero((new >= 0)[self.image])
        columns = {name: getattr(self, name)[kept] for name in _FIELDS[1:]}
        columns["image"] = new[columns["image"]].astype(np.int32)
        return MatchEvidence(self.positives[images], **columns)

    def encode(self) -> str:
        """Compressed base64 text for a JSON record."""
        stream = io.BytesIO()
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        np.savez_compressed(stream, **arrays)
        return base64.b64encode(stream.getvalue()).decode("ascii")

    @classmethod
    def decode(cls, text: str) -> MatchEvidence:
        """The inverse of `encode`. Raises InputError for any other text; never unpickles."""
        try:
            with np.load(
                io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False
            ) as z:
                return cls(**{name: z[name] for name in _FIELDS})
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise InputError(f"match evidence cannot be decoded: {error}") from error


def collect_evidence(
    data: EvaluationData,
    class_ids: Sequence[int],
    *,
    iou_type: IouType = "bbox",
    max_dets: int = 500,
    accepted: Bools | None = None,
) -> MatchEvidence:
    """Match detections to ground truth as the evaluator does and keep the flags per image.

    The class axis follows ascending `class_ids`. `accepted` are flags of the rows of
    `data.detections`.
    """
    return evidence_by_area(
        data,
        class_ids,
        [EVERY_AREA],
        iou_type=iou_type,
        max_dets=max_dets,
        accepted=accepted,
    )[0]


def evidence_by_area(
    data: EvaluationData,
    class_ids: Sequence[int],
    areas: Sequence[tuple[float, float]],
    *,
    iou_type: IouType = "bbox",
    max_dets: int = 500,
    accepted: Bools | None = None,
) -> list[MatchEvidence]:
    """As `collect_evidence`, for several ranges of areas, matched at the same time.

    Boxes outside a range are ignored, as in the area ranges of COCO.
    """
    ids = np.unique(np.asarray(class_ids, dtype=np.int64))
    matches = match(data, ids, iou_type, max_dets, areas=np.array(areas, dtype=np.float64))
    truth = data.truth.take(~data.truth.crowd & np.isin(data.truth.label, ids))
    cell = (truth.image, np.searchsorted(ids, truth.label))
    chosen = np.zeros(len(data.detections), dtype=bool) if accepted is None else accepted
    shared: dict[str, Any] = {
        "image": data.detections.image[matches.row].astype(np.int32),
        "label": matches.label.astype(np.int32),
        "score": matches.score.astype(np.float32),
        "accepted": chosen[matches.row],
    }
    bits = 1 << np.arange(len(IOU_THRESHOLDS), dtype=np.uint16)
    found = []
    for number, (low, high) in enumerate(areas):
        positives = np.zeros((len(data.image_ids), len(ids)), dtype=np.int32)
        np.add.at(positives, cell, (truth.area >= low) & (truth.area <= high))
        flags = np.zeros((2, len(matches.row)), dtype=np.uint16)  # zero unless near ground truth
        flags[0, matches.candidate] = matches.matched[:, :, number] @ bits
        outside = ~matches.inside[:, number]  # ignored, unless it is near a box
        flags[1] = np.where(outside, bits.sum(), 0)
        flags[1, matches.candidate] = matches.ignored[:, :, number] @ bits
        found.append(
            MatchEvidence(positives=positives, matched=flags[0], ignored=flags[1], **shared)
        )
    return found
