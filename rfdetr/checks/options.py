"""Thresholds, severities and silenced codes of the dataset checks."""

from __future__ import annotations

import difflib
from typing import Self

from pydantic import Field, model_validator

from rfdetr.checks.codes import CODES, Severity
from rfdetr.config import StrictConfig
from rfdetr.data.decode import MAX_PIXELS


class CheckConfig(StrictConfig):
    """What counts as a finding. Unknown fields and unknown codes are errors that name them.

    `check_images=False` reads annotation files only. At most `max_findings_per_code` findings of a
    code are listed; all are counted. Tolerances in pixels refer to the original image.
    """

    silence: list[str] = Field(default_factory=list, description="Codes of findings to leave out")
    severity: dict[str, Severity] = Field(
        default_factory=dict, description="Severity for a code: error, warning or info"
    )
    max_findings_per_code: int = Field(default=1000, ge=1, description="Findings listed per code")

    check_images: bool = Field(default=True, description="Open and decode the images")
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=MAX_PIXELS,
        description="Largest image in pixels, at most what training reads",
    )
    near_duplicate_bits: int = Field(default=7, ge=0, le=7, description="Hash bits that may differ")
    near_duplicate_correlation: float = Field(
        default=0.97, ge=-1, le=1, description="Least correlation of near-duplicates"
    )

    outside_tolerance: float = Field(
        default=1.0, ge=0, description="Accepted pixels outside the image"
    )
    min_box_side: float = Field(default=1e-6, ge=0, description="Smallest side in pixels")
    max_aspect: float = Field(default=20.0, gt=1, description="Largest aspect ratio of a box")
    near_duplicate_iou: float = Field(
        default=0.95, gt=0, le=1, description="Least IoU of duplicate boxes"
    )
    area_tolerance: float = Field(default=0.05, ge=0, description="Relative error of stated areas")
    min_mask_fill: float = Field(
        default=0.001, ge=0, le=1, description="Least share of its box a mask fills"
    )

    max_imbalance: float = Field(default=100.0, gt=1, description="Largest ratio of class counts")
    max_empty_share: float = Field(
        default=0.5, ge=0, le=1, description="Largest share of empty images"
    )
    min_valid_share: float = Field(default=0.01, ge=0, le=1, description="Smallest valid / train")
    max_crowd_share: float = Field(
        default=0.5, ge=0, le=1, description="Largest share of crowd regions"
    )
    max_valid_share: float = Field(default=0.6, ge=0, le=1, description="Largest valid / train")
    max_leak_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of a split from which on images of another split in it are an error",
    )
    max_class_shift: float = Field(
        default=0.05, ge=0, le=1, description="Largest shift of a class's share"
    )

    @model_validator(mode="after")
    def _codes_exist(self) -> Self:
        unknown = [code for code in (*self.silence, *self.severity) if code not in CODES]
        if unknown:
            hints = []
            for code in unknown:
                near = difflib.get_close_matches(code, CODES, n=1)
                hints.append(f"'{code}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
            raise ValueError(
                f"unknown finding code {', '.join(hints)}. `--list-codes` prints every code."
            )
        return self

    def severity_of(self, code: str, otherwise: Severity | None = None) -> Severity:
        """The severity of a code: as configured, else `otherwise`, else its default."""
        return self.severity.get(code, otherwise or CODES[code].severity)
