"""front.json: the contract other programs rely on. Written and read here, schema 1."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopeft.confirm.intervals import METHOD
from autopeft.confirm.pruning_audit import Fidelity
from autopeft.confirm.verdict import LevelVerdict, Verdict
from autopeft.costs import Price
from autopeft.costs.objectives import COSTS, Objective
from autopeft.errors import StorageError
from autopeft.plan import Candidate
from autopeft.reporting.front_view import FrontEntry, FrontView, SeedLine
from autopeft.reporting.record import AdapterScore, BudgetReport, DataSummary
from autopeft.utils.files import write_text
from autopeft.utils.serialize import finite, strict_json

SCHEMA = 1


def _entry_json(entry: FrontEntry) -> dict[str, Any]:
    return {
        "digest": entry.digest,
        **entry.candidate.to_json(),
        "summary": entry.summary,
        "objectives": dict(entry.objectives),
        "objectives_ci": {k: v and list(v) for k, v in entry.objectives_ci.items()},
        "validation": dict(entry.validation),
        "seeds": [
            {"seed": s.seed, "validation": dict(s.validation), "test": dict(s.test)}
            for s in entry.seeds
        ],
        "adapter": entry.adapter,
        "adapter_score": entry.adapter_score and entry.adapter_score.to_json(),
        "origin": entry.origin,
        "trial": entry.trial,
        "confirmed": entry.is_confirmed,
        "compressed_from": entry.compressed_from,
        "dominated_by": entry.dominated_by,
        "price": entry.price.to_json(),
    }


def front_to_json(shown: FrontView) -> dict[str, Any]:
    """The content of front.json; NaN and infinity become null."""
    content = {
        "schema": SCHEMA,
        "objectives": [o.to_json() for o in shown.objectives],
        "confirmed": shown.is_confirmed,
        "complete": shown.is_complete,
        "front": [_entry_json(entry) for entry in shown.front],
        "best": shown.best,
        "baseline": shown.baseline and _entry_json(shown.baseline),
        "reference": shown.reference and _entry_json(shown.reference),
        "verdict": shown.verdict.to_json(),
        "budget": shown.budget.to_json(),
        "trials": dict(shown.trials),
        "dominated_finalists": [_entry_json(entry) for entry in shown.dominated_finalists],
        "unconfirmed": [_entry_json(entry) for entry in shown.unconfirmed],
        "fidelity": shown.fidelity and shown.fidelity.to_json(),
        "intervals": METHOD,
        "model": shown.model,
        "task": shown.task,
        "settings": dict(shown.settings),
        "n_layers": shown.n_layers,
        "data": shown.data.to_json(),
        "versions": dict(shown.versions),
        "warnings": list(shown.warnings),
        "started": shown.started,
        "ended": shown.ended,
    }
    clean: dict[str, Any] = finite(content)
    return clean


def write_front(shown: FrontView, path: Path) -> None:
    """Writes front.json in one step.

    Raises:
        OSError: if the folder cannot be written.
    """
    write_text(path, strict_json(front_to_json(shown)))


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Values by name; null, which stands for a number that is not finite, becomes NaN."""
    return {name: math.nan if value is None else value for name, value in row.items()}


def _read_entry(row: Mapping[str, Any]) -> FrontEntry:
    score = row["adapter_score"]
    return FrontEntry(
        candidate=Candidate.from_json(row),
        price=Price(**row["price"]),
        objectives=_numbers(row["objectives"]),
        objectives_ci={
            name: None if pair is None else (pair[0], pair[1])
            for name, pair in row["objectives_ci"].items()
        },
        validation=_numbers(row["validation"]),
        seeds=tuple(
            SeedLine(s["seed"], _numbers(s["validation"]), _numbers(s["test"]))
            for s in row["seeds"]
        ),
        adapter=row["adapter"],
        adapter_score=None if score is None else AdapterScore.from_json(score),
        origin=row["origin"],
        trial=row["trial"],
        is_confirmed=row["confirmed"],
        compressed_from=row.get("compressed_from"),
        dominated_by=row["dominated_by"],
    )


def _read_verdict(row: Mapping[str, Any]) -> Verdict:
    levels = tuple(
        LevelVerdict(**{**level, "gain_ci": tuple(level["gain_ci"])}) for level in row["levels"]
    )
    return Verdict(row["beats_lora"], row["text"], levels)


def _read_objective(row: Mapping[str, Any]) -> Objective:
    known = COSTS.get(row["name"])
    return known or Objective(row["name"], row["direction"], row["unit"])


def front_from_json(content: Mapping[str, Any]) -> FrontView:
    """The view that `front_to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError: if the content is not of schema 1.
    """
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema {content['schema']!r} is not {SCHEMA}")
    return FrontView(
        objectives=tuple(_read_objective(row) for row in content["objectives"]),
        front=tuple(_read_entry(row) for row in content["front"]),
        best=content["best"],
        baseline=content["baseline"] and _read_entry(content["baseline"]),
        reference=content["reference"] and _read_entry(content["reference"]),
        verdict=_read_verdict(content["verdict"]),
        budget=BudgetReport(**content["budget"]),
        trials=content["trials"],
        dominated_finalists=tuple(_read_entry(row) for row in content["dominated_finalists"]),
        unconfirmed=tuple(_read_entry(row) for row in content["unconfirmed"]),
        data=DataSummary.from_json(content["data"]),
        versions=content["versions"],
        warnings=tuple(content["warnings"]),
        settings=content["settings"],
        n_layers=content["n_layers"],
        started=content["started"],
        ended=content["ended"],
        is_confirmed=content["confirmed"],
        is_complete=content["complete"],
        fidelity=Fidelity.from_json(content["fidelity"]) if content.get("fidelity") else None,
    )


def read_front(path: Path) -> FrontView:
    """Reads a front.json back.

    Raises:
        StorageError: if the file is missing, no JSON, or not of schema 1.
    """
    remedy = "point at the output folder of a finished search"
    try:
        return front_from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise StorageError("front.json", str(path), f"cannot be read ({error})", remedy) from error
    except (KeyError, TypeError, ValueError) as error:
        problem = f"is not a front of schema {SCHEMA} ({type(error).__name__}: {error})"
        raise StorageError("front.json", str(path), problem, remedy) from error
