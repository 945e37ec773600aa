"""Read YAML files: settings and search spaces."""

from __future__ import annotations

import re
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from autopeft.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number; YAML 1.1 requires 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(
    path: Path | Traversable, *, field: str, remedy: str, error: type[UserError]
) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, or raise an `error` that names `field`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as wrong:
        problem = f"cannot be read ({type(wrong).__name__})"
        raise error(field, str(path), problem, "check the path") from None
    return parse_yaml(text, field=field, shown=str(path), remedy=remedy, error=error)


def parse_yaml(
    text: str, *, field: str, shown: str, remedy: str, error: type[UserError]
) -> dict[str, Any]:
    """Parse YAML that holds a mapping, or raise an `error` that names `field` and what is shown."""
    try:
        row = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as wrong:
        mark = getattr(wrong, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise error(field, shown, f"is not YAML{where}", "fix the syntax") from None
    if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
        raise error(field, shown, "must hold `name: value` lines", remedy)
    return row
