"""A pruner is found by name, by path or as an object, and made for the rungs of a search."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.pruners import BasePruner, MedianPruner, NopPruner, PercentilePruner
from optuna.trial import FrozenTrial

from autopeft.errors import SettingsError
from autopeft.searcher.pruners.gap import GapPruner
from autopeft.searcher.pruners.registry import PRUNERS, Rungs, make_pruner, register_pruner
from autopeft.searcher.pruners.single_objective import SingleObjectivePruner


class Strict(BasePruner):
    """One that reads the whole study."""

    is_multi_objective = True

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return True


def inner(value: Any) -> Any:
    """What is wrapped for several directions."""
    made = make_pruner(value, Rungs(3, 27, 2.0))
    assert isinstance(made, SingleObjectivePruner)
    return made._inner


def test_every_name_makes_a_pruner() -> None:
    assert {"gap", "none", "median", "percentile", "asha", "hyperband"} <= {*PRUNERS}
    gap = make_pruner("gap", Rungs(eta=2.0))
    assert isinstance(gap, GapPruner)
    assert gap._eta == 2.0
    assert isinstance(inner("none"), NopPruner)
    assert isinstance(inner("percentile"), PercentilePruner)
    assert inner("asha")._min_resource == 3


@pytest.mark.parametrize(
    "value",
    [
        MedianPruner(),
        MedianPruner,
        "optuna.pruners:MedianPruner",
        lambda rungs: MedianPruner(n_warmup_steps=rungs.first),
    ],
)
def test_a_pruner_of_optunas_is_wrapped(value: Any) -> None:
    assert isinstance(inner(value), MedianPruner)


def test_one_that_reads_several_directions_is_not() -> None:
    for value in (Strict(), Strict, lambda rungs: Strict()):
        assert isinstance(make_pruner(value, Rungs()), Strict)


def test_a_registered_one_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PRUNERS, "_items", dict(PRUNERS._items))
    register_pruner("strict", Strict)
    assert isinstance(make_pruner("strict", Rungs()), Strict)
    with pytest.raises(SettingsError, match="registered twice"):
        register_pruner("gap", Strict)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("medain", "pruner='medain': no such pruner; did you mean 'median'"),
        ("optuna.pruners:MedainPruner", "optuna.pruners has no 'MedainPruner'"),
        ("optuna.pruners:ThresholdPruner", "cannot be made"),
        (3, "must be a pruner of Optuna, its class, or a function"),
        (dict, "must be a pruner of Optuna"),
        (lambda: MedianPruner(), "cannot be made"),
        (lambda rungs: 3, "without prune"),
    ],
)
def test_what_is_none_is_refused_in_one_line(value: Any, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        make_pruner(value, Rungs())
    assert "\n" not in str(caught.value)
