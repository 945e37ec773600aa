"""Tests of the study behind a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from sqlalchemy.exc import IntegrityError

from autopeft.costs.objectives import Objective, objective
from autopeft.costs.price import Price
from autopeft.errors import StorageError
from autopeft.plan import AdapterPlan, Candidate, TrainSettings
from autopeft.searcher.pruners.gap import GapPruner
from autopeft.searcher.storage import open_storage
from autopeft.searcher.study import StudyStore, distribution
from autopeft.trial import Trial

OBJECTIVES = (objective("accuracy"), objective("trainable_params"))
COSTS = Price(7, 28, 1e6, 100)
CANDIDATE = Candidate(AdapterPlan(), TrainSettings(1e-3))
X = {"x": distribution({"kind": "float", "low": 0.0, "high": 1.0})}


def start(made: StudyStore, x: float) -> int:
    return made.start(CANDIDATE, COSTS, "search", {"x": x}, X).number


def store(
    storage: str | Path | None = None,
    name: str = "s",
    sampler: optuna.samplers.BaseSampler | None = None,
    resume: bool = False,
    objectives: Sequence[Objective] = OBJECTIVES,
) -> StudyStore:
    sampler = sampler or optuna.samplers.RandomSampler(seed=0)
    return StudyStore(storage, name, objectives, sampler, GapPruner(3), resume=resume)


@pytest.mark.parametrize("kind", ["sqlite", "db", "log", "memory"])
def test_every_storage_keeps_trials_values_attributes_and_rungs(kind: str, tmp_path: Path) -> None:
    places: dict[str, str | Path | None] = {
        "sqlite": f"sqlite:///{tmp_path}/a.db",
        "db": tmp_path / "b.db",
        "log": tmp_path / "c.log",
        "memory": None,
    }
    place = places[kind]
    made = store(place)
    number = start(made, 0.25)
    made.report(number, 5, 0.5)
    made.complete(number, [0.8, 7.0], {"train_seconds": 1.0})
    again = made if place is None else store(place, resume=True)
    assert again.trials() == (
        Trial(
            number,
            CANDIDATE,
            COSTS,
            state="complete",
            values={"accuracy": 0.8, "trainable_params": 7.0},
            rungs=((5, 0.5),),
            measured={"train_seconds": 1.0},
        ),
    )
    assert again.frozen(number).params == {"x": 0.25}
    assert again.study.metric_names == ["accuracy", "trainable_params"]


def test_a_database_that_another_makes_at_the_same_moment_is_opened_at_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a search died on `UNIQUE constraint failed: alembic_version` (issue 5)."""
    made: list[RDBStorage] = []

    def beaten_once(url: str, **options: Any) -> RDBStorage:
        made.append(RDBStorage(url, **options))
        if len(made) == 1:
            raise IntegrityError("INSERT INTO alembic_version", None, Exception("UNIQUE"))
        return made[-1]

    monkeypatch.setattr("autopeft.searcher.storage.RDBStorage", beaten_once)
    storage = open_storage(tmp_path / "shared.db")
    assert storage.get_all_studies() == []
    assert len(made) == 2


def test_only_complete_trials_are_on_optunas_front() -> None:
    made = store()
    first, second, third = (start(made, x) for x in (0.1, 0.2, 0.3))
    made.report(second, 1, 0.99)
    made.prune(second, "pruned at step 1", gap=0.1)
    made.complete(first, [0.5, 3.0], {})
    made.fail(third, "out of memory")
    assert [t.number for t in made.study.best_trials] == [first]
    assert [trial.state for trial in made.trials()] == ["complete", "pruned", "failed"]
    assert made.trials()[2].reason == "out of memory"


def test_tpe_goes_on_after_a_pruned_trial_with_rungs_in_a_study_of_two_directions() -> None:
    """Regression: without a constraint optuna 5.0 looks for a single direction and raises."""
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=3)
    made = store(sampler=sampler)
    for step in range(8):
        number = start(made, step / 10)
        made.report(number, 1, step / 10)
        if step % 2:
            made.prune(number, "pruned at step 1", gap=0.1)
        else:
            made.complete(number, [step / 10, 1.0], {})
    assert 0 <= made.study.ask(X).params["x"] <= 1


@pytest.mark.parametrize("name", ["study.db", "study.log"])
def test_a_file_that_is_gone_is_not_made_again(name: str, tmp_path: Path) -> None:
    store(str(tmp_path / name))
    (tmp_path / name).unlink()
    with pytest.raises(StorageError, match=f"{name}': no such file; restore it"):
        store(str(tmp_path / name), resume=True)
    assert not (tmp_path / name).exists()


def test_a_taken_name_asks_to_resume_and_resuming_needs_the_study(tmp_path: Path) -> None:
    place = f"sqlite:///{tmp_path}/a.db"
    store(place)
    with pytest.raises(StorageError, match="resume"):
        store(place)
    with pytest.raises(StorageError, match="no such study"):
        store(place, name="other", resume=True)
    with pytest.raises(StorageError, match="objectives"):
        store(place, resume=True, objectives=(objective("loss"), objective("trainable_params")))


@pytest.mark.parametrize(
    "place",
    ["sqlite:////no/such/folder/a.db", "/no/such/folder/a.log", "nonsense://x", "study.txt"],
)
def test_a_storage_that_cannot_be_opened_is_one_line(place: str) -> None:
    with pytest.raises(StorageError, match=r"^storage=") as caught:
        open_storage(place)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_text("not a database, but long enough to be read as one" * 40)
    with pytest.raises(StorageError, match="storage"):
        store(path)


def test_a_study_of_the_previous_version_goes_on(tmp_path: Path) -> None:
    """It had a parameter for each block; one of the same name and another kind is left out."""
    place = tmp_path / "a.db"
    former = {"layer.00.rank": distribution({"kind": "int", "low": 1, "high": 64, "log": True})}
    former["x"] = distribution({"kind": "categorical", "choices": ["a", "b"]})
    before = store(place)
    before.start(CANDIDATE, COSTS, "search", {"layer.00.rank": 8, "x": "a"}, former)
    after = store(place, resume=True)
    y = distribution({"kind": "float", "low": 1e-4, "high": 1.0, "log": True})
    after.start(CANDIDATE, COSTS, "search", {"x": 0.5, "y": 0.1}, {**X, "y": y})
    assert [trial.params for trial in after.study.trials] == [
        {"layer.00.rank": 8, "x": "a"},
        {"y": 0.1},
    ]
    assert len(after.trials()) == 2
