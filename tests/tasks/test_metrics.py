"""Metrics by name, path or function; what they return is checked; draws are paired."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, cast

import numpy as np
import pytest
from restored import restored
from scipy import stats
from sklearn import metrics as sk

from autopeft.costs.objectives import UNBOUNDED
from autopeft.errors import SettingsError
from autopeft.tasks.metrics import (
    METRICS,
    Metric,
    bootstrap_draws,
    evaluate_metric,
    find_metric,
    register_metric,
)

TARGETS = np.array([0, 1, 2, 2, 1, 0, 1, 1])
LABELS = np.array([0, 1, 1, 2, 1, 2, 1, 0])
_RNG = np.random.default_rng(0)
SCORES = _RNG.dirichlet(np.ones(3), size=8)
VALUES, GUESSES = _RNG.normal(size=20), _RNG.normal(size=20)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with restored(METRICS):
        yield


def value(metric: Any, targets: Any, predictions: Any) -> float:
    return evaluate_metric(find_metric(metric), targets, predictions)[0]


def test_classes_are_scored_as_scikit_learn_does() -> None:
    assert value("accuracy", TARGETS, LABELS) == sk.accuracy_score(TARGETS, LABELS)
    assert value("f1", TARGETS, LABELS) == sk.f1_score(TARGETS, LABELS, average="macro")
    assert value("matthews", TARGETS, LABELS) == sk.matthews_corrcoef(TARGETS, LABELS)


@pytest.mark.parametrize("seed", range(20))
def test_f1_and_matthews_are_those_of_scikit_learn_to_the_digit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_labels, n_rows = int(rng.integers(2, 6)), int(rng.integers(1, 40))
    targets, found = rng.integers(n_labels, size=(2, n_rows))
    known = sk.f1_score(targets, found, average="macro", labels=np.arange(6), zero_division=0.0)
    assert evaluate_metric(find_metric("f1").for_classes(6), targets, found)[0] == known
    present = sk.f1_score(targets, found, average="macro", zero_division=0.0)
    assert value("f1", targets, found) == present
    assert value("matthews", targets, found) == sk.matthews_corrcoef(targets, found)
    several, hits = rng.integers(2, size=(2, n_rows, 4))
    macro = sk.f1_score(several, hits, average="macro", zero_division=0.0)
    assert evaluate_metric(find_metric("f1").for_classes(4), several, hits)[0] == macro


def test_f1_counts_a_class_that_no_row_has() -> None:
    f1 = find_metric("f1").for_classes(4)
    three = value("f1", TARGETS, LABELS)
    assert evaluate_metric(f1, TARGETS, LABELS)[0] == pytest.approx(three * 3 / 4)


def test_rows_of_several_labels_are_right_as_a_whole() -> None:
    targets = np.array([[1, 0], [1, 1], [0, 0]])
    found = np.array([[1, 0], [1, 0], [0, 0]])
    _, rows = evaluate_metric(find_metric("accuracy"), targets, found)
    assert list(rows) == [1, 0, 1]
    assert value("f1_micro", targets, found) == pytest.approx(0.8)
    scores = np.array([[0.9, 0.2], [0.8, 0.7], [0.1, 0.3]])
    assert value("roc_auc", targets, scores) == 1.0
    assert value("f1_samples", np.array([[1, 0], [1, 1]]), scores[:2]) == 1.0


def test_numbers_are_scored_as_scipy_and_scikit_learn_do() -> None:
    assert value("pearson", VALUES, GUESSES) == pytest.approx(stats.pearsonr(VALUES, GUESSES)[0])
    tied = np.round(GUESSES)
    assert value("spearman", VALUES, tied) == pytest.approx(stats.spearmanr(VALUES, tied)[0])
    mse, mae = sk.mean_squared_error(VALUES, GUESSES), sk.mean_absolute_error(VALUES, GUESSES)
    assert value("mse", VALUES, GUESSES) == pytest.approx(mse)
    assert value("rmse", VALUES, GUESSES) == pytest.approx(mse**0.5)
    assert value("mae", VALUES, GUESSES) == pytest.approx(mae)
    assert value("r2", VALUES, GUESSES) == pytest.approx(sk.r2_score(VALUES, GUESSES))
    assert value("neg_mean_absolute_error", VALUES, GUESSES) == pytest.approx(-mae)


def test_a_constant_prediction_correlates_with_nothing() -> None:
    assert value("pearson", VALUES, np.ones(20)) == 0.0
    with pytest.raises(SettingsError, match="metric='spearman': is nan"):
        value("spearman", np.ones(20), VALUES)


@pytest.mark.parametrize(
    ("name", "needs", "direction"),
    [
        ("accuracy", "labels", "maximize"),
        ("loss", "loss", "minimize"),
        ("mse", "values", "minimize"),
        ("balanced_accuracy", "labels", "maximize"),
        ("f1_weighted", "labels", "maximize"),
        ("roc_auc", "scores", "maximize"),
        ("roc_auc_ovr", "scores", "maximize"),
        ("neg_log_loss", "scores", "maximize"),
        ("average_precision", "scores", "maximize"),
        ("neg_mean_absolute_error", "values", "maximize"),
        ("explained_variance", "values", "maximize"),
        ("rougeL", "text", "maximize"),
    ],
)
def test_a_metric_says_what_it_needs(name: str, needs: str, direction: str) -> None:
    metric = find_metric(name)
    assert (metric.name, metric.needs, metric.direction) == (name, needs, direction)
    assert metric.objective.direction == direction


def test_scorers_of_scikit_learn_read_labels_and_scores() -> None:
    binary, scores = TARGETS.clip(max=1), np.stack([1 - SCORES[:, 0], SCORES[:, 0]], axis=1)
    assert value("roc_auc", binary, scores) == sk.roc_auc_score(binary, scores[:, 1])
    ovr = sk.roc_auc_score(TARGETS, SCORES, multi_class="ovr")
    assert value("roc_auc_ovr", TARGETS, SCORES) == pytest.approx(ovr)
    assert value("neg_log_loss", TARGETS, SCORES) == pytest.approx(-sk.log_loss(TARGETS, SCORES))
    balanced = sk.balanced_accuracy_score(TARGETS, LABELS)
    assert value("balanced_accuracy", TARGETS, LABELS) == balanced
    argmax = sk.f1_score(TARGETS, SCORES.argmax(axis=1), average="weighted")
    assert value("f1_weighted", TARGETS, SCORES) == pytest.approx(argmax)


def test_a_scorer_that_does_not_fit_names_its_variants() -> None:
    with pytest.raises(
        SettingsError, match=r"metric='precision': fails on 8 rows.*precision_macro"
    ):
        value("precision", TARGETS, LABELS)


def test_an_unknown_name_gets_the_nearest_of_all() -> None:
    with pytest.raises(SettingsError, match="did you mean 'balanced_accuracy'"):
        find_metric("balanced_acuracy")


def test_a_function_gives_a_number_or_a_value_per_row() -> None:
    def share(targets: Any, predictions: Any) -> Any:
        return targets == predictions

    metric = find_metric(share)
    assert (metric.name, metric.direction, metric.needs) == ("share", "maximize", "labels")
    mean, rows = evaluate_metric(metric, TARGETS, LABELS)
    assert (mean, rows is not None) == (0.625, True)
    assert evaluate_metric(find_metric(lambda t, p: 0.5), TARGETS, LABELS) == (0.5, None)
    halves = np.array([Decimal("0.5")] * len(TARGETS))
    assert evaluate_metric(find_metric(lambda t, p: halves), TARGETS, LABELS)[0] == 0.5


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (float("nan"), "metric='mine': is nan, but must be a finite number or an array of 8"),
        (np.array([0.0] * 7 + [np.nan]), "is nan for row 8"),
        (np.ones(7), r"returns an array of shape \(7,\)"),
        ([1.0], r"returns an array of shape \(1,\)"),
        ("good", "returns a str"),
        (None, "metric='mine': returns a NoneType"),
        ("0.5", "returns a str"),
        (True, "returns a bool"),
        (np.array("0.5"), "returns a ndarray"),
        (1 + 2j, "returns a complex"),
        (["0.5"] * 8, "returns a list of str"),
        (np.ones(8, dtype=complex), "returns a ndarray of complex"),
        (np.ma.masked, "returns a MaskedConstant"),
        (np.ma.array(np.ones(8), mask=[False] * 7 + [True]), "returns a MaskedArray of masked"),
        ([0.5] * 7 + [None], "returns a list of NoneType"),
    ],
)
def test_what_a_function_returns_is_checked(returned: Any, problem: str) -> None:
    metric = Metric("mine", "maximize", lambda t, p: returned, "labels")
    with pytest.raises(SettingsError, match=problem) as error:
        evaluate_metric(metric, TARGETS, LABELS)
    assert "\n" not in str(error.value)


def test_a_function_that_fails_is_named() -> None:
    metric = find_metric(Metric("mine", "maximize", lambda t, p: 1 / 0, "labels"))
    with pytest.raises(SettingsError, match=r"mine': fails on 8 rows .ZeroDivisionError"):
        evaluate_metric(metric, TARGETS, LABELS)


def test_the_direction_is_said_or_read_from_the_name() -> None:
    @register_metric
    def calibration_error(targets: Any, predictions: Any) -> float:
        return 0.0

    @register_metric("profit", direction="minimize", needs="scores")
    def function(targets: Any, predictions: Any) -> float:
        return 0.0

    def costly(targets: Any, predictions: Any) -> float:
        return 0.0

    costly.direction = "minimize"  # type: ignore[attr-defined]
    assert find_metric("calibration_error").direction == "minimize"
    assert find_metric("profit").direction == "minimize"
    assert find_metric("profit").needs == "scores"
    assert find_metric(costly).direction == "minimize"
    assert find_metric("profit").function is function
    costly.direction = "up"  # type: ignore[attr-defined]
    with pytest.raises(SettingsError, match="its direction must be maximize or minimize"):
        find_metric(costly)
    with pytest.raises(SettingsError, match=r"its needs must be loss or labels or .* is 'logits'"):
        register_metric("own", costly, direction="minimize", needs=cast(Any, "logits"))
    with pytest.raises(SettingsError, match="metric='own': lacks a function"):
        register_metric(Metric("own", "maximize"))


def test_a_name_means_one_metric() -> None:
    register_metric("mine", lambda t, p: 1.0)
    with pytest.raises(SettingsError, match="registered twice"):
        register_metric("mine", lambda t, p: 2.0)
    with pytest.raises(SettingsError, match="registered twice"):
        register_metric("accuracy", lambda t, p: 2.0)


@pytest.mark.parametrize("name", ["loss", "perplexity"])
def test_what_is_compared_by_the_loss_is_no_name_of_another_metric(name: str) -> None:
    own = Metric(name, "minimize", lambda targets, predictions: 2.0, "labels")
    with pytest.raises(SettingsError, match=f"metric='{name}': .*; give yours another name"):
        find_metric(own)
    assert find_metric(name).needs == "loss"


def test_built_in_metrics_travel_by_name() -> None:
    for name in ("f1", "roc_auc", "rouge1", "number_match"):
        assert pickle.loads(pickle.dumps(find_metric(name))).name == name


def test_draws_of_a_mean_are_those_of_its_rows() -> None:
    metric = find_metric("accuracy")
    same = Metric("same", "maximize", lambda t, p: float((t == p).mean()), "labels")
    draws = bootstrap_draws(metric, TARGETS, LABELS, 200, seed=1)
    assert draws.shape == (200,)
    assert draws == pytest.approx(bootstrap_draws(same, TARGETS, LABELS, 200, seed=1))
    assert draws.std() == pytest.approx((0.625 * 0.375 / 8) ** 0.5, rel=0.2)


def test_draws_of_two_models_are_paired() -> None:
    metric = find_metric("pearson")
    first = bootstrap_draws(metric, VALUES, GUESSES, 50, seed=3)
    assert first == pytest.approx(-bootstrap_draws(metric, VALUES, -GUESSES, 50, seed=3))
    assert first != pytest.approx(bootstrap_draws(metric, VALUES, GUESSES, 50, seed=4))


def test_a_function_that_writes_into_its_arguments_changes_nothing_for_others() -> None:
    def writes(targets: Any, predictions: Any) -> float:
        targets -= predictions
        return float((targets == 0).mean())

    targets, predictions = TARGETS.copy(), LABELS.copy()
    metric = Metric("writes", "maximize", writes, "labels")
    draws = bootstrap_draws(metric, targets, predictions, 40, seed=0)
    assert (targets == TARGETS).all()
    assert (predictions == LABELS).all()
    pure = Metric("pure", "maximize", lambda t, p: float((t == p).mean()), "labels")
    assert draws == pytest.approx(bootstrap_draws(pure, TARGETS, LABELS, 40, seed=0))
    assert draws.std() > 0

    def sorts(prompts: Any, references: Any, texts: Any) -> float:
        texts.sort()
        references[0].append("another")
        return float(len(references[0]))

    references = [["a"], ["b"]]
    assert evaluate_metric(Metric("sorts", "maximize", sorts, "text"), references, ["b", "a"], None)
    assert references == [["a"], ["b"]]


def test_an_undefined_resample_is_drawn_again() -> None:
    targets = np.array([1, 0, 0, 0])  # A third of the resamples have one class.
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.05, 0.95], [0.7, 0.3]])
    draws = bootstrap_draws(find_metric("roc_auc"), targets, scores, 60, seed=0)
    assert np.isfinite(draws).all()
    assert set(np.round(draws, 3)) <= {round(wins / 3, 3) for wins in range(4)} | {0.5, 0.0, 1.0}


def test_a_metric_that_stays_undefined_is_told() -> None:
    calls = iter([0.5])
    metric = Metric("once", "maximize", lambda t, p: next(calls, float("nan")), "labels")
    with pytest.raises(
        SettingsError, match=r"once': is undefined on 100 resamples of 8 rows in a row \(nan\)"
    ):
        bootstrap_draws(metric, TARGETS, LABELS, 2, seed=0)


def test_metrics_know_their_range() -> None:
    assert find_metric("f1").objective.bounds == find_metric("rougeL").objective.bounds == (0, 1)
    assert find_metric("pearson").objective.bounds == (-1, 1)
    assert find_metric("r2").objective.bounds == (-math.inf, 1)
    assert find_metric("margin").objective.bounds == UNBOUNDED


def test_why_a_metric_stays_undefined_is_told() -> None:
    calls = iter([0.5])

    def fails(targets: Any, predictions: Any) -> float:
        for value in calls:
            return value
        raise MemoryError("no room")

    metric = Metric("fails", "maximize", fails, "labels")
    with pytest.raises(SettingsError, match=r"100 resamples .* \(MemoryError: no room\); give"):
        bootstrap_draws(metric, TARGETS, LABELS, 2, seed=0)
