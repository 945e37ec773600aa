"""The columns of a front's table, and the facts of one entry.

The terminal, the page and the model card all use them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from autopeft.costs.objectives import COSTS, Objective, objective, quality_beside
from autopeft.reporting.front_view import FrontEntry, FrontView
from autopeft.utils.formatting import human_value

Kind = Literal["number", "text", "adapter", "digest"]

_NAMES: Mapping[str, tuple[str, str]] = {
    "forgetting": ("forgetting", "forgetting: the loss on the retained text over the bare base's")
}


@dataclass(frozen=True)
class Column:
    """One column of a front's table: a cell shows `text` and is sorted by `value`.

    Where there is no room, columns that are no objectives go first.
    """

    heading: str
    text: Callable[[FrontEntry], str]
    value: Callable[[FrontEntry], float | str]
    kind: Kind = "text"
    is_objective: bool = False


def heading(name: str) -> str:
    """Return an objective's short name, for a column."""
    cost = COSTS[name] if name in COSTS.registered else None
    return (cost.heading if cost is not None else "") or _NAMES.get(name, (name, name))[0]


def full_name(name: str, settings: Mapping[str, object] | None = None) -> str:
    """Return an objective's name in full, for an axis or a fact.

    Args:
        name: Of the objective.
        settings: Of the search; how a cost is measured names some of them.
    """
    cost = COSTS[name] if name in COSTS.registered else None
    if cost is None or not cost.description:
        return _NAMES.get(name, (name, name))[1]
    return cost.description.format_map(_Known(settings or {}))


class _Known(dict[str, object]):
    """Settings, of which an earlier version may have lacked some."""

    def __missing__(self, name: str) -> str:
        return "?"


def split_name(shown: FrontView, is_confirmed: bool) -> str:
    """Return the split that a number comes from."""
    return "test" if is_confirmed and shown.is_held_out else "validation"


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Return metrics by name, such as "accuracy 0.8100, loss 0.4210"."""
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))


def with_margin(entry: FrontEntry, objective: Objective) -> str:
    """Return a value and half the width of its interval, such as 0.823 ±0.011."""
    value = human_value(entry.objectives[objective.name], objective.unit)
    interval = entry.objectives_ci.get(objective.name)
    if interval is None or objective.is_known:
        return value
    half = (interval[1] - interval[0]) / 2
    return f"{value} ±{human_value(half, objective.unit)}"


def quality_text(shown: FrontView, entry: FrontEntry) -> str:
    """Return the quality, marked where it is a validation number among test numbers."""
    text = with_margin(entry, shown.quality)
    return f"{text} (val)" if shown.is_confirmed and not entry.is_confirmed else text


def badges(shown: FrontView, entry: FrontEntry) -> list[str]:
    """Return what an entry is besides a candidate: "the pick", "tuned LoRA", both or neither."""
    tuned = shown.baseline.digest if shown.baseline is not None else None
    marks = (("the pick", shown.best), ("tuned LoRA", tuned))
    return [name for name, digest in marks if entry.digest == digest]


def rows_of(shown: FrontView) -> list[FrontEntry]:
    """Return the rows of a front's table: the front, the tuned LoRA and the reference."""
    rows = list(shown.front)
    for entry in (shown.baseline, shown.reference):
        if entry is not None and entry.digest not in {row.digest for row in rows}:
            rows.append(entry)
    return sorted(rows, key=lambda e: [e.objectives[o.name] for o in shown.costs[:1]])


AS_EXPORTED = "as exported"
"""Name of the facts that tell what exports of an entry scored."""

VERSUS = (
    "vs LoRA: against the best LoRA that costs no more, or the tuned one if all cost more; "
    "ties: no difference shown"
)


def front_columns(shown: FrontView) -> list[Column]:
    """Return the columns of a front's table.

    Number, digest, costs, quality, learning rate, comparison with the tuned LoRA, adapter.
    """
    numbers = {entry.digest: number for number, entry in enumerate(shown.front, start=1)}
    levels = {level.digest: level for level in shown.verdict.levels}
    tuned = shown.baseline.digest if shown.baseline is not None else None

    def versus(entry: FrontEntry) -> str:
        if entry.digest == tuned:
            return "is LoRA"
        level = levels.get(entry.digest)
        return "" if level is None else f"{level.result} {level.gain:+.3f}"

    def gain(entry: FrontEntry) -> float | str:
        return levels[entry.digest].gain if entry.digest in levels else ""

    def cost_column(cost: Objective) -> Column:
        def text(entry: FrontEntry) -> str:
            return with_margin(entry, cost)

        return Column(heading(cost.name), text, lambda e: e.objectives[cost.name], "number", True)

    return [
        Column(
            "#", lambda e: str(numbers.get(e.digest, "-")), lambda e: numbers.get(e.digest, 1e9)
        ),
        Column("digest", lambda e: e.digest, lambda e: e.digest, "digest"),
        *map(cost_column, shown.costs),
        Column(
            shown.quality.name,
            lambda e: quality_text(shown, e),
            lambda e: e.objectives[shown.quality.name],
            is_objective=True,
        ),
        Column(
            "rate",
            lambda e: f"{e.candidate.train.learning_rate:.2g}",
            lambda e: e.candidate.train.learning_rate,
            "number",
        ),
        *([Column("vs LoRA", versus, gain)] if levels else []),
        Column("adapter", lambda e: e.summary, lambda e: e.summary, "adapter"),
    ]


def facts(shown: FrontView, entry: FrontEntry) -> list[tuple[str, str]]:
    """Return what is known of an entry, by name: objectives, other costs, comparison, origin."""
    rows = [
        (
            f"{shown.quality.name} ({split_name(shown, entry.is_confirmed)})",
            _long(entry, shown.quality),
        )
    ]
    rows += [(full_name(cost.name, shown.settings), _long(entry, cost)) for cost in shown.costs]
    names = {cost.name for cost in shown.costs}
    others = [COSTS[name] for name in (*COSTS.registered, *entry.price.others) if name in COSTS]
    rows += [
        (full_name(cost.name, shown.settings), _exact(entry.price.value(cost.name), cost))
        for cost in dict.fromkeys(others)
        if cost.is_known
        and cost.name not in names
        and (cost.function is None or cost.name in entry.price.others)
    ]
    rows += [
        (full_name(name, shown.settings), human_value(value, objective(name).unit))
        for name, value in entry.further.items()
        if name not in names and (quality_beside(name) is not None or name in COSTS.registered)
    ]
    if entry.broken:
        rows.append(("breaks", ", ".join(entry.broken)))
    level = next((level for level in shown.verdict.levels if level.digest == entry.digest), None)
    if level is not None:
        low, high = level.gain_ci
        gain = f"{level.gain:+.4f} (corrected 95 % interval {low:+.4f} to {high:+.4f})"
        text = f"{level.result}: {gain} at {level.cost_ratio:.3g} times its cost"
        tuned = shown.baseline.digest if shown.baseline is not None else ""
        name = "the tuned LoRA" if level.against in ("", tuned) else f"LoRA {level.against[:8]}"
        rows.append((f"against {name}", text))
    if entry.adapter_score is not None:
        score = entry.adapter_score
        text = f"{metrics_text(score.metrics)} on {score.n_rows} {score.split} rows"
        rows.append((f"saved weights (seed {score.seed})", text))
    rows += [(AS_EXPORTED, line) for line in converted_lines(shown, entry.digest)]
    trial = "" if entry.trial is None else f"trial {entry.trial}, "
    return [*rows, ("origin", f"{trial}{entry.origin}")]


def converted_lines(shown: FrontView, digest: str | None = None) -> list[str]:
    """Return the test quality of members in the form of an export, one line each.

    Where it is of other weights than those saved now, the line says that alone.

    Args:
        shown: The search.
        digest: Of one member; None for all, each line with its digest.
    """
    lines = [(each, each.line(shown.quality)) for each in shown.converted]
    lines += [(each, each.outdated) for each in shown.outdated]
    return [
        line if digest else f"{each.digest[:8]}: {line}"
        for each, line in lines
        if digest in (None, each.digest)
    ]


def training_facts(entry: FrontEntry) -> list[tuple[str, str]]:
    """Return how an entry was trained: its train settings, by name."""
    settings = entry.candidate.train.to_json()
    rates = settings.pop("method_rates")
    if "alpha" in settings:
        # It scales what has a rank; alpha / rank scales the rest alone.
        settings["alpha_ratio (of methods without alpha)"] = settings.pop("alpha_ratio")
    rows = [(name, f"{value}") for name, value in settings.items()]
    return [*rows, *((f"learning_rate ({method})", f"{rate}") for method, rate in rates.items())]


def _exact(value: float, objective: Objective) -> str:
    return f"{human_value(value, objective.unit)} ({value:,.0f})"


def _long(entry: FrontEntry, objective: Objective) -> str:
    """A value in full: every digit of a known cost, else the interval."""
    value = entry.objectives[objective.name]
    interval = entry.objectives_ci.get(objective.name)
    if objective.is_known:
        return _exact(value, objective)
    if interval is None:
        return human_value(value, objective.unit)
    low, high = (human_value(end, objective.unit) for end in interval)
    return f"{human_value(value, objective.unit)} (95 % interval {low} to {high})"
