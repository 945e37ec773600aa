"""The searches that `kills.py` kills, and the log that they write themselves.

A line is on the disk before the next one begins, whoever is killed in between. The log lies outside
of the run folder: `kill_checks.py` compares both.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

import autopeft
from autopeft.testing.tiny_models import save_model

LOG = "AUTOPEFT_KILLS_LOG"
"""Environment variable with the log's path: it reaches workers, and tells them from others."""

FUNCTION: dict[str, Any] = {
    **{"evaluate": "kill_search:evaluate", "metric": "accuracy", "steps": 27, "rungs": 2},
    **{"budget": "24trials", "confirm_seeds": 2, "max_finalists": 2},
}
TRAINING: dict[str, Any] = {
    **{"steps": 12, "batch_size": 8, "max_length": 16, "precision": "fp32", "compress": False},
    **{"budget": "10trials", "confirm_seeds": 1, "max_finalists": 2},
    **{"space": {"methods": {"lora": {"ranks": [1, 2, 4, 8]}}}},
}

_WORDS = {"good": ("good", "fine", "great"), "bad": ("bad", "poor", "awful")}
_PLAIN = ("the", "film", "was", "a", "plot", "and", "scene", "actor", "very", "so")


def write_assets(folder: Path) -> tuple[Path, Path]:
    """Write a tiny BERT and 200 sentences whose label shows in one word; return both paths."""
    chooser = random.Random(0)
    rows = []
    for number in range(200):
        label = ("good", "bad")[number % 2]
        words = [*chooser.choices(_PLAIN, k=chooser.randint(3, 8)), chooser.choice(_WORDS[label])]
        rows.append((f"{' '.join(words)} {number}", label))
    data = folder / "sentences.csv"
    data.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    texts = [list(_PLAIN), *map(list, _WORDS.values())]
    return save_model("AutoModel", texts, folder / "model"), data


def note(event: str, **facts: Any) -> None:
    """Append a line to the log, and wait until the disk has it."""
    line = json.dumps({"event": event, "at": time.time(), **facts}) + "\n"
    file = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)


def quality(digest: str, size: int, seed: int) -> float:
    """Stand in for a training: more adapters are better, give or take what a seed changes."""
    noise = random.Random(hashlib.sha256(f"{digest}-{seed}".encode()).digest()).random()
    return 0.5 + 0.4 * (1 - float(2.0 ** (-size / 10))) + 0.02 * noise


def evaluate(candidate: autopeft.Candidate, *, seed: int, report: autopeft.TrialReport) -> Any:
    """Stand in for a training that takes a moment and logs what it does."""
    facts = {"digest": candidate.digest, "seed": seed, "confirms": report.is_confirming}
    note("begin", **facts, pid=os.getpid())
    level = quality(candidate.digest, sum(s.rank or 1 for s in candidate.plan.specs), seed)
    for step in report.rungs:
        time.sleep(0.01)
        score = level - 0.3 * (1 / step - 1 / report.rungs[-1])
        report(step, score)
        note("rung", **facts, step=step, score=score)
    (report.folder / "weights.txt").write_text(candidate.digest)
    if not report.is_confirming:
        note("end", **facts, value=level)
        return {"accuracy": level}
    rows = (np.random.default_rng(1).random(200) < level).astype(float)
    note("end", **facts, value=float(rows.mean()))
    return {"accuracy": level, "test_accuracy": float(rows.mean())}, rows


class Told(autopeft.Callback):
    """Logs what the driver has told the study, after it has."""

    def on_search_begin(self, search: autopeft.SearchStart) -> None:
        note("session", resumed=search.is_resumed)

    def on_trial_begin(self, trial: autopeft.Trial) -> None:
        note("handed_out", number=trial.number, digest=trial.digest)

    def on_rung(self, trial: autopeft.Trial, step: int, score: float) -> None:
        note("told_rung", number=trial.number, digest=trial.digest, step=step, score=score)

    def on_trial_end(self, trial: autopeft.Trial) -> None:
        note(
            "told", number=trial.number, digest=trial.digest, state=trial.state,
            values=dict(trial.values), reason=trial.reason,
        )  # fmt: skip

    def on_confirmation(self, candidate: autopeft.Candidate, score: Any, files: Any) -> None:
        note(
            "confirmed", digest=candidate.digest, seed=score.seed, test=dict(score.test)
        )  # fmt: skip


def search(folder: Path, settings: dict[str, Any]) -> None:
    """Begin the search in a folder, or continue it if it has begun."""
    note("call")
    if (folder / "settings.yaml").exists():
        autopeft.resume(folder, callbacks=[Told()], progress=False)
    else:
        autopeft.search(settings, output=str(folder), callbacks=[Told()], progress=False)
