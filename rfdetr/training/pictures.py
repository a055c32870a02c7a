"""Draws the pictures of an evaluation beside the training loop."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from pytorch_lightning.loggers import Logger

from rfdetr.evaluation.box_table import EvaluationData
from rfdetr.evaluation.evaluator import EvaluationResult
from rfdetr.evaluation.plots import Sample
from rfdetr.training.sample_images import send_plots


class Pictures:
    """Draws in a thread; `finish` waits for it and sends the files to the loggers.

    Loggers are used in the thread of the caller only. A folder that cannot be written is a warning.
    Copies and pickles as an idle one.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._files: dict[str, Path] = {}
        self._error: OSError | None = None
        self._target: tuple[list[Logger], Path, int] = ([], Path(), 0)

    def draw(
        self,
        evaluation: tuple[EvaluationResult, EvaluationData],
        names: Sequence[str],
        samples: Sequence[Sample],
        folder: Path,
        *,
        loggers: Iterable[Logger],
        step: int,
    ) -> None:
        """Start drawing into `folder`, whose name is the prefix of the pictures for the loggers."""
        self.finish()
        self._target = list(loggers), folder, step
        arguments = (evaluation, list(names), list(samples), folder)
        self._thread = threading.Thread(target=self._work, args=arguments, name="pictures")
        self._thread.start()

    def _work(
        self,
        evaluation: tuple[EvaluationResult, EvaluationData],
        names: list[str],
        samples: list[Sample],
        folder: Path,
    ) -> None:
        from rfdetr.evaluation.plots import draw_evaluation

        try:
            self._files = draw_evaluation(*evaluation, names, samples, folder)
        except OSError as error:
            self._error = error

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the pictures, and send them.

        After `timeout` seconds they are left to the thread, which draws on, and are not sent.
        """
        if self._thread is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.__init__()  # type: ignore[misc]
            return
        loggers, folder, step = self._target
        files, error = self._files, self._error
        self.__init__()  # type: ignore[misc]
        if error is not None:
            warnings.warn(f"Cannot write plots to {folder}: {error}", UserWarning, stacklevel=2)
        send_plots(loggers, files, folder.name, step)

    def __reduce__(self) -> tuple[type[Pictures], tuple[()]]:
        return type(self), ()
