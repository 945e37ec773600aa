"""A search over a training function of the user's: pruning, confirmation, verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler

import autopeft
from autopeft.engine.evaluate import EVALUATORS
from autopeft.errors import SettingsError
from autopeft.preparing.prepare import prepare
from autopeft.searcher.pruners.registry import PRUNERS
from autopeft.searcher.samplers.registry import SAMPLERS
from autopeft.settings import SearchSettings

SEARCH: dict[str, Any] = {"steps": 27, "rungs": 2, "budget": "14trials", "max_finalists": 2}
SETTINGS: dict[str, Any] = {**SEARCH, "metric": "accuracy", "backend": "local"}


def quality(candidate: autopeft.Candidate) -> float:
    """More adapters are better, with diminishing returns."""
    size = sum(spec.rank or 1 for spec in candidate.plan.specs)
    return 0.5 + 0.4 * (1 - float(2.0 ** (-size / 10)))


def evaluate(candidate: autopeft.Candidate, *, seed: int, report: autopeft.TrialReport) -> Any:
    """Stand in for a training whose validation and test rows are right by chance."""
    level = quality(candidate)
    for step in report.rungs:
        report(step, level - 0.3 / step)
    (report.folder / "weights.txt").write_text(candidate.digest)
    if not report.is_confirming:
        return {"accuracy": level}
    rows = np.random.default_rng(1).random(400) < level
    return {"accuracy": level, "test_accuracy": rows.mean()}, rows.astype(float)


def test_a_function_gets_a_whole_search(tiny_model: Path, tmp_path: Path) -> None:
    result = autopeft.search(
        model=str(tiny_model), evaluate=evaluate, output=tmp_path / "run", **SETTINGS
    )
    trials = autopeft.SearchResult.read(tmp_path / "run").view.trials
    assert trials["failed"] == 0
    assert not any("reported nothing" in warning for warning in result.view.warnings)
    assert sum(trials.values()) == 14
    assert len(repr(result)) < 600
    frame = result.to_pandas()
    assert {member.digest for member in result.front} <= set(frame.index)
    assert (frame["accuracy_low"] <= frame["accuracy"]).all()
    assert "<table>" in result._repr_html_()
    assert "accuracy on the test split" in result._repr_html_()
    curves = result.plot("curves")
    assert curves.axes[0].get_ylabel() == "accuracy"  # what the function reports
    assert len(curves.axes[0].lines) == 14
    with pytest.raises(autopeft.UserError, match="front, curves, where, budget"):
        result.plot("frnt")
    best = result.best
    assert best is not None
    assert repr(best).startswith(f"<Member {best.digest[:8]}: accuracy 0.")
    assert best.folder is not None
    assert (best.folder / "weights.txt").read_text() == best.digest
    assert "on the test split" in result.verdict.text
    assert best.entry.adapter_score is not None
    assert best.entry.adapter_score.n_rows == 400
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("odd", [6e159, 1.7e308])
def test_a_diverged_perplexity_is_a_result_like_any_other(
    odd: float, tiny_model: Path, tmp_path: Path
) -> None:
    """Regression: every later ask raised, and so did each resume (issue 18)."""

    def diverged(candidate: Any, *, seed: int, report: autopeft.TrialReport) -> Any:
        size = sum(spec.rank or 1 for spec in candidate.plan.specs)
        level = odd if size < 2 else 30.0 - size**0.5  # The cheapest are on the front.
        for step in report.rungs:
            report(step, level)
        if not report.is_confirming:
            return {"perplexity": level}
        return {"perplexity": level, "test_perplexity": level}

    settings = {**SETTINGS, "metric": "perplexity", "budget": "24trials"}
    result = autopeft.search(
        model=str(tiny_model), evaluate=diverged, output=tmp_path / "run", **settings
    )
    assert not any("sampler" in warning for warning in result.view.warnings)
    assert result.front
    assert (tmp_path / "run" / "report.html").exists()
    assert autopeft.resume(tmp_path / "run", evaluate=diverged, budget="26trials").front


def test_it_is_resumed_with_the_same_objects_given_again(tiny_model: Path, tmp_path: Path) -> None:
    calls = []

    def local(candidate: Any, *, seed: int, report: Any) -> Any:
        calls.append(seed)
        return evaluate(candidate, seed=seed, report=report)

    class Unsure(NopPruner):
        """Asked at each rung; cannot be pickled, which no worker needs."""

        def __reduce__(self) -> Any:
            raise TypeError("stays here")

        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            asked.append(trial.number)
            return False

    asked: list[int] = []
    parts: dict[str, Any] = {
        "pruner": Unsure(),
        "sampler": lambda problem: RandomSampler(seed=problem.seed),
    }
    settings = {**SETTINGS, **parts, "budget": "8trials", "steps": 90}
    autopeft.search(model=str(tiny_model), evaluate=local, output=tmp_path / "run", **settings)
    before = len(calls)
    assert {*asked} >= {*range(6)}  # not the first baselines
    # As in another process, which knows none of them.
    for registry in (EVALUATORS, PRUNERS, SAMPLERS):
        for name in registry._given:
            registry._items.pop(name, None)
    folder, wanted = tmp_path / "run", r"autopeft.resume\(folder, {}=\.\.\.\)"
    with pytest.raises(SettingsError, match=wanted.format("pruner")):
        autopeft.resume(folder, budget="11trials")
    with pytest.raises(SettingsError, match="pruner='gap': cannot change on resume"):
        autopeft.resume(folder, pruner="gap")
    with pytest.raises(SettingsError, match=wanted.format("sampler")):
        autopeft.resume(folder, pruner=Unsure())
    with pytest.raises(SettingsError, match=r"autopeft.resume\(folder, evaluate=function\)"):
        autopeft.resume(folder, budget="11trials", **parts)
    result = autopeft.resume(folder, budget="11trials", evaluate=local, **parts)
    assert {8, 9, 10} & {*asked}
    assert sum(result.view.trials.values()) == 11
    assert len(calls) > before


def test_without_test_rows_the_verdict_says_what_it_judged(
    tiny_model: Path, tmp_path: Path
) -> None:
    def plain(candidate: Any, *, seed: int, report: Any) -> Any:
        return {"accuracy": quality(candidate) + 0.001 * (seed % 3)}

    result = autopeft.search(
        model=str(tiny_model), evaluate=plain, output=tmp_path / "run", **SETTINGS
    )
    assert "on the rows that the search selected by" in result.verdict.text
    assert "accuracy on the validation split" in result._repr_html_()


def test_one_seed_without_rows_decides_nothing(tiny_model: Path, tmp_path: Path) -> None:
    def plain(candidate: Any, *, seed: int, report: Any) -> Any:
        return {"accuracy": quality(candidate)}

    result = autopeft.search(
        model=str(tiny_model), evaluate=plain, output=tmp_path / "run", confirm_seeds=1, **SETTINGS
    )
    assert result.verdict.text.startswith("Undecided: each finalist has one seed")
    assert not result.verdict.beats_lora


@pytest.mark.parametrize(("rungs", "seen"), [(None, (3, 9, 27)), (2, (9, 27)), (1, (27,))])
def test_a_function_reports_as_often_as_asked(
    rungs: int | None, seen: tuple[int, ...], tiny_model: Path
) -> None:
    name = EVALUATORS.text("evaluate", evaluate)
    asked = SearchSettings(model=str(tiny_model), evaluate=name, metric="accuracy", steps=27)
    ready = prepare(replace(asked, backend="local", rungs=rungs))
    assert ready.rungs == seen
    # What a resumed search reads is the same.
    planned = ready.with_plan(ready.plan)
    assert planned.rungs == seen
    assert prepare(planned.settings).rungs == seen


def test_a_smaller_metric_can_be_better(tiny_model: Path, tmp_path: Path) -> None:
    def plain(candidate: Any, *, seed: int, report: Any) -> Any:
        return {"surprise": 1.0 - quality(candidate)}

    settings = {**SETTINGS, "metric": "surprise", "direction": "minimize", "steps": 90}
    result = autopeft.search(
        model=str(tiny_model), evaluate=plain, output=tmp_path / "run", **settings
    )
    values = [member.objectives["surprise"] for member in result.front]
    assert values == sorted(values, reverse=True)  # The front is cheapest first.
    (told,) = [w for w in result.view.warnings if "no trial can be stopped early" in w]
    assert told.startswith("evaluate reported nothing before its end")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data": "rows.csv"}, "data='rows.csv': has no effect beside evaluate"),
        ({"metric": None}, "metric='': is missing: the name of the quality"),
        ({"max_length": 33}, "max_length=33: the model has positions for 32 tokens"),
        ({"trials_per_worker": 2}, "trials_per_worker=2: has no effect beside evaluate"),
        ({"evaluate": "nowhere:train"}, "the module nowhere cannot be imported"),
        ({"evaluate": 3}, "must be a function of a candidate"),
        ({"sampler": "tpo"}, "no such sampler; did you mean 'tpe'"),
        ({"pruner": "nowhere:Pruner"}, "the module nowhere cannot be imported"),
        ({"pruner": 3}, "must be a pruner of Optuna, its class, or a function"),
        ({"sampler": "optuna.samplers:GridSampler"}, "cannot be made (TypeError"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(
    changes: dict[str, Any], problem: str, tiny_model: Path, tmp_path: Path
) -> None:
    given = {**SETTINGS, "model": str(tiny_model), "evaluate": evaluate, **changes}
    with pytest.raises(SettingsError) as caught:
        autopeft.search(output=tmp_path / "run", **given)
    assert problem in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_there_are_no_rows_to_show(tiny_model: Path) -> None:
    with pytest.raises(SettingsError, match="so autopeft reads no rows"):
        autopeft.preview(model=str(tiny_model), evaluate=evaluate, metric="accuracy")


def test_direction_is_for_functions(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="metrics of tasks have their own"):
        autopeft.search(
            model=str(tiny_model),
            data=str(tiny_data),
            direction="maximize",
            output=tmp_path / "run",
        )


def test_a_function_that_always_fails_ends_the_search(tiny_model: Path, tmp_path: Path) -> None:
    def broken(candidate: Any, *, seed: int, report: Any) -> Any:
        return {"f1": 1.0}

    result = autopeft.search(
        model=str(tiny_model), evaluate=broken, output=tmp_path / "run", **SETTINGS
    )
    assert result.view.trials["complete"] == 0
    assert result.view.trials["failed"] < 14
    assert any("returned f1 without 'accuracy'" in text for text in result.view.warnings)
    assert "trials failed, the last with: evaluate returned f1" in result.verdict.text


class Broken:
    """Raises at every trial."""

    def on_trial_end(self, trial: Any) -> None:
        raise ValueError("no disk")


class Listener(autopeft.Callback):
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.lines: list[str] = []

    def on_message(self, text: str) -> None:
        self.lines.append(text)

    def on_search_begin(self, search: autopeft.SearchStart) -> None:
        self.heard.append(f"begin {search.objectives[0].name}")

    def on_trial_begin(self, trial: Any) -> None:
        self.heard.append("trial")

    def on_rung(self, trial: Any, step: int, score: float) -> None:
        self.heard.append(f"rung {step}")

    def on_trial_end(self, trial: Any) -> None:
        self.heard.append(trial.state)

    def on_confirmation(self, candidate: Any, score: Any, files: Any) -> None:
        self.heard.append(f"confirmed {len(files)}")

    def on_search_end(self, result: Any) -> None:
        self.heard.append(f"end {type(result).__name__}")


def test_callbacks_hear_all_and_a_broken_one_is_switched_off(
    tiny_model: Path, tmp_path: Path
) -> None:
    listener = Listener()
    result = autopeft.search(
        model=str(tiny_model),
        evaluate=evaluate,
        output=tmp_path / "run",
        callbacks=[Broken(), listener],
        **SETTINGS,
    )
    heard = listener.heard
    assert (heard[0], heard[-1]) == ("begin accuracy", "end SearchResult")
    assert heard.count("trial") == 14
    assert heard.count("complete") == result.view.trials["complete"]
    assert "rung 27" in heard
    assert "confirmed 1" in heard
    told = "callback Broken failed in on_trial_end (ValueError: no disk); it is switched off"
    assert sum(line.startswith(told) for line in listener.lines) == 1
    assert any(warning.startswith(told) for warning in result.view.warnings)
