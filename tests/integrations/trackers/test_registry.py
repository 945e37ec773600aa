"""Trackers by name, path or class; an unknown one is refused when the settings are read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from restored import restored

import autopeft
from autopeft.api import merge_settings
from autopeft.engine.callback import CallbackList
from autopeft.errors import SettingsError
from autopeft.integrations.trackers.registry import BUILT_IN, TRACKERS, destinations, make_trackers
from autopeft.utils.registry import carried


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with restored(TRACKERS):
        yield


def asked(report_to: Any) -> tuple[str, ...]:
    return merge_settings({"model": "m", "data": "d", "report_to": report_to}, {}).report_to


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("mlflow, wandb", ("mlflow", "wandb")),
        (["trackio", "tensorboard"], ("trackio", "tensorboard")),
        ("autopeft.integrations.trackers.base:Tracker",) * 2,
        (autopeft.Callback, "autopeft.engine.callback:Callback"),
        ("", ()),
    ],
)
def test_trackers_are_named_in_many_ways(given: Any, kept: Any) -> None:
    assert asked(given) == ((kept,) if isinstance(kept, str) else kept)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("mlfow", "report_to='mlfow': no such tracker; did you mean 'mlflow'?"),
        ("nowhere:Diary", "report_to='nowhere:Diary': the module nowhere cannot be imported"),
        (
            [autopeft.Callback()],
            "must be a class of callbacks; give a callback itself as callbacks",
        ),
    ],
)
def test_others_are_refused_before_anything_is_read(given: Any, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        asked(given)
    assert problem in str(caught.value)


def test_a_tracker_of_the_user_is_made_when_the_search_begins() -> None:
    made = []

    @autopeft.register_tracker("diary")
    class Diary(autopeft.Callback):
        def __init__(self) -> None:
            made.append(self)

    assert asked("diary") == ("diary",)
    trackers = make_trackers(["diary", "mlflow", "diary"])
    assert [tracker.name for tracker in trackers] == ["diary", "mlflow"]
    assert made == []
    trackers[0].on_search_begin("start")
    trackers[0].on_search_end("result")
    assert len(made) == 1
    assert destinations([*trackers, Diary()]) == "diary, mlflow"
    # It may hold what cannot be pickled: workers do not hear of it.
    assert all(group != "autopeft.trackers" for _, group, _, _ in carried().parts)


@pytest.mark.parametrize("name", BUILT_IN)
def test_one_that_is_not_installed_is_told_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    for module in (f"autopeft.integrations.trackers.{name}", "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert asked(name) == (name,)
    callbacks = CallbackList(make_trackers([name]))
    callbacks.call("on_search_begin", "start")
    (line,) = callbacks.failures
    assert line.startswith(f"report_to={name} failed (ModuleNotFoundError: ")
    assert f'; pip install "autopeft[{name}]"); it is switched off, the search goes on' in line


def test_the_built_in_ones_are_registered_first() -> None:
    assert tuple(BUILT_IN) == TRACKERS.registered
