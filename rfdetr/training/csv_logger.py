"""A CSV logger whose metrics.csv survives resumes: it appends rows and merges columns."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from rfdetr.files import atomic_path
from rfdetr.training.lightning_adapter import CsvWriter


class HistoryCSVLogger(CSVLogger):
    """Writes `metrics.csv` and `hparams.yaml` directly into `save_dir`.

    A resumed fit continues the file at its step. A new fit in a used folder renames the old file to
    `metrics_1.csv`, `metrics_2.csv`, ...
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(
            save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps
        )
        self._writer: HistoryWriter | None = None

    @property
    def log_dir(self) -> str:
        return self.root_dir.rstrip("/")

    @property
    @rank_zero_experiment
    def experiment(self) -> HistoryWriter:
        """The writer on rank 0; on other ranks an object that ignores everything."""
        if self._writer is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._writer = HistoryWriter(self.log_dir)
        return self._writer

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is pending, if this process has logged anything."""
        if self._writer is not None:
            self.save()

    @rank_zero_only
    def begin_fit(self, resumed: bool, step: int | None) -> None:
        """Continue from optimizer step `step` (None: keep all rows), or start a new file."""
        if not resumed:
            self.experiment.set_aside()
        elif step is not None:
            self.experiment.drop_from(step)


class HistoryWriter(CsvWriter):
    """Keeps an existing file where Lightning's writer deletes it."""

    def open_history(self) -> None:
        self.metrics_keys = list(self._rows()[0])

    def rewrite(self, columns: list[str]) -> None:
        self._write(columns, self._rows()[1])

    def drop_from(self, step: int) -> None:
        """Remove the rows that were logged after the checkpoint of a resumed run."""
        columns, rows = self._rows()
        kept = [row for row in rows if int(row["step"] or 0) < step]
        if len(kept) < len(rows):
            self._write(columns, kept)

    def set_aside(self) -> None:
        """Rename an existing file."""
        path = Path(self.metrics_file_path)
        if path.is_file() and not self.metrics:
            number = 1
            while (aside := path.with_name(f"metrics_{number}.csv")).exists():
                number += 1
            path.rename(aside)
            self.metrics_keys = []

    def _rows(self) -> tuple[list[str], list[dict[str, str]]]:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return [], []
        with open(path, newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            return list(reader.fieldnames or []), list(reader)

    def _write(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        with (
            atomic_path(self.metrics_file_path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)
