"""Whatever a user's code raises in a worker fails that trial with its reason, and no other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from covering import usual_first

import autopeft
from autopeft.cli import _check_completed
from autopeft.errors import TrainingFailure
from autopeft.reporting.trials_csv import read_trials

pytestmark = [pytest.mark.timeout(240), pytest.mark.filterwarnings("default")]


class Unpicklable(Exception):
    """Cannot be sent to another process, and has no text either."""

    def __init__(self, _needed: int, _too: int) -> None:
        self.local = lambda: None

    def __str__(self) -> str:
        raise ValueError("no text")

    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


HARM: dict[str, Any] = {
    "MemoryError": MemoryError,
    "KeyError: 'weights'": lambda: KeyError("weights"),
    "TypeError: odd": lambda: TypeError("odd"),
    "SystemExit: 3": lambda: SystemExit(3),
    "CancelledError: by a task": lambda: asyncio.CancelledError("by a task"),
    "Unpicklable: its text cannot be read": lambda: Unpicklable(1, 2),
    "KeyboardInterrupt was raised in a worker": KeyboardInterrupt,
}


def searched(
    model: Path,
    data: Path,
    folder: Path,
    metric: Any,
    callback: autopeft.Callback,
    n_trials: int,
    **settings: Any,
) -> autopeft.SearchResult:
    """A short search by a metric of the user's."""
    return autopeft.search(
        model=str(model),
        data=str(data),
        output=str(folder / "run"),
        metric=metric,
        callbacks=callback,
        budget=f"{n_trials}trials",
        steps=4,
        rungs=1,
        batch_size=8,
        max_length=16,
        confirm_seeds=1,
        max_finalists=1,
        **settings,
    )


@pytest.mark.parametrize("backend", usual_first(["local", "ray"], "ray"))
def test_a_search_survives_it(
    backend: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    # In this process, a KeyboardInterrupt is the user's.
    kinds = [kind for kind in HARM if backend == "ray" or "Keyboard" not in kind]

    n_trials = len(kinds) + 4

    class Begin(autopeft.Callback):
        """Before, the metric is tried in this process, where it must not fail."""

        def on_search_begin(self, search: autopeft.SearchStart) -> None:
            (notes / "begun").touch()

    def metric(predictions: Any, references: Any) -> float:
        for number, kind in enumerate(kinds):
            if not (notes / "begun").exists():
                break
            try:
                (notes / str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            raise HARM[kind]()
        return float((predictions == references).mean())

    result = searched(
        tiny_model, tiny_data, tmp_path, metric, Begin(), n_trials, backend=backend, workers=1
    )
    trials = read_trials(result.folder / "trials.csv")
    reasons = [trial.reason for trial in trials if trial.state == "failed"]
    assert len(reasons) == len(kinds)
    for kind, reason in zip(kinds, reasons, strict=True):
        assert kind in reason
    assert result.view.is_complete
    assert result.view.trials["complete"] == 4


def test_where_every_confirmation_fails_nothing_is_complete(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    def metric(targets: Any, predictions: Any) -> float:
        if len(targets) == 80 and (tmp_path / "broken").exists():
            raise KeyError("only of test rows")
        return float((targets == predictions).mean())

    class Begin(autopeft.Callback):
        """Before, the metric is tried on all splits."""

        def on_search_begin(self, search: autopeft.SearchStart) -> None:
            (tmp_path / "broken").touch()

    result = searched(tiny_model, tiny_data, tmp_path, metric, Begin(), 3, backend="local")
    assert result.view.trials["complete"] == 3
    assert not result.view.is_complete
    assert result.best is None
    told = r"no finalist was confirmed; \d of \d failed with: .*only of test rows.* resume"
    with pytest.raises(TrainingFailure, match=told):
        _check_completed(result)
    (tmp_path / "broken").unlink()
    mended = autopeft.resume(result.folder)
    assert mended.view.is_complete
    assert mended.best is not None
    _check_completed(mended)
