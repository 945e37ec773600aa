"""What a user may compare: peft folders, members of autopeft's runs, and whole models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Literal

from autopeft.errors import AdapterError, DataError, SettingsError
from autopeft.inputs import model_digests
from autopeft.models.adapter_files import CONFIG_FILE, PLAN_FILE, holds_plan, tensor_files
from autopeft.result import SearchResult
from autopeft.settings import SearchSettings
from autopeft.utils.arguments import checked_path
from autopeft.workspace import FRONT, SETTINGS, Workspace

Kind = Literal["autopeft", "peft", "model"]

_FILES: tuple[tuple[str, Kind], ...] = ((CONFIG_FILE, "peft"), ("config.json", "model"))
"""File that tells what a folder holds -> what it is; the first one that there is decides."""

_WEIGHTS = "model*.safetensors"
"""Files of tensors of a whole model."""

BASE = "no adapter"
"""Name of the base model among what is compared."""

ALL = "all"
"""Value of `pick` that takes every member of a run."""


@dataclass(frozen=True)
class Source:
    """One thing to score.

    Attributes:
        name: What tells it from the others.
        folder: Where its files are.
        kind: "autopeft" for an adapter that autopeft saved, "peft" for one of others, "model" for a
            whole model.
        note: What a user should know of it; "" if nothing.
    """

    name: str
    folder: Path
    kind: Kind
    note: str = ""

    @property
    def n_bytes(self) -> int:
        """Size of its files of tensors; a folder beside them, such as a checkpoint, has others."""
        is_model = self.kind == "model"
        files = self.folder.glob(_WEIGHTS) if is_model else tensor_files(self.folder)
        return sum(file.stat().st_size for file in files)


def find_sources(
    paths: Sequence[str | Path], pick: str, settings: SearchSettings, *, is_held_out: bool = False
) -> tuple[Source, ...]:
    """Return what folders hold, each under a name of its own.

    Args:
        paths: Folders of adapters, of models or of runs.
        pick: Member of a run as `SearchResult.pick` takes it, or "all".
        settings: What all are scored with; a note tells which runs split their data differently.
        is_held_out: Whether all rows of the data are scored, because no adapter has seen any.

    Raises:
        AdapterError: if a folder holds neither.
        DataError: if a run was searched on rows that are scored as held out.
        SettingsError: if a run has no result, or no such member.
    """
    if not paths:
        problem = "no adapter is named"
        raise SettingsError("adapters", "", problem, "name folders of adapters, models or runs")
    found: list[Source] = []
    for path in paths:
        folder = checked_path("adapters", path, error=AdapterError)
        if (folder / SETTINGS).is_file() and (folder / FRONT).is_file():
            found += _members(folder, pick, settings, is_held_out=is_held_out)
        else:
            kind = _kind_of(folder)
            others = _adapters_in(folder) if kind == "peft" else ()
            note = f"the adapters in its folders {', '.join(others)} are not compared"
            found.append(Source(folder.resolve().name, folder, kind, note if others else ""))
    return _named_apart(found)


def _kind_of(folder: Path) -> Kind:
    remedy = "name a folder of an adapter, of a model or of a run"
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "no such folder"
        raise AdapterError("adapter", str(folder), problem, remedy)
    if holds_plan(folder):
        return "autopeft"
    for file, kind in _FILES:
        if (folder / file).is_file():
            return kind
    names = ", ".join((PLAN_FILE, *(file for file, _ in _FILES)))
    problem = f"holds no adapter and no model ({names})"
    if others := _adapters_in(folder):
        remedy = f"name one of those in it: {', '.join(str(folder / each) for each in others)}"
    raise AdapterError("adapter", str(folder), problem, remedy)


def _adapters_in(folder: Path) -> tuple[str, ...]:
    """Return the names of folders in it that hold an adapter: peft saves several so."""
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}")))


_ROWS = ("data", "data_name", "data_revision", "validation", "test", "seed")
"""Settings that decide which rows are in which split."""


def _members(
    folder: Path, pick: str, settings: SearchSettings, *, is_held_out: bool
) -> list[Source]:
    """Return the members of a run that were saved."""
    result = SearchResult.read(folder)
    members = list(result.front) if pick == ALL else [result.pick(pick)]
    if not any(member.folder for member in members):
        problem = "no adapter of it was confirmed, so none was saved"
        raise SettingsError("pick", pick, problem, f"autopeft resume {folder}")
    own = Workspace(folder).settings()
    if is_held_out:
        seen = (("validation", own.validation), ("data", own.data))
        for name, value in seen:
            if value and _is_same_source(value, settings.data):
                raise DataError(
                    "data",
                    settings.data,
                    f"is the {name} of {folder}, so its adapters have seen rows of it",
                    "leave out --held-out, so that the test split is scored, or name other data",
                )
    differing = [
        name
        for name in _ROWS
        if not is_held_out and not _is_same_source(getattr(own, name), getattr(settings, name))
    ]
    note = f"searched with another {' and '.join(differing)}: it may have seen these rows"
    return [
        Source(
            f"{folder.resolve().name}:{member.digest[:8]}",
            member.folder,
            "autopeft",
            note if differing else "",
        )
        for member in members
        if member.folder is not None
    ]


def _is_same_source(one: object, other: object) -> bool:
    """Return whether two settings name the same files, however their paths are written."""
    if isinstance(one, str) and isinstance(other, str):
        places = [Path(each).expanduser() for each in (one, other)]
        return one == other or (all(p.exists() for p in places) and places[0].samefile(places[1]))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same_source, one, other))
    return one == other


def _named_apart(found: Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources with names that differ, also from that of the base model.

    They differ by the folders above, else by number.
    """
    counts = Counter(source.name for source in found)
    longer = [
        replace(s, name=f"{s.folder.resolve().parent.name}/{s.name}") if counts[s.name] > 1 else s
        for s in found
    ]
    named: dict[str, Source] = {}
    for source in longer:
        numbered = (f"{source.name} ({number})" for number in count(2))
        free = (n for n in chain((source.name,), numbered) if n not in named and n != BASE)
        name = next(free)
        named[name] = replace(source, name=name)
    return tuple(named.values())


def is_same_base(named: str | None, model: str) -> bool:
    """Return whether a base model that an adapter names may be the given one.

    Folders move and hub ids become folders, so only the last part of the name counts. Where both
    are folders here, their configurations and weights must be equal too.

    Example:
        >>> from autopeft.comparing.sources import is_same_base
        >>> is_same_base("org/Tiny-1B", "/models/Tiny-1B"), is_same_base("gpt2", "roberta-base")
        (True, False)
    """
    if not named or _is_same_source(named, model):
        return True
    if _last_part(named) != _last_part(model):
        return False
    (one, _), (other, _) = (model_digests(str(Path(each).expanduser())) for each in (named, model))
    return not (one and other) or one == other


def _last_part(model: str) -> str:
    """Return the last part of a folder or hub id; of a folder in the hub's cache, its hub id's."""
    cached = re.search(r"models--(?:.*--)?([^/\\]+)[/\\]snapshots", model)
    name = cached[1] if cached else re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    return name.casefold()
