"""front.json: the search's result for other programs, schema 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autopeft.confirm.intervals import METHOD
from autopeft.costs.objectives import COSTS
from autopeft.errors import StorageError, UserError
from autopeft.plan import MAX_LAYERS, Candidate
from autopeft.reporting.front_view import FrontEntry, FrontView
from autopeft.utils.files import write_text
from autopeft.utils.serialize import finite, from_plain, read_json, strict_json, to_plain

SCHEMA = 1

_REMEDY = "point at the output folder of a finished search"


def _entry_json(entry: FrontEntry) -> dict[str, Any]:
    row = _renamed(to_plain(entry), "is_confirmed", "confirmed")
    if entry.adapter_score:
        score = row["adapter_score"]
        metrics = score.pop("metrics")
        row["adapter_score"] = {"split": score.pop("split"), **score, **metrics}
    del row["candidate"]
    costs = row.pop("price")
    return {
        "digest": entry.digest,
        **entry.candidate.to_json(),
        "summary": entry.summary,
        **row,
        "price": costs,
    }


def _renamed(row: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in row.items()}


def front_to_json(shown: FrontView) -> dict[str, Any]:
    """Return the content of front.json; NaN and infinity become null."""
    content = {
        "schema": SCHEMA,
        "objectives": [
            {"name": o.name, "direction": o.direction, "unit": o.unit} for o in shown.objectives
        ],
        "confirmed": shown.is_confirmed,
        "is_held_out": shown.is_held_out,
        "complete": shown.is_complete,
        "front": [_entry_json(entry) for entry in shown.front],
        "best": shown.best,
        "baseline": shown.baseline and _entry_json(shown.baseline),
        "reference": shown.reference and _entry_json(shown.reference),
        "verdict": to_plain(shown.verdict),
        "budget": to_plain(shown.budget),
        "trials": shown.trials,
        "dominated_finalists": [_entry_json(entry) for entry in shown.dominated_finalists],
        "unconfirmed": [_entry_json(entry) for entry in shown.unconfirmed],
        "fidelity": to_plain(shown.fidelity),
        "converted": to_plain(shown.converted),
        "outdated": to_plain(shown.outdated),
        "intervals": METHOD,
        "model": shown.model,
        "task": shown.task,
        "settings": shown.settings,
        "n_layers": shown.n_layers,
        "data": to_plain(shown.data),
        "unsearched": shown.unsearched,
        "versions": shown.versions,
        "warnings": shown.warnings,
        "started": shown.started,
        "ended": shown.ended,
    }
    clean: dict[str, Any] = finite(content)
    return clean


def write_front(shown: FrontView, path: Path) -> None:
    """Write front.json atomically."""
    write_text(path, strict_json(front_to_json(shown)))


def _entries(value: Any) -> Any:
    """Return rows of front.json with the fields of FrontEntry; leave other values to the check."""
    if isinstance(value, list):
        return [_entries(row) for row in value]
    if not isinstance(value, Mapping):
        return value
    row = {**_renamed(value, "confirmed", "is_confirmed"), "candidate": Candidate.from_json(value)}
    score = row.get("adapter_score")
    if isinstance(score, Mapping):
        names = ("split", "seed", "n_rows")
        metrics = {name: metric for name, metric in score.items() if name not in names}
        row["adapter_score"] = {**score, "metrics": metrics}
    return row


def front_from_json(content: Mapping[str, Any]) -> FrontView:
    """Return the view that `front_to_json` wrote, or raise a UserError."""
    schema = content.get("schema")
    if schema != SCHEMA:
        raise StorageError("schema", schema, f"must be {SCHEMA}", _REMEDY)
    row = _renamed(_renamed(content, "confirmed", "is_confirmed"), "complete", "is_complete")
    for key in ("front", "baseline", "reference", "dominated_finalists", "unconfirmed"):
        row[key] = _entries(row.get(key))
    shown = from_plain(
        FrontView, row, error=StorageError, remedy=_REMEDY, allow_unknown=True, null_is_nan=True
    )
    _check(shown)
    # What computed a registered cost need not be at hand.
    computed = {name for entry in shown.entries() for name in entry.price.others}
    objectives = (replace(o, is_known=o.name in computed) for o in shown.objectives)
    return replace(shown, objectives=tuple(COSTS.get(o.name, o) for o in objectives))


def _check(shown: FrontView) -> None:
    """Check what the values must have in common; a report would fail on them, or go elsewhere."""

    def wrong(place: str, value: object, problem: str) -> StorageError:
        return StorageError(place, value, problem, _REMEDY)

    names = [objective.name for objective in shown.objectives]
    if not names or len(set(names)) < len(names):
        raise wrong("objectives", names, "must name a quality and costs, each once")
    for name in names:
        if not _NAME.fullmatch(name):
            raise wrong("objectives", name, "is no name of a metric or cost")
    if not 0 <= shown.n_layers <= MAX_LAYERS:
        raise wrong("n_layers", shown.n_layers, f"`0 <= n_layers <= {MAX_LAYERS}` must hold")
    others = [entry for entry in (shown.baseline, shown.reference) if entry is not None]
    entries = [*shown.front, *shown.dominated_finalists, *shown.unconfirmed, *others]
    if len(entries) > _MOST_ENTRIES:
        raise wrong("front", len(entries), f"at most {_MOST_ENTRIES:,} candidates are read")
    for form in shown.converted:
        if names[0] not in form.metrics:
            raise wrong("converted", form.digest, f"lacks the value of {names[0]!r}")
    for entry in entries:
        lacking = [name for name in names if name not in entry.objectives]
        if lacking:
            raise wrong("objectives", entry.digest, f"lacks the value of {lacking[0]!r}")
        if entry.adapter is not None and not _ADAPTER.fullmatch(entry.adapter):
            problem = "must be a folder in adapters/, named by a digest"
            raise wrong("adapter", entry.adapter, problem)


_NAME = re.compile(r"[^/\\\x00-\x1f\x7f-\x9f]{1,100}")
"""The name of an objective: plots are files of that name."""

_ADAPTER = re.compile(r"adapters/[0-9a-f]{16}")
"""Where an adapter is: nothing else is taken for one, above all not what is outside the folder."""

_MOST_ENTRIES = 10_000
"""Most candidates of a front that are read; a page has a row for each."""


def read_front(path: Path) -> FrontView:
    """Read front.json, or raise a StorageError."""
    content = read_json(path, dict[str, Any], remedy=_REMEDY)
    try:
        return front_from_json(content)
    except UserError as error:
        raise StorageError("front.json", str(path), error.mistake, _REMEDY) from None
