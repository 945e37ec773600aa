"""Trackio: a run for the search and one for each trial, in one group.

The project is that of `TRACKIO_PROJECT`; `TRACKIO_DIR`, `TRACKIO_SERVER_URL` and
`TRACKIO_SPACE_ID` say where it is.
"""

from __future__ import annotations

import contextvars
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import trackio
import trackio.run
import trackio.utils

from autopeft.engine.callback import SearchStart
from autopeft.integrations.trackers.base import (
    PROJECT,
    Tracker,
    adapters,
    check_answers,
    front_frame,
    result_values,
    search_parameters,
)
from autopeft.reporting.markup import front_markdown

if TYPE_CHECKING:
    from autopeft.result import SearchResult

_PRINTING = (trackio, trackio.run, trackio.utils)
"""Modules that print what they do; there is no switch."""


class TrackioTracker(Tracker):
    """Trackio has no states of runs, so how a trial ended is among its last values."""

    name = "trackio"

    def __init__(self) -> None:
        self._runs: dict[int, Any] = {}
        for module in _PRINTING:
            vars(module)["print"] = _nothing
        warnings.filterwarnings("ignore", module=r"trackio\b")

    def open(self, search: SearchStart, group: str) -> str:
        """Open the search's run."""
        self._project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self._group = group
        server, space = os.environ.get("TRACKIO_SERVER_URL"), os.environ.get("TRACKIO_SPACE_ID")
        if server and not space:
            check_answers(server)
        self._parent = self._run("search", search_parameters(search))
        place = space or (server or "").partition("?")[0] or trackio.utils.TRACKIO_DIR
        return f"{place}, project {self._project}, group {group}"

    def _run(self, name: str, config: Mapping[str, Any]) -> Any:
        # Within a context of its own, a new run does not end another one.
        return contextvars.Context().run(
            trackio.init,
            self._project,
            name=f"{self._group} {name}",
            group=self._group,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def begin(self, number: int, parameters: Mapping[str, Any]) -> None:
        """Open the trial's run."""
        self._runs[number] = self._run(f"trial {number}", parameters)

    def log(self, number: int, values: Mapping[str, float], step: int) -> None:
        """Write values of a step."""
        self._runs[number].log(dict(values), step=step)

    def end(self, number: int, state: str, reason: str) -> None:
        """Write how it ended."""
        run = self._runs.pop(number)
        run.log({"state": state, **({"reason": reason} if reason else {})})
        run.finish()

    def conclude(self, result: SearchResult) -> None:
        """Write table, verdict, report and adapters to the search's run."""
        run = self._parent
        said = {"verdict": result.verdict.text, **result_values(result)}
        if (frame := front_frame(result)) is not None:
            said["front"] = trackio.Table(dataframe=frame)
            said["summary"] = trackio.Markdown(front_markdown(result.view))
        run.log(said, step=self.n_ended)
        run.log_artifact(result.folder / "report.html", name=f"report-{self._search.id}")
        for digest, folder in adapters(result):
            run.log_artifact(folder, name=f"adapter-{digest}", type="model")
        run.finish()

    def close(self) -> None:
        """Let the library print again."""
        for module in _PRINTING:
            vars(module).pop("print", None)


def _nothing(*_arguments: Any, **_keywords: Any) -> None:
    """Stand in for print."""
