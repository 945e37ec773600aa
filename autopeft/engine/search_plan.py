"""What a budget buys: the sizes of trainings and confirmations that make it a search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from autopeft.confirm.finalists import Retraining
from autopeft.confirm.race import EXTRA_SEEDS, n_rounds, reserved_seeds
from autopeft.errors import SettingsError
from autopeft.plan import TrainSettings
from autopeft.searcher.space.initial_design import N_BASELINES, N_PORTFOLIO
from autopeft.settings import SearchSettings
from autopeft.training.rungs import EARLIEST_STEP, rung_steps
from autopeft.utils.formatting import counted

ENOUGH_TRIALS = 40
"""Trials that make a search: the first 13 are LoRA baselines and known good plans."""

PLENTY = 80
"""Trials beyond which longer trainings are worth more than more of them."""

_USUAL_ROWS, LEAST_ROWS = TrainSettings.batch_size, 4
"""Rows of a step, and the fewest that are planned."""

_SHORT, LEAST_STEPS = 50, EARLIEST_STEP
"""Steps below which trainings tell little, and below which they tell nothing."""

_MOST_STEPS = 1000
_MOST_EPOCHS = 3
_PRUNED = 0.8
"""Share of a full training that a trial takes on average where rungs can stop it early."""

_LEAST_SHARE, _MOST_SHARE = 0.1, 0.6
"""Share of a budget that confirmations get at least and at most."""

N_BASIC = 2
"""Trainings of a confirmation beside the finalists: the tuned LoRA and the cheapest one. (The model
without an adapter is scored only.)"""


@dataclass(frozen=True)
class TextSpeed:
    """What generating the text of one task takes.

    Attributes:
        row: Seconds of a row.
        n_rows: Rows of a split that text is generated for.
        is_at_rungs: Whether it is generated at rungs too, for as many rows as are scored there.
    """

    row: float
    n_rows: int
    is_at_rungs: bool = False


@dataclass(frozen=True)
class Speed:
    """What a worker takes, in seconds.

    Attributes:
        step: A step of an average candidate, of the workload's rows.
        row: Scoring a validation row.
        start: Attaching a candidate, and all else that each training takes once.
        fixed: What of a step does not depend on its rows.
        texts: Generating text, for the search's task and for further tasks.
    """

    step: float
    row: float
    start: float
    fixed: float = 0.0
    texts: tuple[TextSpeed, ...] = ()


@dataclass(frozen=True)
class Workload:
    """What there is to do, and with what.

    Attributes:
        budget: The whole budget in seconds.
        seconds: What is left of it when the workers begin.
        n_workers: Trainings at once.
        n_train: Training rows.
        batch_size: Rows a step, where nothing else is planned.
        n_validation: Validation rows.
        test_share: Time to score the test split over time to score the validation split.
        eta: Ratio of steps between one rung and the next.
        earliest_rung: Rungs before this step are left out.
    """

    budget: float
    seconds: float
    n_workers: int
    n_train: int
    batch_size: int
    n_validation: int
    test_share: float
    eta: int = 3
    earliest_rung: int = EARLIEST_STEP


@dataclass(frozen=True)
class SearchPlan:
    """The sizes of a search. The settings of the same names win where the user gave them.

    Attributes:
        n_trials: Trials that the budget is expected to pay for; None where that is unknown.
        open: Names of the sizes that follow what trials take: of the confirmation, and the rungs.
    """

    steps: int = 100
    batch_size: int = TrainSettings.batch_size
    rungs: int = 3
    rung_rows: int = 256
    max_finalists: int = 6
    confirm_seeds: int = 3
    confirm_share: float = 0.3
    n_trials: int | None = None
    open: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "rungs": 1, "rung_rows": 1}
        for name, minimum in {**least, "max_finalists": 0, "confirm_seeds": 0}.items():
            size = getattr(self, name)
            if not minimum <= size < 2**31:
                problem = f"`{minimum} <= {name} < 2**31` must hold"
                raise SettingsError(name, size, problem, "correct it")

    @classmethod
    def of(cls, settings: SearchSettings) -> SearchPlan:
        """Return the sizes that the settings state, and the usual ones for the others."""
        pinned = pinned_sizes(settings)
        return cls(**pinned, open=tuple(name for name in _REVISABLE if name not in pinned))

    @property
    def most_seeds(self) -> int:
        """Seeds that a finalist gets at most, those for the verdict's sake included."""
        return self.confirm_seeds + (EXTRA_SEEDS if "confirm_seeds" in self.open else 0)

    @property
    def n_portfolio(self) -> int | None:
        """Known good plans to start with, such that half of the trials are proposals; None: all."""
        if self.n_trials is None:
            return None
        # One in six later trials is another LoRA; the model without an adapter is scored too.
        return max(0, min(N_PORTFOLIO, int(0.4 * self.n_trials) - N_BASELINES - 1))

    def line(self, when: str = "") -> str:
        """Return it in a line for the user."""
        n_trials = self.n_trials
        trials = "trials" if n_trials is None else f"about {counted(n_trials, 'trial')}"
        rows = f" of {counted(self.batch_size, 'row')}" if self.batch_size < _USUAL_ROWS else ""
        return (
            f"plan{when}: {trials} of {counted(self.steps, 'step')}{rows}; up to "
            f"{counted(self.max_finalists, 'finalist')} with up to "
            f"{counted(self.confirm_seeds, 'seed')} each, {self.confirm_share:.0%} of the budget"
        )


_REVISABLE = ("max_finalists", "confirm_seeds", "confirm_share", "rungs")

CHOICES = tuple(each.name for each in fields(SearchPlan) if each.name not in ("n_trials", "open"))
"""Settings that a plan decides where the user leaves them open."""


def pinned_sizes(settings: SearchSettings) -> dict[str, Any]:
    """Return the sizes that the user set, by name."""
    given = {name: getattr(settings, name) for name in CHOICES}
    return {name: value for name, value in given.items() if value is not None}


_LEVELS: tuple[Mapping[str, Any], ...] = (
    {"max_finalists": 6, "confirm_seeds": 3, "rung_rows": 256},
    {"max_finalists": 5, "confirm_seeds": 3, "rung_rows": 256},
    {"max_finalists": 4, "confirm_seeds": 3, "rung_rows": 128},
    {"max_finalists": 3, "confirm_seeds": 3, "rung_rows": 128},
    {"max_finalists": 3, "confirm_seeds": 2, "rung_rows": 64},
    {"max_finalists": 2, "confirm_seeds": 2, "rung_rows": 64},
)
"""From thorough to frugal. Two seeds are the least that tell the variance between trainings."""


def choose_plan(speed: Speed, work: Workload, pinned: Mapping[str, Any]) -> SearchPlan:
    """Return the most thorough plan that the budget pays for.

    Longer trainings are chosen as long as `PLENTY` trials remain; then `ENOUGH_TRIALS` are kept by
    confirming less, and last by shorter trainings. If even the smallest plan buys fewer trials, it
    is returned all the same.

    Args:
        speed: As measured on this machine.
        work: Rows, workers and seconds.
        pinned: What the user set, by name.
    """
    best: SearchPlan | None = None
    for choice in _choices(work, pinned):
        plan = replace(SearchPlan(batch_size=work.batch_size), **choice)
        plan = priced(plan, speed, work, pinned)
        assert plan.n_trials is not None, "it was priced"
        wanted = PLENTY if plan.steps > SearchPlan.steps else ENOUGH_TRIALS
        if plan.n_trials >= wanted:
            return plan
        if best is None or plan.n_trials > (best.n_trials or 0):
            best = plan
    assert best is not None, "there is a smallest plan"
    return best


def _choices(work: Workload, pinned: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the sizes to try, from thorough to frugal."""
    epochs = max(1, _MOST_EPOCHS * work.n_train // max(1, work.batch_size))
    most = max(_SHORT, min(_MOST_STEPS, epochs))
    long = sorted({most, *(s for s in (700, 500, 350, 250, 175, 125, 100, 75, 60, 50) if s < most)})
    for steps in [s for s in reversed(long) if s > SearchPlan.steps]:
        yield {"steps": steps, **_LEVELS[0], **pinned}
    usual = [s for s in reversed(long) if s <= SearchPlan.steps]
    # Both are cut in turn, the confirmation a little sooner.
    pairs = [(i + 0.75 * j, i, j) for i in range(len(usual)) for j in range(len(_LEVELS))]
    for _, i, j in sorted(pairs):
        yield {"steps": usual[i], **_LEVELS[j], **pinned}
    batches = [work.batch_size, *(rows for rows in (8, LEAST_ROWS) if rows < work.batch_size)]
    short = itertools.product((_SHORT, 45, 40, 35, 30, LEAST_STEPS), batches)
    least = _worth(LEAST_STEPS, work.batch_size)
    for steps, rows in sorted(short, key=lambda size: _worth(*size), reverse=True):
        if _worth(steps, rows) >= least:
            yield {"steps": steps, "batch_size": rows, **_LEVELS[-1], **pinned}


def _worth(steps: int, rows: int) -> float:
    """Return what a short training is worth beside others.

    Of equally many rows in all, smaller batches learn more; four rows of a step as much as 16 in
    half the steps. Measured: guides/measurements.md, batches.
    """
    return steps * math.sqrt(rows)


def training_seconds(plan: SearchPlan, speed: Speed, work: Workload) -> float:
    """Return the seconds of one whole trial, without early stops."""
    *early, _end = rung_steps(plan.steps, work.eta, plan.rungs, earliest=work.earliest_rung)
    n_early = len(early)
    rows = work.n_validation + n_early * min(plan.rung_rows, work.n_validation)
    scoring = rows * speed.row + _text_seconds(speed)
    for text in speed.texts:
        scoring += n_early * text.is_at_rungs * min(plan.rung_rows, text.n_rows) * text.row
    share = _PRUNED if n_early else 1.0
    return speed.start + share * (_steps_seconds(plan, speed, work) + scoring)


def _text_seconds(speed: Speed) -> float:
    """Return the seconds of generating the text of a whole split."""
    return sum(text.n_rows * text.row for text in speed.texts)


def _steps_seconds(plan: SearchPlan, speed: Speed, work: Workload) -> float:
    share = plan.batch_size / work.batch_size
    return plan.steps * (speed.fixed + share * (speed.step - speed.fixed))


def confirmation_seconds(plan: SearchPlan, speed: Speed, work: Workload) -> float:
    """Return the wall seconds that the confirmations take."""
    scoring = work.n_validation * (1.0 + work.test_share) * speed.row
    scoring += 2 * _text_seconds(speed)  # Of both splits: it has a limit, so they are alike.
    training = speed.start + _steps_seconds(plan, speed, work) + scoring
    trainings = [Retraining(training)] * (plan.max_finalists + N_BASIC)
    return _race_seconds(trainings, plan.confirm_seeds, work.n_workers) + scoring / work.n_workers


def _race_seconds(trainings: Sequence[Retraining], n_seeds: int, n_workers: int) -> float:
    """Return the wall seconds of what is left of a race.

    In each round, workers wait for the last training.
    """
    n_left = n_rounds(n_seeds) - min((each.n_begun for each in trainings), default=0)
    longest = max((each.seconds for each in trainings), default=0.0)
    waits = max(0, n_left) * longest * (1.0 - 1.0 / n_workers)
    work = sum(each.left(reserved_seeds(n_seeds)) for each in trainings)
    return work / n_workers + waits


def _share(seconds: float, budget: float) -> float:
    share = math.ceil(1000 * seconds / budget) / 1000
    return min(max(share, _LEAST_SHARE), _MOST_SHARE)


def priced(plan: SearchPlan, speed: Speed, work: Workload, pinned: Mapping[str, Any]) -> SearchPlan:
    """Return the plan with the share of its confirmations and the trials that are left to pay."""
    share = _share(confirmation_seconds(plan, speed, work), work.budget)
    kept = float(pinned.get("confirm_share", share))
    left = max(0.0, work.seconds - work.budget * kept) * work.n_workers
    n_trials = int(left / max(training_seconds(plan, speed, work), 1e-9))
    return replace(plan, confirm_share=kept, n_trials=n_trials)


@dataclass(frozen=True)
class Pace:
    """How a search goes on, as its trials show.

    Attributes:
        n_trials: Trials so far.
        trial_seconds: What one takes of a worker.
    """

    n_trials: int
    trial_seconds: float


def revised(
    plan: SearchPlan,
    nominees: Callable[[int], Sequence[Retraining]],
    *,
    budget: float,
    seconds_left: float,
    n_workers: int,
    pace: Pace | None = None,
) -> SearchPlan:
    """Return the plan with the most thorough confirmation that the rest of the budget pays for.

    Time that the plan did not foresee goes to finalists and seeds first, as far as `ENOUGH_TRIALS`
    remain, then to more trials; time that is missing is taken from finalists and seeds. What
    `plan.open` does not name stays. The steps always do: trials of other steps would not compare.

    Args:
        plan: As it is.
        nominees: Takes the most finalists; returns what confirming each takes that would be
            confirmed now.
        budget: Seconds of the whole budget.
        seconds_left: Seconds left of it.
        n_workers: Trainings at once.
        pace: None: the search has ended, and all that is left is the confirmation's.
    """
    for level in _LEVELS:
        sizes = {name: level[name] for name in level if name in plan.open}
        found = replace(plan, **sizes)
        seconds = _race_seconds(nominees(found.max_finalists), found.confirm_seeds, n_workers)
        if pace is None:
            if seconds <= seconds_left:
                break
            continue
        if "confirm_share" in plan.open:
            found = replace(found, confirm_share=_share(seconds, budget))
        kept = found.confirm_share * budget
        n_more = int(max(0.0, seconds_left - kept) * n_workers / max(pace.trial_seconds, 1e-9))
        found = replace(found, n_trials=pace.n_trials + n_more)
        if pace.n_trials + n_more >= ENOUGH_TRIALS and seconds <= min(kept, seconds_left):
            break
    return found


def missing_seconds(n_trials: int, pace: Pace, n_workers: int) -> float:
    """Return the seconds that a search of so few trials lacks."""
    return (ENOUGH_TRIALS - n_trials) * pace.trial_seconds / n_workers


def remedy(plan: SearchPlan, speed: Speed, work: Workload, pinned: Mapping[str, Any]) -> str:
    """Return what would pay for a search, where the plan does not."""
    enough = f"{minutes_for(ENOUGH_TRIALS, plan, speed, work, pinned)}m would pay for"
    if not plan.n_trials:
        one = math.ceil(training_seconds(plan, speed, work))
        return (
            f"this budget may not pay for a single trial: one takes about {one} s, and "
            f"{max(0, int(work.seconds))} s are left after the start; "
            f"{minutes_for(1, plan, speed, work, pinned)}m would pay for one, {enough} "
            f"{ENOUGH_TRIALS}, a search that can learn"
        )
    return (
        f"this budget pays for about {counted(plan.n_trials, 'trial')}, too few for a search to "
        f"learn from; {enough} {ENOUGH_TRIALS}"
    )


def minutes_for(
    n_trials: int, plan: SearchPlan, speed: Speed, work: Workload, pinned: Mapping[str, Any]
) -> int:
    """Return the budget in minutes that pays for so many trials of the plan."""
    more = 1.0
    while more < 1e9:
        larger = replace(work, budget=work.budget + more, seconds=work.seconds + more)
        if (priced(plan, speed, larger, pinned).n_trials or 0) >= n_trials:
            break
        more *= 1.1
    return math.ceil((work.budget + more) / 60)
