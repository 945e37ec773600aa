"""Learning curves to prune: recorded ones from a file, or made-up ones with the same habits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_N_RUNS, _N_POINTS, _STEPS = 60, 20, 5000


@dataclass(frozen=True)
class Curve:
    """One training, recorded to its end.

    Attributes:
        name: For people.
        points: Pairs (step, training loss), in order.
        accuracy: On the test split, at the end.
        memory: Peak memory in bytes.
        params: Trainable parameters.
        seconds: Of the whole training.
    """

    name: str
    points: tuple[tuple[int, float], ...]
    accuracy: float
    memory: int
    params: int
    seconds: float

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.points[-1][0]


def read_curves(path: Path) -> tuple[Curve, ...]:
    """Curves recorded as JSON.

    The file holds `{"runs": [{"name", "test_accuracy", "peak_memory_bytes", "trainable_params",
    "train_seconds", "curve": [{"step", "train_loss"}, ...]}, ...]}`; other keys are ignored.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return tuple(
        Curve(
            row["name"],
            tuple((int(p["step"]), float(p["train_loss"])) for p in row["curve"]),
            float(row["test_accuracy"]),
            int(row["peak_memory_bytes"]),
            int(row["trainable_params"]),
            float(row["train_seconds"]),
        )
        for row in rows
    )


def make_curves(seed: int) -> tuple[Curve, ...]:
    """Made-up trainings: larger adapters end better, learn later, and any may be badly tuned.

    Losses fall by power laws whose exponents differ, so that curves cross; accuracy follows the
    last loss up to chance.
    """
    rng = np.random.default_rng(seed)
    steps = np.linspace(_STEPS / _N_POINTS, _STEPS, _N_POINTS)
    curves = []
    for number in range(_N_RUNS):
        size = rng.uniform(0.0, 1.0)
        mistuned = rng.gamma(1.0, 0.06)
        last = 0.62 + 0.25 * np.exp(-4.0 * size) + mistuned + rng.normal(0.0, 0.006)
        drop = rng.uniform(0.15, 0.45) * (0.6 + 0.8 * size)
        losses = last + drop * ((steps / steps[0]) ** -rng.uniform(0.5, 1.6))
        losses += rng.normal(0.0, 0.004, _N_POINTS)
        accuracy = 0.55 - 1.4 * (last - 0.62) + rng.normal(0.0, 0.012)
        memory = 2.0e10 * (1.0 + 0.3 * size + 0.15 * rng.random() ** 2)
        curves.append(
            Curve(
                f"made-up {number}",
                tuple(zip(map(int, steps), map(float, losses), strict=True)),
                max(float(accuracy), 0.0),
                int(memory),
                int(np.exp(np.log(1e4) + size * np.log(1e4) + rng.normal(0.0, 0.4))),
                float(1000.0 * (0.7 + 0.4 * size + rng.gamma(1.0, 0.2))),
            )
        )
    return tuple(curves)


def volume(costs: Sequence[float], accuracies: Sequence[float], worst: float) -> float:
    """Hypervolume: the area under the best accuracy each cost can buy, up to the worst cost."""
    total, best, at = 0.0, 0.0, worst
    for cost, accuracy in sorted(zip(costs, accuracies, strict=True), key=lambda p: (p[0], -p[1])):
        if accuracy > best:
            total += max(cost - at, 0.0) * best if best else 0.0
            best, at = accuracy, cost
    return total + max(worst - at, 0.0) * best
