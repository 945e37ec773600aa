"""Read YAML files: settings and search spaces."""

from __future__ import annotations

import re
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from autopeft.errors import UserError
from autopeft.utils.text_files import (
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_YAML_BYTES,
    TOO_DEEP,
    NamedTwice,
    Unreadable,
    read_text,
)

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, and neither 012 as ten nor 1:30 as ninety."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML declares it so)
        first: [rule for rule in rules if rule[0] not in (_INT, _FLOAT)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


# PyYAML 6.0 (yaml/resolver.py) reads numbers as YAML 1.1: octal and sexagesimal ones are text here.
_Loader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?(0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts that the loader would read as numbers, such as 1e3."""


_Dumper.add_implicit_resolver(
    _FLOAT, re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)

_MAX_NODES = 100_000
"""Most values in one file. Aliases count at each place: nine of them in nine make a billion."""


def read_yaml(
    path: Path | Traversable, *, field: str, remedy: str, error: type[UserError]
) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, or raise an `error` that names `field`."""
    try:
        text = read_text(path, max_bytes=MAX_YAML_BYTES)
    except Unreadable as wrong:
        raise error(field, str(path), str(wrong), "check the path and the file") from None
    return parse_yaml(text, field=field, shown=str(path), remedy=remedy, error=error)


def to_yaml(values: Any, **options: Any) -> str:
    """Return YAML that `parse_yaml` reads as the same values, in their order.

    Example:
        >>> from autopeft.utils.yaml_files import to_yaml
        >>> to_yaml({"study_name": "1e3", "steps": 90}).splitlines()
        ["study_name: '1e3'", 'steps: 90']
    """
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, **options))


def parse_yaml(
    text: str, *, field: str, shown: str, remedy: str, error: type[UserError]
) -> dict[str, Any]:
    """Parse YAML that holds a mapping, or raise an `error` that names `field` and what is shown."""
    try:
        row = _parsed(text)
    except yaml.YAMLError as wrong:
        mark = getattr(wrong, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise error(field, shown, f"is not YAML{where}", "fix the syntax") from None
    except NamedTwice as wrong:
        raise error(field, shown, str(wrong), "name it once") from None
    except Unreadable as wrong:
        raise error(field, shown, str(wrong), remedy) from None
    if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
        raise error(field, shown, "must hold `name: value` lines", remedy)
    return row


def _parsed(text: str) -> Any:
    """Return the values of a text whose size, with each alias in its place, was checked first."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {}, 0)
        _check_names(node, loader, set())
        return loader.construct_document(node)
    except RecursionError:
        raise Unreadable(TOO_DEEP) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as wrong:
        if isinstance(wrong, Unreadable):
            raise
        # A tag or a date whose text does not fit it: PyYAML's constructors do not check.
        raise Unreadable(f"holds a value that its tag or form does not allow ({wrong})") from None
    finally:
        loader.dispose()


def _weigh(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return how many values a node stands for, or raise an Unreadable: too deep, or too many."""
    if depth > MAX_DEPTH:
        raise Unreadable(TOO_DEEP)  # also an alias inside what it names
    if id(node) in known:
        return known[id(node)]
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            raise Unreadable(f"holds a number of {len(node.value)} digits")
        return 1
    inner = node.value
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    total = 1 + sum(_weigh(part, known, depth + 1) for part in inner)
    if total > _MAX_NODES:
        raise Unreadable(f"stands for more than {_MAX_NODES:,} values, the most that are read")
    known[id(node)] = total
    return total


def _check_names(node: yaml.Node, loader: _Loader, known: set[int]) -> None:
    """Raise a NamedTwice if a mapping has a key twice: of its values, only the last would count."""
    if isinstance(node, yaml.ScalarNode) or id(node) in known:
        return
    known.add(id(node))
    inner = node.value
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
        lines: dict[Any, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            name = key.value
            if key.tag != _MERGE:
                name = loader.construct_object(key, deep=True)
            if name in lines:
                raise NamedTwice(key.value, f"at lines {lines[name]} and {line}")
            lines[name] = line
    for part in inner:
        _check_names(part, loader, known)
