"""What must hold after a search was killed: read from outside, from its log and its files.

Nothing is lost or repeated means:

1. A candidate is complete or pruned once. It is trained again only if something was killed after
   its training began and before the study was told of its end.
2. What was told, and what a study held when it was killed, is there unchanged at the end: state,
   values, reports at rungs.
3. Values are those that the training itself logged.
4. The same for confirmations; none is missing that was begun, and each finalist has one.
5. The seconds spent are those of the sessions' calls, and the trials those that ended.
6. The front is the one that the log gives.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

SECONDS_A_SESSION = 2.0
"""Spent seconds of a killed session may differ by so much: they are written every second."""

Line = Mapping[str, Any]
Ended = dict[int, tuple[str, tuple[float, ...], tuple[tuple[int, float], ...]]]
"""State, values and rungs of ended trials, by number."""

_ENDS = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


@dataclass
class Found:
    """Problems, and what was counted."""

    problems: list[str] = field(default_factory=list)
    trained_again: int = 0
    given_up: int = 0
    seconds_off: float = 0.0


def read_log(path: Path) -> list[Line]:
    """Return the log's lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def stored_trials(storage: str, name: str) -> list[optuna.trial.FrozenTrial]:
    """Return a study's trials by Optuna alone; none if it has not been made."""
    backend: Any = storage
    path = storage.removeprefix("sqlite:///")
    if path.startswith("/") and not Path(path).exists():
        return []
    if storage.endswith(".log"):
        backend = optuna.storages.JournalStorage(JournalFileBackend(storage))
    try:
        study = optuna.load_study(study_name=name, storage=backend)
    except KeyError:
        return []
    return study.get_trials(deepcopy=False)


def ended(trials: Sequence[optuna.trial.FrozenTrial]) -> Ended:
    """Return what must not change any more."""
    return {
        t.number: (
            _ENDS[t.state],
            tuple(t.values or ()),
            tuple(sorted(t.intermediate_values.items())),
        )
        for t in trials
        if t.state in _ENDS
    }


def check(
    log: Sequence[Line],
    folder: Path,
    trials: Sequence[optuna.trial.FrozenTrial],
    snapshots: Sequence[Ended],
    seconds: float,
    n_sessions: int,
) -> Found:
    """Check a search that has ended.

    Args:
        log: What trainings, driver and killer wrote, in order.
        folder: The run folder.
        trials: Those of the study.
        snapshots: Ended trials after each kill.
        seconds: True seconds of all sessions.
        n_sessions: How many there were.
    """
    found = Found()
    front = json.loads((folder / "front.json").read_text())
    _check_study(log, trials, snapshots, found)
    _check_repeats(log, found)
    _check_confirmations(log, folder, front, found)
    spent = front["budget"]
    booked = json.loads((folder / "state" / "spent.json").read_text())["seconds"]
    found.seconds_off = booked - seconds
    if abs(found.seconds_off) > SECONDS_A_SESSION * n_sessions:
        found.problems.append(f"spent {booked:.1f} s, truly {seconds:.1f} s")
    n_ended = sum(not _is_interrupted(t) for t in trials)
    wanted = int(front["settings"]["budget"].removesuffix("trials"))
    if not spent["n_trials"] == n_ended == wanted == sum(front["trials"].values()):
        counted = f"{spent['n_trials']} spent, {n_ended} in the study, {front['trials']} told"
        found.problems.append(f"{wanted} trials wanted: {counted}")
    if not front["complete"]:
        found.problems.append("front.json is not complete")
    _check_front(log, trials, front, found)
    return found


def _is_interrupted(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and trial.user_attrs.get("reason") == "interrupted"


def _check_study(
    log: Sequence[Line],
    trials: Sequence[optuna.trial.FrozenTrial],
    snapshots: Sequence[Ended],
    found: Found,
) -> None:
    now, problems = ended(trials), found.problems
    if len(now) < len(trials):
        problems.append(f"{len(trials) - len(now)} trials have not ended")
    for snapshot in snapshots:
        problems += [
            f"trial {number} was {was}, is {now.get(number)}"
            for number, was in snapshot.items()
            if now.get(number) != was
        ]
    trained = [t.user_attrs["digest"] for t in trials if now.get(t.number, "f")[0][0] != "f"]
    problems += [f"{d} was trained twice" for d in set(trained) if trained.count(d) > 1]
    numbers = {t.number: t for t in trials}
    values = {row["digest"]: row["value"] for row in _of(log, "end") if not row["confirms"]}
    for row in _of(log, "told"):
        state, stored, _ = now.get(row["number"], ("missing", (), ()))
        if (state, stored) != (row["state"], tuple(row["values"].values())):
            problems.append(f"told {row}, stored {state} {stored}")
    for row in _of(log, "told_rung"):
        if numbers[row["number"]].intermediate_values.get(row["step"]) != row["score"]:
            problems.append(f"a rung that was told is missing: {row}")
    rungs = {
        (t.user_attrs["digest"], s, v) for t in trials for s, v in t.intermediate_values.items()
    }
    for row in _of(log, "rung"):
        if not row["confirms"] and (row["digest"], row["step"], row["score"]) not in rungs:
            problems.append(f"a rung that was answered is missing: {row}")
    for trial in trials:
        digest = trial.user_attrs["digest"]
        if values and trial.state == TrialState.COMPLETE and trial.values[0] != values.get(digest):
            problems.append(f"{digest} has {trial.values[0]}, logged was {values.get(digest)}")
        reason = str(trial.user_attrs.get("reason", ""))
        if trial.state == TrialState.FAIL and not _is_interrupted(trial):
            found.given_up += 1
            tries = sum(row["digest"] == digest for row in _of(log, "handed_out"))
            if "died" not in reason or tries < 3:
                problems.append(f"{digest} failed after {tries} tries: {reason}")


def _of(log: Sequence[Line], event: str) -> list[Line]:
    return [row for row in log if row["event"] == event]


def _check_repeats(log: Sequence[Line], found: Found) -> None:
    """Check that a training begins again only because something was killed meanwhile."""
    begun: dict[tuple[str, int, bool], int] = {}  # the kills so far, when it began
    over: set[tuple[str, int, bool]] = set()
    ends, n_kills = {(r["digest"], False) for r in _of(log, "begin")}, 0
    for row in log:
        # A kill takes a moment, in which a training may begin; a session ends before the next call.
        if row["event"] in ("kill", "killed", "call"):
            n_kills += 1
        elif row["event"] == "begin" or (row["event"] == "handed_out" and not ends):
            key = (row["digest"], row.get("seed", 0), row.get("confirms", False))
            if key in over:
                found.problems.append(f"{key} began after its end was told")
            elif key in begun:
                found.trained_again += 1
                if begun[key] == n_kills:
                    found.problems.append(f"{key} began again, and nothing had been killed")
            begun[key] = n_kills
        elif row["event"] == "told" and row["reason"] != "interrupted":
            over |= {key for key in begun if key[0] == row["digest"] and not key[2]}
        elif row["event"] == "confirmed":
            key = (row["digest"], row["seed"], True)
            if key in over:
                found.problems.append(f"{key} was confirmed twice")
            over.add(key)


def _check_confirmations(
    log: Sequence[Line], folder: Path, front: Mapping[str, Any], found: Found
) -> None:
    stored = {
        path.parent.name: json.loads(path.read_text())["test"]
        for path in (folder / "confirm").glob("*-seed*/score.json")
    }
    shown = _entries(front)
    logged = {
        f"{r['digest']}-seed{r['seed']}": r["value"] for r in _of(log, "end") if r["confirms"]
    }
    for row in _of(log, "confirmed"):
        if stored.get(f"{row['digest']}-seed{row['seed']}") != row["test"]:
            found.problems.append(f"confirmed, but not stored: {row}")
    for name, test in stored.items():
        if logged and test["accuracy"] != logged.get(name):
            found.problems.append(f"{name} has {test}, logged was {logged.get(name)}")
        digest, seed = name.rsplit("-seed", 1)
        seeds = [line["seed"] for line in shown[digest]["seeds"]] if digest in shown else []
        if int(seed) not in seeds:
            found.problems.append(f"{name} is not in front.json")
    told = {f"{d}-seed{line['seed']}" for d, e in shown.items() for line in e["seeds"]}
    if told != stored.keys():
        found.problems.append(f"front.json shows {sorted(told ^ stored.keys())} more or less")
    if not (front["front"] and all(entry["seeds"] for entry in front["front"])):
        found.problems.append("a member of the front has no confirmation")


def _entries(front: Mapping[str, Any]) -> dict[str, Any]:
    rows = [*front["front"], *front["dominated_finalists"], *front["unconfirmed"]]
    rows += [front[name] for name in ("baseline", "reference") if front[name]]
    return {row["digest"]: row for row in rows}


def _front_of(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return those that no other dominates; points are (quality, cost)."""

    def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] >= other[0] and one[1] <= other[1] and one != other

    return {
        digest
        for digest, point in points.items()
        if not any(dominates(other, point) for other in points.values())
    }


def _check_front(
    log: Sequence[Line],
    trials: Sequence[optuna.trial.FrozenTrial],
    front: Mapping[str, Any],
    found: Found,
) -> None:
    """Compute the front of the search and that of the confirmations again."""
    shown, told = _entries(front), _of(log, "told")
    logged = {r["digest"]: r["value"] for r in _of(log, "end") if not r["confirms"]}
    logged = logged or {r["digest"]: r["values"]["accuracy"] for r in told if r["values"]}
    complete = {t.user_attrs["digest"]: t.values for t in trials if t.state == TrialState.COMPLETE}
    # The driver of a training may be killed between the study's line and that of the log.
    points = {d: (logged.get(d, quality), cost) for d, (quality, cost) in complete.items()}
    searched, unconfirmed = _front_of(points), {e["digest"] for e in front["unconfirmed"]}
    if lost := searched - shown.keys():
        found.problems.append(f"on the front of the search, not in front.json: {sorted(lost)}")
    if more := unconfirmed - searched:
        found.problems.append(f"not on the front of the search: {sorted(more)}")
    tests: dict[str, list[float]] = defaultdict(list)
    for row in {(r["digest"], r["seed"]): r for r in _of(log, "confirmed")}.values():
        tests[row["digest"]].append(row["test"]["accuracy"])
    means = {
        digest: (float(np.mean(tests[digest])), entry["objectives"]["trainable_params"])
        for digest, entry in shown.items()
        if digest in tests and entry["plan"]
    }
    members = {entry["digest"] for entry in front["front"]}
    if members != _front_of(means):
        found.problems.append(f"front.json has {members}, the log gives {_front_of(means)}")
