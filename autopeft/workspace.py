"""The output folder of one search: what is in it, and who may write there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from autopeft.errors import SettingsError, StorageError
from autopeft.settings import SearchSettings

SETTINGS = "settings.yaml"
STUDY = "study.db"
FRONT = "front.json"


def read_settings(path: str | Path) -> dict[str, Any]:
    """The keys of a settings file.

    Raises:
        SettingsError: if the file is missing, is no YAML, or holds no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            "settings", str(path), f"cannot be read ({type(error).__name__})", "check the path"
        ) from None
    try:
        rows = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise SettingsError("settings", str(path), f"is not YAML{where}", "repair it") from None
    if not isinstance(rows, dict) or not all(isinstance(key, str) for key in rows):
        raise SettingsError(
            "settings", str(path), "must hold `name: value` lines", "see examples/quickstart.yaml"
        )
    return rows


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as the number it is (YAML 1.1 wants 1.0e-3)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


class Workspace:
    """One output folder.

    Args:
        folder: Where it is.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def check_free(self) -> None:
        """Raises unless a new search may be written here.

        Raises:
            StorageError: if the folder holds a search, is a file, or cannot be written.
        """
        if (self.folder / SETTINGS).exists():
            raise StorageError(
                "output",
                str(self.folder),
                "the folder holds another search",
                f"continue it with `autopeft resume {self.folder}`, or choose another --output",
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise StorageError(
                "output", str(self.folder), "is a file, not a folder", "choose another --output"
            )
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise StorageError(
                "output", str(self.folder), "the folder is not empty", "choose another --output"
            )
        parent = next(p for p in [self.folder, *self.folder.absolute().parents] if p.exists())
        if not os.access(parent, os.W_OK):
            raise StorageError(
                "output", str(self.folder), f"{parent} is not writable", "choose another --output"
            )

    def create(self, settings: SearchSettings) -> None:
        """Makes the folder and writes the settings into it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(SETTINGS, yaml.safe_dump(settings.to_mapping(), sort_keys=False))

    def settings(self) -> SearchSettings:
        """The settings of the search held here.

        Raises:
            StorageError: if the folder holds no search.
        """
        if not (self.folder / SETTINGS).exists():
            raise StorageError(
                "folder",
                str(self.folder),
                f"holds no search ({SETTINGS} is missing)",
                "give the --output folder of a search",
            )
        return SearchSettings.from_mapping(read_settings(self.folder / SETTINGS))

    def write(self, name: str, text: str) -> None:
        """Writes a file whole or not at all."""
        path = self.folder / name
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)

    def remember(self, name: str, value: Mapping[str, Any]) -> None:
        """Keeps a small JSON value under `state/`."""
        (self.folder / "state").mkdir(exist_ok=True)
        self.write(f"state/{name}.json", json.dumps(value))

    def recall(self, name: str) -> dict[str, Any]:
        """What `remember` kept; empty if nothing."""
        try:
            value: dict[str, Any] = json.loads((self.folder / "state" / f"{name}.json").read_text())
        except FileNotFoundError:
            return {}
        return value

    def storage(self, settings: SearchSettings) -> str:
        """The Optuna storage of the search: the user's, else a SQLite file in the folder."""
        return settings.storage or f"sqlite:///{self.folder / STUDY}"

    def study_name(self, settings: SearchSettings) -> str:
        """The study's name in the storage."""
        return settings.study_name or self.folder.absolute().name
