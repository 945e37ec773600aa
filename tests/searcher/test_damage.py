"""A study whose values are not what was written: one line, and nothing in it changes."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autopeft
from autopeft.errors import StorageError
from autopeft.searcher.controller import SearchController
from autopeft.searcher.study import read_states, read_study

TOPOLOGY = autopeft.Topology(2, {"attn.q": (32, 32), "mlp.up": (32, 64)})
SPACE = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, TOPOLOGY, steps=90)
OBJECTIVES = ["accuracy", "trainable_params"]


def controller(path: Path | str | None, *, resume: bool, **more: Any) -> SearchController:
    given = {"storage": path, "study_name": "s", "resume": resume, "objectives": OBJECTIVES}
    return SearchController(SPACE, seed=1, sampler="random", **{**given, **more})


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    for name in ("study.db", "study.log"):
        search = controller(folder / name, resume=False)
        for i in range(3):
            trial = search.ask()
            assert trial is not None
            search.report(trial, 10, 0.5)
            search.tell(trial, score=0.5 + i / 10, measured={"seconds": 1.0})
    return folder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("update trials set state='BOGUS' where number=1", "trial 1 is damaged .*BOGUS"),
        ("update trials set number=-1 where number=1", "trial 0 is there twice, or has no number"),
        ("delete from trials where number=1", "trial 1 is missing"),
        ("update trial_values set value=NULL where trial_id=2", "trial 1 is damaged .*Assertion"),
        ("update trial_values set value_type='INF_POS'", "trial 0 is damaged"),
        ("update trial_values set value='abc' where trial_id=3", "trial 2 .*no number: 'abc'"),
        ("delete from trial_values where trial_id=2 and objective=1", "trial 1 .*1 values for 2"),
        ("update trial_params set distribution_json='{}'", "trial 0 .*KeyError: 'type'"),
        ("update trial_params set param_value=1e9", "trial 0 .*IndexError"),
        ("update trial_user_attributes set value_json='{' where trial_id=2", "trial 1 .*JSON"),
        ("update trial_user_attributes set value_json='[3]' where key='measured'", "trial 0 .*mea"),
        ("update trial_user_attributes set value_json='3' where key='origin'", "trial 0 .*origin"),
        ("update trial_intermediate_values set intermediate_value='x'", "trial 0 .*step 10 .*'x'"),
        ("update trial_intermediate_values set step=-step", "trial 0 .*step -10"),
        ("update study_directions set direction='UP'", "damaged .*UP"),
        ("drop table trials", "it is damaged .it has no table trials"),
    ],
)
def test_a_database_that_was_changed_is_one_line(
    change: str, told: str, studies: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(studies / "study.db", tmp_path))
    database = sqlite3.connect(path)
    database.execute(change)
    database.commit()
    database.close()
    before = path.read_bytes()
    for read in (
        lambda: controller(path, resume=True),
        lambda: read_study(path, "s"),
        lambda: controller(f"sqlite:///{path}", resume=True),
    ):
        with pytest.raises(StorageError, match=f"storage='.*study.db': .*{told}") as caught:
            read()
        assert str(caught.value).endswith("; restore it from a copy, or begin a new search")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("op", "change", "told"),
    [
        (6, lambda log: {**log, "values": ["a", 1.0]}, "trial 0 .*no number: 'a'"),
        (6, lambda log: {**log, "values": [[0.5], 1.0]}, r"trial 0 .*no number: \[0.5\]"),
        (6, lambda log: {**log, "values": [0.5]}, "trial 0 .*1 values for 2"),
        (6, lambda log: {**log, "state": 77}, "it is damaged .ValueError: 77"),
        (7, lambda log: {**log, "intermediate_value": "x"}, "trial 0 .*'x'"),
        (4, lambda log: {**log, "distributions": 3}, "damaged"),
        (4, lambda log: {**log, "user_attrs": 0.5}, "damaged"),
    ],
)
def test_a_journal_that_was_changed_is_one_line(
    op: int, change: Callable[[Any], Any], told: str, studies: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (studies / "study.log").read_text().splitlines()]
    first = next(i for i, line in enumerate(lines) if line["op_code"] == op)
    lines[first] = change(lines[first])
    path = tmp_path / "study.log"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for read in (lambda: controller(path, resume=True), lambda: read_study(path, "s")):
        with pytest.raises(StorageError, match=f"storage='.*study.log': .*{told}"):
            read()


def test_the_states_of_a_search_are_read_without_its_attributes(studies: Path) -> None:
    for name in ("study.db", "study.log"):
        assert read_states(studies / name, "s") == dict.fromkeys(range(3), "complete")


def test_other_directions_are_told_by_direction(studies: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(studies / "study.db", tmp_path))
    given = [autopeft.Objective("accuracy", "minimize"), "trainable_params"]
    asked = "['accuracy (minimize)', 'trainable_params (minimize)']"
    there = "the study has ['accuracy (maximize)', 'trainable_params (minimize)']"
    with pytest.raises(StorageError, match=re.escape(f"objectives={asked}: {there}")):
        controller(path, resume=True, objectives=given)


def test_a_study_in_memory_is_neither_continued_nor_taken_for_a_lasting_one() -> None:
    with pytest.raises(StorageError, match=r"resume=True: .*in memory alone.*; give its stor"):
        controller(None, resume=True)
    for url in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(StorageError, match=r"in memory; leave it out, or name a file"):
            controller(url, resume=False)


def test_a_note_that_was_changed_is_one_line(studies: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(studies / "study.db", tmp_path))
    search = controller(path, resume=True)
    search.study._storage.set_study_system_attr(
        search.study._study_id, "dashboard:note_ver", "three"
    )
    with pytest.raises(StorageError, match=r"storage='.*study.db': study 's' is damaged"):
        search.post()
