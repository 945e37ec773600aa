"""Searches that share a study on purpose: no candidate is trained twice, one of them confirms."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from postgres import PostgresServer, closed_connections, missing

from autopeft.errors import SettingsError, StorageError
from autopeft.inputs import Inputs
from autopeft.searcher import join, owner
from autopeft.searcher.controller import INTERRUPTED, SearchController
from autopeft.searcher.join import Shared, check_reachable, read_shared
from autopeft.searcher.losses import Losses
from autopeft.searcher.owner import StudyOwner
from autopeft.searcher.study import StudyExists, read_study
from autopeft.settings import SearchSettings
from autopeft.testing.plain_space import plain_space
from autopeft.trial import DUPLICATE, Trial
from autopeft.utils.timer import Timer


@pytest.fixture(autouse=True)
def _short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (owner, join):
        monkeypatch.setattr(module, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(owner, "_POLL_SECONDS", 0.02)


class Searcher:
    """One search of those that share a study, with a heartbeat until it is killed."""

    def __init__(self, name: str, storage: str, study: str, *, is_new: bool) -> None:
        self.storage, self.study = storage, study
        self.owner = StudyOwner(name, inode=1, folder=f"runs/{name}", shared={"any": 1})
        self.beat = Timer(self.owner.beat, 0.05)
        self.beat.__enter__()
        self.controller = SearchController(
            plain_space(),
            ["accuracy", "trainable_params"],
            storage=storage,
            study_name=study,
            resume=not is_new,
            owner=self.owner,
        )

    def asked(self) -> Trial:
        trial = self.controller.ask()
        assert trial is not None
        return trial

    def kill(self) -> None:
        """End without a word."""
        self.beat.__exit__(None, None, None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Return the URL of a PostgreSQL server."""
    if reason := missing():
        pytest.skip(reason)
    made = PostgresServer()
    yield made.url
    made.remove()


@pytest.fixture(params=["s.db", "s.log", "postgresql"])
def searches(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Make searches that share one study; the first call makes the study."""
    is_server = request.param == "postgresql"
    made: list[Searcher] = []
    storage = request.getfixturevalue("server") if is_server else str(tmp_path / request.param)

    def make(name: str) -> Searcher:
        made.append(Searcher(name, storage, tmp_path.name, is_new=not made))
        return made[-1]

    with closed_connections():
        yield make
        for each in made:
            each.kill()


def test_two_searches_train_nothing_twice_and_have_one_front(searches: Any) -> None:
    # With one seed, both would propose the same.
    both = [searches("a"), searches("b")]
    asked: list[Trial] = []

    def run(search: Searcher) -> None:
        for _ in range(10):
            trial = search.asked()
            asked.append(trial)
            search.controller.tell(trial, score=0.5 + trial.number / 100)

    threads = [threading.Thread(target=run, args=[each]) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({trial.digest for trial in asked}) == len(asked) == 20
    for each in both:
        each.controller.follow()
        assert each.controller.counts()["complete"] == 20
        assert each.controller.n_spent == 10
    fronts = [[t.number for t in each.controller.front()] for each in both]
    assert fronts[0] == fronts[1]
    assert len(read_study(both[0].storage, both[0].study)[0]) == 20


def test_of_one_candidate_in_two_searches_the_first_trial_is_kept(
    searches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = searches("a"), searches("b")
    first = one.asked()
    with monkeypatch.context() as patched:
        patched.setattr(two.controller, "follow", lambda: None)  # It has not seen it.
        trial = two.asked()
    assert trial.digest != first.digest
    frozen = one.controller.study.get_trials()
    assert [t.user_attrs.get("reason") for t in frozen] == [None, DUPLICATE, None]
    one.controller.follow()
    for each in (one.controller, two.controller):
        assert sum(each.counts().values()) == 0
        assert {t.number for t in each.running()} <= {0, 2}
    assert len(read_study(one.storage, one.study)[0]) == 2


def test_trials_of_the_living_are_left_alone_and_those_of_the_dead_are_run_again(
    searches: Any,
) -> None:
    one, two = searches("a"), searches("b")
    kept, lost = one.asked(), two.asked()
    Losses(two.controller.study, "b").add([f"search-{lost.digest}"])
    two.kill()
    three = searches("c")
    assert {t.number: t.state for t in three.controller.running()} == {kept.number: "running"}
    (ended,) = three.controller.trials()
    assert (ended.number, ended.reason) == (lost.number, INTERRUPTED)
    again = three.asked()
    assert again.digest == lost.digest
    assert three.controller.losses.of(f"search-{lost.digest}") == 1
    # The first search sees it, and does not propose it.
    one.controller.follow()
    assert again.number in {t.number for t in one.controller.running()}
    three.controller.tell(again, score=0.7)
    one.controller.follow()
    assert [t.number for t in one.controller.front()] == [again.number]
    assert one.controller.n_spent == 0


def test_the_last_search_confirms(searches: Any) -> None:
    one, two = searches("a"), searches("b")
    assert one.controller.confirmed_by().startswith("the search in runs/b (process ")
    assert two.controller.confirmed_by() == ""
    # Who comes later than that does not.
    assert "is confirming" in searches("c").controller.confirmed_by()
    two.owner.note_confirmed()
    two.kill()
    assert searches("d").controller.confirmed_by() == "the search in runs/b has confirmed before"
    assert searches("b").controller.confirmed_by() == ""


def test_a_search_confirms_where_the_others_are_dead(searches: Any) -> None:
    one, two = searches("a"), searches("b")
    two.kill()
    assert one.controller.confirmed_by() == ""


@pytest.mark.parametrize("n", [2, 4])
def test_of_searches_that_end_at_once_one_confirms(searches: Any, n: int) -> None:
    all_of_them = [searches(f"s{i}") for i in range(n)]
    barrier, said = threading.Barrier(n), []

    def end(search: Searcher) -> None:
        barrier.wait()
        said.append(search.controller.confirmed_by())

    threads = [threading.Thread(target=end, args=[each]) for each in all_of_them]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(bool, said)) == [False] + [True] * (n - 1)


def test_counts_of_deaths_of_two_searches_are_both_kept() -> None:
    study = optuna.create_study()
    one, two = Losses(study, "a"), Losses(study, "b")
    one.add(["x"])
    two.add(["x", "y"])
    assert [Losses(study, "c").of(key) for key in "xyz"] == [2, 1, 0]
    one.take_back(["x"])
    assert Losses(study, "c").of("x") == 1


def settings(tmp_path: Path, **more: Any) -> SearchSettings:
    given = {"output": str(tmp_path / "run"), "storage": str(tmp_path / "s.db"), "join": True}
    return SearchSettings.from_mapping({**given, "study_name": "shared", **more})


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"study_name": None}, "study_name='': is needed to join"),
        ({"storage": None}, "storage=.*: no other search can join a study there"),
        ({"storage": "{output}/study.db"}, "storage=.*study.db.*no other search can join"),
        ({"storage": "sqlite:///{output}/s.db"}, "no other search can join"),
        ({"storage": "sqlite://"}, "no other search can join"),
    ],
)
def test_a_study_that_others_do_not_find_is_refused(
    tmp_path: Path, more: dict[str, Any], problem: str
) -> None:
    more = {k: v and v.format(output=tmp_path / "run") for k, v in more.items()}
    with pytest.raises(SettingsError, match=problem):
        check_reachable(settings(tmp_path, **more))
    check_reachable(settings(tmp_path))
    check_reachable(settings(tmp_path, storage="postgresql+psycopg://me@host/db"))


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    begun = settings(tmp_path, model="m", steps=9, batch_size=4, rungs=2, seed=3)
    shared = Shared.of(begun, Inputs(data="1", rows="2"))
    adopted = shared.adopted(settings(tmp_path, model="m", seed=5, budget="1h"))
    assert (adopted.steps, adopted.batch_size, adopted.seed) == (9, 4, 3)
    shared.check(adopted, Inputs(data="1", rows="2"))
    for name, value in (
        *(("steps", 10), ("objectives", ["latency_ms"]), ("constraints", ["latency_ms<=1"])),
        *(("space", {"methods": ["lora"]}), ("model", "other")),
    ):
        other = shared.adopted(settings(tmp_path, **{"model": "m", name: value}))
        with pytest.raises(SettingsError, match=f"{name}=.*: the study was begun with"):
            shared.check(other, Inputs(data="1", rows="2"))
    with pytest.raises(Exception, match="the study was begun with other rows"):
        shared.check(adopted, Inputs(data="1", rows="3"))


def test_the_study_of_a_single_search_is_not_joined(tmp_path: Path) -> None:
    assert read_shared(settings(tmp_path)) is None
    arguments: dict[str, Any] = {"storage": str(tmp_path / "s.db"), "study_name": "shared"}
    SearchController(plain_space(), ["accuracy"], **arguments).ask()
    with pytest.raises(StorageError, match="the study was not begun with --join"):
        read_shared(settings(tmp_path))
    with pytest.raises(StudyExists, match="the storage holds a study of this name"):
        SearchController(plain_space(), ["accuracy"], **arguments)
