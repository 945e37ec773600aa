"""report.html: one file that opens offline; the verdict first, details on demand."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from autopeft.confirm.intervals import METHOD
from autopeft.plan import ROLES, AdapterPlan, LayerSpec
from autopeft.plan_text import role_word, unsearched_text
from autopeft.reporting import columns
from autopeft.reporting.front_view import FrontEntry, FrontView
from autopeft.reporting.plots import Plot
from autopeft.trial import Trial
from autopeft.utils.formatting import human_count, human_seconds, human_value


def page(shown: FrontView, trials: Sequence[Trial], plots: Sequence[Plot]) -> str:
    """Return the text of report.html; fronts are embedded as SVG, the other plots as PNG."""
    data = {"labels": ", ".join(shown.data.labels), "fingerprint": shown.data.fingerprint}
    return _report().render(
        shown=shown,
        columns=columns.front_columns(shown),
        versus=columns.VERSUS,
        rows=columns.rows_of(shown),
        fronts=[plot for plot in plots if plot.svg],
        pictures=[plot for plot in plots if not plot.svg],
        reliability=_reliability(shown, trials),
        settings=[(name, _setting(value)) for name, value in shown.settings.items()],
        versions=[*shown.versions.items(), *data.items()],
    )


@cache
def _report() -> Template:
    made = Environment(
        loader=PackageLoader("autopeft.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(
        badges=columns.badges,
        converted_lines=columns.converted_lines,
        facts=columns.facts,
        quality_text=columns.quality_text,
        site_rows=_site_rows,
        split_name=columns.split_name,
        tooltip=_tooltip,
        training_facts=columns.training_facts,
    )
    made.filters.update(
        costs=_costs,
        count=human_count,
        data_uri=_data_uri,
        metrics=columns.metrics_text,
        python=_python,
        seconds=human_seconds,
        shell=shlex.quote,
    )
    return made.get_template("report.html")


def _reliability(shown: FrontView, trials: Sequence[Trial]) -> list[tuple[str, str]]:
    """What the numbers rest on: rows, rungs, pruning, seeds, intervals."""
    steps = sorted({step for trial in trials for step, _ in trial.rungs})
    facts = [
        ("task", shown.data.headline().removeprefix("task ") or shown.task),
        ("data", "; ".join(shown.data.lines())),
        ("rungs", ", ".join(map(str, steps)) + " steps" if steps else "none reached"),
    ]
    if unsearched := unsearched_text(shown.unsearched):
        facts.append(("not searched", unsearched))
    if shown.fidelity is not None:
        facts.append(("pruning", shown.fidelity.text()))
    seeds = sorted({len(entry.seeds) for entry in shown.front if entry.seeds})
    if seeds:
        noun = "seed" if seeds == [1] else "seeds"
        facts.append(("confirmation", f"{'-'.join(map(str, seeds))} {noun} per finalist"))
    return [*facts, ("intervals", METHOD)]


def _costs(entry: FrontEntry, shown: FrontView) -> str:
    costs = ((c, human_value(entry.objectives[c.name], c.unit)) for c in shown.costs)
    return ", ".join(f"{value} {columns.heading(cost.name)}" for cost, value in costs)


def _tooltip(shown: FrontView, entry: FrontEntry) -> str:
    numbers = [f"{o.name}: {columns.with_margin(entry, o)}" for o in shown.objectives]
    return "\n".join([entry.summary, *numbers, entry.digest])


def _site_rows(plan: AdapterPlan, n_layers: int) -> list[tuple[str, list[LayerSpec | None]]]:
    """The rows of a plan's map: a role's word, and the adapter of each layer, if any."""
    found = {(spec.layer, spec.role): spec for spec in plan.specs}
    roles = [role for role in ROLES if role in {spec.role for spec in plan.specs}]
    return [
        (role_word(role), [found.get((layer, role)) for layer in range(n_layers)]) for role in roles
    ]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _python(text: object) -> str:
    """A string literal that is valid Python and takes one line."""
    return json.dumps(str(text), ensure_ascii=False)


def _setting(value: object) -> str:
    """A setting's value for people: text as it is, the rest as JSON."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
