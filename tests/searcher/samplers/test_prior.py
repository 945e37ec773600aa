from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autopeft.costs import Topology
from autopeft.errors import SettingsError
from autopeft.searcher.controller import SearchController
from autopeft.searcher.samplers.prior import (
    PriorRow,
    checked_rows,
    normal_scores,
    point_of,
    read_prior,
)
from autopeft.searcher.samplers.warm_start import WarmStart
from autopeft.searcher.space.space import SearchSpace

SHAPES = {"attn.q": (64, 64), "attn.v": (64, 64), "mlp.up": (256, 64), "mlp.down": (64, 256)}
TOPOLOGY = Topology(8, SHAPES)
QV = ("attn.q", "attn.v")


def space(**config: Any) -> SearchSpace:
    return SearchSpace.from_source({"methods": ["lora", "ia3"], **config}, TOPOLOGY)


def row(**changes: Any) -> PriorRow:
    given: dict[str, Any] = {"setting": "a", "method": "lora", "roles": QV, "rank": 8}
    given |= {"quality": 0.5, **changes}
    return PriorRow(**given)


def sites(here: SearchSpace, given: PriorRow) -> set[tuple[int, str]]:
    point = point_of(given, here)
    assert point is not None
    return {(spec.layer, spec.role) for spec in here.encoder.to_candidate(point).plan.specs}


@pytest.mark.parametrize("granularity", ["layer", "site", "group:2"])
def test_a_row_is_the_same_part_of_any_model(granularity: str) -> None:
    upper = row(depth=(0.5, 1.0))
    assert sites(space(granularity=granularity), upper) == {
        (layer, role) for layer in range(4, 8) for role in QV
    }


def test_a_part_narrower_than_a_layer_is_the_nearest_layer() -> None:
    assert {layer for layer, _ in sites(space(), row(depth=(0.17, 0.18)))} == {1}


def test_rank_and_rate_are_the_nearest_of_the_space() -> None:
    here = space()
    low, high = here.encoder.rates("lora")
    point = point_of(row(rank=9, learning_rate=low), here)
    assert point is not None
    candidate = here.encoder.to_candidate(point)
    assert {spec.rank for spec in candidate.plan.specs} == {8}
    assert candidate.train.learning_rate == pytest.approx(low)
    middle = point_of(row(), here)
    assert middle is not None
    assert middle.position == 0.5
    assert point_of(row(learning_rate=10 * high), here) is None


@pytest.mark.parametrize("given", [{"method": "oft"}, {"roles": ("norm",)}])
def test_what_the_space_has_not_is_no_point(given: dict[str, Any]) -> None:
    assert point_of(row(**given), space()) is None


def test_qualities_are_compared_within_a_setting_and_failures_are_last() -> None:
    rows = [
        row(quality=quality, setting=setting)
        for setting, quality in [("a", 0.9), ("b", 0.1), ("a", None), ("b", 0.2), ("a", 0.8)]
    ]
    scores = normal_scores(rows)
    assert scores[2] < scores[4] < scores[0]
    assert scores[1] == pytest.approx(-scores[3])
    known = WarmStart.of((), space(), [row(setting="c", method="oft"), *rows])
    assert known.sources.tolist() == [1, 1, 1, 2, 2]
    assert known.n_rows == len(known) == 5


def test_a_file_is_read_and_its_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    plain = {"setting": "a", "method": "lora", "roles": list(QV), "rank": 8, "quality": 0.5}
    path.write_text(json.dumps([plain, {**plain, "quality": None, "depth": [0.5, 1]}]))
    assert read_prior(path) == (row(), row(quality=None, depth=(0.5, 1.0)))
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"depth": [1, 0.5]}, "depth"),
        ({"rank": -1}, "rank"),
        ({"roles": []}, "roles"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"quality": "good"}, "quality"),
    ]
    for wrong, named in mistakes:
        path.write_text(json.dumps([plain | wrong]))
        with pytest.raises(SettingsError, match=named):
            read_prior(path)
    with pytest.raises(SettingsError, match="prior"):
        read_prior(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rank", wrong) for wrong in (-3, "x", None, 2.5, True, 10**30)),
        *(("roles", wrong) for wrong in ((), None, "attn.q", (1,))),
        *(("depth", wrong) for wrong in ((1, 0), (0,), None, (float("nan"), 1), "ab", (0, 1, 2))),
        *(("learning_rate", wrong) for wrong in (0, -1, float("nan"), float("inf"), "x", 10**400)),
        *(("quality", wrong) for wrong in (float("nan"), float("inf"), "x", 10**400, 1j)),
        *(("setting", wrong) for wrong in (3, None, [], object())),
        ("method", ["lora"]),
    ],
)
def test_rows_are_checked_as_those_of_a_file_are(name: str, value: Any) -> None:
    """Regression: a mistake was a traceback of the sampler, or passed (issue 18)."""
    with pytest.raises(SettingsError, match=r"prior\[1\]") as refused:
        SearchController(space(), ["accuracy"], prior=[row(), row(**{name: value})])
    assert "\n" not in str(refused.value)


def test_rows_may_hold_numbers_of_numpy() -> None:
    given = row(rank=np.int64(8), quality=np.float32(0.5), depth=(0, 1), roles=list(QV))
    assert checked_rows([given]) == (row(),)


def test_a_controller_takes_rows_and_refuses_what_fits_nowhere() -> None:
    rng = np.random.default_rng(0)
    rows = [row(rank=int(rank), quality=float(rank)) for rank in rng.choice([1, 2, 4, 8], 12)]
    controller = SearchController(space(), ["accuracy", "trainable_params"], prior=rows)
    for _ in range(12):
        trial = controller.ask()
        assert trial is not None
        ranks = sum(spec.rank for spec in trial.plan.specs)
        controller.tell(trial, score=1.0 - 1.0 / (1.0 + ranks))
    assert controller.counts()["complete"] == 12
    with pytest.raises(SettingsError, match="prior"):
        SearchController(space(), ["accuracy"], prior=[row(method="oft")])


def test_the_measured_rows_are_a_prior() -> None:
    path = Path(__file__).parents[3] / "examples" / "benchmarks" / "prior.json"
    rows = read_prior(path)
    topology = Topology(6, {**SHAPES, "attn.k": (64, 64), "attn.o": (64, 64), "norm": (64, 4)})
    here = SearchSpace.from_source("default", topology)
    assert WarmStart.of((), here, rows).n_rows > 0.9 * len(rows)
