"""A CSV logger whose metrics.csv outlives resumes: rows are appended, columns are united."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from rfdetr.files import atomic_path


class HistoryCSVLogger(CSVLogger):
    """Writes `metrics.csv` and `hparams.yaml` straight into `save_dir`.

    A resumed fit continues the file from its step on. A new fit in a used folder puts the old file
    aside as `metrics_1.csv`, `metrics_2.csv`, ...
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(
            save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps
        )

    @property
    def log_dir(self) -> str:
        return self.root_dir.rstrip("/")

    @property
    def experiment(self) -> Any:
        """The writer on rank 0; elsewhere an object that ignores everything."""
        if _is_rank_zero() and self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = HistoryWriter(self.log_dir)
        return super().experiment

    @rank_zero_only
    def begin_fit(self, resumed: bool, step: int | None) -> None:
        """Continue from optimizer step `step` (None: keep all rows), or start a new file."""
        if not resumed:
            self.experiment.put_aside()
        elif step is not None:
            self.experiment.drop_from(step)


def _is_rank_zero() -> bool:
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


class HistoryWriter(ExperimentWriter):
    """Lightning's writer, without its deletion of an existing file."""

    def _check_log_dir_exists(self) -> None:
        self.metrics_keys = list(self._rows()[0])

    def _rows(self) -> tuple[list[str], list[dict[str, str]]]:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return [], []
        with open(path, newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            return list(reader.fieldnames or []), list(reader)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(fieldnames, self._rows()[1])

    def _write(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        with (
            atomic_path(self.metrics_file_path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)

    def drop_from(self, step: int) -> None:
        """Remove rows that a run logged after the checkpoint it goes on from."""
        columns, rows = self._rows()
        kept = [row for row in rows if int(row["step"] or 0) < step]
        if len(kept) < len(rows):
            self._write(columns, kept)

    def put_aside(self) -> None:
        """Give an existing file another name."""
        path = Path(self.metrics_file_path)
        if path.is_file() and not self.metrics:
            number = 1
            while (aside := path.with_name(f"metrics_{number}.csv")).exists():
                number += 1
            path.rename(aside)
            self.metrics_keys = []
