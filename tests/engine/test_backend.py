"""The door of backends: names, paths and objects, in a search and when it is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autopeft
from autopeft.engine.backend import BACKENDS, check_backend, make_backend
from autopeft.errors import SettingsError


class OneProcess(autopeft.Backend):
    """The smallest backend there is."""

    used = 0

    def __init__(self, context: autopeft.WorkerContext) -> None:
        self.context = context

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, dispatcher: autopeft.Dispatcher) -> None:
        OneProcess.used += 1
        executor = autopeft.make_executor(self.context)
        while (job := dispatcher.next_job()) is not None:
            executor.begin([job])
            while dispatcher.take(job, executor.advance()[0]):
                pass
            executor.drop([0])


def evaluate(candidate: Any, *, seed: int, report: Any) -> dict[str, float]:
    return {"accuracy": 0.5 + 0.01 * len(candidate.plan.specs)}


def test_a_search_runs_on_an_own_backend_and_is_resumed(tiny_model: Path, tmp_path: Path) -> None:
    class Here(OneProcess):
        """No other process could import it."""

    result = autopeft.search(
        model=str(tiny_model),
        evaluate=evaluate,
        metric="accuracy",
        steps=4,
        budget="6trials",
        workers=1,
        confirm_seeds=1,
        backend=Here,
        output=tmp_path / "run",
    )
    assert result.view.trials["complete"] == 6
    assert OneProcess.used == 1
    assert "backend: Here" in (tmp_path / "run" / "settings.yaml").read_text()
    del BACKENDS._items["Here"]  # As in another process.
    with pytest.raises(
        SettingsError, match=r"backend='Here': no such .* give the object in Python"
    ):
        autopeft.resume(tmp_path / "run", budget="7trials")
    again = autopeft.resume(tmp_path / "run", budget="7trials", backend=Here)
    assert again.view.trials["complete"] == 7
    assert OneProcess.used == 2


def test_a_name_is_imported_only_when_it_is_not_built_in() -> None:
    check_backend("ray")
    check_backend("local")
    assert {"ray", "local"} <= set(BACKENDS)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("slurm", "backend='slurm': no such backend is registered or installed; use ray, local"),
        ("nowhere:Slurm", "the module nowhere cannot be imported"),
        ("autopeft:load_adapter", "must be made with a WorkerContext alone"),
        ("autopeft:Member", "lacks __enter__, __exit__, run, which a Backend has"),
        (3, "must be a class of backends"),
        (lambda: None, "must be made with a WorkerContext alone"),
    ],
)
def test_what_is_no_backend_is_refused_in_one_line(value: object, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        autopeft.price(model="m", data="d", backend=value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "problem"),
    [
        (lambda context: 1 / 0, "cannot be made with a WorkerContext (ZeroDivisionError"),
        (lambda context: context, "has no run(dispatcher)"),
    ],
)
def test_what_a_factory_does_wrong_is_told(backend: Any, problem: str) -> None:
    name = BACKENDS.text("backend", backend)
    settings = autopeft.SearchSettings(backend=name)
    with pytest.raises(SettingsError) as caught:
        make_backend(autopeft.WorkerContext(settings, None, (), (), "cpu"))
    assert problem in str(caught.value)
