"""Tests of a storage that fails in mid-search: what is repeated is neither lost nor doubled."""

from __future__ import annotations

import signal
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import optuna
import pytest
import torch
from optuna.artifacts import get_all_artifact_meta
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage
from sqlalchemy.orm import Session

from autopeft.costs.topology import Topology
from autopeft.searcher.controller import SearchController
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.storage import RetryingStorage, open_storage
from autopeft.searcher.study import read_trials
from autopeft.trial import Trial

T = TypeVar("T")
TOPOLOGY = Topology(3, {"attn.q": (64, 64), "attn.v": (64, 64), "mlp.up": (64, 128)})
SPACE = SearchSpace.from_source({"methods": ["lora", "ia3"]}, TOPOLOGY)
OBJECTIVES = ("accuracy", "trainable_params")


class Faulty(RetryingStorage):
    """Raises once, at the write of a number, before or after it is done; it never tries again."""

    def __init__(self, inner: Any, fails_at: int = -1, after: bool = False) -> None:
        super().__init__(inner, "faulty")
        self.n_writes, self.fails_at, self.after = 0, fails_at, after
        self.fails_on = ""  # or at the write of this name

    def create_new_trial(self, study_id: int, template_trial: Any = None) -> int:
        return self._attempt(self.inner.create_new_trial, study_id, template_trial)

    def _attempt(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        if call.__name__.startswith(("get_", "check_", "remove_")):
            return call(*arguments, **named)
        self.n_writes += 1
        if self.n_writes != self.fails_at and call.__name__ != self.fails_on:
            return call(*arguments, **named)
        self.fails_on = ""
        if self.after:
            call(*arguments, **named)
        raise StorageInternalError("the server is gone")


def again(call: Callable[[], T]) -> T:
    """Call it until it succeeds, as a careful user would."""
    for _ in range(2):
        try:
            return call()
        except StorageInternalError:
            continue
    return call()


def drive(storage: Any, folder: Path, n: int = 12) -> SearchController:
    controller = again(lambda: SearchController(SPACE, OBJECTIVES, storage=storage, seed=3))
    for index in range(n):
        trial = again(controller.ask)
        controller_told(controller, trial, index)
    again(lambda: controller.remember("verdict", "yes"))
    again(lambda: controller.conclude("# The end"))
    again(lambda: controller.attach(folder / "artifacts", [folder / "report.html"], {}))
    return controller


def controller_told(controller: SearchController, trial: Trial, index: int) -> None:
    score = 0.5 + 0.03 * (index % 7) - (0.4 if index % 5 == 4 else 0.0)
    for step in (10, 30):
        again(partial(controller.report, trial, step, score * step / 100))
    if index % 6 == 5:
        again(lambda: controller.tell(trial, failed="out of memory"))
    else:
        again(lambda: controller.tell(trial, score=score, measured={"loss": 1.0 - score}))


def plain(trials: Any) -> list[Any]:
    return [(t.number, t.digest, t.state, t.values, t.rungs, t.reason, t.measured) for t in trials]


@pytest.mark.parametrize("after", [False, True])
def test_a_verb_that_failed_is_repeated_without_loss_or_double(after: bool, tmp_path: Path) -> None:
    """Regression: a second tell was silent, the trial stayed running; an ask lost its candidate."""
    counted = Faulty(InMemoryStorage())
    (tmp_path / "report.html").write_text("<p>")
    wanted = plain(drive(counted, tmp_path).trials())
    assert {trial[2] for trial in wanted} == {"complete", "pruned", "failed"}
    # The first three writes make the study; a storage that fails there has no study yet.
    for number in range(4, counted.n_writes + 1):
        storage = Faulty(InMemoryStorage(), number, after)
        controller = drive(storage, tmp_path)
        assert plain(controller.trials()) == wanted, number
        stored = read_trials(controller.study, controller.objectives)
        assert stored == controller.trials(), number
        assert sum(controller.counts().values()) == len(wanted)
        assert not controller.running()
        assert controller.recall("verdict") == "yes"
        assert len(get_all_artifact_meta(controller.study)) == 1


def test_what_a_failed_write_left_is_seen_without_a_second_try(tmp_path: Path) -> None:
    storage = Faulty(open_storage(tmp_path / "a.db"))
    controller = SearchController(SPACE, OBJECTIVES, storage=storage, seed=3)
    trial = controller.ask()
    storage.fails_on, storage.after = "set_trial_state_values", True
    with pytest.raises(StorageInternalError):
        controller.tell(trial, score=0.5, measured={"loss": 0.5})
    assert [t.state for t in controller.trials()] == ["complete"]
    assert controller.front()[0].values["accuracy"] == 0.5
    controller.tell(trial, failed="the wire was cut")  # It is told already.
    assert controller.counts() == {"complete": 1, "pruned": 0, "failed": 0}


def test_an_ending_that_was_begun_leaves_no_trace_in_another() -> None:
    storage = Faulty(InMemoryStorage())
    controller = SearchController(SPACE, OBJECTIVES, storage=storage, seed=3)
    trial = controller.ask()
    storage.fails_on = "set_trial_state_values"
    with pytest.raises(StorageInternalError):
        controller.tell(trial, score=0.5, measured={"loss": 0.5})
    controller.tell(trial, failed="out of memory")
    assert controller.trials() == read_trials(controller.study, controller.objectives)
    assert controller.trials()[0].measured == {}


@pytest.mark.parametrize(
    "number",
    [
        np.float32(0.5),
        np.int64(1),
        np.float64(0.25),
        torch.tensor(0.5),
        Decimal("0.5"),
        np.array(1),
    ],
)
def test_numbers_of_other_libraries_are_numbers(number: Any, tmp_path: Path) -> None:
    """Regression: a scalar of numpy in `measured` left the trial running for ever."""
    controller = SearchController(SPACE, OBJECTIVES, storage=tmp_path / "a.db", seed=3)
    trial = controller.ask()
    controller.report(trial, 10, number)
    controller.tell(trial, score=number, measured={"loss": number})
    assert controller.trials() == read_trials(controller.study, controller.objectives)
    assert controller.trials()[0].measured == {"loss": float(number)}


@pytest.mark.parametrize(
    "value",
    [
        *("0.5", None, True, [0.5], np.array([0.1, 0.2]), 10**400, 1j, Decimal("sNaN")),
        *(np.ma.masked, np.ma.array(0.5, mask=True), np.str_("0.5"), np.complex64(1)),
    ],
)
def test_what_is_no_number_is_refused_and_changes_nothing(value: Any) -> None:
    controller = SearchController(SPACE, OBJECTIVES, seed=3)
    trial = controller.ask()
    with pytest.raises(ValueError, match="must be a number"):
        controller.tell(trial, score=0.5, measured={"loss": value})
    with pytest.raises(ValueError, match="must be a number"):
        controller.report(trial, 10, value)
    assert controller.trials() == ()
    controller.tell(trial, score=0.5)
    assert controller.counts()["complete"] == 1


def test_a_write_is_interrupted_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: SIGTERM in the middle of a commit was SQLAlchemy's AssertionError (issue 18)."""
    study = optuna.create_study(storage=open_storage(tmp_path / "a.db"))
    commit = Session.commit

    def interrupted(session: Session) -> None:
        signal.raise_signal(signal.SIGINT)
        commit(session)

    monkeypatch.setattr(Session, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.set_user_attr("verdict", "yes")
    monkeypatch.undo()
    assert study.user_attrs == {"verdict": "yes"}
