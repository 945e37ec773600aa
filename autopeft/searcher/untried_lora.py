"""The chance that a LoRA which was not tried is better than the tuned one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autopeft.costs.objectives import Objective
from autopeft.searcher.samplers.gp import Embedding, GaussianProcess
from autopeft.searcher.samplers.observations import History, Observations
from autopeft.searcher.space.initial_design import lora_choices
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import Trial

_SPREAD_WEIGHT = 0.5
"""Share of the model's standard deviation that counts: the best of a hundred is overestimated. With
it, chances and frequencies agree best on the landscapes of `examples/benchmarks/`."""

_FEWEST, _N_DRAWS, _N_OBSERVATIONS = 4, 1000, 300


def chance_of_better_lora(
    space: SearchSpace, quality: Objective, trials: Sequence[Trial], margin: float
) -> float | None:
    """Return the chance that one of all LoRA baselines exceeds the tuned one by a margin.

    Args:
        space: The search space.
        quality: The quality objective.
        trials: All trials of the search, by number.
        margin: In the quality's unit.

    Returns:
        None where too few trials were completed to model the quality.
    """
    history = History(space, quality)
    history.update(trials)
    tuned = max(
        (i for i in history.complete if history.trials[i].origin == "baseline"),
        key=lambda i: history.quality[i],
        default=None,
    )
    point = None if tuned is None else history.points[tuned]
    if len(history.complete) < _FEWEST or point is None:
        return None
    low, high = np.log(np.maximum(space.cost_range(), 1.0))
    embedding = Embedding(space.grid, (float(low), float(high)))
    model = GaussianProcess(embedding)
    known = Observations.of(history, _N_OBSERVATIONS)
    model.fit(embedding.of(known.points, space), known.values, known.noise)
    choices = embedding.of([point, *lora_choices(space.encoder)], space)
    mean, _ = model.predict(choices)
    draws = model.draws(choices, _N_DRAWS, np.random.default_rng(0))
    draws = mean + _SPREAD_WEIGHT * (draws - mean)
    return float(np.mean(draws.max(axis=1) > draws[:, 0] + margin))
