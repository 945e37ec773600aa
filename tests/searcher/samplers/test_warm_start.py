from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypervolume import hypervolume

from autopeft.costs import PriceTable, Topology
from autopeft.errors import SettingsError, StorageError
from autopeft.plan import Candidate
from autopeft.searcher.controller import SearchController
from autopeft.searcher.samplers.gp import Earlier, Embedding, GaussianProcess
from autopeft.searcher.samplers.warm_start import WarmStartTrial, warm_start_trials
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.study import read_study

SHAPES = {"attn.q": (64, 64), "attn.v": (64, 64), "mlp.up": (256, 64), "mlp.down": (64, 256)}
TOPOLOGY = Topology(8, SHAPES, head_params=66)
SPACE = SearchSpace.from_source({"methods": ["lora", "ia3", "miss"]}, TOPOLOGY, steps=9)
PRICES = PriceTable.from_topology(TOPOLOGY)
TWO = ("accuracy", "trainable_params")


def quality(
    candidate: Candidate, *, good: Sequence[int] = (5, 6, 7), rate: float = -2.5, scale: float = 1.0
) -> float:
    """Adapters in a few good blocks help, elsewhere hardly; one rate is best."""
    value = 0.0
    for spec in candidate.plan.specs:
        value += (0.3 if spec.layer in good else 0.02) * math.log2(1 + (spec.rank or 1)) / 5
    position = math.log10(candidate.train.learning_rate)
    return scale * (0.5 + 0.4 * (1 - math.exp(-value)) - 0.05 * (position - rate) ** 2)


def run(n: int, seed: int, warm_start: Any = (), **landscape: Any) -> SearchController:
    controller = SearchController(
        SPACE, TWO, seed=seed, pruner="none", warm_start=warm_start, prices=PRICES, n_baselines=4
    )
    for _ in range(n):
        trial = controller.ask()
        controller.tell(trial, score=quality(trial.candidate, **landscape))
    return controller


def volume(controller: SearchController) -> float:
    """Hypervolume over log cost, of the true qualities."""
    points = [
        (o.values["accuracy"], -math.log(o.values["trainable_params"])) for o in controller.front()
    ]
    return hypervolume(np.array(points), np.array([0.4, -math.log(3e5)]))


def test_qualities_are_kept_in_their_own_spreads_and_the_front_is_known() -> None:
    controller = run(20, 0)
    trials = warm_start_trials(controller.trials(), controller.objectives)
    values = [trial.quality for trial in trials]
    assert values == sorted(values, reverse=True)
    assert np.mean(values) == pytest.approx(0.0, abs=1e-9)
    assert np.std(values) == pytest.approx(1.0)
    front = {o.candidate.digest for o in controller.front() if o.candidate.plan.specs}
    assert front <= {t.candidate.digest for t in trials if t.is_on_front}
    again = [WarmStartTrial.from_json(json.loads(json.dumps(t.to_json()))) for t in trials]
    assert again == list(trials)
    assert warm_start_trials((), controller.objectives) == ()


def test_the_earlier_front_is_tried_first_in_this_searchs_own_training() -> None:
    earlier = warm_start_trials(run(30, 0).trials(), SearchController(SPACE, TWO).objectives)
    longer = SearchSpace.from_source({"methods": ["lora", "ia3", "miss"]}, TOPOLOGY, steps=50)
    controller = SearchController(longer, TWO, warm_start=earlier, prices=PRICES, n_baselines=2)
    plans = {t.candidate.plan for t in earlier if t.is_on_front}
    first = [controller.ask() for _ in range(8)]
    starters = [t for t in first if t.origin == "portfolio" and t.plan in plans]
    assert len(starters) >= 2
    assert all(t.train.steps == 50 for t in starters)


def test_a_right_warm_start_helps_and_a_wrong_one_does_little_harm() -> None:
    right = warm_start_trials(
        run(40, 100, scale=0.7).trials(), SearchController(SPACE, TWO).objectives
    )
    wrong = warm_start_trials(
        run(40, 101, good=(0, 1), rate=-3.6).trials(), SearchController(SPACE, TWO).objectives
    )
    # Early on, that is: later a search without a warm start has learned as much by itself.
    cold, warm, misled = (
        np.mean([volume(run(14, seed, warm_start=earlier)) for seed in range(4)])
        for earlier in ((), right, wrong)
    )
    assert warm > 1.02 * cold
    assert misled > 0.93 * cold


def test_an_earlier_search_is_trusted_as_far_as_it_agrees() -> None:
    embedding = Embedding(SPACE.grid, (5.0, 12.0))
    rng = np.random.default_rng(0)
    points = [SPACE.point_sampler.stratified(rng) for _ in range(60)]
    true = np.array([quality(SPACE.encoder.to_candidate(point)) for point in points])
    scores = (true - true.mean()) / true.std()
    here, there, new = (embedding.of(p, SPACE) for p in (points[:14], points[14:44], points[44:]))
    trust, errors = [], []
    for sign in (1.0, -1.0):
        model = GaussianProcess(embedding)
        # Another level and spread does not matter.
        sources = np.ones(30, dtype=np.int64)
        model.fit(here, 7.0 + true[:14], None, Earlier(there, sign * scores[14:44], sources))
        model.learn_trust()
        trust.append(float(model.trust[0]))
        errors.append(float(np.abs(model.predict(new)[0] - 7.0 - true[44:]).mean()))
    alone = GaussianProcess(embedding)
    alone.fit(here, 7.0 + true[:14])
    error = float(np.abs(alone.predict(new)[0] - 7.0 - true[44:]).mean())
    assert trust[0] > 0.6 > 0.3 > trust[1]
    assert errors[0] < error
    assert errors[1] < 1.3 * error


def test_recipes_wait_while_an_earlier_search_is_right() -> None:
    right = warm_start_trials(
        run(40, 100, scale=0.7).trials(), SearchController(SPACE, TWO).objectives
    )
    cold, warm = (run(16, 0, warm_start=earlier).trials() for earlier in ((), right))
    recipes = [sum(trial.origin == "portfolio" for trial in trials) for trials in (cold, warm)]
    searched = [sum(trial.origin == "search" for trial in trials) for trials in (cold, warm)]
    assert recipes[1] < recipes[0]
    assert searched[1] > searched[0] + 2


def test_what_fits_nowhere_is_told_and_no_study_is_an_error(tmp_path: Path) -> None:
    earlier = warm_start_trials(run(12, 0).trials(), SearchController(SPACE, TWO).objectives)
    other = SearchSpace.from_source("default", Topology(2, SHAPES), steps=9)
    with pytest.raises(SettingsError, match="warm_start"):
        SearchController(
            other, TWO, warm_start=[t for t in earlier if t.candidate.plan.specs[-1].layer > 1]
        )
    with pytest.raises(StorageError, match="no such file"):
        read_study(f"sqlite:///{tmp_path / 'study.db'}", "none")


def test_a_study_is_read_back(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    controller = SearchController(
        SPACE, TWO, "random", "none", storage=storage, study_name="first", prices=PRICES
    )
    for _ in range(8):
        trial = controller.ask()
        controller.tell(trial, score=quality(trial.candidate))
    assert warm_start_trials(*read_study(storage, "first")) == warm_start_trials(
        controller.trials(), controller.objectives
    )
