"""What optuna-dashboard shows of a search beyond its own plots: a note, learning curves, the front.

The dashboard hides its plot of intermediate values for studies with several directions, so the
learning curves are put on the study as a plotly graph. Figures are plain data; plotly itself, which
takes a second to import, is not needed to write them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna_dashboard import save_note, save_plotly_graph_object

from autopeft.costs.objectives import Objective
from autopeft.plan_text import write_plan
from autopeft.trial import Trial, front_of

_MOST_CURVES = 150
_COLOURS = {"complete": "#1f6feb", "pruned": "#b0b7c3", "failed": "#d1242f"}
_SHOWN = 30


@dataclass(frozen=True)
class Figure:
    """A plotly figure as plain data; has what `save_plotly_graph_object` asks of one."""

    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Plotly's JSON."""
        return json.dumps({"data": self.data, "layout": self.layout})


class DashboardWriter:
    """Writes notes and graphs to a study, not more often than every so many seconds.

    Args:
        study: Where to write.
        objectives: Quality first.
        seconds: Least time between two writings.
    """

    def __init__(
        self, study: optuna.study.Study, objectives: Sequence[Objective], seconds: float = 20.0
    ) -> None:
        self._study = study
        self._objectives = tuple(objectives)
        self._seconds = seconds
        self._last = float("-inf")

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed."""
        return time.monotonic() - self._last >= self._seconds

    def post(self, trials: Sequence[Trial]) -> None:
        """Write how the search stands."""
        save_note(self._study, note(trials, self._objectives))
        for name, figure in (
            ("learning-curves", learning_curves(trials, self._objectives[0])),
            ("front", front_figure(trials, self._objectives)),
        ):
            # The dashboard's own type is plotly's Figure; it only calls to_json.
            shown: Any = figure
            save_plotly_graph_object(self._study, shown, graph_object_id=name)
        self._last = time.monotonic()


def note(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str:
    """The state in Markdown: how many trials, and the front, cheapest first."""
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("complete", "pruned", "failed"))
    names = [objective.name for objective in objectives]
    lines = [
        f"**autopeft** has told {len(states)} trials: {counts}. The front, cheapest first:",
        "",
        "| trial | " + " | ".join(names) + " | origin | plan |",
        "|---" * (len(names) + 3) + "|",
    ]
    for trial in front_of(trials, objectives)[:_SHOWN]:
        values = " | ".join(f"{trial.values[name]:.6g}" for name in names)
        plan = write_plan(trial.candidate.plan)
        shown = plan if len(plan) <= 100 else plan[:97] + "..."
        lines.append(f"| {trial.number} | {values} | {trial.origin} | `{shown}` |")
    return "\n".join(lines)


def learning_curves(trials: Sequence[Trial], quality: Objective) -> Figure:
    """Score at each rung, a line for each of the latest trials."""
    lines = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [step for step, _ in trial.rungs],
            "y": [score for _, score in trial.rungs],
            "name": f"{trial.number} {'+'.join(trial.candidate.plan.methods) or 'no adapter'}",
            "line": {"color": _COLOURS[trial.state], "width": 1},
            "showlegend": False,
        }
        for trial in trials[-_MOST_CURVES:]
        if trial.rungs
    ]
    title = f"Score at the rungs (follows {quality.name}; gray: pruned)"
    return Figure(lines, {"title": title, "xaxis": {"title": "optimizer steps"}})


def front_figure(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Figure:
    """Quality against the first cost: all complete trials, and the front as a staircase."""
    names = [objective.name for objective in objectives]
    x_name = names[1] if len(names) > 1 else names[0]
    complete = [trial for trial in trials if trial.state == "complete"]
    front = front_of(complete, objectives[:2])
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": label,
            "x": [o.values[x_name] for o in rows],
            "y": [o.values[names[0]] for o in rows],
            "text": [f"trial {o.number}" for o in rows],
            "marker": {"color": color, "symbol": symbol},
        }
        for label, color, symbol, rows in (
            ("LoRA", "#fb8f24", "diamond", [o for o in complete if o.origin == "baseline"]),
            ("others", "#1f6feb", "circle", [o for o in complete if o.origin != "baseline"]),
        )
    ]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "front",
            "x": [o.values[x_name] for o in front],
            "y": [o.values[names[0]] for o in front],
            "line": {"shape": "hv", "color": "#1f6feb"},
        }
    )
    axes = {"xaxis": {"title": x_name, "type": "log"}, "yaxis": {"title": names[0]}}
    return Figure(data, {"title": "Front", **axes})
