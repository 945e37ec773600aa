"""trials.csv: one row per trial in any state. It reads back as the same trials."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from autopeft.costs import Price
from autopeft.costs.objectives import Objective
from autopeft.errors import StorageError, UserError, printable
from autopeft.plan import Candidate, TrainSettings
from autopeft.plan_text import plan_summary, read_plan
from autopeft.trial import Trial
from autopeft.utils.serialize import from_plain, to_plain
from autopeft.utils.text_files import MAX_JSON_BYTES, Unreadable, long_fields, read_text

_TRAIN = ("learning_rate", *(f.name for f in fields(TrainSettings) if f.name != "learning_rate"))

_PRICE = tuple(f.name for f in fields(Price) if f.name != "others")


_FORMULA = re.compile(r"'*[=+\-@]")
"""Start of a text that a spreadsheet computes: an error's text may be anyone's."""


def _cell(value: object) -> object:
    """What a cell holds: floats to the last digit, nothing for NaN, text on one line.

    Text that a spreadsheet would take for a formula gets an apostrophe before it; numbers stay.
    """
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ""
    if not isinstance(value, str):
        return value
    text = printable(" ".join(value.split()))
    return f"'{text}" if _FORMULA.match(text) else text


def _unquoted(cell: str) -> str:
    """Return the text that `_cell` wrote."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _row(trial: Trial) -> dict[str, object]:
    plan, train = trial.plan, trial.train
    settings = {name: getattr(train, name) for name in _TRAIN}
    costs = to_plain(trial.costs)
    costs |= costs.pop("others")
    settings["method_rates"] = " ".join(f"{m}={r!r}" for m, r in train.method_rates)
    return {
        "number": trial.number,
        "state": trial.state,
        "origin": trial.origin,
        "digest": trial.digest,
        "methods": "+".join(plan.methods),
        "n_layers": len({spec.layer for spec in plan.specs}),
        "n_sites": len(plan.specs),
        "total_rank": sum(spec.rank for spec in plan.specs),
        **settings,
        **{f"objective.{name}": value for name, value in trial.values.items()},
        **{f"price.{name}": value for name, value in costs.items()},
        **{f"measured.{name}": value for name, value in trial.measured.items()},
        **{f"rung.{step}": score for step, score in trial.rungs},
        "plan": plan_summary(plan, max_parts=10**9),
        "reason": trial.reason,
        "audited_at": trial.audited_at or "",
        "broken": " ".join(trial.broken),
    }


def _columns(objectives: Sequence[Objective], rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Every column, in an order that does not depend on the order of the trials."""
    seen = {name for row in rows for name in row}
    first = [f"objective.{o.name}" for o in objectives]
    prices = [f"price.{name}" for name in _PRICE]
    head = ["number", "state", "origin", "digest", "methods", "n_layers", "n_sites", "total_rank"]
    return [
        *head,
        *_TRAIN,
        *first,
        *sorted(n for n in seen if n.startswith("objective.") and n not in first),
        *prices,
        *sorted(n for n in seen if n.startswith("price.") and n not in prices),
        *sorted(n for n in seen if n.startswith("measured.")),
        *sorted((n for n in seen if n.startswith("rung.")), key=lambda n: int(n[5:])),
        "plan",
        "reason",
        "audited_at",
        "broken",
    ]


def trials_csv(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str:
    """Return the text of trials.csv; a cell is empty where a trial lacks the value."""
    rows = [_row(trial) for trial in trials]
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(objectives, rows), restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _read_row(row: Mapping[str, str]) -> Trial:
    if None in row or None in row.values():
        raise ValueError("a row has more or fewer cells than the header")
    row = {name: _unquoted(cell) for name, cell in row.items()}

    def cells(start: str) -> dict[str, str]:
        return {name.removeprefix(start): c for name, c in row.items() if name.startswith(start)}

    # Without a fixed alpha its cell is empty; files of earlier versions have no such column.
    settings: dict[str, Any] = {
        name: row[name] for name in _TRAIN if name != "alpha" or row.get("alpha")
    }
    costs = cells("price.")
    others = {name: float(costs.pop(name)) for name in costs.keys() - set(_PRICE)}
    settings["method_rates"] = [pair.split("=") for pair in row["method_rates"].split()]
    train = from_plain(TrainSettings, settings, from_text=True)
    rungs = ((int(step), score) for step, score in cells("rung.").items() if score)
    trial = {
        **{name: row[name] for name in ("number", "origin", "state", "reason")},
        "candidate": Candidate(read_plan(row["plan"]), train),
        "costs": {**costs, "others": others},
        "values": {name: value for name, value in cells("objective.").items() if value},
        "rungs": sorted(rungs),
        "measured": {name: value for name, value in cells("measured.").items() if value},
        "audited_at": row["audited_at"] or 0,
        # Limits have no spaces here; files of earlier versions have no such column.
        "broken": row.get("broken", "").split(),
    }
    return from_plain(Trial, trial, from_text=True)


def read_trials(path: Path) -> tuple[Trial, ...]:
    """Read the trials of a trials.csv, or raise a StorageError."""
    remedy = "run `autopeft resume` on the folder to write it again"
    try:
        text = read_text(path, max_bytes=MAX_JSON_BYTES)
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if "number" not in (rows.fieldnames or ()):
            raise ValueError("it has no header")
        with long_fields():
            return tuple(_read_row(row) for row in rows)
    except Unreadable as error:
        raise StorageError("trials.csv", str(path), str(error), remedy) from None
    except (csv.Error, ArithmeticError, LookupError, TypeError, ValueError, UserError) as error:
        problem = f"is not a table of trials ({type(error).__name__}: {error})"
        raise StorageError("trials.csv", str(path), problem, remedy) from error
