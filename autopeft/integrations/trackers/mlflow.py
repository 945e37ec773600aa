"""MLflow: a parent run for the search, a nested run for each trial.

The server or folder is that of `MLFLOW_TRACKING_URI`, the experiment that of
`MLFLOW_EXPERIMENT_NAME`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from mlflow.utils.time import get_current_time_millis

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
from autopeft.utils.quiet import silence

if TYPE_CHECKING:
    from autopeft.result import SearchResult

_SEARCH, _TRIAL = "autopeft.search", "autopeft.trial"
"""Tags by which a resumed search finds its runs."""

_STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Unless the user says otherwise: the library's own defaults add up to a quarter of an hour."""


class MlflowTracker(Tracker):
    """Writes with a client of its own, so that the user's active run is left alone."""

    name = "mlflow"

    def __init__(self) -> None:
        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            silence(name, logging.ERROR)
        self._impatient = {k: v for k, v in _PATIENCE.items() if k not in os.environ}
        os.environ.update(self._impatient)
        self._client = mlflow.MlflowClient()
        self._runs: dict[int, str] = {}

    def open(self, search: SearchStart, group: str) -> str:
        """Find or create the experiment and the parent run."""
        uri = self._client.tracking_uri
        if uri.startswith("http"):
            check_answers(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        self._experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._id = search.id
        self._parent = self._find("search") or self._create(
            "search", group, search_parameters(search)
        )
        self._client.update_run(self._parent, status="RUNNING")
        if uri.startswith("http"):
            return f"{uri}/#/experiments/{self._experiment}/runs/{self._parent}"
        return f"{uri}, experiment {name}, run {group}"

    def begin(self, number: int, parameters: Mapping[str, Any]) -> None:
        """Create the nested run, or find that of an interrupted trial."""
        found = self._find(str(number)) if self._search.is_resumed else None
        self._runs[number] = found or self._create(str(number), f"trial {number}", parameters)

    def _find(self, part: str) -> str | None:
        query = f"tags.`{_SEARCH}` = '{self._id}' and tags.`{_TRIAL}` = '{part}'"
        runs = self._client.search_runs([self._experiment], query, max_results=1)
        return runs[0].info.run_id if runs else None

    def _create(self, part: str, name: str, parameters: Mapping[str, Any]) -> str:
        tags = {_SEARCH: self._id, _TRIAL: part}
        if part != "search":
            tags[MLFLOW_PARENT_RUN_ID] = self._parent
        run = self._client.create_run(self._experiment, tags=resolve_tags(tags), run_name=name)
        run_id: str = run.info.run_id
        params = [Param(key, _text(value)) for key, value in parameters.items()]
        self._client.log_batch(run_id, params=params)
        return run_id

    def log(self, number: int, values: Mapping[str, float], step: int) -> None:
        """Write metrics."""
        self._log(self._runs[number], values, step)

    def _log(self, run: str, values: Mapping[str, float], step: int) -> None:
        now = get_current_time_millis()
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(run, metrics=metrics)

    def end(self, number: int, state: str, reason: str) -> None:
        """Set state and reason as tags, and the status that goes with them."""
        run = self._runs.pop(number)
        tags = [RunTag("state", state), *([RunTag("reason", reason)] if reason else [])]
        self._client.log_batch(run, tags=tags)
        self._client.set_terminated(run, _STATUS[state])

    def conclude(self, result: SearchResult) -> None:
        """Write table, verdict, report and adapters to the parent run."""
        run = self._parent
        self._client.set_tag(run, "verdict", result.verdict.text)
        if (frame := front_frame(result)) is not None:
            self._client.set_tag(run, MLFLOW_RUN_NOTE, front_markdown(result.view))
            self._client.log_dict(run, json.loads(frame.to_json(orient="split")), "front.json")
        self._log(run, result_values(result), self.n_ended)
        for name in ("report.html", "settings.yaml"):
            self._client.log_artifact(run, str(result.folder / name))
        for digest, folder in adapters(result):
            self._client.log_artifacts(run, str(folder), f"adapters/{digest}")
        self._client.set_terminated(run, "FINISHED" if result.view.is_complete else "KILLED")

    def close(self) -> None:
        """Let the library wait again as it likes."""
        for name in self._impatient:
            os.environ.pop(name, None)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:6000]
