"""Whatever a user's code raises in a worker fails that trial with its reason, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autopeft
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
    "Unpicklable: its text cannot be read": lambda: Unpicklable(1, 2),
    "KeyboardInterrupt was raised in a worker": KeyboardInterrupt,
}


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_search_survives_it(
    backend: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    # In this process, a KeyboardInterrupt is the user's.
    kinds = [kind for kind in HARM if backend == "ray" or "Keyboard" not in kind]

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

    result = autopeft.search(
        model=str(tiny_model),
        data=str(tiny_data),
        output=str(tmp_path / "run"),
        metric=metric,
        callbacks=Begin(),
        budget="9trials",
        steps=4,
        rungs=1,
        batch_size=8,
        max_length=16,
        confirm_seeds=1,
        max_finalists=1,
        backend=backend,
        workers=1,
    )
    trials = read_trials(result.folder / "trials.csv")
    reasons = [trial.reason for trial in trials if trial.state == "failed"]
    assert len(reasons) == len(kinds)
    for kind, reason in zip(kinds, reasons, strict=True):
        assert kind in reason
    assert result.view.is_complete
    assert result.view.trials["complete"] == 9 - len(kinds)
