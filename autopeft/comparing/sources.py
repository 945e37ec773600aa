"""What a user may compare: peft folders, members of autopeft's runs, and whole models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from autopeft.errors import AdapterError, SettingsError
from autopeft.result import SearchResult
from autopeft.settings import SearchSettings
from autopeft.workspace import FRONT, SETTINGS, Workspace

Kind = Literal["autopeft", "peft", "model"]

_FILES: tuple[tuple[str, Kind], ...] = (
    ("plan.json", "autopeft"),
    ("adapter_config.json", "peft"),
    ("config.json", "model"),
)
"""File that tells what a folder holds -> what it is; the first one that there is decides."""

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
        """Size of its files of tensors."""
        return sum(file.stat().st_size for file in self.folder.rglob("*.safetensors"))


def find_sources(
    paths: Sequence[str | Path], pick: str, settings: SearchSettings
) -> tuple[Source, ...]:
    """Return what folders hold, each under a name of its own.

    Args:
        paths: Folders of adapters, of models or of runs.
        pick: Member of a run as `SearchResult.pick` takes it, or "all".
        settings: What all are scored with; a note tells which runs split their data differently.

    Raises:
        AdapterError: if a folder holds neither.
        SettingsError: if a run has no result, or no such member.
    """
    if not paths:
        problem = "no adapter is named"
        raise SettingsError("adapters", "", problem, "name folders of adapters, models or runs")
    found: list[Source] = []
    for path in paths:
        folder = Path(path).expanduser()
        if (folder / SETTINGS).is_file() and (folder / FRONT).is_file():
            found += _members(folder, pick, settings)
        else:
            found.append(Source(folder.resolve().name, folder, _kind_of(folder)))
    return _named_apart(found)


def _kind_of(folder: Path) -> Kind:
    remedy = "name a folder of an adapter, of a model or of a run"
    if not folder.is_dir():
        raise AdapterError("adapter", str(folder), "no such folder", remedy)
    for file, kind in _FILES:
        if (folder / file).is_file():
            return kind
    problem = f"holds no adapter and no model ({', '.join(file for file, _ in _FILES)})"
    raise AdapterError("adapter", str(folder), problem, remedy)


def _members(folder: Path, pick: str, settings: SearchSettings) -> list[Source]:
    """Return the members of a run that were saved."""
    result = SearchResult.read(folder)
    members = list(result.front) if pick == ALL else [result.pick(pick)]
    if not any(member.folder for member in members):
        problem = "no adapter of it was confirmed, so none was saved"
        raise SettingsError("pick", pick, problem, f"autopeft resume {folder}")
    own = Workspace(folder).settings()
    differing = [
        name for name in ("data", "test", "seed") if getattr(own, name) != getattr(settings, name)
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


def _named_apart(found: Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources with names that differ: by the folders above, else by number."""
    counts = Counter(source.name for source in found)
    longer = [
        replace(s, name=f"{s.folder.resolve().parent.name}/{s.name}") if counts[s.name] > 1 else s
        for s in found
    ]
    seen: Counter[str] = Counter()
    named = []
    for source in longer:
        seen[source.name] += 1
        number = seen[source.name]
        name = source.name if number == 1 else f"{source.name} ({number})"
        named.append(replace(source, name=name))
    return tuple(named)


def is_same_base(named: str | None, model: str) -> bool:
    """Return whether a base model that an adapter names may be the given one.

    Folders move and hub ids become folders, so only the last part of the name counts.

    Example:
        >>> from autopeft.comparing.sources import is_same_base
        >>> is_same_base("org/Tiny-1B", "/models/Tiny-1B"), is_same_base("gpt2", "roberta-base")
        (True, False)
    """
    return not named or _last_part(named) == _last_part(model)


def _last_part(model: str) -> str:
    """Return the last part of a folder or hub id; of a folder in the hub's cache, its hub id's."""
    cached = re.search(r"models--(?:.*--)?([^/\\]+)[/\\]snapshots", model)
    name = cached[1] if cached else re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    return name.casefold()
