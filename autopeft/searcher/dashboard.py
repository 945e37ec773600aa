"""Notes and learning curves for optuna-dashboard, beside the dashboard's own plots.

The dashboard plots no intermediate values of studies with several objectives, so the learning
curves are saved to the study as a plotly figure. The figure is plain data: plotly is not needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna_dashboard import get_note, save_note, save_plotly_graph_object

from autopeft.costs.objectives import Objective
from autopeft.plan_text import plan_summary
from autopeft.trial import Trial, front_of
from autopeft.utils.formatting import counted, markdown_text

_MOST_CURVES = 150
_COLORS = {"complete": "#1f6feb", "pruned": "#b0b7c3", "failed": "#d1242f"}
_MOST_MEMBERS = 30


@dataclass(frozen=True)
class Figure:
    """A plotly figure as plain data; `save_plotly_graph_object` calls nothing but `to_json`."""

    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the figure as plotly's JSON."""
        return json.dumps({"data": self.data, "layout": self.layout})


class DashboardWriter:
    """Write a note and learning curves to a study, at most once per interval.

    With many trials it takes a while; the interval is then so long that it takes 1 % of the time.

    Args:
        study: The study that the dashboard shows.
        objectives: Quality first.
        seconds: Interval between two writes.
    """

    def __init__(
        self, study: optuna.study.Study, objectives: Sequence[Objective], seconds: float = 20.0
    ) -> None:
        self._study = study
        self._objectives = tuple(objectives)
        self._seconds = seconds
        self._next = float("-inf")

    @property
    def is_due(self) -> bool:
        """Whether the interval has passed."""
        return time.monotonic() >= self._next

    def post(self, trials: Sequence[Trial]) -> None:
        """Write the state of the search."""
        began = time.monotonic()
        save_note(self._study, note(trials, self._objectives))
        curves: Any = learning_curves(trials, self._objectives[0])
        save_plotly_graph_object(self._study, curves, graph_object_id="learning-curves")
        now = time.monotonic()
        self._next = now + max(self._seconds, 100.0 * (now - began))


@dataclass(frozen=True)
class _WriteOnly:
    """A study's attributes, none of them read: all notes of all trials are among them."""

    storage: BaseStorage

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write one attribute."""
        self.storage.set_study_system_attr(study_id, key, value)


def save_trial_note(study: optuna.study.Study, trial_id: int, text: str) -> None:
    """Write the first note of a trial."""
    # Not an `optuna.Trial`: that would ask the sampler for a proposal.
    storage = _WriteOnly(study._storage)
    trial: Any = SimpleNamespace(storage=storage, study=study, _trial_id=trial_id)
    save_note(trial, text)


def conclude(study: optuna.study.Study, text: str) -> None:
    """Put what is known at the end above the state of the search, in the study's note."""
    before = get_note(study)
    save_note(study, f"{text}\n\n## The search, on validation numbers of one seed\n\n{before}")


def note(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str:
    """Return the state in Markdown: number of trials, and the front, cheapest first."""
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("complete", "pruned", "failed"))
    names = [objective.name for objective in objectives]
    head = f"**autopeft**: {counted(len(states), 'trial')}: {counts}."
    if not (members := front_of(trials, objectives)):
        return head
    lines = [
        f"{head} The front, cheapest first:",
        "",
        "| trial | digest | " + " | ".join(map(markdown_text, names)) + " | origin | adapter |",
        "|---" * (len(names) + 4) + "|",
    ]
    for trial in members[:_MOST_MEMBERS]:
        values = " | ".join(f"{trial.values[name]:.6g}" for name in names)
        start = f"| {trial.number} | {trial.digest[:8]} | {values}"
        lines.append(f"{start} | {trial.origin} | {plan_summary(trial.plan)} |")
    return "\n".join(lines)


def learning_curves(trials: Sequence[Trial], quality: Objective) -> Figure:
    """Return the scores at the rungs, one line for each of the latest trials."""
    lines = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [step for step, _ in trial.rungs],
            "y": [score for _, score in trial.rungs],
            "name": f"{trial.number} {'+'.join(trial.candidate.plan.methods) or 'no adapter'}",
            "line": {"color": _COLORS[trial.state], "width": 1},
            "showlegend": False,
        }
        for trial in trials[-_MOST_CURVES:]
        if trial.rungs
    ]
    title = f"Score at the rungs (follows {quality.name}; gray: pruned)"
    axes = {"xaxis": {"title": "optimizer steps"}, "yaxis": {"title": "score"}}
    return Figure(lines, {"title": title, **axes})
