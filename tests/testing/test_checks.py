"""autopeft's own parts pass the checks; broken ones are named in one line."""

from __future__ import annotations

import doctest
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.pruners import BasePruner
from task_rows import DATA, REVIEWS

import autopeft
from autopeft import methods, testing
from autopeft.costs.objectives import COSTS, Cost
from autopeft.methods.lora import Lora
from autopeft.searcher.pruners.registry import PRUNERS
from autopeft.tasks.metrics import METRICS, Metric
from autopeft.tasks.registry import TASKS
from autopeft.tasks.text_classification import TextClassification
from autopeft.testing import (
    check_callback,
    check_cost,
    check_method,
    check_metric,
    check_pruner,
    check_task,
)


def problem(check: Callable[..., None], *arguments: Any, **options: Any) -> str:
    """What a check says of a broken part: one line."""
    with pytest.raises(AssertionError) as caught:
        check(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", testing.__all__)
def test_the_example_of_a_check_runs(name: str) -> None:
    check = getattr(testing, name)
    example = (check.__doc__ or "").partition("Example:\n")[2]
    found = doctest.DocTestParser().get_doctest(example, {}, name, None, 0)
    assert found.examples
    printed: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=printed.append)
    assert printed == []


# Costs and metrics


@pytest.mark.parametrize("name", [*COSTS])
def test_every_cost_passes(name: str) -> None:
    check_cost(name)


@pytest.mark.parametrize("name", [*METRICS, "balanced_accuracy", "roc_auc_ovr", "neg_log_loss"])
def test_every_metric_passes(name: str) -> None:
    check_metric(name)


def test_a_broken_cost_is_named() -> None:
    def rent(price: Any, plan: Any) -> float:
        return float(np.random.random())

    assert "cost rent: the empty plan costs 0." in problem(check_cost, rent)
    rent_of_many = Cost("rent", "minimize", is_known=True, function=lambda p, plan: -1.0)
    assert "must be a number of at least 0" in problem(check_cost, rent_of_many)
    lock = threading.Lock()
    locked = Cost("rent", "minimize", function=lambda p, plan: float(lock is None))
    assert "sending it to a worker (pickling it) fails" in problem(check_cost, locked)


@pytest.mark.parametrize(
    ("function", "direction", "text"),
    [
        (lambda t, p: float(np.random.random()), "maximize", "nothing else may decide it"),
        (lambda t, p: float((t != p).mean()), "maximize", "set direction"),
        (
            lambda t, p: float((t == p)[: len(t) // 3].mean() + 0.1 * p[0]),
            "maximize",
            "another order",
        ),
        (lambda t, p: 200.0 + (t == p).mean(), "maximize", "outside of its bounds"),
        (lambda t, p: float("nan"), "maximize", "must be a finite number"),
    ],
)
def test_a_broken_metric_is_named(function: Any, direction: Any, text: str) -> None:
    assert text in problem(
        check_metric, Metric("odd", direction, function, "labels", bounds=(0, 1))
    )


# Methods


@dataclass(frozen=True)
class WrongPrice(Lora):
    def n_params(self, rank: int, shape: tuple[int, ...], role: str = "") -> int:
        return super().n_params(rank, shape, role) + 1


@dataclass(frozen=True)
class WrongFlops(Lora):
    def flops(self, rank: int, shape: tuple[int, ...], role: str = "") -> Any:
        return replace(super().flops(rank, shape, role), forward_per_step=1e6)


RATES = (1e-4, 1e-2)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (WrongPrice("mine", RATES), "were priced"),
        (WrongFlops("mine", RATES), "FLOPs of a step are"),
        (Lora("mine", RATES, min_rank=64), "no site of a tiny BERT or a tiny Llama can have it"),
        (replace(methods.get("pissa"), name="mine", changes_base=False), "set changes_base=True"),
        (replace(methods.get("pissa"), name="mine", exact_start=True), "set exact_start=False"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_method_is_named(method: methods.Method, text: str) -> None:
    found = problem(check_method, method)
    assert found.startswith("method mine: ")
    assert text in found
    assert "mine" not in methods.registry.METHODS


# Tasks


@pytest.mark.parametrize("name", [*DATA])
def test_every_task_of_texts_passes(name: str) -> None:
    rows, settings = DATA[name]
    check_task(name, rows, **settings)


def test_a_task_is_checked_on_a_file_and_with_a_model_too(
    tiny_model: Path, tiny_data: Path
) -> None:
    check_task("text-classification", tiny_data, max_train_rows=40)
    check_task("text-classification", str(tiny_data), model=tiny_model, max_train_rows=40)


class Silent(TextClassification):
    """Drops long rows and tells nobody."""

    name = "silent"

    def clean(self, table: Any) -> Any:
        rows = super().clean(table)
        return rows.take(np.arange(len(rows) - 2))


class Keeping(TextClassification):
    name = "keeping"

    def clean_column(self, column: Any, values: Any) -> Any:
        return ["nothing" if value is None else value for value in values]


class Long(TextClassification):
    name = "long"

    def encode(self, processor: Any, rows: Any, labels: Any, max_length: int) -> Any:
        return super().encode(processor, rows, labels, 10 * max_length)


class Detached(TextClassification):
    name = "detached"

    def row_losses(self, model: Any, batch: Any) -> Any:
        losses, weights = super().row_losses(model, batch)
        return losses.detach(), weights


class Crowded(TextClassification):
    name = "crowded"

    def row_losses(self, model: Any, batch: Any) -> Any:
        losses, weights = super().row_losses(model, batch)
        return losses * len(losses), weights

    def score(self, model: Any, batch: Any) -> Any:
        scores = super().score(model, batch)
        return {**scores, "loss": scores["loss"] * len(batch.rows)}


class Scoreless(TextClassification):
    name = "scoreless"

    def score(self, model: Any, batch: Any) -> Any:
        return {k: v for k, v in super().score(model, batch).items() if k != "weight"}


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (Silent, "clean keeps 38 and drops 0 of 40 rows"),
        (Keeping, "a row without text is not dropped"),
        (Long, "tokens, but max_length is 4"),
        (Detached, "the backward pass of the loss fails"),
        (Crowded, "set can_share_batch=False"),
        (Scoreless, "score returns no 'weight'"),
    ],
)
def test_a_broken_task_is_named(task: Any, text: str) -> None:
    settings = {"max_length": 4} if task is Long else {}
    found = problem(check_task, task, REVIEWS, **settings)
    assert found.startswith(f"task {task.name}: ")
    assert text in found
    assert task.name not in TASKS


# Pruners and callbacks


@pytest.mark.parametrize("name", [*PRUNERS])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_pruner_passes(name: str) -> None:
    check_pruner(name)


class Strict(BasePruner):
    is_multi_objective = True

    def prune(self, study: Any, trial: Any) -> Any:
        return trial.number == 0


class Odd(Strict):
    def prune(self, study: Any, trial: Any) -> Any:
        return None


class Throws(Strict):
    def prune(self, study: Any, trial: Any) -> Any:
        return study.best_trial.number == 0


class Drawn(Strict):
    def prune(self, study: Any, trial: Any) -> Any:
        return trial.number > 0 and np.random.random() < 0.5


@pytest.mark.parametrize(
    ("pruner", "text"),
    [
        (Strict, "pruner Strict: stops the cheapest and best trial"),
        (Odd, "pruner Odd: prune returns None; return True or False"),
        (Throws(), "pruner Throws: prune fails: "),
        (Drawn, "pruner Drawn: decides differently on the same trials"),
    ],
)
def test_a_broken_pruner_is_named(pruner: Any, text: str) -> None:
    assert text in problem(check_pruner, pruner)


class Log(autopeft.Callback):
    def on_trial_end(self, trial: Any) -> None: ...


class Ended:
    def on_trial_ended(self, trial: Any) -> None: ...


class Short:
    def on_rung(self, trial: Any) -> None: ...


def test_callbacks_are_checked() -> None:
    check_callback(Log())
    assert "on_trial_ended is never called" in problem(check_callback, Ended())
    assert "on_rung must take (trial, step, score)" in problem(check_callback, Short())
    assert "is a class; give an object" in problem(check_callback, Log)
    assert "has no method that is called" in problem(check_callback, object())
