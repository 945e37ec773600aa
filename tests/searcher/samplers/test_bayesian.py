"""Tests of the default proposer: its model, its costs, what it makes of unfinished trials."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest

from autopeft.costs import PriceTable, Topology
from autopeft.costs.constraints import parse_constraints
from autopeft.costs.objectives import objective
from autopeft.searcher.samplers.base import StratifiedSampler
from autopeft.searcher.samplers.bayesian import N_INITIAL, BayesianSampler
from autopeft.searcher.samplers.budget_first import BudgetFirstEncoding, PlainEncoding
from autopeft.searcher.samplers.cost_model import CostModel
from autopeft.searcher.samplers.gp import Embedding, Features, GaussianProcess
from autopeft.searcher.samplers.measured_cost import MeasuredCost
from autopeft.searcher.samplers.observations import History, Observations
from autopeft.searcher.samplers.optuna_adapters import AutoPeftSampler
from autopeft.searcher.samplers.registry import Problem
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.initial_design import single_method
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import INTERRUPTED, State, Trial
from autopeft.utils.serialize import to_plain

SHAPES = {"attn.q": (64, 64), "attn.v": (64, 64), "mlp.up": (128, 64), "mlp.down": (64, 128)}
TOPOLOGY = Topology(6, SHAPES)
SPACE = SearchSpace.from_source({"methods": ["lora", "ia3", "miss"]}, TOPOLOGY)
PRICES = PriceTable.from_topology(TOPOLOGY)
TWO = (objective("accuracy"), objective("trainable_params"))
RNG = np.random.default_rng
NUMBERS = itertools.count()


def quality(space: SearchSpace, point: Point) -> float:
    """Upper blocks matter more, sizes saturate, the middle of the rates is best."""
    grid = space.grid
    sizes = np.log1p(grid.params[np.arange(len(grid.units)), point.options]) / 8
    weights = np.linspace(0.2, 1.0, len(grid.units))
    total = float((weights * sizes).sum() / weights.sum())
    return 0.5 + 0.4 * (1 - math.exp(-2 * total)) - 0.6 * (point.position - 0.5) ** 2


def tried(
    space: SearchSpace,
    point: Point,
    state: State = "complete",
    rungs: Iterable[tuple[int, float]] = (),
    prices: PriceTable = PRICES,
    **values: float,
) -> Trial:
    candidate = space.encoder.to_candidate(point)
    costs = prices.price(candidate)
    if state == "complete":
        found = {"accuracy": quality(space, point), "trainable_params": costs.trainable_params}
        values = found | values
    return Trial(next(NUMBERS), candidate, costs, "search", state, values, tuple(rungs))


def point_of(trial: Trial, space: SearchSpace = SPACE) -> Point:
    return space.encoder.point_of(trial.candidate)


def history(n: int, seed: int = 0, space: SearchSpace = SPACE) -> list[Trial]:
    rng = RNG(seed)
    return [tried(space, space.point_sampler.stratified(rng)) for _ in range(n)]


def observe(rows: Sequence[Trial], n_max: int = 100) -> Observations:
    seen = History(SPACE, TWO[0])
    seen.update(rows)
    return Observations.of(seen, n_max)


def volume(rows: Sequence[Trial]) -> float:
    low, high = (math.log(c) for c in SPACE.cost_range())
    points = sorted((math.log(s.costs.trainable_params), s.values["accuracy"]) for s in rows)
    area, best, at = 0.0, 0.5, low
    for cost, value in points:
        if value > best:
            area, best, at = area + (cost - at) * (best - 0.5), value, cost
    return area + (high - at) * (best - 0.5)


def grow(proposer: Any, n: int) -> list[Trial]:
    rows: list[Trial] = []
    for _ in range(n):
        rows.append(tried(SPACE, proposer.propose(rows)))
    return rows


def test_it_finds_a_larger_front_than_random_points_of_twice_as_many_trials() -> None:
    gain = [
        volume(grow(BayesianSampler(Problem(SPACE, TWO, PRICES, seed=s)), 30)) for s in range(2)
    ]
    random = [
        volume(grow(StratifiedSampler(Problem(SPACE, TWO, PRICES, seed=s)), 60)) for s in range(2)
    ]
    assert np.mean(gain) > np.mean(random)


def test_it_never_proposes_a_point_twice_even_while_trials_run() -> None:
    proposer = BayesianSampler(Problem(SPACE, TWO, PRICES, seed=0))
    rows = history(16)
    keys = {point_of(s).key for s in rows}
    for _ in range(12):
        point = proposer.propose(rows)
        assert point.key not in keys
        keys.add(point.key)
        rows.append(tried(SPACE, point, "running"))


def test_running_trials_push_the_next_proposals_apart_in_cost() -> None:
    proposer = BayesianSampler(Problem(SPACE, TWO, PRICES, seed=1))
    rows = history(24)
    logs = []
    for _ in range(5):
        point = proposer.propose(rows)
        logs.append(math.log(SPACE.n_params(point.options)))
        rows.append(tried(SPACE, point, "running"))
    assert len(np.unique(np.round(logs, 2))) >= 4


@pytest.mark.parametrize(("n_running", "n_fits"), [(10, 6), (200, 1)])
def test_one_model_serves_several_proposals_where_many_trials_run(
    n_running: int, n_fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposer = BayesianSampler(Problem(SPACE, TWO, PRICES, seed=0))
    rows = history(24) + [
        tried(SPACE, point_of(trial), "running") for trial in history(n_running, seed=1)
    ]
    fitted: list[int] = []
    fit = GaussianProcess.fit

    def counted(self: GaussianProcess, features: Features, *rest: Any, **named: Any) -> None:
        fitted.append(len(features.total))
        fit(self, features, *rest, **named)

    monkeypatch.setattr(GaussianProcess, "fit", counted)
    keys = set()
    for _ in range(6):
        point = proposer.propose(rows)
        keys.add(point.key)
        rows.append(tried(SPACE, point, "running"))
    assert len(keys) == 6
    assert len(fitted) == 2 * n_fits  # With and without the running trials.
    assert max(fitted) <= 24 + 128


def test_the_design_covers_costs_and_methods() -> None:
    proposer = BayesianSampler(Problem(SPACE, TWO, PRICES, seed=0))
    rows = grow(proposer, N_INITIAL)
    low, high = (math.log(c) for c in SPACE.cost_range())
    places = [(math.log(s.costs.trainable_params) - low) / (high - low) for s in rows]
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() >= 1
    used = {m for s in rows for m in SPACE.encoder.plan(point_of(s)).methods}
    assert used == {"lora", "ia3", "miss"}
    assert proposer.origin == "design"


@pytest.mark.parametrize(
    "names",
    [
        ["accuracy"],
        ["loss", "trainable_params"],
        ["accuracy", "trainable_params", "train_flops"],
        ["accuracy", "train_seconds", "latency_ms"],
        ["accuracy", "peak_memory_bytes"],
    ],
)
def test_any_objectives_work(names: list[str]) -> None:
    objectives = [objective(name) for name in names]
    rows = []
    for trial in history(20):
        score = -trial.values["accuracy"] if names[0] == "loss" else trial.values["accuracy"]
        values = {"train_seconds": trial.costs.train_flops / 1e9, "latency_ms": 3.0}
        values |= to_plain(trial.costs) | {names[0]: score}
        rows.append(replace(trial, values={name: values[name] for name in names}))
    proposer = BayesianSampler(Problem(SPACE, tuple(objectives), PRICES, seed=0))
    for _ in range(3):
        point = proposer.propose(rows)
        assert point.options.any()
        rows.append(tried(SPACE, point, "running"))


def test_constraints_bound_the_proposals() -> None:
    for text in ("trainable_params<=2000", "peak_memory_bytes<=1.01e9", "train_flops<=9e10"):
        limits = parse_constraints([text])
        prices = [PRICES.price(SPACE.encoder.to_candidate(point_of(s))) for s in history(30)]
        if not any(limits[0].allows(price) for price in prices):
            limits = (
                type(limits[0])(
                    limits[0].name,
                    float(np.median([getattr(p, limits[0].name) for p in prices])),
                    text,
                ),
            )
        proposer = BayesianSampler(Problem(SPACE, TWO, PRICES, tuple(limits), seed=0))
        rows = [s for s in history(60) if proposer.is_allowed(point_of(s))]
        for _ in range(4):
            point = proposer.propose(rows)
            assert proposer.is_allowed(point)
            rows.append(tried(SPACE, point, "running"))


def test_costs_of_many_are_the_pricers() -> None:
    names = ("trainable_params", "adapter_bytes", "train_flops", "peak_memory_bytes")
    model = CostModel(SPACE, [TWO[0], *(objective(n) for n in names)], PRICES)
    points = [SPACE.point_sampler.stratified(RNG(s)) for s in range(40)] + [
        Point(np.zeros(6, dtype=int))
    ]
    fast, exact = model.predict(points), model.exact(points)
    np.testing.assert_allclose(fast[:, :2], exact[:, :2], rtol=1e-9)
    apart = np.abs(fast[:, 2:] - exact[:, 2:])
    assert apart.mean() < 0.05
    assert apart.max() < 0.3
    assert not model.is_exact
    assert CostModel(SPACE, TWO, PRICES).is_exact


def test_a_measured_cost_is_learned_from_the_priced_one() -> None:
    model = CostModel(SPACE, [TWO[0], objective("train_seconds")], PRICES)

    def seconds(trial: Trial) -> float:
        return 7.0 + trial.costs.train_flops / 1e9

    rows = [replace(t, values={"accuracy": 0.5, "train_seconds": seconds(t)}) for t in history(12)]
    model.fit(rows)
    fresh = history(5, seed=9)
    expected = [math.log(seconds(s)) for s in fresh]
    assert model.exact([point_of(s) for s in fresh])[:, 0] == pytest.approx(expected, abs=0.02)


def test_the_latency_of_a_method_without_flops_is_learned_from_its_sites() -> None:
    model = CostModel(SPACE, [TWO[0], objective("latency_ms")], PRICES)
    noise = RNG(0)
    each = {"lora": 0.12, "ia3": 0.05, "miss": 0.02}

    def latency(trial: Trial) -> float:
        sites = sum(each[spec.method] for spec in trial.plan.specs)
        return 2.0 + sites + trial.costs.inference_flops / 1e9

    rows, fresh = history(20), history(60, seed=9)
    model.fit(
        [
            replace(
                t,
                values={
                    "accuracy": 0.5,
                    "latency_ms": latency(t) * math.exp(noise.normal(0.0, 0.03)),
                },
            )
            for t in rows
        ]
    )
    truth = np.log([latency(t) for t in fresh])
    error = model.predict([point_of(t) for t in fresh])[:, 0] - truth
    assert np.sqrt(np.mean(error**2)) < 0.06
    assert np.sqrt(np.mean(error**2)) < 0.35 * truth.std()
    # A running trial is predicted, a complete one is known.
    running = replace(fresh[0], state="running", values={})
    assert model.observed(running)[0] == pytest.approx(truth[0], abs=0.15)
    told = replace(fresh[0], values={"accuracy": 0.5, "latency_ms": 3.0})
    assert model.observed(told)[0] == pytest.approx(math.log(3.0))


def test_a_method_that_was_not_tried_costs_as_much_as_the_others() -> None:
    known, rng = RNG(1).random(20), RNG(0)
    sites = np.column_stack([rng.integers(0, 9, (20, 2)), np.zeros(20)]).astype(float)
    measured = 2.0 + known + sites @ np.array([0.3, 0.3, 0.0])
    found = MeasuredCost.fit(known, sites, measured)
    assert found.sites == pytest.approx([0.3, 0.3, 0.3], rel=0.05)
    assert (found.fixed, found.slope) == pytest.approx((2.0, 1.0), rel=0.1)
    assert found.predict(known, sites) == pytest.approx(measured, rel=0.02)


def test_equal_trials_do_not_upset_the_model_of_a_measured_cost() -> None:
    found = MeasuredCost.fit(np.zeros(3), np.zeros((3, 2)), np.full(3, 4.0))
    assert found.predict(np.ones(1), np.ones((1, 2))) == pytest.approx([4.0])


def test_a_pruned_trial_counts_at_the_quality_its_rung_predicts() -> None:
    rows = [replace(t, rungs=((3, t.values["accuracy"] - 0.2),)) for t in history(12)]
    for trial in history(4, seed=5):
        rungs = ((3, trial.values["accuracy"] - 0.2),)
        rows.append(replace(trial, state="pruned", values={}, rungs=rungs))
    observations = observe(rows)
    assert observations.is_final.sum() == 12
    best = observations.values[:12].max()
    expected = [min(quality(SPACE, point_of(t)), best) for t in rows[12:]]
    assert observations.values[12:] == pytest.approx(expected, abs=0.02)
    assert (observations.noise[12:] > 0).all()
    assert len(observe(rows, 5).values) == 5


def test_a_rung_that_hardly_tells_the_end_says_nothing_of_pruned_trials() -> None:
    rows = [replace(t, rungs=((3, float(i % 5)),)) for i, t in enumerate(history(12))]
    for trial in history(4, seed=5):
        rows.append(replace(trial, state="pruned", values={}, rungs=((3, 0.0),)))
    assert len(observe(rows).values) == 12


def test_a_history_that_grows_is_the_history_read_at_once() -> None:
    final = [replace(t, rungs=((3, t.values["accuracy"] - 0.2),)) for t in history(12)]
    final[7:] = [replace(t, state="pruned", values={}) for t in final[7:]]
    running = [replace(t, state="running", values={}, rungs=()) for t in final]
    grown = History(SPACE, TWO[0])
    for n in (3, 6, 12):  # trials end later than others that were started after them
        grown.update([*running[: n // 2], *final[n // 2 : n]])
    grown.update(final)
    at_once = History(SPACE, TWO[0])
    at_once.update(final)
    one, two = (Observations.of(found, 100) for found in (grown, at_once))
    assert [t.number for t in one.trials] == [t.number for t in two.trials]
    assert one.values.tolist() == two.values.tolist()
    assert (list(grown.running), grown.n_pruned, grown.latest) == ([], 5, at_once.latest)
    assert sorted(grown.ended) == list(range(12))


def test_the_surrogate_predicts_and_knows_where_it_cannot() -> None:
    low, high = (math.log(c) for c in SPACE.cost_range())
    embedding = Embedding(SPACE.grid, (low, high))

    def points(points: Sequence[Point]) -> Features:
        options = np.array([g.options for g in points])
        logs = np.log(np.maximum(SPACE.n_params(options), 1))
        return embedding.features(options, np.array([g.position for g in points]), logs)

    train = [point_of(s) for s in history(60)]
    test = [point_of(s) for s in history(100, seed=7)]
    model = GaussianProcess(embedding)
    model.fit(points(train), np.array([quality(SPACE, g) for g in train]))
    mean, spread = model.predict(points(test))
    truth = np.array([quality(SPACE, g) for g in test])
    assert np.corrcoef(mean, truth)[0, 1] > 0.9
    assert np.mean(np.abs(truth - mean) < 3 * spread) > 0.9
    _, known = model.predict(points(train))
    assert known.mean() < spread.mean()


def test_equal_values_do_not_upset_the_surrogate() -> None:
    rows = [replace(t, values={**t.values, "accuracy": 0.5}) for t in history(20)]
    assert BayesianSampler(Problem(SPACE, TWO, PRICES, seed=0)).propose(rows).options.any()


def test_the_sampler_works_in_an_ordinary_optuna_study() -> None:
    sampler = AutoPeftSampler(SPACE, TWO, seed=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    distributions = sampler.infer_relative_search_space(study, None)
    for _ in range(18):
        trial = study.ask(distributions)
        candidate = SPACE.decode(trial.params)
        price = PRICES.price(candidate)
        trial.set_user_attr("price", to_plain(price))
        score = quality(SPACE, SPACE.encoder.from_candidate(candidate))
        study.tell(trial, [score, price.trainable_params])
    assert len({str(t.params) for t in study.trials}) == 18


@pytest.mark.parametrize("seed", range(5))
def test_other_parameters_of_a_space_come_back_as_nearly_the_same_point(seed: int) -> None:
    low, high = (math.log(c) for c in SPACE.cost_range())
    budget = BudgetFirstEncoding(SPACE.encoder, 0, (low, high))
    plain = PlainEncoding(SPACE.encoder)
    point = SPACE.point_sampler.stratified(RNG(seed))
    assert plain.decode(plain.encode(point)).key == point.key
    assert set(plain.encode(point)) == set(plain.parameters)
    values = budget.encode(point)
    assert set(values) == set(budget.parameters)
    back = budget.decode(values)
    cost, again = (float(SPACE.n_params(g.options)) for g in (point, back))
    assert abs(math.log(again / cost)) < 0.7
    assert back.position == point.position


def test_failed_trials_end_the_initial_design_and_keep_proposals_away_from_their_rates() -> None:
    rng = RNG(0)
    drawn = [SPACE.point_sampler.stratified(rng) for _ in range(3 * N_INITIAL)]
    # The best rates are said to be high ones, where trainings fail.
    rows = [
        tried(SPACE, p, "failed") if p.position > 0.5 else tried(SPACE, p, accuracy=p.position)
        for p in drawn
    ]
    proposer = BayesianSampler(Problem(SPACE, TWO, PRICES, seed=0))
    first = rows[: N_INITIAL + 4]
    assert 4 <= sum(trial.state == "complete" for trial in first) < N_INITIAL
    proposer.propose(first)
    assert proposer.origin == "search"
    assert proposer.propose(rows).position < 0.7
    points = [replace(drawn[0], position=at) for at in (0.2, 0.8)]
    low, high = proposer.success.predict(proposer._features(points))
    assert low > 0.8
    assert high < 0.2


def test_without_failures_success_is_certain() -> None:
    proposer = BayesianSampler(Problem(SPACE, TWO, PRICES, seed=0))
    rows = history(16)
    proposer.propose(
        [*rows, replace(tried(SPACE, point_of(rows[0]), "failed"), reason=INTERRUPTED)]
    )
    assert proposer.success.predict(proposer._features([point_of(rows[0])])) == [1.0]


def test_baselines_aim_in_turn_at_the_best_lora_and_at_their_front() -> None:
    choices = [
        point
        for rank in (1, 64)
        for at in (0.1, 0.5)
        if (point := single_method(SPACE.encoder, "lora", None, rank, at))
    ]
    proposer = BayesianSampler(Problem(SPACE, TWO, PRICES, seed=0))
    middle = [single_method(SPACE.encoder, "lora", None, 8, at) for at in (0.2, 0.4, 0.6, 0.8)]
    loras = [replace(tried(SPACE, point), origin="baseline") for point in middle if point]
    rows = [*history(12), *loras]
    sizes = [
        SPACE.n_params(proposer.propose_baseline(rows[:end], choices).options) for end in (16, 15)
    ]
    assert sizes[0] > sizes[1]
