"""Tests of any finite number as a result: a search asks on, the same way each time."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.costs.topology import Topology
from autopeft.searcher.controller import Decision, SearchController
from autopeft.searcher.samplers import bayesian
from autopeft.searcher.samplers.gp import GaussianProcess
from autopeft.searcher.space.space import SearchSpace

SPACE = SearchSpace.from_source(
    {"methods": ["lora", "ia3"]}, Topology(2, {"attn.q": (32, 32), "mlp.up": (32, 64)}), steps=90
)
THREE = ("perplexity", "trainable_params", "train_seconds")
EXTREMES = (1e308, -1e308, 5e-324, 0.0, 1e160, -1e-200, 20.0, 20.5, 21.0)
VALUES = st.sampled_from(EXTREMES) | st.floats(allow_nan=False, allow_infinity=False)
ENDINGS = st.tuples(st.sampled_from(["complete"] * 4 + ["failed", "pruned"]), VALUES, VALUES)


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the models take over after four trials."""
    monkeypatch.setattr(bayesian, "N_INITIAL", 4)


def proposed(rows: list[tuple[str, float, float]], sampler: str = "autopeft", **given: Any) -> Any:
    """Return the candidates that a search of such endings asks for, and the controller."""
    given = {"n_portfolio": 0, "n_baselines": 1, **given}
    controller = SearchController(SPACE, THREE, sampler=sampler, seed=5, **given)
    digests = []
    for state, value, other in rows:
        trial = controller.ask()
        digests.append(trial.digest)
        if controller.report(trial, 10, other) is Decision.STOP:
            continue
        if state == "complete":
            controller.tell(trial, score=value, measured={"train_seconds": other})
        else:
            ending: dict[str, Any] = {"failed" if state == "failed" else "stopped": "so"}
            controller.tell(trial, **ending)
    digests.append(controller.ask().digest)
    return digests, controller


@settings(max_examples=15)
@given(rows=st.lists(ENDINGS, min_size=6, max_size=12))
def test_no_finite_number_stops_a_search(rows: list[tuple[str, float, float]]) -> None:
    first, controller = proposed(rows)
    assert controller.warnings == ()
    assert proposed(rows)[0] == first


@pytest.mark.nightly
@pytest.mark.timeout(600)
@settings(max_examples=1500)
@given(rows=st.lists(ENDINGS, min_size=6, max_size=14))
def test_no_finite_number_stops_a_search_whatever_is_drawn(
    rows: list[tuple[str, float, float]],
) -> None:
    assert proposed(rows)[1].warnings == ()


@pytest.mark.parametrize("odd", [1e308, -1e308, 6e159, 5e-324])
def test_all_equal_but_one(odd: float) -> None:
    """Regression: one perplexity of a loss of 368 made every later ask raise (issue 18)."""
    rows = [("complete", 20.0, 1.0)] * 5 + [("complete", odd, 1.0)] + [("complete", 20.0, 1.0)] * 2
    assert proposed(rows)[1].warnings == ()


def test_a_diverged_perplexity_does_not_blind_the_model() -> None:
    rows = [("complete", 20.0 + i % 3, 1.0 + i % 2) for i in range(8)]
    diverged = [*rows[:4], ("complete", 6e159, 1.0), *rows[5:]]
    _, controller = proposed(diverged)
    model = controller._sampler.inner.model
    assert model._spread < 100


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_other_samplers_ask_on_too(sampler: str) -> None:
    rows = [("complete" if i % 4 else "failed", v, 1e308) for i, v in enumerate(EXTREMES * 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's own arithmetic may overflow.
        assert proposed(rows, sampler)[0] == proposed(rows, sampler)[0]


def test_a_model_that_fails_is_replaced_by_chance_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **named: Any) -> None:
        raise ValueError("array must not contain infs or NaNs")

    monkeypatch.setattr(GaussianProcess, "fit", broken)
    rows = [("complete", 20.0 + i, 1.0) for i in range(8)]
    with pytest.warns(UserWarning, match="its model failed"):
        first, controller = proposed(rows)
    assert "infs or NaNs" in controller.warnings[0]
    with pytest.warns(UserWarning, match="its model failed"):
        assert proposed(rows)[0] == first


def test_a_search_with_a_diverged_trial_is_resumed(tmp_path: Path) -> None:
    rows = [("complete", 20.0 + i, 1.0) for i in range(6)] + [("complete", 6e159, 1.0)]
    given: dict[str, Any] = {"storage": tmp_path / "a.db", "study_name": "s"}
    proposed(rows, **given)
    again = SearchController(SPACE, THREE, seed=6, resume=True, **given)
    for _ in range(3):
        assert again.ask() is not None


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_report_that_is_not_finite_fails_the_trial(score: float) -> None:
    controller = SearchController(SPACE, THREE, seed=5)
    trial = controller.ask()
    assert controller.report(trial, 10, score) is Decision.STOP
    assert controller.trials()[0].state == "failed"
    assert controller.trials()[0].reason == f"score at step 10 is {score}"
    controller.tell(trial, failed="late")
    assert controller.counts()["failed"] == 1
