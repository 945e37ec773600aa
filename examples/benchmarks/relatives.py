"""What is known of landscapes like another, or unlike it: earlier knowledge for `landscapes.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from responses import Response

from autopeft import SearchController
from autopeft.searcher.samplers.prior import PriorRow, read_prior
from autopeft.searcher.samplers.warm_start import WarmStartTrial, warm_start_trials
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.initial_design import single_method
from autopeft.searcher.space.space import SearchSpace

N_DRAWS, N_SEARCHED = 56, 40
_PARTS = (1.0, 0.5, 0.25, 1.0, 1 / 12)

KINDS = ("none", "draws", "unlike-draws", "search", "unlike-search")
"""Plans drawn at random or an earlier search, on a relative or on its opposite; or a file."""


@dataclass(frozen=True)
class Known:
    """What `SearchController` takes: rows of trainings, or an earlier search."""

    prior: tuple[PriorRow, ...] = ()
    warm_start: tuple[WarmStartTrial, ...] = ()


def known(kind: str, response: Response, space: SearchSpace) -> Known:
    """Return what is known before a landscape is searched."""
    if kind == "none":
        return Known()
    if kind not in KINDS:
        return Known(read_prior(Path(kind)))
    relative = _relative(_opposite(response) if kind.startswith("unlike") else response)
    if kind.endswith("draws"):
        return Known(_draws(relative, space))
    return Known(warm_start=_searched(relative, space))


def _relative(response: Response) -> Response:
    """A landscape that is like another: the same methods, layers and rates, each somewhat off."""
    rng = np.random.default_rng([response.seed, 7])

    def off(values: NDArray[np.float64], spread: float) -> NDArray[np.float64]:
        return rng.normal(0.0, spread, values.shape)

    weights = response.weights * np.exp(off(response.weights, 0.4))
    general = off(response.strength[:, :1, :1], 0.25)
    limits = np.where(response.limits < 1.0, response.limits - 0.02, 2.0)
    return replace(
        response,
        seed=response.seed + 5000,
        weights=weights / weights.sum(),
        strength=response.strength * np.exp(general + off(response.strength, 0.2)),
        half_size=response.half_size * np.exp(off(response.half_size, 0.3)),
        best_rate=np.minimum(response.best_rate + off(response.best_rate, 0.08), limits),
    )


def _opposite(response: Response) -> Response:
    """A landscape where the other methods, roles, layers and rates are good."""
    logs = np.log(response.strength)
    weights = 1.0 / response.weights
    return replace(
        response,
        weights=weights / weights.sum(),
        strength=np.exp(2.0 * logs.mean() - logs),
        best_rate=1.0 - response.best_rate,
    )


def _draws(response: Response, space: SearchSpace) -> tuple[PriorRow, ...]:
    """Rows of whole plans of one method, drawn at random."""
    rng = np.random.default_rng([response.seed, 8])
    rows = []
    for index in range(N_DRAWS):
        method = space.methods[index % len(space.methods)]
        places = [o.placement for o in space.grid.options if o.method == method]
        part = _PARTS[index % len(_PARTS)]
        last = max(1, round(part * len(space.grid.units)))
        rank, position = int(rng.choice([1, 2, 4, 8, 16, 32])), float(rng.uniform(0.1, 0.95))
        point = single_method(space.encoder, method, str(rng.choice(places)), rank, position, last)
        assert point is not None, "every method is legal in the last layer"
        rows.append(_row(point, response, space, (1.0 - part, 1.0)))
    return tuple(rows)


def _row(
    point: Point, response: Response, space: SearchSpace, depth: tuple[float, float]
) -> PriorRow:
    candidate = space.encoder.to_candidate(point)
    first = candidate.plan.specs[0]
    return PriorRow(
        "relative",
        first.method,
        tuple(dict.fromkeys(spec.role for spec in candidate.plan.specs)),
        first.rank,
        None if response.fails(candidate) else response(candidate),
        depth,
        candidate.train.rate_for(first.method),
    )


def _searched(response: Response, space: SearchSpace) -> tuple[WarmStartTrial, ...]:
    """Trials of a search."""
    cost = "latency_ms" if response.traits.is_measured else "trainable_params"
    controller = SearchController(space, ["accuracy", cost], pruner="none", seed=response.seed)
    for _ in range(N_SEARCHED):
        trial = controller.ask()
        assert trial is not None, "the space is vast"
        if response.fails(trial.candidate):
            controller.tell(trial, failed="the loss diverged")
        else:
            measured = {cost: response.cost(trial.candidate)} if response.traits.is_measured else {}
            controller.tell(trial, score=response(trial.candidate), measured=measured)
    return warm_start_trials(controller.trials(), controller.objectives)
