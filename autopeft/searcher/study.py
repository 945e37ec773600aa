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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from autopeft.costs.objectives import Objective, objective
from autopeft.costs.price import Price
from autopeft.errors import StorageError
from autopeft.plan import Candidate, TrainSettings
from autopeft.plan_text import read_plan, write_plan
from autopeft.searcher.pruners.gap import PRICE_KEY, TRAIN_KEY, GapPruner
from autopeft.searcher.pruners.prunable import PRUNED
from autopeft.searcher.trial_note import trial_note
from autopeft.trial import State, Trial, facts
from autopeft.utils.quiet import ignored, silence
from autopeft.utils.registry import blamed, describe
from autopeft.utils.serialize import from_plain, to_plain

if TYPE_CHECKING:
    from autopeft.searcher.dashboard import DashboardWriter

_CONSTRAINT = f"constraints:{PRUNED}"
"""System attribute behind `Trial.set_constraint(PRUNED, ...)`."""

PLAN_KEY, ORIGIN_KEY, REASON_KEY, MEASURED_KEY = "plan", "origin", "reason", "measured"
"""User attributes of a trial, beside its costs and train settings (`searcher/pruners/gap.py`)."""

AUDIT_KEY = "audited_at"
"""User attribute: the step at which a trial would have been stopped but continued."""

STATES: Mapping[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
"""States of a trial that was handed out; a waiting trial has none."""

_REMEDY = "use a path ending in .db or .log, or a URL such as sqlite:///study.db"


def open_storage(storage: str | Path | BaseStorage | None) -> BaseStorage:
    """The storage behind a URL or a path.

    Args:
        storage: An SQLAlchemy URL; a path ending in .log (journal file) or .db (SQLite); None for
            memory; or a storage, which passes through.

    Raises:
        StorageError: if it cannot be opened.
    """
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    text = str(storage)
    if "://" not in text and not text.endswith((".log", ".db")):
        raise StorageError("storage", text, "neither a URL nor a .db or .log file", _REMEDY)
    try:
        if "://" in text:
            return _relational(text)
        if text.endswith(".log"):
            return JournalStorage(JournalFileBackend(text))
        return _relational(f"sqlite:///{text}")
    except Exception as error:
        raise StorageError(
            "storage", text, f"cannot be opened ({_first_line(error)})", _REMEDY
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _relational(url: str) -> BaseStorage:
    # A dashboard may read while we write: wait for its lock instead of failing.
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}

    def opened() -> BaseStorage:
        return optuna.storages.get_storage(RDBStorage(url, engine_kwargs=waiting))

    # Whoever opens a new database makes its tables. Of those that do so at once (two searches, a
    # search and a dashboard) one may be refused; at its next try it finds them made.
    for _ in range(2):
        try:
            return opened()
        except SQLAlchemyError:
            time.sleep(0.2)
    return opened()


def distribution(row: Mapping[str, Any]) -> BaseDistribution:
    """Optuna's distribution of one of a space's parameters."""
    if row["kind"] == "categorical":
        return CategoricalDistribution(row["choices"])
    if row["kind"] == "int":
        return IntDistribution(row["low"], row["high"], log=row.get("log", False))
    # A step would make Optuna complain of rounding; positions are snapped when decoded.
    return FloatDistribution(row["low"], row["high"], log=row.get("log", False))


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
        opened = open_storage(storage)
        shown = name if storage is None else str(storage)
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
            raise StorageError(
                "study_name", name, "the storage holds a study of this name", "resume it or rename"
            ) from None
        except (KeyError, ValueError):
            raise StorageError(
                "study_name", name, f"{shown} holds no such study", "check the name"
            ) from None
        except Exception as error:
            raise StorageError(
                "storage", shown, f"cannot be used ({_first_line(error)})", _REMEDY
            ) from None
        known = [direction.name.lower() for direction in self.study.directions]
        if known != directions or (self.study.metric_names or names) != names:
            raise StorageError(
                "objectives", names, f"the study has {self.study.metric_names}", "use the same"
            )
        self._storage = self.study._storage
        self._objectives = tuple(objectives)
        self._board: DashboardWriter | None = None
        trials = self.study.get_trials(deepcopy=False)
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
    ) -> Trial:
        """Create a running trial in one transaction.

        Its parameters are for people and Optuna's plots; nothing reads them back. A study that goes
        on in another space keeps those whose kind is still the same, as Optuna demands.
        """
        kept = [name for name in params if self._is_allowed(name, distributions[name])]
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
        )
        trial_id = self._storage.create_new_trial(self.study._study_id, template_trial=template)
        number = self._storage.get_trial_number_from_id(trial_id)
        self._ids[number] = trial_id
        return Trial(number, candidate, costs, origin)

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

    def report(self, number: int, step: int, score: float) -> None:
        """Store a rung's score; a second report at the same step is ignored."""
        self._storage.set_trial_intermediate_value(self._ids[number], step, float(score))

    def prune_gap(self, number: int) -> float:
        """Return the pruner's gap, or 1.0 for a pruner without gaps; 0.0 if the trial goes on."""
        trial = self.frozen(number)
        pruner = self.study.pruner
        if isinstance(pruner, GapPruner):
            return pruner.gap(self.study, trial)
        shown = describe(getattr(pruner, "inner", pruner))
        with blamed("pruner", shown, "prune fails", passing=(StorageInternalError,)):
            return 1.0 if pruner.prune(self.study, trial) else 0.0

    def complete(self, number: int, values: Sequence[float], measured: Mapping[str, float]) -> None:
        """Mark the trial complete, with the values of the objectives."""
        if measured:
            self._attribute(number, MEASURED_KEY, dict(measured))
        self._constrain(number, 0.0)
        self.study.tell(number, list(values), state=TrialState.COMPLETE)

    def prune(self, number: int, reason: str, gap: float = 1.0) -> None:
        """Mark the trial pruned.

        In a study with several directions it also gets a positive constraint, without which TPE
        looks for a single direction and raises.
        """
        self._attribute(number, REASON_KEY, reason)
        self._constrain(number, gap if gap > 0 and math.isfinite(gap) else 1.0)
        self.study.tell(number, state=TrialState.PRUNED)

    def note_audit(self, number: int, step: int) -> None:
        """Record that the trial continues past a rung that would have stopped it."""
        self._attribute(number, AUDIT_KEY, step)

    def fail(self, number: int, reason: str) -> None:
        """Mark the trial failed."""
        self._attribute(number, REASON_KEY, reason)
        self.study.tell(number, state=TrialState.FAIL)

    def _attribute(self, number: int, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._ids[number], key, value)

    def _constrain(self, number: int, value: float) -> None:
        if len(self.study.directions) > 1:
            self._storage.set_trial_system_attr(self._ids[number], _CONSTRAINT, float(value))

    @property
    def has_gaps(self) -> bool:
        """Whether `prune_gap` is a difference of scores."""
        return isinstance(self.study.pruner, GapPruner)

    def write_note(self, trial: Trial) -> None:
        """Write the note of an ended trial that optuna-dashboard shows."""
        if not isinstance(self._storage, InMemoryStorage):
            from autopeft.searcher.dashboard import save_trial_note

            save_trial_note(
                self.study, self._ids[trial.number], trial_note(trial, self._objectives)
            )

    def conclude(self, text: str) -> None:
        """Write the last note that optuna-dashboard shows, in Markdown."""
        if not isinstance(self._storage, InMemoryStorage):
            from autopeft.searcher.dashboard import conclude

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
            self._board.post(trials())


def read_trials(study: optuna.study.Study, objectives: Sequence[Objective]) -> tuple[Trial, ...]:
    """Read the trials that a search wrote into a study, by number."""
    return tuple(
        read_trial(frozen, objectives)
        for frozen in study.get_trials(deepcopy=False)
        if frozen.state in STATES and PLAN_KEY in frozen.user_attrs
    )


def read_trial(
    frozen: FrozenTrial,
    objectives: Sequence[Objective],
    candidate: Candidate | None = None,
    costs: Price | None = None,
) -> Trial:
    """Convert one of Optuna's trials; its attributes hold what is None."""
    attributes = frozen.user_attrs
    values = (frozen.values or ()) if frozen.state == TrialState.COMPLETE else ()
    return Trial(
        frozen.number,
        candidate
        or Candidate(
            read_plan(attributes[PLAN_KEY]), TrainSettings.from_json(attributes[TRAIN_KEY])
        ),
        costs or from_plain(Price, attributes[PRICE_KEY], field=PRICE_KEY, error=StorageError),
        str(attributes.get(ORIGIN_KEY, "search")),
        STATES[frozen.state],
        {o.name: v for o, v in zip(objectives, values, strict=False)},
        tuple(sorted(frozen.intermediate_values.items())),
        str(attributes.get(REASON_KEY, "")),
        dict(attributes.get(MEASURED_KEY, {})),
        int(attributes.get(AUDIT_KEY, 0)),
    )


def read_study(storage: str | Path, name: str) -> tuple[tuple[Trial, ...], tuple[Objective, ...]]:
    """Read the trials and objectives of a study without changing it.

    Raises:
        StorageError: if there is no such study.
    """
    try:
        study = optuna.load_study(study_name=name, storage=open_storage(storage))
    except (KeyError, ValueError):
        raise StorageError(
            "study_name", name, f"{storage} holds no such study", "check the name"
        ) from None
    objectives = tuple(
        replace(
            objective(name),
            direction="maximize" if direction == StudyDirection.MAXIMIZE else "minimize",
        )
        for name, direction in zip(study.metric_names or (), study.directions, strict=False)
    )
    return read_trials(study, objectives), objectives
