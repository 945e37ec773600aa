"""trials.csv: one row a trial, whatever its state; and what the plots need of it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from autopeft.costs import Price
from autopeft.errors import StorageError
from autopeft.plan import TrainSettings
from autopeft.plan_text import plan_summary
from autopeft.reporting.record import RunRecord
from autopeft.trial import Trial
from autopeft.utils.files import write_text


@dataclass(frozen=True)
class TrialLine:
    """What the plots know of a trial: it can be had from a record or from trials.csv.

    Attributes:
        number: The trial's number in the study.
        state: "complete", "pruned" or "failed".
        origin: Where the candidate came from.
        digest: The candidate's identity.
        n_sites: Adapted sites; 0 for the reference.
        values: Value by objective name, as found on the validation split.
        rungs: Pairs (step, score).
    """

    number: int
    state: str
    origin: str
    digest: str
    n_sites: int
    values: Mapping[str, float]
    rungs: tuple[tuple[int, float], ...] = ()


_TRAIN = ("learning_rate", *(f.name for f in fields(TrainSettings) if f.name != "learning_rate"))


def _cell(value: object) -> object:
    """What a spreadsheet reads back as the same number; empty for NaN; text on one line."""
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ""
    return " ".join(value.split()) if isinstance(value, str) else value


def _row(trial: Trial) -> dict[str, object]:
    plan, train = trial.candidate.plan, trial.candidate.train
    settings = {name: getattr(train, name) for name in _TRAIN}
    settings["method_rates"] = " ".join(f"{m}={r!r}" for m, r in train.method_rates)
    return {
        "number": trial.number,
        "state": trial.state,
        "origin": trial.origin,
        "digest": trial.candidate.digest,
        "methods": "+".join(plan.methods),
        "n_layers": len({spec.layer for spec in plan.specs}),
        "n_sites": len(plan.specs),
        "total_rank": sum(spec.rank for spec in plan.specs),
        **settings,
        **{f"objective.{name}": value for name, value in trial.values.items()},
        **{f"price.{name}": value for name, value in trial.costs.to_json().items()},
        **{f"measured.{name}": value for name, value in trial.measured.items()},
        **{f"rung.{step}": score for step, score in trial.rungs},
        "plan": plan_summary(plan, max_parts=10**9),
        "reason": trial.reason,
        "audited_at": trial.audited_at or "",
    }


def _columns(record: RunRecord, rows: list[dict[str, object]]) -> list[str]:
    """Every column, in an order that depends on the run's settings and not on the trials' order."""
    seen = {name for row in rows for name in row}
    objectives = [f"objective.{o.name}" for o in record.objectives]
    extra = sorted(n for n in seen if n.startswith("objective.") and n not in objectives)
    rungs = sorted((n for n in seen if n.startswith("rung.")), key=lambda n: int(n[5:]))
    head = ["number", "state", "origin", "digest", "methods", "n_layers", "n_sites", "total_rank"]
    return [
        *head,
        *_TRAIN,
        *objectives,
        *extra,
        *(f"price.{f.name}" for f in fields(Price)),
        *sorted(n for n in seen if n.startswith("measured.")),
        *rungs,
        "plan",
        "reason",
        "audited_at",
    ]


def trials_csv(record: RunRecord) -> str:
    """The text of trials.csv; a cell is empty where a trial has no such value."""
    rows = [_row(trial) for trial in record.trials]
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(record, rows), restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def write_trials(record: RunRecord, path: Path) -> None:
    """Writes trials.csv in one step.

    Raises:
        OSError: if the folder cannot be written.
    """
    write_text(path, trials_csv(record))


def _values(record: RunRecord, trial: Trial) -> dict[str, float]:
    """A trial's objectives; a complete one has all of them, NaN for what it lacks."""
    if trial.state != "complete":
        return dict(trial.values)
    missing = {objective.name: math.nan for objective in record.objectives}
    return missing | dict(trial.values)


def trial_lines(record: RunRecord) -> tuple[TrialLine, ...]:
    """The trials of a record, as the plots take them."""
    return tuple(
        TrialLine(
            o.number,
            o.state,
            o.origin,
            o.candidate.digest,
            len(o.candidate.plan.specs),
            _values(record, o),
            o.rungs,
        )
        for o in record.trials
    )


def _read_line(row: Mapping[str, str]) -> TrialLine:
    def numbers(prefix: str) -> dict[str, float]:
        cells = {n.removeprefix(prefix): cell for n, cell in row.items() if n.startswith(prefix)}
        return {name: float(cell) for name, cell in cells.items() if cell}

    objectives = numbers("objective.")
    if row["state"] == "complete":  # an empty cell of a complete trial was no finite number
        names = [name.removeprefix("objective.") for name in row if name.startswith("objective.")]
        objectives = {name: objectives.get(name, math.nan) for name in names}
    return TrialLine(
        int(row["number"]),
        row["state"],
        row["origin"],
        row["digest"],
        int(row["n_sites"]),
        objectives,
        tuple(sorted((int(step), score) for step, score in numbers("rung.").items())),
    )


def read_trials(path: Path) -> tuple[TrialLine, ...]:
    """The trials of a trials.csv.

    Raises:
        StorageError: if the file is missing or no trials.csv.
    """
    remedy = "run `autopeft resume` on the folder to have it written anew"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return tuple(_read_line(row) for row in csv.DictReader(file))
    except OSError as error:
        raise StorageError("trials.csv", str(path), f"cannot be read ({error})", remedy) from error
    except (KeyError, TypeError, ValueError) as error:
        problem = f"is not a table of trials ({type(error).__name__}: {error})"
        raise StorageError("trials.csv", str(path), problem, remedy) from error
