"""TensorBoard: a folder for the search and one for each trial.

They are in `OUTPUT/tensorboard`, or in the group's folder below `TENSORBOARD_LOGGING_DIR`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard import summary as summaries

from autopeft.engine.callback import SearchStart
from autopeft.integrations.trackers.base import (
    Tracker,
    adapters,
    front_frame,
    result_values,
    search_parameters,
)
from autopeft.reporting.markup import front_markdown

if TYPE_CHECKING:
    from autopeft.result import SearchResult


class TensorBoardTracker(Tracker):
    """Parameters and final values are in the tab of hyperparameters."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._writers: dict[int, Any] = {}
        self._parameters: dict[int, Mapping[str, Any]] = {}
        self._values: dict[int, Mapping[str, float]] = {}

    def open(self, search: SearchStart, group: str) -> str:
        """Open the search's folder."""
        shared = os.environ.get("TENSORBOARD_LOGGING_DIR")
        self._folder = Path(shared).expanduser() / group if shared else search.folder / self.name
        self._parent = SummaryWriter(str(self._folder / "search"))
        lines = [f"    {name}: {value}" for name, value in search_parameters(search).items()]
        self._parent.add_text("settings", "\n".join(lines))
        return str(self._folder)

    def begin(self, number: int, parameters: Mapping[str, Any]) -> None:
        """Open the trial's folder."""
        self._writers[number] = SummaryWriter(str(self._folder / f"trial-{number:04d}"))
        self._parameters[number] = parameters

    def log(self, number: int, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        self._values[number] = values
        for name, value in values.items():
            self._writers[number].add_scalar(name, value, step)

    def end(self, number: int, state: str, reason: str) -> None:
        """Write parameters, and which of the scalars are results, for the tab."""
        writer, values = self._writers.pop(number), self._values.pop(number, {})
        known = {**self._parameters.pop(number), "state": state}
        results = {name: value for name, value in values.items() if name.startswith("final/")}
        hparams: Any = summaries.hparams
        for summary in hparams(known, results):
            writer.file_writer.add_summary(summary)
        writer.add_text("state", f"{state} {reason}".strip())
        writer.close()

    def conclude(self, result: SearchResult) -> None:
        """Write verdict and front as text, and where the adapters are."""
        writer, step = self._parent, self.n_ended
        writer.add_text("verdict", result.verdict.text, step)
        if front_frame(result) is not None:
            writer.add_text("front", front_markdown(result.view), step)
        for name, value in result_values(result).items():
            writer.add_scalar(name, value, step)
        files = [*(folder for _, folder in adapters(result)), result.folder / "report.html"]
        writer.add_text("files", "\n".join(f"- {path}" for path in files), step)
        writer.close()
