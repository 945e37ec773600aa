"""The dispatcher: search then confirm, within the budget, telling the controller the truth."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_clock import FakeClock

from autopeft.confirm.finalists import (
    Compressed,
    Finalist,
    SeedScore,
    _spread,
    can_be_cut,
    choose_finalists,
    confirmed_finalists,
    mark_lora_baselines,
    tuned_lora,
)
from autopeft.confirm.pick import pick_best
from autopeft.confirm.race import expected_seeds
from autopeft.confirm.store import ConfirmationStore
from autopeft.costs import PriceTable, Topology
from autopeft.costs.objectives import objective
from autopeft.engine import dispatcher, watch
from autopeft.engine.budget import Budget, BudgetTracker, Spent
from autopeft.engine.callback import CallbackList, Progress
from autopeft.engine.dispatcher import FAILURES, STORM, Dispatcher
from autopeft.engine.messages import (
    Activity,
    BeatMessage,
    ConfirmMessage,
    FailureMessage,
    HungJob,
    Job,
    RungMessage,
    StepMessage,
    TimeUpMessage,
)
from autopeft.engine.search_plan import SearchPlan
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.searcher.controller import SearchController
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import SearchSettings
from autopeft.training import step_clock
from autopeft.trial import RungReport, front_of

TOPOLOGY = Topology(
    4,
    {"attn.q": (64, 64), "attn.v": (64, 64), "mlp.up": (128, 64), "mlp.down": (64, 128)},
    head_params=130,
)
OBJECTIVES = (objective("accuracy"), objective("trainable_params"))
RUNGS = (11, 33, 100)
PINNED = SearchSettings(confirm_seeds=2, max_finalists=3, confirm_share=0.3, workers=2)


class FakeSearch:
    """A dispatcher with a controller on the default space, and a worker that answers at once."""

    def __init__(
        self,
        folder: Path,
        budget: str,
        *,
        compress: bool = False,
        settings: SearchSettings | None = None,
        storage: Path | None = None,
        **options: Any,
    ) -> None:
        self.space = SearchSpace.from_source("default", TOPOLOGY, steps=100, batch_size=16)
        self.prices = PriceTable.from_topology(TOPOLOGY, batch_size=16)
        self.controller = SearchController(
            self.space,
            OBJECTIVES,
            sampler="random",
            pruner="none",
            prices=self.prices,
            storage=storage,
            study_name="s",
            resume=storage is not None and storage.exists(),
        )
        spent = Spent(trials=self.controller.n_spent)
        self.budget = BudgetTracker(Budget.parse(budget), 0.3, spent)
        self.progress: list[Progress] = []
        self.store = ConfirmationStore(folder)
        self.dispatcher = Dispatcher(
            self.controller,
            self.budget,
            self.store,
            settings or replace(PINNED, compress=compress),
            on_progress=self.progress.append,
            **options,
        )
        self.dispatcher.start()
        self.fails_at: set[int] = set()

    def score(self, job: Job) -> float:
        return 0.5 + 0.01 * len(job.candidate.plan.specs) + 1e-4 * job.seed

    def seconds(self, job: Job) -> float:
        return 1.0

    def activity(self, job: Job) -> Activity:
        return Activity()

    def work(self, job: Job) -> None:
        if job.kind == "confirm":
            score = SeedScore(
                job.seed,
                {"accuracy": self.score(job), "loss": 0.5},
                {"accuracy": self.score(job), "loss": 0.5},
                (1.0, 0.0),
                {"accuracy": self.score(job), "trainable_params": 1.0},
            )
            cut = tuple(
                Compressed(each, self.prices.price(each), score, {"adapter.txt": b"cut"})
                for each in job.cuts or self.cuts_of(job)
            )
            files = {"adapter.txt": b"x"}
            assert not self.dispatcher.take(
                job, ConfirmMessage(score, files, Activity(train=1.0), 1e6, cut)
            )
            return
        if job.number in self.fails_at:
            assert not self.dispatcher.take(job, FailureMessage("diverged"))
            return
        for step in (step for step in RUNGS if step not in job.skipped):
            report = RungReport(step, -0.5, 0.5, {"accuracy": self.score(job)}, 1, 1, step * 1e6)
            measured = {"train_seconds": self.seconds(job)}
            message = RungMessage(report, step == RUNGS[-1], measured, self.activity(job))
            if not self.dispatcher.take(job, message):
                break

    def cuts_of(self, job: Job) -> list[Candidate]:
        """Drop the first sites: as many as the job's seed says, for each of two cuts."""
        specs = job.candidate.plan.specs if job.compress else ()
        kept = [specs[job.seed * i :] for i in (1, 2)]
        return [Candidate(AdapterPlan(rest), job.candidate.train) for rest in kept if rest]

    def run(self) -> list[Job]:
        done = []
        while True:
            job = self.dispatcher.next_job()
            if job is None:
                break
            self.work(job)
            done.append(job)
        assert self.dispatcher.phase == "done"
        return done


def test_the_search_comes_first_then_the_finalists_with_new_seeds(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "15trials")
    jobs = search.run()
    kinds = [job.kind for job in jobs]
    assert kinds[:15] == ["search"] * 15
    assert set(kinds[15:]) == {"confirm"}
    assert {job.seed for job in jobs if job.kind == "search"} == {0}
    assert {job.seed for job in jobs if job.kind == "confirm"} == {1, 2}
    confirmed = confirmed_finalists(search.controller.trials(), search.store.scores())
    assert all(f.seeds[0].seed == 1 for f in confirmed)
    assert {"baseline", "reference"} <= {f.origin for f in confirmed}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock().replace_in(monkeypatch, dispatcher, step_clock, watch)


def _next(search: FakeSearch) -> Job:
    job = search.dispatcher.next_job()
    assert job is not None
    return job


def _left(job: Job) -> float | None:
    return None if job.deadline is None else job.deadline.seconds_left


def test_a_trial_carries_the_seconds_that_the_search_has_left(
    tmp_path: Path, clock: FakeClock
) -> None:
    search = FakeSearch(tmp_path, "100s")
    clock.now += 10.0
    job = _next(search)
    jobs = [job, _next(search), _next(search)]
    # Without the reference and one adapter there is nothing to confirm, for which 30 % are kept.
    assert [_left(job) for job in jobs] == pytest.approx([90.0, 90.0, 60.0])
    clock.now += 70.0
    report = RungReport(11, -0.5, 0.5, {"accuracy": 0.9}, 1, 1, 11e6)
    assert search.dispatcher.take(jobs[1], RungMessage(report, False))
    assert not search.dispatcher.take(jobs[2], RungMessage(report, False))
    assert _next(FakeSearch(tmp_path, "5trials,1e15flops")).deadline is None


def test_a_trial_whose_time_was_up_is_pruned_and_keeps_its_rungs(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "100s")
    job = _next(search)
    report = RungReport(11, -0.5, 0.5, {"accuracy": 0.9}, 1, 1, 11e6)
    assert search.dispatcher.take(job, RungMessage(report, False))
    assert not search.dispatcher.take(job, TimeUpMessage(20, 20e6))
    (trial,) = search.controller.trials()
    assert (trial.state, trial.reason) == ("pruned", "the search's share of the budget ended")
    assert trial.rungs == ((11, -0.5),)
    assert search.budget.spent.flops == 20e6
    assert not search.dispatcher.is_running(job)


def test_a_trial_whose_time_was_up_before_a_rung_confuses_no_sampler(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "100s")
    assert not search.dispatcher.take(_next(search), TimeUpMessage(3, 3e6))
    search.work(_next(search))
    assert search.controller.counts() == {"complete": 1, "pruned": 1, "failed": 0}


def test_no_trial_begins_that_cannot_end(tmp_path: Path, clock: FakeClock) -> None:
    search = FakeSearch(tmp_path, "100s")
    for _ in range(3):
        job = _next(search)
        clock.now += 20.0
        search.work(job)
    assert _next(search).kind == "confirm"  # 10 s of 70 are left, and a trial takes 20.


def test_a_budget_that_is_used_up_still_pays_for_what_a_verdict_needs(
    tmp_path: Path, clock: FakeClock
) -> None:
    search = FakeSearch(tmp_path, "1000s,15trials")
    for _ in range(15):
        search.work(_next(search))
    clock.now += 2000.0
    jobs = search.run()
    by_digest = {o.digest: o.origin for o in mark_lora_baselines(search.controller.trials())}
    origins = [by_digest[job.candidate.digest] for job in jobs]
    assert origins
    assert set(origins) <= {"baseline", "reference"}
    assert all(job.deadline is None for job in jobs)
    confirmed = confirmed_finalists(search.controller.trials(), search.store.scores())
    assert {"baseline", "reference"} <= {f.origin for f in confirmed}
    assert all(len(f.seeds) == 1 for f in confirmed)
    assert any("the budget ended before" in text for text in search.dispatcher.warnings)


def test_without_an_adapter_nothing_is_confirmed_after_the_end(
    tmp_path: Path, clock: FakeClock
) -> None:
    search = FakeSearch(tmp_path, "100s")
    search.work(_next(search))
    assert search.controller.counts()["complete"] == 1  # The reference.
    job = _next(search)
    clock.now += 101.0
    assert not search.dispatcher.take(job, TimeUpMessage(20, 20e6))
    assert search.dispatcher.next_job() is None
    assert search.dispatcher.phase == "done"


def test_a_confirmation_is_stopped_where_half_of_it_is_past_the_deadline(
    tmp_path: Path, clock: FakeClock
) -> None:
    search = FakeSearch(tmp_path, "1000s,15trials")
    for _ in range(15):
        search.work(_next(search))
    clock.now += 990.0
    job = _next(search)
    while job.deadline is None:
        search.work(job)
        search.dispatcher._expected[job.candidate.digest] = 4.0
        job = _next(search)
    expected = search.dispatcher._expected[job.candidate.digest]
    assert _left(job) == pytest.approx(10.0 + expected / 2)
    assert not search.dispatcher.take(job, TimeUpMessage(40, 0.0))
    (warning,) = search.dispatcher.warnings
    assert "was stopped at step 40: the budget ended" in warning
    search.run()


def test_a_cheap_confirmation_is_not_lost_with_a_dear_one_before_it(
    tmp_path: Path, clock: FakeClock
) -> None:
    search = FakeSearch(tmp_path, "1000s,15trials")
    for _ in range(15):
        search.work(_next(search))
    job = _next(search)
    while search.dispatcher._without_confirmation():
        search.work(job)
        job = _next(search)
    search.work(job)
    dear, cheap, *more = search.dispatcher._queue
    assert not more
    for each, seconds in ((dear, 100.0), (cheap, 10.0)):
        search.dispatcher._expected[each.candidate.digest] = seconds
    clock.now += 990.0
    assert _next(search).key == cheap.key
    assert any("before 1 confirmation;" in text for text in search.dispatcher.warnings)
    assert search.dispatcher.next_job() is None


class TimedSearch(FakeSearch):
    """The more sites, the longer a training, and the better: what is confirmed is dear.

    Of the time left and a plan in which nothing is pinned, the confirmation follows the trials.
    """

    def __init__(
        self, folder: Path, budget: str, clock: FakeClock, pace: float = 1.0, **options: Any
    ) -> None:
        self.clock, self.pace = clock, pace
        super().__init__(
            folder, budget, settings=SearchSettings(workers=1, compress=False), **options
        )
        self.lines: list[str] = []
        self.dispatcher._callbacks = CallbackList([self])

    def on_message(self, text: str) -> None:
        self.lines.append(text)

    def seconds(self, job: Job) -> float:
        return float(self.pace * (1.0 + 0.2 * len(job.candidate.plan.specs) ** 1.5))

    def score(self, job: Job) -> float:
        # Seeds differ by more than finalists do: the race asks for all there are.
        return super().score(job) + 0.05 * (int(job.candidate.digest, 16) * job.seed % 7)

    def work(self, job: Job) -> None:
        self.clock.now += self.seconds(job)
        super().work(job)


@pytest.mark.parametrize("pace", [0.25, 0.5, 0.7])
def test_the_confirmation_follows_the_trials_and_ends_in_time(
    pace: float, tmp_path: Path, clock: FakeClock
) -> None:
    plan = replace(SearchPlan.of(SearchSettings()), n_trials=41, max_finalists=3, confirm_seeds=2)
    search = TimedSearch(tmp_path, "600s", clock, pace, plan=plan)
    jobs = search.run()
    n_trials = sum(job.kind == "search" for job in jobs)
    confirmed = confirmed_finalists(search.controller.trials(), search.store.scores())
    trained = [f for f in confirmed if f.candidate.plan.specs]
    fronts = [f for f in trained if f.origin != "baseline"]
    n_seeds = {f.digest: len(f.seeds) for f in trained}
    assert n_trials >= 40
    assert n_seeds[tuned_lora(confirmed, (), OBJECTIVES[0])] >= 2
    assert sum(n >= 2 for n in n_seeds.values()) > len(fronts) / 2
    assert clock.now - 1000.0 <= 600.0 * 1.02
    if pace == 0.25:
        assert len(fronts) >= 4
        assert max(n_seeds.values()) >= 3
        assert any("up to 6 finalists with up to 3 seeds each" in line for line in search.lines)


@pytest.mark.parametrize("pace", [0.7, 0.8])
def test_a_larger_budget_adds_the_confirmations_that_a_smaller_one_ended_before(
    pace: float, tmp_path: Path, clock: FakeClock
) -> None:
    plan = replace(SearchPlan.of(SearchSettings()), n_trials=41)
    search = TimedSearch(tmp_path, "600s", clock, pace, plan=plan)
    done = {job.key for job in search.run()}
    told = r"the budget ended before (\d+) confirmations?; `autopeft resume`"
    n_promised = sum(int(n) for n in re.findall(told, "\n".join(search.dispatcher.warnings)))
    assert n_promised
    # As a resume does, with the sizes of the first plan; what is left is for confirmations.
    search.budget = BudgetTracker(Budget.parse("660s"), 0.6, search.budget.spent)
    search.dispatcher = Dispatcher(
        search.controller, search.budget, search.store, SearchSettings(workers=1), plan=plan
    )
    search.dispatcher.start()
    more = search.run()
    assert {job.kind for job in more} == {"confirm"}
    assert not done & {job.key for job in more}
    assert len(more) >= n_promised
    assert clock.now - 1000.0 <= 660.0 * 1.02


def test_a_search_that_is_slower_than_planned_says_so_and_keeps_its_own_half(
    tmp_path: Path, clock: FakeClock
) -> None:
    plan = replace(SearchPlan.of(SearchSettings()), n_trials=80)
    search = TimedSearch(tmp_path, "400s", clock, 1.3, plan=plan)
    search.run()
    text = r"plan after \d+ trials: about \d+ trials .* would pay for 40 trials"
    assert any(re.fullmatch(text, line) for line in search.lines)
    origins = [trial.origin for trial in search.controller.trials()]
    n_own = sum(origin in ("design", "search") for origin in origins)
    assert n_own >= len(origins) // 2 - 1


class _DearRungs(FakeSearch):
    """Scoring takes half of a trial's time."""

    def activity(self, job: Job) -> Activity:
        return Activity(train=1.0, evaluate=1.0)


@pytest.mark.parametrize(
    ("budget", "settings", "skipped"),
    [
        ("30trials,1h", SearchSettings(workers=1), (11, 33)),
        ("30trials,1h", SearchSettings(workers=1, rungs=3), ()),
        ("30trials", SearchSettings(workers=1), ()),
    ],
)
def test_a_rung_that_takes_more_than_it_saves_is_left_out_unless_the_user_set_it(
    budget: str, settings: SearchSettings, skipped: tuple[int, ...], tmp_path: Path
) -> None:
    told: list[str] = []

    class Listener:
        def on_message(self, text: str) -> None:
            told.append(text)

    search = _DearRungs(tmp_path, budget, settings=settings, callbacks=CallbackList([Listener()]))
    jobs = [job for job in search.run() if job.kind == "search"]
    assert not jobs[0].skipped
    assert tuple(sorted(jobs[-1].skipped)) == skipped
    lines = [text for text in told if text.startswith("trials are no longer scored at step")]
    assert len(lines) == len(skipped)


def test_time_and_steps_go_on_while_no_job_has_a_message(tmp_path: Path, clock: FakeClock) -> None:
    search = FakeSearch(tmp_path, "100s")
    job = _next(search)
    clock.now += 7.0
    search.dispatcher.tick()
    assert search.progress[-1].seconds_left == pytest.approx(93.0)
    at = StepMessage.of(job, 31, 0.5, 2.0)
    search.dispatcher.tick([at, replace(at, job=("search", "unknown", 0))])
    search.work(job)
    told = [state.steps for state in search.progress]
    assert (at,) in told
    assert set(told) == {(), (at,)}
    assert told[-1] == ()


def test_the_second_seed_goes_where_it_may_decide(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "15trials")
    confirmations = [job for job in search.run() if job.kind == "confirm"]
    seeds = [job.seed for job in confirmations]
    assert seeds == sorted(seeds)
    confirmed = confirmed_finalists(search.controller.trials(), search.store.scores())
    n_seeds = {f.digest: len(f.seeds) for f in confirmed}
    assert n_seeds[tuned_lora(confirmed, (), OBJECTIVES[0])] == 2
    assert n_seeds[pick_best(confirmed, OBJECTIVES)] == 2
    assert min(n_seeds.values()) == 1
    assert search.store.looks()[-1] == n_seeds


def test_a_race_goes_on_from_what_is_on_disk(tmp_path: Path) -> None:
    n_jobs = len(FakeSearch(tmp_path / "a", "15trials").run())
    first = FakeSearch(tmp_path / "b", "15trials")
    done = []
    for _ in range(n_jobs - 2):
        job = first.dispatcher.next_job()
        assert job is not None
        first.work(job)
        done.append(job.key)
    second = FakeSearch(tmp_path / "b", "15trials")
    rest = [job.key for job in second.run() if job.kind == "confirm"]
    assert rest
    assert not set(done) & set(rest)
    third = FakeSearch(tmp_path / "b", "15trials")
    assert not [job for job in third.run() if job.kind == "confirm"]
    assert third.store.looks() == second.store.looks()


def test_a_confirmation_that_fails_is_not_tried_twice(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "15trials")
    handed = []
    while (job := search.dispatcher.next_job()) is not None:
        handed.append(job.key)
        if job.kind == "confirm" and job.candidate.plan.specs:
            search.dispatcher.fail(job, "diverged")
        else:
            search.work(job)
    assert search.dispatcher.phase == "done"
    assert len(handed) == len(set(handed))


@pytest.mark.parametrize("kind", ["search", "confirm"])
def test_a_job_whose_worker_dies_is_tried_twice_more_alone(kind: str, tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "6trials")
    tries: list[Job] = []
    while (job := search.dispatcher.next_job()) is not None:
        is_bad = job.kind == kind and bool(job.candidate.plan.specs)
        if is_bad and (not tries or job.key == tries[0].key):
            tries.append(job)
            search.dispatcher.lose(job, "the worker died")
        else:
            search.work(job)
    assert [job.is_alone for job in tries] == [False, True, True]
    assert len({job.number for job in tries}) == 1
    told = [trial.reason for trial in search.controller.trials() if trial.state == "failed"]
    told += search.dispatcher.warnings
    assert len(told) == 1
    assert told[0].endswith("the worker died; so did 2 others before")


def _one_session(folder: Path, storage: Path) -> tuple[FakeSearch, Job | None]:
    """Work until the process dies, as it does of each LoRA's confirmation; return what killed it.

    As the local backend does, a death is counted before the training.
    """
    search = FakeSearch(folder, "5trials", storage=storage)
    while (job := search.dispatcher.next_job()) is not None:
        search.dispatcher.may_die([job])
        if job.kind == "confirm" and job.candidate.plan.specs:
            return search, job
        search.work(job)
        search.dispatcher.survived([job])
    return search, None


def test_a_confirmation_that_ends_its_process_is_tried_three_times(tmp_path: Path) -> None:
    """Regression: each resume died of the same one again, and no search ever ended (issue 18)."""
    killers: list[Job] = []
    for _ in range(20):
        search, job = _one_session(tmp_path / "run", tmp_path / "study.log")
        if job is None:
            break
        killers.append(job)
    tries = [job.key for job in killers]
    assert tries
    assert {tries.count(key) for key in tries} == {3}
    assert search.dispatcher.phase == "done"
    assert search.store.done()  # The reference, which kills nothing.
    reasons = [line for line in search.dispatcher.warnings if "failed: " in line]
    assert len(reasons) == len(set(tries))
    assert all("the process that trained it died 3 times" in line for line in reasons)


def test_a_confirmation_that_ended_its_process_comes_last_and_alone(tmp_path: Path) -> None:
    storage = tmp_path / "study.log"
    _, killer = _one_session(tmp_path / "run", storage)
    _, again = _one_session(tmp_path / "run", storage)
    assert killer is not None
    assert again is not None
    assert again.key != killer.key
    third = FakeSearch(tmp_path / "run", "5trials", storage=storage)
    rest = [job for job in third.run() if job.kind == "confirm"]
    first_round = rest[: len({job.candidate.digest for job in rest})]
    assert {job.key for job in first_round[-2:]} == {killer.key, again.key}
    assert all(job.is_alone for job in first_round[-2:])


def test_the_last_trial_is_tried_again_too(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "6trials")
    handed: list[Job] = []
    while (job := search.dispatcher.next_job()) is not None:
        handed.append(job)
        if len(handed) == 6:
            search.dispatcher.lose(job, "the worker died")
        else:
            search.work(job)
    assert handed[5].key == handed[6].key
    assert search.controller.counts() == {"complete": 6, "pruned": 0, "failed": 0}


def test_one_death_is_no_failure(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "6trials")
    job = search.dispatcher.next_job()
    assert job is not None
    search.dispatcher.lose(job, "the worker died")
    jobs = search.run()
    assert jobs[0].key == job.key
    assert search.controller.counts() == {"complete": 6, "pruned": 0, "failed": 0}
    assert not search.dispatcher.warnings


def test_what_has_no_time_to_be_tried_again_fails(tmp_path: Path, clock: FakeClock) -> None:
    search = FakeSearch(tmp_path, "100s")
    job = search.dispatcher.next_job()
    assert job is not None
    search.dispatcher.lose(job, "the worker died")
    clock.now += 99.0
    assert job.key not in [each.key for each in search.run()]
    (trial,) = search.controller.trials()
    assert trial.reason == "the worker died; the budget left no time to try again"


def test_who_hangs_is_named_at_a_tick(tmp_path: Path, clock: FakeClock) -> None:
    search = FakeSearch(tmp_path, "1000s")
    job = search.dispatcher.next_job()
    assert job is not None
    beat = BeatMessage((job.key,), 5.0)
    for _ in range(250):
        assert search.dispatcher.tick((), [beat]) == ()
        clock.now += 1.0
    clock.now += 1.0
    (hung,) = search.dispatcher.tick((), [beat])
    assert hung == HungJob(job, "no sign of progress for 251 s")
    search.dispatcher.tick([StepMessage.of(job, 3, 0.5, 2.0)], [beat])
    assert search.dispatcher.tick((), [beat]) == ()


def test_no_candidate_is_trained_twice(tmp_path: Path) -> None:
    jobs = FakeSearch(tmp_path, "40trials").run()
    digests = [job.candidate.digest for job in jobs if job.kind == "search"]
    assert len(digests) == len(set(digests)) == 40


def test_a_failure_is_told_as_one_and_never_confirmed(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "12trials")
    search.fails_at = {0, 5}
    jobs = search.run()
    failed = [o for o in search.controller.trials() if o.state == "failed"]
    assert [o.number for o in failed] == [0, 5]
    assert all(o.reason == "diverged" for o in failed)
    bad = {o.candidate.digest for o in failed}
    assert not bad & {job.candidate.digest for job in jobs if job.kind == "confirm"}


def test_a_search_whose_trials_all_fail_alike_ends_before_its_budget(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "40trials")
    search.fails_at = set(range(40))
    assert len(search.run()) == FAILURES
    (warning,) = search.dispatcher.warnings
    assert warning.endswith(f"{FAILURES} trials in a row failed with: diverged")


def test_a_storm_of_failures_alike_ends_a_search_that_has_trained_trials(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "60trials")
    search.fails_at = set(range(3, 60))
    jobs = search.run()
    assert sum(job.kind == "search" for job in jobs) == 3 + STORM
    (warning,) = search.dispatcher.warnings
    assert warning.endswith(f"{STORM} trials in a row failed with: diverged")
    assert any(job.kind == "confirm" for job in jobs), "what was trained is confirmed"


def test_a_few_failures_end_no_search_that_has_trained_a_trial(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "20trials")
    search.fails_at = set(range(1, 12))
    jobs = search.run()
    assert sum(job.kind == "search" for job in jobs) == 20
    assert not search.dispatcher.warnings


def test_flops_are_booked_once_a_step(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "5trials")
    search.run()
    n_confirmed = sum(len(scores) for scores in search.store.scores().values())
    assert search.budget.spent.flops == pytest.approx(5 * 100e6 + n_confirmed * 1e6)


def test_a_flops_budget_ends_the_search(tmp_path: Path) -> None:
    jobs = FakeSearch(tmp_path, "1e9flops").run()
    # 100e6 a trial, 70 % of 1e9 for the search: the seventh trial uses it up.
    assert sum(job.kind == "search" for job in jobs) == 7


def test_confirmations_on_disk_are_not_done_again(tmp_path: Path) -> None:
    first = FakeSearch(tmp_path, "10trials")
    n_first = sum(job.kind == "confirm" for job in first.run())
    second = FakeSearch(tmp_path, "10trials")
    assert n_first > 0
    assert sum(job.kind == "confirm" for job in second.run()) == 0


def test_waiting_is_not_the_end(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "1trials")
    job = search.dispatcher.next_job()
    assert job is not None
    assert search.dispatcher.next_job() is None
    assert search.dispatcher.phase == "search"
    search.work(job)
    confirm = search.dispatcher.next_job()
    assert confirm is not None
    assert confirm.kind == "confirm"


def test_a_free_worker_confirms_the_reference_while_the_last_trial_ends(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "10trials")
    for _ in range(9):
        job = search.dispatcher.next_job()
        assert job is not None
        search.work(job)
    last = search.dispatcher.next_job()
    assert last is not None
    assert last.kind == "search"
    early = search.dispatcher.next_job()
    assert early is not None
    assert (early.kind, early.candidate.plan.specs) == ("confirm", ())
    assert early.deadline is None
    assert search.dispatcher.next_job() is None
    search.work(last)
    search.work(early)
    rest = search.run()
    assert all(job.candidate.plan.specs for job in rest)


def test_at_the_end_a_free_worker_confirms_the_reference_once(
    tmp_path: Path, clock: FakeClock
) -> None:
    search = FakeSearch(tmp_path, "100s")
    search.work(_next(search))
    assert _next(search).candidate.plan.specs
    clock.now += 99.8
    assert _next(search).candidate.plan.specs == ()
    assert search.dispatcher.next_job() is None


def test_a_message_of_a_job_that_ended_changes_nothing(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "2trials")
    job = search.dispatcher.next_job()
    assert job is not None
    search.dispatcher.fail(job, "the worker died")
    report = RungReport(11, -0.5, 0.5, {"accuracy": 0.9}, 1, 1, 1e6)
    assert not search.dispatcher.take(job, RungMessage(report, False))
    assert search.controller.trials()[0].state == "failed"


def test_the_front_is_thinned_from_the_middle(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "60trials")
    search.run()
    front = front_of(search.controller.trials(), OBJECTIVES)
    thin = _spread(front, OBJECTIVES, 3)
    assert len(thin) == min(3, len(front))
    assert thin[0] is front[0] or len(thin) < 2
    assert thin[-1] is front[-1]
    for limit in range(1, len(front) + 2):
        assert len(_spread(front, OBJECTIVES, limit)) == min(limit, len(front))


def test_the_tuned_lora_is_always_nominated(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "60trials")
    search.run()
    chosen = choose_finalists(
        search.controller.trials(), OBJECTIVES, max_finalists=1, test_share=1.0
    )
    assert chosen[0].trial.origin == "baseline"


def test_the_reference_takes_no_finalists_place(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "60trials")
    search.run()
    # As good as can be for the price of a head: it would dominate every adapter.
    trials = tuple(
        replace(o, values={**o.values, "accuracy": 1.0}) if o.origin == "reference" else o
        for o in search.controller.trials()
    )
    chosen = choose_finalists(trials, OBJECTIVES, max_finalists=4, test_share=1.0)
    digests = {n.trial.candidate.digest for n in chosen}
    adapters = [o for o in mark_lora_baselines(trials) if o.candidate.plan.specs]
    front = front_of(adapters, OBJECTIVES)
    assert len(front) > 1
    assert {o.candidate.digest for o in _spread(front, OBJECTIVES, 4)} <= digests
    assert any(n.trial.origin == "reference" for n in chosen)


def test_an_ordinary_lora_counts_as_lora_whoever_found_it(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "20trials")
    search.run()
    trials = mark_lora_baselines(search.controller.trials())
    loras = [o for o in trials if o.origin == "baseline"]
    found = tuple(replace(o, origin="search") if o is loras[1] else o for o in trials)
    assert mark_lora_baselines(found) == trials
    plan = loras[0].candidate.plan
    partial = replace(loras[1].candidate, plan=AdapterPlan(plan.specs[1:]))
    odd = replace(loras[1], candidate=partial, origin="search")
    assert mark_lora_baselines((loras[0], odd))[1].origin == "search"


def test_the_store_publishes_the_adapter_of_one_seed(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "10trials")
    search.run()
    finalist = confirmed_finalists(search.controller.trials(), search.store.scores())[0]
    folder = search.store.publish(finalist, finalist.seeds[-1].seed)
    assert folder == tmp_path / "adapters" / finalist.candidate.digest
    assert (folder / "adapter.txt").read_bytes() == b"x"
    assert not [p for p in (tmp_path / "confirm").iterdir() if p.name.startswith(".")]


def test_only_a_plan_of_loras_can_be_cut() -> None:
    def is_cut(*names: str) -> bool:
        plan = AdapterPlan(LayerSpec(i, "attn.q", name, 8) for i, name in enumerate(names))
        return can_be_cut(Candidate(plan, TrainSettings(1e-3)))

    assert is_cut("lora", "rslora")
    assert not is_cut("lora", "miss")
    assert not is_cut()


def test_all_seeds_of_a_lora_are_cut_to_the_ranks_that_the_first_decided(tmp_path: Path) -> None:
    search = FakeSearch(tmp_path, "15trials", compress=True)
    jobs = search.run()
    trained = {job.candidate.digest for job in jobs if job.kind == "search"}
    first = [job for job in jobs if job.compress and job.seed == 1]
    assert not any(job.cuts for job in first)
    cut = {
        c.digest: job.candidate
        for job in first
        for c in search.cuts_of(job)
        if c.digest not in trained
    }
    assert cut
    assert {c.digest for job in jobs for c in job.cuts} == set(cut)
    assert not trained & set(cut)
    scores = search.store.scores()
    assert all(len(scores[digest]) == 2 for digest in cut)
    found = confirmed_finalists(search.controller.trials(), scores, search.store.compressed())
    compressed = {f.candidate.digest: f for f in found if f.origin == "compressed"}
    assert set(compressed) == set(cut)
    for digest, finalist in compressed.items():
        assert finalist.compressed_from == cut[digest].digest
        assert finalist.costs == search.prices.price(finalist.candidate)
        assert finalist.costs.trainable_params < search.prices.price(cut[digest]).trainable_params
        folder = search.store.publish(finalist, 1)
        assert (folder / "adapter.txt").read_bytes() == b"cut"


@pytest.mark.parametrize("n_written", range(0, 12))
def test_a_kill_among_confirmations_and_what_is_cut_from_them_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    whole = FakeSearch(tmp_path / "whole", "15trials", compress=True)
    whole.run()
    folder, storage = tmp_path / "killed", tmp_path / "study.log"
    folder.mkdir()
    killed = FakeSearch(folder, "15trials", compress=True, storage=storage)
    write, left = ConfirmationStore._write, iter(range(n_written))

    def dies(*given: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(ConfirmationStore, "_write", staticmethod(dies))
        with pytest.raises(KeyboardInterrupt):
            killed.run()
    resumed = FakeSearch(folder, "15trials", compress=True, storage=storage)
    assert {job.kind for job in resumed.run()} == {"confirm"}
    assert resumed.store.compressed() == whole.store.compressed()
    assert resumed.store.scores() == whole.store.scores()
    assert resumed.store.looks() == whole.store.looks()


def test_what_was_cut_first_and_trained_later_is_confirmed_by_its_own_training(
    tmp_path: Path,
) -> None:
    search = FakeSearch(tmp_path, "15trials", compress=True)
    source, cut = next((job.candidate, c) for job in search.run() for c in job.cuts)
    assert cut.digest not in {digest for digest, _ in search.store.done()}
    # A later sitting trains it as a trial of its own.
    search.controller.enqueue(cut)
    trial = search.controller.ask()
    assert trial is not None
    search.controller.tell(trial, score=0.9)

    def of_cut() -> list[Finalist]:
        found = confirmed_finalists(
            search.controller.trials(), search.store.scores(), search.store.compressed()
        )
        return [f for f in found if f.candidate == cut]

    (before,) = of_cut()
    assert (before.origin, before.compressed_from) == ("compressed", source.digest)
    search.work(Job("confirm", cut, trial.costs, seed=1))
    (after,) = of_cut()
    assert (after.origin, after.compressed_from) == (search.controller.trials()[-1].origin, "")
    assert [score.seed for score in after.seeds] == [1]
    assert (search.store.publish(after, 1) / "adapter.txt").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("compress", "share", "is_scored"),
    [(True, 1.5, True), (True, 1.05, False), (False, 1.5, False)],
)
def test_lower_ranks_are_scored_only_if_asked_for_and_time_is_left(
    tmp_path: Path, compress: bool, share: float, is_scored: bool
) -> None:
    """`share` is the time left over the time that the confirmations take."""
    confirmed = [
        job.candidate
        for job in FakeSearch(tmp_path / "a", "15trials").run()
        if job.kind != "search"
    ]
    search = FakeSearch(tmp_path / "b", "15trials,100000s", compress=compress)
    for _ in range(15):
        job = search.dispatcher.next_job()
        assert job is not None
        search.work(job)
    # Each confirmation is expected to take 1 s, as its trial did, on one of 2 workers.
    seconds = len(set(confirmed)) * expected_seeds(2) / 2
    search.budget.spend(seconds=search.dispatcher.seconds_left - share * seconds)
    confirmations = search.run()
    assert len(confirmations) >= len(set(confirmed))
    assert any(job.compress for job in confirmations) == is_scored
