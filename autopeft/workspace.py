"""The output folder of a search: its settings, its state, and the study by default."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from autopeft.errors import SettingsError, StorageError
from autopeft.settings import FORMER_DEFAULTS, RENAMED, SearchSettings
from autopeft.utils.files import write_text
from autopeft.utils.serialize import read_json, strict_json
from autopeft.utils.yaml_files import read_yaml

T = TypeVar("T")

SETTINGS = "settings.yaml"
STUDY = "study.db"
FRONT = "front.json"
_SAVED = {"model": "model", "data": "data", "validation": "data", "test": "data"}
"""Setting -> folder of what was given as an object, see `autopeft.saved_inputs`."""


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a settings file."""
    return read_yaml(
        Path(path), field="settings", remedy="see examples/quickstart.yaml", error=SettingsError
    )


class Workspace:
    """The output folder of a search; `~` is expanded in its path."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def check_free(self) -> None:
        """Check that a new search can be written here."""
        folder, remedy = self.folder, "choose another --output"
        parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
        if (folder / SETTINGS).exists():
            problem = "the folder holds another search"
            remedy = f"continue it with `autopeft resume {folder}`, or {remedy}"
        elif folder.exists() and not folder.is_dir():
            problem = "is a file, not a folder"
        elif folder.is_dir() and any(folder.iterdir()):
            problem = "the folder is not empty"
        elif not os.access(parent, os.W_OK):
            problem = f"{parent} is not writable"
        else:
            return
        raise StorageError("output", str(folder), problem, remedy)

    def create(self, settings: SearchSettings) -> None:
        """Create the folder and write the settings into it."""
        text = yaml.safe_dump(settings.to_mapping(), sort_keys=False)
        write_text(self.folder / SETTINGS, text)

    def settings(self) -> SearchSettings:
        """Return the settings of the search in this folder, or raise a StorageError."""
        if not (self.folder / SETTINGS).exists():
            problem = f"holds no search ({SETTINGS} is missing)"
            remedy = "give the --output folder of a search"
            raise StorageError("folder", str(self.folder), problem, remedy)
        rows = read_settings(self.folder / SETTINGS)
        # A search of an earlier version stays usable: its settings may have former names, and
        # columns of all tasks. Columns of these names are recognized anyway.
        if all(name in rows for name in FORMER_DEFAULTS):
            rows = {k: v for k, v in rows.items() if (k, v) not in FORMER_DEFAULTS.items()}
        found = SearchSettings.from_mapping({RENAMED.get(key, key): rows[key] for key in rows})
        return self._here(found)

    def _here(self, settings: SearchSettings) -> SearchSettings:
        """Return settings that find in this folder what was saved in it, if it was moved."""
        before = Path(settings.output).expanduser()
        moved: dict[str, Any] = {}
        for name, part in _SAVED.items():
            value = getattr(settings, name)
            if isinstance(value, str) and Path(value).is_relative_to(before / part):
                moved[name] = str(self.folder / Path(value).relative_to(before))
        return replace(settings, **moved)

    def remember(self, name: str, value: Any) -> None:
        """Keep a small value, a dataclass or plain values, in `state/`."""
        write_text(self._state(name), strict_json(value, indent=None))

    def recall(self, name: str, kind: type[T]) -> T | None:
        """Return what `remember` kept as a `kind`, or None."""
        path = self._state(name)
        return read_json(path, kind, remedy="delete it") if path.exists() else None

    def _state(self, name: str) -> Path:
        return self.folder / "state" / f"{name}.json"

    @property
    def artifacts(self) -> Path:
        """The folder of the study's artifacts."""
        return self.folder / "artifacts"

    def storage(self, settings: SearchSettings) -> str:
        """Return the user's Optuna storage, or by default a SQLite file in the folder."""
        return settings.storage or f"sqlite:///{self.folder / STUDY}"

    def study_name(self, settings: SearchSettings) -> str:
        """Return the name of the study in the storage."""
        return settings.study_name or self.folder.absolute().name
