"""Tests of a controller that is misused: each mistake is one line or harmless, study and all agree.

A state machine calls any verb with any arguments, in any order.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from autopeft.costs import Price
from autopeft.costs.objectives import Objective
from autopeft.costs.topology import Topology
from autopeft.errors import UserError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.searcher.controller import Decision, SearchController
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.study import read_trials
from autopeft.trial import DUPLICATE, INTERRUPTED, Trial
from autopeft.utils.pareto import non_dominated

SPACE = SearchSpace.from_source(
    {"methods": ["lora", "ia3"]}, Topology(2, {"attn.q": (32, 32), "mlp.up": (32, 64)}), steps=90
)
OTHER = SearchSpace.from_source({"methods": ["miss"]}, Topology(9, {"attn.v": (16, 16)}))
FOREIGN = OTHER.sample_stratified(np.random.default_rng(0))
OBJECTIVES = ("accuracy", "trainable_params", "train_seconds")

STEPS = st.sampled_from([1, 5, 10, 30, 90, 91, np.int64(20), 0, -1, 1.5, "3", None, True, 10**30])
NUMBERS = st.sampled_from(
    [
        *(0.1, 0.5, 0.9, 1, np.float32(0.25), Decimal("0.75"), 1e308, -1e308, 5e-324),
        *(float("nan"), float("inf"), "0.5", None, True, [1.0], np.zeros(2), 1j, 10**400),
    ]
)
NAMES = st.sampled_from(["train_seconds", "train_seconds", "accuracy", "trainable_params", "x", 3])
MEASURED = st.dictionaries(NAMES, NUMBERS, max_size=3) | st.sampled_from([None, 3, "text", []])
REASONS = st.sampled_from(["", "out of memory", "a\nb\x00c \ud800", "é" * 3000, 3, ValueError("x")])
MISTAKES = (ValueError, UserError)


class Misuse(RuleBasedStateMachine):
    """One controller, its study, and everything that it handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.asked: list[Any] = [None, "trial", 3]

    @initialize(
        kind=st.sampled_from([None, "a.log", "a.db"]), pruner=st.sampled_from(["gap", "asha"])
    )
    def begin(self, kind: str | None, pruner: str) -> None:
        self.place = kind and self.folder / kind
        self.pruner = pruner
        self.controller = self.made(resume=False)
        other = SearchController(OTHER, OBJECTIVES, seed=1)
        self.asked += [other.ask(), other.ask()]

    def made(self, resume: bool) -> SearchController:
        return SearchController(
            SPACE,
            OBJECTIVES,
            sampler="random",
            pruner=self.pruner,
            storage=self.place,
            study_name="s",
            resume=resume,
            n_baselines=2,
            n_portfolio=1,
            audit_share=0.5,
        )

    def attempt(self, call: Callable[[], Any]) -> Any:
        """Return what it returns; a mistake is one of the user's and changes nothing."""
        before = self.seen()
        try:
            return call()
        except MISTAKES:
            assert self.seen() == before
            return None

    def seen(self) -> Any:
        controller = self.controller
        return controller.trials(), controller.running(), controller.counts(), controller.front()

    @rule()
    def ask(self) -> None:
        trial = self.controller.ask()
        if trial is not None:
            assert trial.state == "running"
            self.asked.append(trial)

    @rule(n=st.integers(2, 4))
    def ask_from_threads(self, n: int) -> None:
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda: found.append(self.controller.ask())) for _ in range(n)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == n
        trials = [trial for trial in found if trial is not None]
        assert len({trial.digest for trial in trials}) == len(trials)
        self.asked += trials

    @rule(index=st.integers(0, 10**6), step=STEPS, score=NUMBERS)
    def report(self, index: int, step: Any, score: Any) -> None:
        trial = self.asked[-1 - index % len(self.asked)]
        decision = self.attempt(lambda: self.controller.report(trial, step, score))
        assert decision is None or isinstance(decision, Decision)

    @rule(
        index=st.integers(0, 10**6),
        score=st.none() | NUMBERS,
        measured=MEASURED,
        failed=st.none() | REASONS,
        stopped=st.none() | REASONS,
    )
    def tell(self, index: int, **ending: Any) -> None:
        trial = self.asked[-1 - index % len(self.asked)]
        self.attempt(lambda: self.controller.tell(trial, **ending))

    @rule(index=st.integers(0, 10**6), score=st.floats(0, 1), seconds=st.floats(0.1, 9))
    def tell_well(self, index: int, score: float, seconds: float) -> None:
        trial = self.asked[-1 - index % len(self.asked)]
        measured = {"train_seconds": seconds}
        self.attempt(lambda: self.controller.tell(trial, score=score, measured=measured))

    @rule(
        candidate=st.sampled_from([FOREIGN, SPACE.reference(), "lora", None]),
        index=st.none() | st.integers(0, 10**6),
    )
    def enqueue(self, candidate: Any, index: int | None) -> None:
        if index is not None and isinstance(self.asked[index % len(self.asked)], Trial):
            candidate = self.asked[index % len(self.asked)].candidate
        self.attempt(lambda: self.controller.enqueue(candidate))

    @rule(n=st.sampled_from([0, 1, -3, 100]))
    def limit_portfolio(self, n: int) -> None:
        self.controller.limit_portfolio(n)

    @rule(
        key=st.sampled_from(["a", "", 3, None]),
        value=st.sampled_from([1, "x", {"a": [1]}, np.float32(1.0), object(), {1, 2}, b"x"]),
    )
    def remember(self, key: Any, value: Any) -> None:
        self.attempt(lambda: self.controller.remember(key, value))
        if isinstance(key, str):
            self.controller.recall(key)

    @rule(text=st.sampled_from(["", "# The end", "é\x00"]))
    def conclude(self, text: str) -> None:
        self.controller.conclude(text)
        self.controller.post()

    @rule(name=st.sampled_from(["there.txt", "missing.txt"]))
    def attach(self, name: str) -> None:
        (self.folder / "there.txt").write_text("x")
        try:
            self.controller.attach(self.folder / "artifacts", [self.folder / name], {})
        except OSError:
            assert name == "missing.txt"

    @rule()
    def resume(self) -> None:
        if self.place is not None:
            n_running = len(self.controller.running())
            before = self.controller.trials()
            self.controller = self.made(resume=True)
            assert len(self.controller.trials()) == len(before) + n_running
            assert not self.controller.running()

    @invariant()
    def study_and_controller_agree(self) -> None:
        if not hasattr(self, "controller"):
            return
        controller = self.controller
        stored = read_trials(controller.study, controller.objectives)
        assert controller.trials() == tuple(t for t in stored if t.state != "running")
        assert controller.running() == tuple(t for t in stored if t.state == "running")
        assert controller.counts() == {
            state: sum(
                t.state == state and t.reason not in (INTERRUPTED, DUPLICATE) for t in stored
            )
            for state in ("complete", "pruned", "failed")
        }
        complete = [t for t in stored if t.state == "complete"]
        rows = [[t.values["accuracy"], *(-t.values[n] for n in OBJECTIVES[1:])] for t in complete]
        best = {t.number for t, keep in zip(complete, non_dominated(rows), strict=True) if keep}
        assert {t.number for t in controller.front()} == best

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


Misuse.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)
TestMisuse = Misuse.TestCase


class LongMisuse(Misuse):
    """The same for long."""


LongMisuse.TestCase.settings = settings(
    max_examples=1500, stateful_step_count=60, suppress_health_check=list(HealthCheck)
)
TestLongMisuse = pytest.mark.timeout(3600)(pytest.mark.nightly(LongMisuse.TestCase))


def controller(**given: Any) -> SearchController:
    return SearchController(SPACE, ("accuracy", "trainable_params"), seed=3, **given)


def test_rungs_in_any_order_are_kept_in_order() -> None:
    """Regression: the study kept them by step, the controller as they came."""
    search = controller()
    trial = search.ask()
    for step in (30, 10, 20, 10):
        search.report(trial, step, step / 100)
    search.tell(trial, score=0.5)
    assert search.trials()[0].rungs == ((10, 0.1), (20, 0.2), (30, 0.3))
    assert search.trials() == read_trials(search.study, search.objectives)


def test_what_another_controller_ended_has_ended(tmp_path: Path) -> None:
    place = tmp_path / "a.db"
    first = controller(storage=place, study_name="s")
    trial, other = first.ask(), first.ask()
    controller(storage=place, study_name="s", resume=True)  # It takes both for interrupted.
    first.tell(trial, score=0.5)
    assert first.report(other, 10, 0.5) is Decision.STOP
    assert [t.state for t in first.trials()] == ["failed", "failed"]
    assert first.warnings[0].startswith("2 trials had been ended in the study by another process")
    assert first.trials() == read_trials(first.study, first.objectives)


def test_a_candidate_of_another_model_is_refused_when_it_is_enqueued() -> None:
    """Regression: it was taken, and each later ask failed on its price."""
    search = controller()
    plan = AdapterPlan((LayerSpec(99, "attn.k", "lora", 4),))
    with pytest.raises((ValueError, UserError)):
        search.enqueue(Candidate(plan, TrainSettings(1e-3)))
    assert search.ask() is not None


def test_a_candidate_enqueued_twice_is_handed_out_once() -> None:
    search = controller(n_baselines=0, n_portfolio=0)
    candidate = SPACE.sample_stratified(np.random.default_rng(1))
    search.enqueue(candidate)
    search.enqueue(candidate)
    digests = [search.ask().digest for _ in range(4)]
    assert digests.count(candidate.digest) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("space", "all"),
        ("objectives", "accuracy"),
        ("objectives", [3]),
        ("seed", -1),
        ("seed", "x"),
        ("audit_share", float("nan")),
        ("audit_share", 2.0),
        ("eta", 0.0),
        ("eta", 1e300),
        ("objectives", ["trainable_params"]),
        ("objectives", ["trainable_params", "accuracy"]),
        ("objectives", ["latency_ms", "trainable_params"]),
        ("objectives", [Objective("inference_flops", "minimize"), "trainable_params"]),
        ("storage", "a\0.db"),
        ("storage", "sqlite:///a\0.db"),
        ("n_baselines", -1),
        ("n_portfolio", "many"),
        ("storage", 3),
        ("study_name", 3),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"space": SPACE, "objectives": ["accuracy"], name: value}
    with pytest.raises(UserError, match=name):
        SearchController(**given)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda c, t: c.limit_portfolio("x"), "n_portfolio must be an integer"),
        (lambda c, t: c.limit_portfolio(None), "n_portfolio"),
        (lambda c, t: c.limit_portfolio([1]), "n_portfolio"),
        (lambda c, t: c.limit_portfolio(2.5), "n_portfolio"),
        (lambda c, t: c.attach(3, [], {}), "folder must be a path"),
        (lambda c, t: c.attach("a\0", [], {}), "folder holds a NUL character"),
        (lambda c, t: c.attach("there", "x", {}), "files must be a list of paths"),
        (lambda c, t: c.attach("there", [3], {}), "files must be a path"),
        (lambda c, t: c.attach("there", [], "x"), "adapters must map names to folders"),
        (lambda c, t: c.attach("there", [], {"a": None}), "adapters must be a path"),
        (lambda c, t: c.attach("there", [], {"../a": "x"}), "adapter's name .* got '../a'"),
        (lambda c, t: c.recall([]), "a key must be text"),
        (lambda c, t: c.recall(3), "a key must be text"),
        (lambda c, t: c.remember("k\ud800", "x"), "half a character"),
        (lambda c, t: c.recall("k\ud800"), "half a character"),
        (lambda c, t: c.tell(replace(t, number=[1]), score=0.5), "number must be int"),
        (lambda c, t: c.report(replace(t, number=False), 1, 0.5), "number must be int"),
    ],
)
def test_misuse_is_one_line_and_changes_nothing(
    call: Callable[[SearchController, Any], Any],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: these were a TypeError, an AttributeError or SQLite's error (issue 18)."""
    monkeypatch.chdir(tmp_path)
    search = controller(storage=tmp_path / "a.db")
    trial = search.ask()
    with pytest.raises(ValueError, match=named):
        call(search, trial)
    assert (search.running(), search.trials(), search.study.user_attrs.get("k")) == (
        (trial,),
        (),
        None,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.db"]


def test_numbers_of_decimal_are_computed_with() -> None:
    """Regression: the audit added a Decimal to a float once a trial was to be pruned."""
    search = controller(eta=Decimal(3), audit_share=Decimal("0.5"), n_baselines=0, pruner="gap")
    decisions = []
    for number in range(12):
        trial = search.ask()
        decisions.append(search.report(trial, 30, 0.9 - 0.07 * number))
        search.tell(trial, score=0.9 - 0.07 * number)
    assert Decision.STOP in decisions


def test_a_score_overwrites_no_cost() -> None:
    """Regression: a cost as the first objective had the score as its value (issue 18)."""

    class Priced:
        """Prices with a cost of the quality's name."""

        def price(self, candidate: Candidate) -> Price:
            return Price(1, 4, 1.0, 1, others={"accuracy": 3.0})

    search = controller(prices=Priced())
    trial = search.ask()
    with pytest.raises(ValueError, match="score would overwrite the cost 'accuracy'"):
        search.tell(trial, score=0.5)
    assert search.running() == (trial,)
