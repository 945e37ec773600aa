"""What searches that share a study must have alike; the first one writes it into the study."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import optuna

from autopeft.errors import SettingsError, StorageError
from autopeft.inputs import SAME, Inputs
from autopeft.searcher.owner import SHARED_KEY
from autopeft.searcher.storage import file_of, open_to_read, shown_place
from autopeft.settings import RESUMABLE, SearchSettings
from autopeft.utils.folder_lock import WATCH_SECONDS
from autopeft.utils.serialize import finite, from_plain, to_plain

_ADOPTED = ("steps", "batch_size", "rungs", "rung_rows")
"""Sizes that a search that joins takes from the study where its user left them open."""

_INPUTS = ("model", "data", "validation", "test")
"""Settings that machines may write in other ways: digests of what is behind them are compared."""

_OWN = RESUMABLE | frozenset(
    (
        *(*_INPUTS, "seed", "output", "storage", "study_name", "join", "compress", "max_data_gb"),
        *("sampler", "pruner", "warm_start", "prior", "audit_share", "attn_implementation"),
        *("activation_cache", "activation_cache_gb", "gradient_checkpointing"),
        *("micro_batch_tokens", "packing"),
    )
)
"""Settings that each search may choose: none changes what a trial's result means."""


@dataclass(frozen=True)
class Shared:
    """What all searches of a study have alike.

    Attributes:
        settings: Settings by name, those of `_OWN` left out.
        model: The setting of the search that began the study; it counts for a hub id.
        seed: The seed of the splits and the trainings.
        inputs: Digests of data and model.
    """

    settings: Mapping[str, Any]
    model: str
    seed: int
    inputs: Inputs

    @classmethod
    def of(cls, settings: SearchSettings, inputs: Inputs) -> Shared:
        """Return what others must have alike that join this search, whose sizes are planned."""
        names = [each.name for each in fields(settings) if each.name not in _OWN]
        # As they are read again: lists in the place of tuples.
        same = finite(to_plain({name: getattr(settings, name) for name in names}))
        return cls(same, settings.model, settings.seed, inputs)

    def to_plain(self) -> dict[str, Any]:
        """Return plain values."""
        values: dict[str, Any] = to_plain(self)
        return values

    def adopted(self, settings: SearchSettings) -> SearchSettings:
        """Return the settings of a search that joins, with the seed and the sizes of the study.

        A search of another seed would train each candidate in another way, and the seeds of the
        confirmation would be among those of the search.
        """
        is_open = [name for name in _ADOPTED if getattr(settings, name) is None]
        sizes: dict[str, Any] = {name: self.settings.get(name) for name in is_open}
        return replace(settings, seed=self.seed, **sizes)

    def check(self, settings: SearchSettings, inputs: Inputs) -> None:
        """Check that a search that joins has the same.

        Args:
            settings: Its settings, planned.
            inputs: Its digests.

        Raises:
            UserError: naming the first setting that differs, and the remedy.
        """
        now = Shared.of(settings, inputs)
        before, after = dict(self.settings), dict(now.settings)
        if not (self.inputs.model and inputs.model):
            before["model"], after["model"] = self.model, now.model
        for name in sorted(before | after):
            if before.get(name) != after.get(name):
                problem = f"the study was begun with {before.get(name)}"
                raise SettingsError(name, after.get(name), problem, SAME)
        self.inputs.check_same(inputs, model=settings.model, data=settings.data, joins=True)


def check_reachable(settings: SearchSettings) -> None:
    """Check that the study of a search that joins others is where they find it.

    Raises:
        SettingsError: if it is not.
    """
    if not settings.study_name:
        problem = "is needed to join a study: by default, each search has its own"
        raise SettingsError("study_name", "", problem, "give --study-name, the same for all")
    place = settings.storage or ""
    file = file_of(place)
    folder = Path(settings.output).expanduser().resolve()
    is_inside = file is not None and Path(file).expanduser().resolve().is_relative_to(folder)
    if is_inside or file in ("", ":memory:"):
        problem = "no other search can join a study there"
        remedy = "give --storage: a database's URL, or a file outside of --output"
        raise SettingsError("storage", shown_place(place), problem, remedy)


def read_shared(settings: SearchSettings) -> Shared | None:
    """Return what the searches of the study have alike; None if there is no study yet.

    Raises:
        StorageError: if the study is that of a single search.
    """
    assert settings.storage is not None, "it is checked"
    file = file_of(settings.storage)
    if file is not None and not Path(file).expanduser().is_file():
        return None
    try:
        study = optuna.load_study(
            study_name=settings.study_name, storage=open_to_read(settings.storage)
        )
    except KeyError:
        return None
    until = time.monotonic() + WATCH_SECONDS
    while True:
        attributes = study._storage.get_study_system_attrs(study._study_id)
        if SHARED_KEY in attributes:
            return from_plain(Shared, attributes[SHARED_KEY], field=SHARED_KEY, error=StorageError)
        # Another search may have made it just now.
        if study.get_trials(deepcopy=False) or time.monotonic() > until:
            problem = "the study was not begun with --join"
            remedy = "give another --study-name, or begin that search with --join"
            raise StorageError("study_name", settings.study_name, problem, remedy)
        time.sleep(0.2)
