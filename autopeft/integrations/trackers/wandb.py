"""Weights & Biases: a run for the search and one for each trial, in one group.

Project, entity, mode and folder are those of `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_MODE` and
`WANDB_DIR`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wandb

from autopeft.engine.callback import SearchStart
from autopeft.integrations.trackers.background import TrackerError
from autopeft.integrations.trackers.base import (
    PROJECT,
    Tracker,
    adapters,
    check_answers,
    front_frame,
    result_values,
    search_parameters,
)

if TYPE_CHECKING:
    from autopeft.result import SearchResult


class WandbTracker(Tracker):
    """Its runs have ids of their own, so that a resumed search continues them."""

    name = "wandb"

    def __init__(self) -> None:
        self._settings = wandb.Settings(
            silent=True, console="off", init_timeout=20, finish_timeout=30, x_disable_stats=True
        )
        # Before anything else: the library prints as it starts.
        self._found = wandb.setup(self._settings).settings
        self._runs: dict[int, Any] = {}

    def open(self, search: SearchStart, group: str) -> str:
        """Open the search's run, which tells whether the server takes it."""
        mode = self._found.mode
        if mode == "online":
            check_answers(self._found.base_url)
            if not wandb.login(prompt=False):
                raise TrackerError("no API key; run `wandb login`, or set WANDB_MODE=offline")
        self._group = group
        self._folder = Path(os.environ.get("WANDB_DIR") or search.folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._parent = self._run("search", "search", search_parameters(search))
        return self._parent.url or f"{mode}, {self._folder / 'wandb'}, group {group}"

    def _run(self, part: str, name: str, config: Mapping[str, Any]) -> Any:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=f"{self._search.id}-{part}",
            name=name,
            group=self._group,
            job_type="search" if part == "search" else "trial",
            config=dict(config),
            dir=self._folder,
            resume="allow",
            reinit="create_new",
            settings=self._settings,
        )

    def begin(self, number: int, parameters: Mapping[str, Any]) -> None:
        """Open the trial's run."""
        self._runs[number] = self._run(str(number), f"trial {number}", parameters)

    def log(self, number: int, values: Mapping[str, float], step: int) -> None:
        """Write values of a step."""
        self._runs[number].log(dict(values), step=step)

    def end(self, number: int, state: str, reason: str) -> None:
        """Write how it ended to the summary."""
        run = self._runs.pop(number)
        run.summary.update({"state": state, "reason": reason})
        run.finish(exit_code=int(state == "failed"))

    def conclude(self, result: SearchResult) -> None:
        """Write table, verdict and report, and each adapter as an artifact."""
        run = self._parent
        run.summary.update({"verdict": result.verdict.text, **result_values(result)})
        run.log({"report": wandb.Html(str(result.folder / "report.html"))})
        if (frame := front_frame(result)) is not None:
            run.log({"front": wandb.Table(dataframe=frame)})
        for digest, folder in adapters(result):
            artifact = wandb.Artifact(f"adapter-{digest}", type="model")
            artifact.add_dir(str(folder))
            run.log_artifact(artifact)
        run.finish(exit_code=int(not result.view.is_complete))

    def close(self) -> None:
        """End the library's own process, unless the user has a run open in it."""
        if wandb.run is None:
            wandb.teardown()
