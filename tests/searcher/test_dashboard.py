"""Tests of what optuna-dashboard is given to show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
import pytest
from optuna_dashboard import get_note
from optuna_dashboard._note import get_note_from_system_attrs

from autopeft.costs import Topology
from autopeft.costs.objectives import Objective, objective
from autopeft.searcher.controller import SearchController
from autopeft.searcher.dashboard import learning_curves
from autopeft.searcher.space.readable import ReadableParams
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import Trial

TOPOLOGY = Topology(2, {"attn.q": (16, 16), "attn.v": (16, 16)})
SPACE = SearchSpace.from_source({"methods": ["lora", "ia3"]}, TOPOLOGY, steps=9)
OBJECTIVES = (objective("accuracy"), objective("trainable_params"))


def searched(storage: Path | None = None, n: int = 8) -> SearchController:
    controller = SearchController(SPACE, OBJECTIVES, storage=storage, pruner="none")
    for number in range(n):
        trial = controller.ask()
        controller.report(trial, 3, number / 20)
        if number == 3:
            controller.tell(trial, failed="out of memory")
        else:
            controller.tell(trial, score=number / 10)
    return controller


def test_note_and_graphs_are_on_the_study(tmp_path: Path) -> None:
    controller = searched(tmp_path / "study.db")
    controller.post()
    text = get_note(controller.study)
    assert "8 trials: 7 complete, 0 pruned, 1 failed" in text
    best = controller.front()[-1]
    assert f"| {best.number} | {best.digest[:8]} | 0.7 |" in text
    study = controller.study
    keys = study._storage.get_study_system_attrs(study._study_id)
    assert any(key.startswith("dashboard:plot_data:learning-curves") for key in keys)


def test_each_trial_that_ended_has_a_note(tmp_path: Path) -> None:
    controller = searched(tmp_path / "study.db", n=5)
    controller.ask()
    study = controller.study
    attributes = study._storage.get_study_system_attrs(study._study_id)
    notes = [get_note_from_system_attrs(attributes, t._trial_id)["body"] for t in study.trials]
    assert all("Complete." in notes[number] for number in (0, 1, 2, 4))
    assert "Failed: `out of memory`" in notes[3]
    assert notes[5] == ""


def test_only_the_first_trials_have_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads one attribute of a study reads all of them: tens of thousands are too many."""
    monkeypatch.setattr("autopeft.searcher.study._N_NOTES", 2)
    study = searched(tmp_path / "study.log", n=4).study
    attributes = study._storage.get_study_system_attrs(study._study_id)
    notes = [get_note_from_system_attrs(attributes, t._trial_id)["body"] for t in study.trials]
    assert [bool(note) for note in notes] == [True, True, False, False]


def test_learning_curves_are_a_plotly_figure() -> None:
    trials = searched().trials()
    drawn = go.Figure(json.loads(learning_curves(trials, OBJECTIVES[0]).to_json()))
    assert drawn.layout.title.text
    assert [list(line.x) for line in drawn.data] == [[3]] * 8


def test_a_long_search_writes_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def note(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str:
        written.append(f"{len(trials)} trials")
        return written[-1]

    monkeypatch.setattr("autopeft.searcher.dashboard.note", note)
    searched(tmp_path / "study.log", n=12)
    assert len(written) == 1


def test_the_note_ends_with_what_is_confirmed(tmp_path: Path) -> None:
    controller = searched(tmp_path / "study.db")
    controller.conclude("**No: LoRA is as good.**")
    controller.conclude("**Yes: after a resume.**")
    text = get_note(controller.study)
    assert text.startswith("**Yes: after a resume.**")
    assert text.index("validation numbers of one seed") < text.index("8 trials: 7 complete")
    assert "No: LoRA" not in text


def test_trials_have_parameters_and_attributes_for_people(tmp_path: Path) -> None:
    controller = searched(tmp_path / "study.db", n=3)
    for frozen in controller.study.trials:
        shown, trial = frozen.user_attrs, controller.trials()[frozen.number]
        assert frozen.params == ReadableParams(SPACE).of(trial.candidate)
        assert shown["methods"] == ("+".join(trial.plan.methods) or "none")
        assert shown["learning_rate"] == trial.train.learning_rate
        assert shown["trainable_params"] == trial.costs.trainable_params
        assert shown["n_sites"] == len(trial.plan.specs)
