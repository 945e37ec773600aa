"""The Optuna study behind a search: the one bridge between `Trial` and Optuna.

A search's trials are ordinary trials of an ordinary study, so optuna-dashboard and any Optuna tool
can read them. Optuna does not offer three things for studies with several directions, so they go
through the storage: a trial is created with all parameters in one transaction, intermediate values
are stored, and the pruner is asked directly. All private calls are in this file; those for Optuna's
own users are in `pruners/prunable.py`.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from autopeft.costs.objectives import Objective, objective
from autopeft.costs.price import Price
from autopeft.errors import StorageError, StorageFailure, UserError
from autopeft.plan import Candidate, TrainSettings
from autopeft.plan_text import read_plan, write_plan
from autopeft.searcher.damage import (
    check_values,
    checked_numbers,
    checked_words,
    damage_named,
    damaged,
    place_of,
    remedy_of,
    stored_trials,
)
from autopeft.searcher.pruners.gap import FURTHER_KEY, PRICE_KEY, TRAIN_KEY, GapPruner
from autopeft.searcher.pruners.prunable import PRUNED
from autopeft.searcher.storage import (
    TOKEN_KEY,
    check_file,
    created_trial,
    open_storage,
    open_to_read,
    reason_of,
    shown_place,
)
from autopeft.searcher.trial_note import trial_note
from autopeft.trial import DUPLICATE, INTERRUPTED, State, Trial, facts
from autopeft.utils.extremes import one_nan
from autopeft.utils.formatting import one_line
from autopeft.utils.quiet import ignored, silence
from autopeft.utils.registry import blamed, describe
from autopeft.utils.serialize import from_plain, to_plain

if TYPE_CHECKING:
    from autopeft.searcher.dashboard import DashboardWriter

_CONSTRAINT = "constraints:"
"""Start of the system attribute behind `Trial.set_constraint`; the constraint's name follows."""

PLAN_KEY, ORIGIN_KEY, REASON_KEY, MEASURED_KEY = "plan", "origin", "reason", "measured"
"""User attributes of a trial, beside its costs and train settings (`searcher/pruners/gap.py`)."""

_N_NOTES = 2000
"""Number of trials that have a note: whoever reads one attribute of a study reads all notes."""

AUDIT_KEY = "audited_at"
"""User attribute: the step at which a trial would have been stopped but continued."""

STATES: Mapping[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
"""States of a trial that was handed out; a waiting trial has none."""


def distribution(row: Mapping[str, Any]) -> BaseDistribution:
    """Optuna's distribution of one of a space's parameters."""
    if row["kind"] == "categorical":
        return CategoricalDistribution(row["choices"])
    if row["kind"] == "int":
        return IntDistribution(row["low"], row["high"], log=row.get("log", False))
    # A step would make Optuna complain of rounding; positions are snapped when decoded.
    return FloatDistribution(row["low"], row["high"], log=row.get("log", False))


OWNER_KEY = "autopeft:owner"
"""System attribute of a trial in a study that several searches share: the id of its search."""


class StudyExists(StorageError):
    """The storage holds a study of this name already."""


class TrialEnded(Exception):
    """A trial has ended in the study already."""


class StudyStore:
    """One study, opened or created.

    Args:
        storage: See `open_storage`.
        name: The study's name; None for a generated one.
        objectives: Quality first; they become directions and metric names.
        sampler: The study's sampler.
        pruner: The study's pruner.
        resume: True to continue a study that is there; False to insist that there is none.

    Raises:
        StorageError: if the storage cannot be opened, the study is there (or, resuming, is not), or
            has other objectives.
    """

    def __init__(
        self,
        storage: str | Path | BaseStorage | None,
        name: str | None,
        objectives: Sequence[Objective],
        sampler: BaseSampler,
        pruner: BasePruner,
        *,
        resume: bool = False,
    ) -> None:
        silence("optuna", logging.WARNING)
        if not (name is None or isinstance(name, str)):
            raise StorageError("study_name", name, "must be text", "give a name")
        if resume and storage is None:
            problem = "a study that is kept in memory alone cannot be continued"
            raise StorageError("resume", True, problem, "give its storage, or leave resume out")
        if resume and isinstance(storage, str | Path):
            check_file(storage)
        opened = open_storage(storage)
        shown = name if storage is None else shown_place(storage)
        directions = [objective.direction for objective in objectives]
        names = [objective.name for objective in objectives]
        try:
            if resume:
                self.study = optuna.load_study(
                    study_name=name, storage=opened, sampler=sampler, pruner=pruner
                )
            else:
                self.study = optuna.create_study(
                    study_name=name,
                    storage=opened,
                    sampler=sampler,
                    pruner=pruner,
                    directions=directions,
                )
                with ignored(optuna.exceptions.ExperimentalWarning):
                    self.study.set_metric_names(names)
        except optuna.exceptions.DuplicatedStudyError:
            raise StudyExists(
                "study_name", name, "the storage holds a study of this name", "resume it or rename"
            ) from None
        except (KeyError, ValueError):
            raise StorageError(
                "study_name", name, f"{shown} holds no such study", "check the name"
            ) from None
        except StorageFailure as failure:
            problem = f"cannot be used ({failure.reason})"
            remedy = remedy_of(failure.reason, "try again once it works")
            raise StorageError("storage", shown, problem, remedy) from None
        except StorageError:
            raise
        except Exception as error:
            problem = f"cannot be used ({reason_of(error)})"
            raise StorageError("storage", shown, problem, "use another file or URL") from None
        self._storage = self.study._storage
        with damage_named(place_of(self._storage), self.study.study_name):
            known = [direction.name.lower() for direction in self.study.directions]
            known_names = list(self.study.metric_names or names)
        if known != directions or known_names != names:
            asked, there = names, known_names
            if names == known_names:
                asked, there = _directed(names, directions), _directed(names, known)
            raise StorageError("objectives", asked, f"the study has {there}", "use the same")
        self._objectives = tuple(objectives)
        self._board: DashboardWriter | None = None
        self._unsure: tuple[str, str] | None = None  # digest and token of a start that failed
        self._partly: set[int] = set()  # trials with a write that failed
        self._written: set[int] = set()  # trials whose scores the gap pruner has not read
        self._is_shared = False
        trials = stored_trials(self.study)
        self._ids = {trial.number: trial._trial_id for trial in trials}
        self._kinds: dict[str, BaseDistribution] = {}
        for trial in trials:
            self._kinds.update(trial.distributions)

    # --- trials ----------------------------------------------------------------------------------

    def trials(self) -> tuple[Trial, ...]:
        """All trials of a search, by number; trials enqueued by others are left out."""
        return read_trials(self.study, self._objectives)

    def start(
        self,
        candidate: Candidate,
        costs: Price,
        origin: str,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        *,
        search: str = "",
    ) -> Trial | None:
        """Create a running trial in one transaction.

        After an error it may be called again: what the failed call did create is found.

        In a study that several searches share, `search` is the id of this one. Of their trials of
        one candidate the first is kept: None if it is not this one.

        Its parameters are for people and Optuna's plots; nothing reads them back. A study that goes
        on in another space keeps those whose kind is still the same, as Optuna demands.
        """
        kept = [name for name in params if self._is_allowed(name, distributions[name])]
        is_retry = self._unsure is not None and self._unsure[0] == candidate.digest
        token = self._unsure[1] if is_retry and self._unsure else uuid.uuid4().hex
        template = create_trial(
            state=TrialState.RUNNING,
            params={name: params[name] for name in kept},
            distributions={name: distributions[name] for name in kept},
            user_attrs={
                PLAN_KEY: write_plan(candidate.plan),
                TRAIN_KEY: candidate.train.to_json(),
                ORIGIN_KEY: origin,
                "digest": candidate.digest,
                **facts(candidate, costs),
                PRICE_KEY: to_plain(costs),
            },
            system_attrs={TOKEN_KEY: token} | ({OWNER_KEY: search} if search else {}),
        )
        self._unsure = (candidate.digest, token)
        self._is_shared = self._is_shared or bool(search)
        study_id = self.study._study_id
        trial_id = created_trial(self._storage, study_id, token) if is_retry else None
        if trial_id is None:
            trial_id = self._storage.create_new_trial(study_id, template_trial=template)
        number = self._storage.get_trial_number_from_id(trial_id)
        self._ids[number] = trial_id
        is_kept = not search or self._is_first(number, candidate.digest)
        if not is_kept:
            with suppress(TrialEnded):
                self.fail(number, DUPLICATE)
        self._unsure = None
        return Trial(number, candidate, costs, origin) if is_kept else None

    def _is_first(self, number: int, digest: str) -> bool:
        """Return whether no earlier trial of a candidate counts.

        The storage gives numbers in the order of transactions: whoever has a number sees all lower
        ones.
        """
        return not any(
            trial.number < number
            and trial.state in STATES
            and trial.user_attrs.get("digest") == digest
            and trial.user_attrs.get(REASON_KEY) not in (INTERRUPTED, DUPLICATE)
            for trial in self.study.get_trials(deepcopy=False)
        )

    def of_others(self, search: str, ended: Container[int]) -> tuple[Trial, ...]:
        """Return the trials of the other searches that share the study, but those in `ended`."""
        found = []
        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.number in ended or frozen.system_attrs.get(OWNER_KEY) == search:
                continue
            if is_trial(frozen):
                self._ids[frozen.number] = frozen._trial_id
                found.append(read_trial(frozen, self._objectives, study=self.study))
        return tuple(found)

    def owners(self) -> Mapping[int, str]:
        """Return trial number -> id of its search, in a study that searches share."""
        return {
            trial.number: str(trial.system_attrs[OWNER_KEY])
            for trial in self.study.get_trials(deepcopy=False)
            if OWNER_KEY in trial.system_attrs
        }

    def _is_allowed(self, name: str, kind: BaseDistribution) -> bool:
        """Return whether Optuna allows a parameter of this kind beside those of earlier trials."""
        try:
            check_distribution_compatibility(self._kinds.setdefault(name, kind), kind)
        except ValueError:
            return False
        return True

    def frozen(self, number: int) -> FrozenTrial:
        """Return Optuna's record of a trial."""
        return self._storage.get_trial(self._ids[number])

    def read(self, trial: Trial) -> Trial:
        """Return what the study holds of a trial."""
        found = self.frozen(trial.number)
        self._written.add(trial.number)
        return read_trial(found, self._objectives, trial.candidate, trial.costs, study=self.study)

    @contextmanager
    def _writing(self, number: int) -> Iterator[None]:
        """Raise TrialEnded if a write fails because the trial has ended."""
        try:
            yield
        except (UpdateFinishedTrialError, ValueError) as error:
            if self.frozen(number).state.is_finished():
                raise TrialEnded(f"trial {number} has ended in the study") from error
            raise
        except Exception:
            self._partly.add(number)
            raise

    def report(
        self,
        number: int,
        step: int,
        score: float,
        further: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Store a rung's score, and its further qualities."""
        self._written.add(number)
        with self._writing(number):
            if further:  # First: whoever reads the score reads them.
                told = self.frozen(number).user_attrs.get(FURTHER_KEY, {})
                self._attribute(number, FURTHER_KEY, {**told, str(step): dict(further)})
            self._storage.set_trial_intermediate_value(self._ids[number], step, float(score))

    def prune_gap(self, number: int) -> float:
        """Return the pruner's gap, or 1.0 for a pruner without gaps; 0.0 if the trial goes on."""
        trial = self.frozen(number)
        pruner = self.study.pruner
        if isinstance(pruner, GapPruner):
            # What nobody else writes need not be looked for among tens of thousands of trials.
            written = self._written - {number}
            changed = None if self._is_shared else [self.frozen(each) for each in sorted(written)]
            gap = pruner.gap(self.study, trial, changed)
            self._written.clear()
            return gap
        shown = describe(getattr(pruner, "inner", pruner))
        with blamed("pruner", shown, "prune fails", passing=(StorageInternalError,)):
            return 1.0 if pruner.prune(self.study, trial) else 0.0

    # The state is written last: a write that fails may be repeated from its beginning.

    def complete(
        self,
        number: int,
        values: Sequence[float],
        measured: Mapping[str, float],
        *,
        excess: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Mark the trial complete, with the values of the objectives.

        Each limit on a measured value is a constraint of Optuna: `excess` says by how much the
        trial is above it, and Optuna's front lacks those that are.
        """
        self._written.add(number)
        with self._writing(number):
            if measured or number in self._partly:
                self._attribute(number, MEASURED_KEY, dict(measured))
            self._constrain(number, 0.0)
            for name, much in excess.items():
                self._set_constraint(number, name, much)
            self._end(number, TrialState.COMPLETE, list(map(float, values)))

    def prune(self, number: int, reason: str, gap: float = 1.0) -> None:
        """Mark the trial pruned.

        In a study with several directions it also gets a positive constraint, without which TPE
        looks for a single direction and raises.
        """
        with self._writing(number):
            self._attribute(number, REASON_KEY, reason)
            self._constrain(number, gap if gap > 0 and math.isfinite(gap) else 1.0)
            self._end(number, TrialState.PRUNED)

    def note_audit(self, number: int, step: int) -> None:
        """Record that the trial continues past a rung that would have stopped it."""
        with self._writing(number):
            self._attribute(number, AUDIT_KEY, step)

    def fail(self, number: int, reason: str) -> None:
        """Mark the trial failed."""
        with self._writing(number):
            self._attribute(number, REASON_KEY, reason)
            self._end(number, TrialState.FAIL)

    def _end(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        if state == TrialState.PRUNED and len(self._objectives) == 1:
            self.study.tell(number, state=state)  # It makes the last score the trial's value.
        else:
            # Optuna's `tell` does no more, but asks for the study and the trial again.
            self._storage.set_trial_state_values(self._ids[number], state, values)

    def _attribute(self, number: int, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._ids[number], key, value)

    def _constrain(self, number: int, value: float) -> None:
        if len(self.study.directions) > 1:
            self._set_constraint(number, PRUNED, value)

    def _set_constraint(self, number: int, name: str, value: float) -> None:
        self._storage.set_trial_system_attr(self._ids[number], f"{_CONSTRAINT}{name}", float(value))

    @property
    def has_gaps(self) -> bool:
        """Whether `prune_gap` is a difference of scores."""
        return isinstance(self.study.pruner, GapPruner)

    def write_note(self, trial: Trial) -> None:
        """Write the note of an ended trial that optuna-dashboard shows, if it is an early one."""
        if trial.number < _N_NOTES and not isinstance(self._storage, InMemoryStorage):
            from autopeft.searcher.dashboard import save_trial_note

            save_trial_note(
                self.study, self._ids[trial.number], trial_note(trial, self._objectives)
            )

    def conclude(self, text: str) -> None:
        """Write the last note that optuna-dashboard shows, in Markdown."""
        if not isinstance(self._storage, InMemoryStorage):
            from autopeft.searcher.dashboard import conclude

            with damage_named(place_of(self._storage), self.study.study_name):
                conclude(self.study, text)

    def post(self, trials: Callable[[], Sequence[Trial]], *, now: bool = False) -> None:
        """Write the note and graphs that optuna-dashboard shows, if they are due or `now`.

        Nothing is written for a study in memory, which no dashboard can read. `trials` returns the
        ended trials; it is called only if something is written.
        """
        if isinstance(self._storage, InMemoryStorage):
            return
        if self._board is None:
            # Imported here: the dashboard's server takes a moment to load.
            from autopeft.searcher.dashboard import DashboardWriter

            self._board = DashboardWriter(self.study, self._objectives)
        if now or self._board.is_due:
            ended = trials()
            with damage_named(place_of(self._storage), self.study.study_name):
                self._board.post(ended)


def _directed(names: Sequence[str], directions: Sequence[str]) -> list[str]:
    return [f"{name} ({direction})" for name, direction in zip(names, directions, strict=False)]


def read_trials(study: optuna.study.Study, objectives: Sequence[Objective]) -> tuple[Trial, ...]:
    """Read the trials that a search wrote into a study, by number.

    Raises:
        StorageError: if one is damaged, or missing.
    """
    return tuple(
        read_trial(frozen, objectives, study=study)
        for frozen in stored_trials(study)
        if is_trial(frozen)
    )


def is_trial(frozen: FrozenTrial) -> bool:
    """Return whether one of Optuna's trials was handed out by a search and counts."""
    attributes = frozen.user_attrs
    is_dropped = frozen.state == TrialState.FAIL and attributes.get(REASON_KEY) == DUPLICATE
    return frozen.state in STATES and PLAN_KEY in attributes and not is_dropped


def read_trial(
    frozen: FrozenTrial,
    objectives: Sequence[Objective],
    candidate: Candidate | None = None,
    costs: Price | None = None,
    *,
    study: optuna.study.Study | None = None,
) -> Trial:
    """Convert one of Optuna's trials; its attributes hold what is None.

    Args:
        frozen: The trial.
        objectives: Those of the study.
        candidate: What it trained, if that is known.
        costs: What that costs, if it is known.
        study: The study that it is of, for messages.

    Raises:
        StorageError: if a value or an attribute is damaged or of another type.
    """
    try:
        return _read_trial(frozen, objectives, candidate, costs)
    except StorageFailure:
        raise
    except Exception as error:  # What is stored may be anyone's.
        said = error.mistake if isinstance(error, UserError) else one_line(error)
        reason = f"no trial of autopeft: {said}"
        place, name = ("", "") if study is None else (place_of(study._storage), study.study_name)
        raise damaged(place, reason, study=name, number=frozen.number) from error


def _read_trial(
    frozen: FrozenTrial,
    objectives: Sequence[Objective],
    candidate: Candidate | None,
    costs: Price | None,
) -> Trial:
    attributes = frozen.user_attrs
    check_values(frozen, len(objectives))
    is_complete = frozen.state == TrialState.COMPLETE
    has_reason = frozen.state in (TrialState.PRUNED, TrialState.FAIL)
    # Attributes are written before the state: an ending that was not told to its end has some.
    values = (frozen.values or ()) if is_complete else ()
    measured = checked_numbers(MEASURED_KEY, attributes.get(MEASURED_KEY, {}))
    if PLAN_KEY in attributes:  # Else, it is one of a user's own study.
        for step, told in attributes.get(FURTHER_KEY, {}).items():
            checked_numbers(f"{FURTHER_KEY}[{int(step)}]", told)
    return Trial(
        frozen.number,
        candidate
        or Candidate(
            read_plan(attributes[PLAN_KEY]), TrainSettings.from_json(attributes[TRAIN_KEY])
        ),
        costs or from_plain(Price, attributes[PRICE_KEY], field=PRICE_KEY, error=StorageError),
        checked_words(attributes, ORIGIN_KEY, "search"),
        STATES[frozen.state],
        {o.name: v for o, v in zip(objectives, values, strict=False)},
        tuple(sorted(frozen.intermediate_values.items())),
        checked_words(attributes, REASON_KEY, "") if has_reason else "",
        {name: one_nan(value) for name, value in measured.items()} if is_complete else {},
        int(attributes.get(AUDIT_KEY, 0)),
        tuple(sorted(n for n, v in frozen.constraints.items() if n != PRUNED and not v <= 0))
        if is_complete
        else (),
    )


def read_study(storage: str | Path, name: str) -> tuple[tuple[Trial, ...], tuple[Objective, ...]]:
    """Read the trials and objectives of a study without changing it.

    Raises:
        StorageError: if there is no such study.
    """
    study = _loaded(storage, name)
    with damage_named(place_of(study._storage), name):
        objectives = tuple(
            replace(
                objective(name),
                direction="maximize" if direction == StudyDirection.MAXIMIZE else "minimize",
            )
            for name, direction in zip(study.metric_names or (), study.directions, strict=False)
        )
    return read_trials(study, objectives), objectives


def read_states(storage: str | Path, name: str) -> dict[int, State]:
    """Return trial number -> state of a search's trials in a study, without changing it.

    Raises:
        StorageError: if there is no such study, or it is damaged.
    """
    trials = stored_trials(_loaded(storage, name))
    return {trial.number: STATES[trial.state] for trial in trials if is_trial(trial)}


def _loaded(storage: str | Path, name: str) -> optuna.study.Study:
    """Return a study, opened to be read alone."""
    opened = open_to_read(storage)
    try:
        return optuna.load_study(study_name=name, storage=opened)
    except (KeyError, ValueError):
        place = shown_place(storage)
        raise StorageError(
            "study_name", name, f"{place} holds no such study", "check the name"
        ) from None
