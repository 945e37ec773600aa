"""The Optuna study behind a search: storage, trials in and out, resume. All private calls are here.

A search's trials are ordinary trials of an ordinary study, so that optuna-dashboard and any Optuna
tool read them. Three things Optuna does not offer for studies with several directions are done
through the storage: a trial is created with all its parameters at once (one transaction instead of
one a parameter), intermediate values are stored, and the pruner is asked directly.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from autopeft.costs.objectives import Objective
from autopeft.errors import StorageError
from autopeft.searcher.pruner import PRICE_KEY, GapPruner
from autopeft.searcher.space.encoding import Genome
from autopeft.trial import Outcome

if TYPE_CHECKING:
    from autopeft.searcher.dashboard import Noticeboard

_CONSTRAINT = "constraints:pruned"
"""System attribute behind `Trial.set_constraint("pruned", ...)`."""

AUDIT_KEY = "audited_at"
"""User attribute: the step at which a trial would have been stopped but went on."""

STATES: Mapping[TrialState, Literal["complete", "pruned", "failed", "running"]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
"""The states of a trial that was handed out."""

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
        if text.endswith(".log") and "://" not in text:
            return JournalStorage(JournalFileBackend(text))
        url = text if "://" in text else f"sqlite:///{text}"
        return _relational(url)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(
            "storage", text, f"cannot be opened ({reason[0][:200]})", _REMEDY
        ) from None


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
    return FloatDistribution(row["low"], row["high"])


@dataclass(frozen=True)
class StoredTrial:
    """A trial as the study holds it.

    Attributes:
        number: In the study.
        state: How it stands.
        values: Of the objectives, if it is complete.
        attributes: User attributes.
        rungs: Pairs (step, score), in order.
    """

    number: int
    state: Literal["complete", "pruned", "failed", "running"]
    values: tuple[float, ...]
    attributes: Mapping[str, Any]
    rungs: tuple[tuple[int, float], ...]


class StudyBook:
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
        optuna.logging.set_verbosity(optuna.logging.WARNING)
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
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
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
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StorageError(
                "storage", shown, f"cannot be used ({line[:200]})", _REMEDY
            ) from None
        known = [direction.name.lower() for direction in self.study.directions]
        if known != directions or (self.study.metric_names or names) != names:
            raise StorageError(
                "objectives", names, f"the study has {self.study.metric_names}", "use the same"
            )
        self._storage = self.study._storage
        self._objectives = tuple(objectives)
        self._board: Noticeboard | None = None
        self._ids = {trial.number: trial._trial_id for trial in self.trials()}

    # --- proposing -------------------------------------------------------------------------------

    def propose(self) -> dict[str, Any]:
        """Parameters of a point worth trying, from the study's sampler; no trial is created yet."""
        stand_in = create_trial(state=TrialState.RUNNING)
        sampler = self.study.sampler
        search_space = sampler.infer_relative_search_space(self.study, stand_in)
        return sampler.sample_relative(self.study, stand_in, search_space)

    @property
    def origin(self) -> str:
        """Where the last proposal came from: "design" or "search"."""
        return str(getattr(self.study.sampler, "origin", "search"))

    def propose_baseline(self, choices: Sequence[Genome]) -> Genome:
        """Which of some LoRA baselines the sampler would try next."""
        propose = getattr(self.study.sampler, "propose_baseline", None)
        found: Genome = propose(self.study, choices) if propose is not None else choices[0]
        return found

    # --- trials ----------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number; not to be changed."""
        return self.study.get_trials(deepcopy=False)

    def stored(self) -> list[StoredTrial]:
        """All trials as plain data, by number; those that only wait are left out."""
        return _stored(self.study)

    def start(
        self,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        attributes: Mapping[str, Any],
    ) -> int:
        """A new running trial, written in one transaction; its number.

        Args:
            params: Its parameters.
            distributions: At least those of its parameters.
            attributes: User attributes.
        """
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions={name: distributions[name] for name in params},
            user_attrs=dict(attributes),
        )
        trial_id = self._storage.create_new_trial(self.study._study_id, template_trial=template)
        number = self._storage.get_trial_number_from_id(trial_id)
        self._ids[number] = trial_id
        return number

    def trial(self, number: int) -> FrozenTrial:
        """One trial as stored."""
        return self._storage.get_trial(self._ids[number])

    def record(self, number: int, step: int, score: float) -> None:
        """Store a rung's score; a second report at the same step is ignored."""
        self._storage.set_trial_intermediate_value(self._ids[number], step, float(score))

    def prune_gap(self, number: int) -> float:
        """Above 0 if the pruner stops the trial: its gap, or 1 where the pruner knows no gap."""
        trial = self.trial(number)
        pruner = self.study.pruner
        if isinstance(pruner, GapPruner):
            return pruner.gap(self.study, trial)
        return 1.0 if pruner.prune(self.study, trial) else 0.0

    def complete(self, number: int, values: Sequence[float], measured: Mapping[str, float]) -> None:
        """The trial ended with these values of the objectives."""
        if measured:
            self._attribute(number, "measured", dict(measured))
        self._constrain(number, 0.0)
        self.study.tell(number, list(values), state=TrialState.COMPLETE)

    def prune(self, number: int, reason: str, gap: float = 1.0) -> None:
        """The trial was stopped at a rung.

        In a study with several directions it also gets a positive constraint: TPE would otherwise
        look for its single direction and raise.
        """
        self._attribute(number, "reason", reason)
        self._constrain(number, gap if gap > 0 and math.isfinite(gap) else 1.0)
        self.study.tell(number, state=TrialState.PRUNED)

    def note_audit(self, number: int, step: int) -> None:
        """The trial goes on past a rung that would have stopped it."""
        self._attribute(number, AUDIT_KEY, step)

    def fail(self, number: int, reason: str) -> None:
        """The trial gave nothing."""
        self._attribute(number, "reason", reason)
        self.study.tell(number, state=TrialState.FAIL)

    def _attribute(self, number: int, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._ids[number], key, value)

    def _constrain(self, number: int, value: float) -> None:
        if len(self.study.directions) > 1:
            self._storage.set_trial_system_attr(self._ids[number], _CONSTRAINT, float(value))

    def post(self, outcomes: Callable[[], Sequence[Outcome]], *, now: bool = False) -> None:
        """Put note and graphs where optuna-dashboard shows them, if it is time.

        Nothing is written for a study in memory, which nobody can watch.

        Args:
            outcomes: Gives the trials told so far; called only if something is written.
            now: Write whatever the time.
        """
        if isinstance(self._storage, InMemoryStorage):
            return
        if self._board is None:
            # Imported here: the dashboard's server takes a moment to load.
            from autopeft.searcher.dashboard import Noticeboard

            self._board = Noticeboard(self.study, self._objectives)
        if now or self._board.is_due:
            self._board.post(outcomes())

    # --- the study as a notebook -----------------------------------------------------------------

    def remember(self, key: str, value: Any) -> None:
        """Keep plain data with the study; over an earlier value of the key."""
        self.study.set_user_attr(key, value)

    def recall(self, key: str, default: Any = None) -> Any:
        """What `remember` kept."""
        return self.study.user_attrs.get(key, default)


def price_attribute(price: Mapping[str, float]) -> dict[str, Any]:
    """The user attribute that carries a trial's price to the pruner."""
    return {PRICE_KEY: dict(price)}


def _stored(study: optuna.study.Study) -> list[StoredTrial]:
    return [
        StoredTrial(
            trial.number,
            STATES[trial.state],
            tuple(trial.values or ()) if trial.state == TrialState.COMPLETE else (),
            trial.user_attrs,
            tuple(sorted(trial.intermediate_values.items())),
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state in STATES
    ]


def stored_study(storage: str | Path, name: str) -> tuple[list[StoredTrial], list[str]]:
    """The trials of a study, and its metrics' names; nothing in it is changed.

    Raises:
        StorageError: if there is no such study.
    """
    try:
        study = optuna.load_study(study_name=name, storage=open_storage(storage))
    except (KeyError, ValueError):
        raise StorageError(
            "study_name", name, f"{storage} holds no such study", "check the name"
        ) from None
    return _stored(study), list(study.metric_names or ())
