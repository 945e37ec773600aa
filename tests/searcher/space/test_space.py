"""Tests of search spaces: legal points, random points, error messages."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft import methods
from autopeft.costs import PriceTable, Topology, check_plan
from autopeft.errors import SpaceError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.searcher.space.config import prompt_sizes
from autopeft.searcher.space.space import SearchSpace, available_spaces

ROOT = Path(__file__).parents[3]
BERT = Topology(
    6,
    {
        "attn.q": (64, 64),
        "attn.k": (64, 64),
        "attn.v": (64, 64),
        "attn.o": (64, 64),
        "mlp.up": (128, 64),
        "mlp.down": (64, 128),
        "norm": (64, 4),
    },
    head_params=130,
)
FUSED = Topology(
    4, {"attn.qkv": (96, 32), "attn.o": (32, 32), "mlp.gate_up": (64, 32), "mlp.down": (32, 64)}
)
SOURCES: dict[str, Any] = {
    "layer": {"methods": ["lora", "ia3", "ln_tuning"], "alpha_ratio": [1, 2], "dropout": [0, 0.1]},
    "site": {"methods": ["lora", "miss", "oft"], "granularity": "site"},
    "group": {
        "methods": ["dora", "ia3"],
        "granularity": "group:4",
        "layers": "last:5",
        "alpha": [8, 16],
    },
    "model": {
        "methods": {"lora": {"ranks": [1, 8], "learning_rate": [1e-4, 1e-2]}},
        "granularity": "model",
    },
    "narrow": {"methods": ["lora", "ia3"], "min_adapted_layers": 2, "max_adapted_layers": 3},
    "sharing": {
        "methods": ["lora", "vera", "vblora", "unilora", "tinylora_tied", "randlora"],
        "granularity": "site",
    },
}
SPACES = {name: SearchSpace.from_source(row, BERT, steps=30) for name, row in SOURCES.items()}
names = st.sampled_from(sorted(SPACES))
seeds = st.integers(0, 10_000)


def mutated(space: SearchSpace, candidate: Candidate, rng: np.random.Generator) -> Candidate:
    point = space.neighborhood.mutate(space.encoder.from_candidate(candidate), rng)
    return space.encoder.to_candidate(point)


def crossed(
    space: SearchSpace, first: Candidate, second: Candidate, rng: np.random.Generator
) -> Candidate:
    one, other = map(space.encoder.from_candidate, (first, second))
    return space.encoder.to_candidate(space.neighborhood.crossover(one, other, rng))


@settings(deadline=None, max_examples=150)
@given(names, seeds)
def test_every_sample_is_legal_priced_and_survives_its_parameters(name: str, seed: int) -> None:
    space, rng = SPACES[name], np.random.default_rng(seed)
    first, second = space.sample(rng), space.sample_stratified(rng)
    for candidate in (
        first,
        second,
        mutated(space, first, rng),
        crossed(space, first, second, rng),
    ):
        check_plan(BERT, candidate.plan)
        assert candidate.plan.specs
        assert space.decode(space.encode(candidate)) == candidate
        point = space.encoder.from_candidate(candidate)
        price = PriceTable.from_topology(BERT).price(candidate)
        assert price.trainable_params == space.n_params(point.options)
        assert set(space.encode(candidate)) <= set(space.parameters)


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_limits_on_adapted_layers_hold_for_samples_and_mutations(seed: int) -> None:
    space, rng = SPACES["narrow"], np.random.default_rng(seed)
    candidate = space.sample(rng)
    for _ in range(5):
        assert 2 <= len({spec.layer for spec in candidate.plan.specs}) <= 3
        candidate = mutated(space, candidate, rng)


def test_a_rate_is_the_methods_own_at_one_shared_position() -> None:
    space = SPACES["layer"]
    plan = AdapterPlan(
        [
            LayerSpec(0, "attn.q", "lora", 4),
            LayerSpec(0, "attn.v", "lora", 4),
            LayerSpec(1, "norm", "ln_tuning"),
        ]
    )
    params = {
        "lr_position": 0.5,
        "layer.00.method": "lora",
        "layer.00.rank": 4,
        "layer.00.placement": "qv",
        "layer.01.method": "ln_tuning",
    }
    train = space.decode(params).train
    assert space.decode(params).plan == plan
    rates = dict(train.method_rates)
    assert set(rates) == {"lora", "ln_tuning", "head"}
    assert rates["lora"] == pytest.approx(
        math.sqrt(math.prod(methods.get("lora").learning_rate)), rel=5e-3
    )
    assert train.learning_rate == pytest.approx(
        math.sqrt(rates["lora"] * rates["ln_tuning"]), rel=5e-3
    )
    single = space.decode({"lr_position": 0.0, "layer.00.method": "lora", "layer.00.rank": 4}).train
    assert (single.learning_rate, dict(single.method_rates)) == (
        methods.get("lora").learning_rate[0],
        {"head": methods.HEAD_RATES[0]},
    )


def test_stratified_samples_fill_the_log_cost_axis_evenly_where_uniform_ones_crowd() -> None:
    space = SearchSpace.from_source("default", BERT)
    rng = np.random.default_rng(0)
    low, high = (math.log(c) for c in space.cost_range())

    def quarters(draw: Callable[[np.random.Generator], Candidate]) -> np.ndarray:
        logs = [
            math.log(space.n_params(space.encoder.from_candidate(draw(rng)).options))
            for _ in range(200)
        ]
        return np.histogram(logs, bins=4, range=(low, high))[0]

    assert quarters(space.sample_stratified).min() > 25
    assert quarters(space.sample).min() < 5


def test_a_sample_comes_close_to_the_wanted_cost() -> None:
    space = SearchSpace.from_source("default", BERT)
    rng = np.random.default_rng(1)
    for wanted in (2_000, 10_000):
        draws = [space.point_sampler.at_cost(rng, math.log(wanted)) for _ in range(20)]
        costs = [space.n_params(point.options) for point in draws]
        assert np.median(np.abs(np.log(np.array(costs) / wanted))) < 0.1


def test_baselines_are_lora_and_the_first_four_cover_placement_rate_and_the_largest_rank() -> None:
    rows = SPACES["layer"].baselines()
    assert {m for c in rows for m in c.plan.methods} == {"lora"}
    first = rows[:4]
    assert len({c.train.learning_rate for c in first}) == 2
    assert {frozenset(s.role for s in c.plan.specs) for c in first} == {
        frozenset({"attn.q", "attn.v"}),
        frozenset({"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}),
    }
    ranks = {option.rank for option in SPACES["layer"].grid.options if option.method == "lora"}
    assert {8, max(ranks)} == {s.rank for c in first for s in c.plan.specs}
    assert len(SPACES["layer"].baselines(3)) == 3
    assert SPACES["group"].baselines() == ()


def test_known_recipes_are_points_of_the_space() -> None:
    for space in SPACES.values():
        for candidate in (*space.baselines(), *space.portfolio(), space.reference()):
            assert space.decode(space.encode(candidate)) == candidate
    assert SPACES["layer"].reference().plan.specs == ()


def test_fused_modules_stand_in_for_their_parts() -> None:
    space = SearchSpace.from_source({"methods": ["lora"]}, FUSED)
    roles = {s.role for c in space.baselines() for s in c.plan.specs}
    assert roles == {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"}


def test_methods_with_a_role_of_their_own_go_there_whatever_the_placement() -> None:
    space = SPACES["layer"]
    params = {"lr_position": 0.5, "layer.00.method": "ln_tuning", "layer.00.placement": "qv"}
    assert [s.role for s in space.decode(params).plan.specs] == ["norm"]


def test_a_candidate_from_elsewhere_is_no_point_of_the_space() -> None:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 5)])
    with pytest.raises(SpaceError):
        SPACES["layer"].encode(Candidate(plan, TrainSettings(1e-3)))


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({}, "space.methods"),
        ({"methods": []}, "space.methods"),
        ({"methods": ["lorra"]}, "method"),
        ({"methods": ["lora"], "granularty": "layer"}, "space.granularty"),
        ({"methods": ["lora"], "granularity": "group:0"}, "space.granularity"),
        ({"methods": ["lora"], "roles": ["attn.qq"]}, "space.roles"),
        ({"methods": ["lora"], "roles": ["mlp.gate"]}, "space.roles"),
        ({"methods": ["lora"], "placements": {"x": ["cross.q"]}}, "space.placements.x"),
        ({"methods": ["lora"], "layers": [0, 6]}, "space.layers"),
        ({"methods": ["lora"], "layers": "last:7"}, "space.layers"),
        ({"methods": ["lora"], "layers": "upper"}, "space.layers"),
        ({"methods": {"lora": {"ranks": [65]}}}, "space.methods.lora.ranks"),
        ({"methods": {"lora": {"ranks": [0]}}}, "space.methods.lora.ranks"),
        ({"methods": {"oft": {"ranks": [5]}}}, "space.methods.oft.ranks"),
        ({"methods": {"ia3": {"ranks": [2]}}}, "space.methods.ia3.ranks"),
        ({"methods": {"lora": {"rank": [2]}}}, "space.methods.lora.rank"),
        ({"methods": {"lora": {"ranks": []}}}, "space.methods.lora.ranks"),
        ({"methods": {"lora": {"ranks": [2.5]}}}, "space.methods.lora.ranks[0]"),
        ({"methods": {"ia3": {}, "lora": [2]}}, "space.methods.lora"),
        ({"methods": 3}, "space.methods[0]"),
        ({"methods": ["lora"], "name": "mine"}, "space.name"),
        ({"methods": ["lora"], "granularity": 3}, "space.granularity"),
        ({"methods": ["lora"], "roles": []}, "space.roles"),
        ({"methods": ["lora"], "placements": ["qv"]}, "space.placements"),
        ({"methods": ["lora"], "layers": []}, "space.layers"),
        ({"methods": ["lora"], "layers": True}, "space.layers"),
        ({"methods": ["lora"], "alpha_ratio": float("nan")}, "space.alpha_ratio"),
        ({"methods": {"lora": {"learning_rate": 0}}}, "space.methods.lora.learning_rate"),
        (
            {"methods": {"lora": {"learning_rate": [1e-2, 1e-3]}}},
            "space.methods.lora.learning_rate",
        ),
        ({"methods": ["lora"], "alpha_ratio": 0}, "space.alpha_ratio"),
        ({"methods": ["lora"], "alpha": []}, "space.alpha"),
        ({"methods": ["lora"], "alpha": 16, "alpha_ratio": 2}, "space.alpha_ratio"),
        ({"methods": ["lora"], "dropout": [1.0]}, "space.dropout"),
        ({"methods": ["lora"], "include_empty": "yes"}, "space.include_empty"),
        ({"methods": ["lora"], "max_adapted_layers": -1}, "space.max_adapted_layers"),
        ({"methods": ["ln_tuning"], "roles": ["attn.q"], "layers": [0]}, ""),
        ("no_such_space", "space"),
    ],
)
def test_every_mistake_names_its_field_in_one_line(row: Any, field: str) -> None:
    if not field:
        SearchSpace.from_source(row, BERT)  # norm is its own role: no mistake
        return
    with pytest.raises(SpaceError, match=f"^{re.escape(field)}=") as caught:
        SearchSpace.from_source(row, BERT)
    assert "\n" not in str(caught.value)


def test_the_remedy_is_of_the_setting_s_own_size() -> None:
    with pytest.raises(SpaceError, match=r"use e\.g\. \[1, 2\]"):
        SearchSpace.from_source({"methods": ["lora"], "alpha_ratio": 0}, BERT)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"source": 3}, "space=3: must be a name, a file or a mapping"),
        ({"topology": 3}, "topology=3: must be a Topology"),
        *(({"steps": steps}, "whole numbers from 1") for steps in ("9", 1.5, float("nan"), True)),
        ({"batch_size": None}, "whole numbers from 1"),
        ({"weight_decay": "0.1"}, "weight_decay='0.1': must be a number"),
        ({"warmup_fraction": None}, "warmup_fraction=None: must be a number"),
    ],
)
def test_what_a_space_is_made_with_is_checked(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpaceError, match=problem):
        SearchSpace.from_source(**{"source": "default", "topology": BERT, **given})


def test_a_near_miss_is_guessed() -> None:
    with pytest.raises(SpaceError, match="did you mean 'lora'"):
        SearchSpace.from_source({"methods": ["lorra"]}, BERT)
    with pytest.raises(SpaceError, match="did you mean 'default'"):
        SearchSpace.from_source("defualt", BERT)


def test_a_method_that_fits_nowhere_is_a_mistake_only_if_the_user_wrote_it() -> None:
    bare = Topology(3, {"attn.q": (16, 16), "attn.v": (16, 16)})
    with pytest.raises(SpaceError, match="ln_tuning"):
        SearchSpace.from_source({"methods": ["lora", "ln_tuning"]}, bare)
    assert "ln_tuning" not in SearchSpace.from_source("default", bare).methods


@pytest.mark.parametrize("name", sorted(available_spaces()))
@pytest.mark.parametrize("topology", [BERT, FUSED])
def test_every_shipped_space_loads_and_draws_on_any_model(name: str, topology: Topology) -> None:
    space = SearchSpace.from_source(name, topology)
    check_plan(topology, space.sample_stratified(np.random.default_rng(0)).plan)
    assert available_spaces()[name]
    assert name in (space.name, "default") or space.describe()


def test_the_widest_space_holds_and_draws_every_method_that_sits_in_a_block() -> None:
    widest = yaml.safe_load((ROOT / "search_spaces" / "everything.yaml").read_text())["methods"]
    known = {m.name for m in methods.all_methods() if set(m.roles) != {"model"}}
    assert set(widest) == known
    square = dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.o"), (64, 64))
    shapes = {**square, "mlp.up": (256, 64), "mlp.down": (64, 256), "norm": (64, 4)}
    topology = Topology(4, {**shapes, "attn": (4, 64), "block": (64, 64)}, n_heads=4)
    space = SearchSpace.from_source("everything", topology)
    rng = np.random.default_rng(0)
    drawn = {name for _ in range(400) for name in space.sample(rng).plan.methods}
    assert drawn == known


def test_a_file_is_read_and_a_broken_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("methods: {lora: {learning_rate: [1e-4, 1e-2]}}\nlayers: last:2\n")
    space = SearchSpace.from_source(path, BERT)
    assert (space.name, len(space.grid.units)) == ("mine", 2)
    path.write_text("methods: [lora")
    with pytest.raises(SpaceError, match="not YAML"):
        SearchSpace.from_source(path, BERT)


def test_every_package_folder_is_named_for_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "autopeft").rglob("__init__.py")
    }
    assert set(listed) == found | {"autopeft.search_spaces"}


PROMPTED = Topology(6, {**BERT.shapes, "model": (100, 64)}, head_params=130)
WITH_PROMPT = {"methods": ["lora", "ia3", "prompt_tuning"], "layers": "last:3"}


@pytest.mark.parametrize("granularity", ["model", "group:2", "layer", "site"])
def test_a_prompt_is_one_choice_of_the_whole_plan(granularity: str) -> None:
    space = SearchSpace.from_source({**WITH_PROMPT, "granularity": granularity}, PROMPTED)
    first, *others = space.grid.units
    assert (first.name, first.layers, first.roles) == ("plan", (0,), ("model",))
    assert all("model" not in unit.roles and 0 not in unit.layers for unit in others)
    prices = PriceTable.from_topology(PROMPTED, prompt_sizes=space.prompt_sizes)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        drawn = space.sample_stratified(rng)
        for candidate in (drawn, mutated(space, drawn, rng)):
            check_plan(PROMPTED, candidate.plan)
            assert prices.price(candidate).trainable_params > 130
            assert space.decode(space.encode(candidate)).plan == candidate.plan
            seen.add(tuple(sorted({spec.role == "model" for spec in candidate.plan.specs})))
    assert seen >= {(False,), (True,), (False, True)}
    assert {c.plan.methods for c in space.portfolio()} >= {("prompt_tuning",), ("ia3",)}
    assert all("prompt_tuning" not in c.plan.methods for c in space.baselines())


@pytest.mark.parametrize("topology", [BERT, FUSED])
@pytest.mark.parametrize("granularity", ["model", "group:2", "layer", "site"])
def test_starts_hold_loras_in_one_early_and_in_all_feed_forward_modules(
    granularity: str, topology: Topology
) -> None:
    row = {"methods": ["lora", "ia3"], "granularity": granularity}
    space = SearchSpace.from_source(row, topology)
    plans = [c.plan for c in space.portfolio() if c.plan.methods == ("lora",)]
    places = [{(spec.layer, spec.role) for spec in plan.specs} for plan in plans]
    feed_forward = {role for role in topology.shapes if role.startswith("mlp")}
    early = {"group:2": {0, 1}}.get(granularity, {1})
    roles = {"mlp.down"} if granularity == "site" else feed_forward
    assert ({(layer, role) for layer in early for role in roles} in places) == (
        granularity != "model"
    )
    assert {(layer, role) for layer in range(topology.n_layers) for role in feed_forward} in places
    assert all(spec.rank == 1 for plan in plans for spec in plan.specs)


def test_a_space_without_prompts_has_no_such_choice() -> None:
    for source in ("default", {"methods": ["lora", "ln_tuning"]}):
        plain, other = (SearchSpace.from_source(source, t) for t in (BERT, PROMPTED))
        assert plain.grid.units == other.grid.units
        assert plain.grid.options == other.grid.options
        draws = [s.sample_stratified(np.random.default_rng(3)).digest for s in (plain, other)]
        assert draws[0] == draws[1]
        assert other.prompt_sizes == () == prompt_sizes(source)


def test_a_space_of_prompts_alone_is_one_choice() -> None:
    space = SearchSpace.from_source({"methods": {"prompt_tuning": {"ranks": [3, 9]}}}, PROMPTED)
    assert [unit.name for unit in space.grid.units] == ["plan"]
    assert (
        space.prompt_sizes
        == (3, 9)
        == prompt_sizes({"methods": {"prompt_tuning": {"ranks": [9, 3]}}})
    )
    assert space.cost_range() == (130 + 3 * 64, 130 + 9 * 64)


def test_prompts_need_a_model_with_room_for_them() -> None:
    with pytest.raises(SpaceError, match="it needs one of model"):
        SearchSpace.from_source(WITH_PROMPT, BERT)
    full = Topology(6, {**BERT.shapes, "model": (2, 64)})
    with pytest.raises(SpaceError, match="a smaller max_length leaves more"):
        SearchSpace.from_source(WITH_PROMPT, full)
    with pytest.raises(SpaceError, match="a smaller max_length leaves more"):
        SearchSpace.from_source({"methods": {"prompt_tuning": {"ranks": 3}}}, full)


def test_low_rank_updates_have_one_alpha_at_all_ranks_where_a_space_says_nothing() -> None:
    space = SearchSpace.from_source({"methods": ["lora"], "granularity": "model"}, BERT)
    drawn = [space.sample(np.random.default_rng(seed)) for seed in range(20)]
    assert {candidate.train.alpha for candidate in drawn} == {16.0}
    assert len({spec.rank for candidate in drawn for spec in candidate.plan.specs}) > 1
    of_rank = SearchSpace.from_source({"methods": ["lora"], "alpha_ratio": 2}, BERT)
    candidate = of_rank.sample(np.random.default_rng(0))
    assert (candidate.train.alpha, candidate.train.alpha_ratio) == (None, 2.0)
    # A candidate of one space is none of the other: the same numbers mean other trainings.
    for ours, theirs in ((space, candidate), (of_rank, drawn[0])):
        assert ours.encoder.point_of(theirs) is None
