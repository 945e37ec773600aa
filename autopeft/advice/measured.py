"""What the scores were worth where it was measured: `measured.json`, and intervals from it.

`examples/benchmarks/sensitivity.py` makes the file: it trains a small LoRA at one site at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from autopeft.utils.serialize import from_plain

FILE = "measured.json"

_N_DRAWS = 1000
_LEVEL = 0.95
DEPTH = "depth"


@dataclass(frozen=True)
class MeasuredSite:
    """One site.

    Attributes:
        layer: Its block.
        role: Its role.
        losses: Validation loss of a LoRA at this site alone, by seed.
        scores: Score name -> value, before the training.
    """

    layer: int
    role: str
    losses: tuple[float, ...]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Setting:
    """A model and data.

    Attributes:
        title: Both in a few words.
        learning_rate: That of the LoRAs.
        steps: Their steps.
        references: Validation loss without an adapter, by seed; a new head is trained.
        sites: The sites that were tried.
    """

    title: str
    learning_rate: float
    steps: int
    references: tuple[float, ...]
    sites: tuple[MeasuredSite, ...]

    def gains(self) -> NDArray[np.float64]:
        """Return the loss that an adapter saves, shape (n_sites, n_seeds)."""
        losses = np.array([site.losses for site in self.sites], dtype=np.float64)
        return np.array(self.references, dtype=np.float64) - losses

    def agreement(self) -> float:
        """Return the rank correlation of the gains of two seeds: more cannot be predicted."""
        gains = self.gains()
        return float(_correlation(gains[:, 0][None], gains[:, 1][None])[0])


@dataclass(frozen=True)
class Measured:
    """All that was measured.

    Attributes:
        command: What made it.
        date: When.
        versions: Package -> version.
        rank: Rank of the LoRAs.
        settings: Name -> setting.
    """

    command: str
    date: str
    versions: Mapping[str, str]
    rank: int
    settings: Mapping[str, Setting]


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def figures(self) -> tuple[float, float, float]:
        """The value and the ends of the interval."""
        return (self.value, self.low, self.high)

    def __str__(self) -> str:
        return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*self.figures)


@dataclass(frozen=True)
class Worth:
    """How well a score told which sites gain.

    Attributes:
        settings: Setting -> rank correlation with the gains; the interval is a bootstrap over
            sites.
        mean: Mean over settings; the bootstrap is over settings and, within them, sites.
        beyond_depth: How much stronger it is than depth's mean, whatever the signs.
    """

    settings: Mapping[str, Correlation]
    mean: Correlation
    beyond_depth: Correlation

    @property
    def sign(self) -> int:
        """-1 where sites with a low score gain more."""
        return -1 if self.mean.value < 0 else 1

    @property
    def least(self) -> float:
        """The bound of the mean's interval that is nearer to 0; 0 if it holds 0."""
        return min(abs(self.mean.low), abs(self.mean.high)) if self.mean.is_certain else 0.0


@cache
def read_measured() -> Measured:
    """Return what was measured, as the package has it."""
    text = resources.files("autopeft.advice").joinpath(FILE).read_text(encoding="utf-8")
    row: dict[str, Any] = msgspec.json.decode(text)
    return from_plain(Measured, row, field=FILE)


def worths(measured: Measured) -> dict[str, Worth]:
    """Return the worth of every score that was measured, by name."""
    rng = np.random.default_rng(0)
    names = list(next(iter(measured.settings.values())).sites[0].scores)
    points: dict[str, dict[str, float]] = {}
    draws: dict[str, dict[str, NDArray[np.float64]]] = {}
    for key, setting in measured.settings.items():
        gains = setting.gains().mean(axis=1)
        n = len(gains)
        drawn = rng.integers(0, n, (_N_DRAWS, n))
        scores = {name: np.array([s.scores[name] for s in setting.sites]) for name in names}
        points[key] = {k: float(_correlation(v[None], gains[None])[0]) for k, v in scores.items()}
        draws[key] = {k: _correlation(v[drawn], gains[drawn]) for k, v in scores.items()}
    # Which settings, and which draw of their sites: the same for all scores.
    keys = list(measured.settings)
    which = rng.integers(0, len(keys), (_N_DRAWS, len(keys)))
    what = rng.integers(0, _N_DRAWS, which.shape)
    means = {n: float(np.mean([points[key][n] for key in keys])) for n in names}
    mean_draws = {n: np.array([draws[k][n] for k in keys])[which, what].mean(axis=1) for n in names}
    strengths = {name: np.sign(means[name]) * mean_draws[name] for name in names}
    return {
        name: Worth(
            {key: _interval(points[key][name], draws[key][name]) for key in keys},
            _interval(means[name], mean_draws[name]),
            _interval(abs(means[name]) - abs(means[DEPTH]), strengths[name] - strengths[DEPTH]),
        )
        for name in names
    }


def best_score(found: Mapping[str, Worth]) -> str:
    """Return the score whose mean is the farthest from 0 for sure; depth if none is."""
    best = max(found, key=lambda name: found[name].least)
    return best if found[best].least > found[DEPTH].least else DEPTH


def _interval(value: float, draws: NDArray[np.float64]) -> Correlation:
    low, high = np.quantile(draws, [0.5 - _LEVEL / 2, 0.5 + _LEVEL / 2])
    return Correlation(value, float(low), float(high))


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Spearman's correlation of each row, shape (n,); 0 where a side is constant."""
    a, b = (rankdata(side, axis=1) for side in (left, right))
    a, b = (side - side.mean(axis=1, keepdims=True) for side in (a, b))
    size = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    found: NDArray[np.float64] = (a * b).sum(axis=1) / np.where(size > 0, size, 1.0)
    return found
