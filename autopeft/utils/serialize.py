"""Convert dataclasses to plain values and back: the only place that knows msgspec."""

from __future__ import annotations

import difflib
import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from autopeft.errors import SettingsError, StorageError, UserError
from autopeft.utils.text_files import MAX_JSON_BYTES, Unreadable, parse_json, read_text

T = TypeVar("T")

_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "object": "a mapping",
    "str": "text",
}
"""msgspec's words for types, in a user's words."""


def to_plain(value: Any) -> Any:
    """Return dataclasses as dicts, in the order of their fields; numpy scalars as numbers."""
    return msgspec.to_builtins(value, enc_hook=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if _is_masked(value):
        return None
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"cannot be written as JSON: {type(value).__name__}")


def finite(value: Any) -> Any:
    """Return `value` with NaN and infinity replaced by None, as strict JSON requires.

    Mappings become dicts with string keys; tuples and sets become lists.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((finite(v) for v in value), key=str)
    return value


def strict_json(value: Any, *, indent: int | None = 2) -> str:
    """Return JSON without NaN."""
    content = finite(to_plain(value))
    return json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def from_plain(
    kind: type[T],
    data: Any,
    *,
    field: str = "",
    remedy: str = "correct it",
    error: type[UserError] = SettingsError,
    allow_unknown: bool = False,
    null_is_nan: bool = False,
    from_text: bool = False,
) -> T:
    """Build a `kind` from plain values; types are checked and never coerced, except int to float.

    Args:
        kind: A dataclass, or any type that annotations can express.
        data: Dicts, lists, strings, numbers, None; finished dataclasses may be among them.
        field: What the error names, followed by the path inside `data`.
        remedy: What the user can do about a wrong value.
        error: The error to raise.
        allow_unknown: Ignore unknown keys, such as those a later version writes.
        null_is_nan: Read None as NaN where a number is required: the inverse of `finite`.
        from_text: Read numbers from text, as a CSV file holds them.

    Raises:
        UserError: of class `error`, if a value has the wrong type or a key is missing or unknown.
    """
    if null_is_nan:
        data = _with_nan(inspect.type_info(kind), data)
    try:
        value: T = msgspec.convert(data, kind, strict=not from_text)
    except msgspec.ValidationError as wrong:
        place, found = _locate(kind, data, str(wrong), strict=not from_text)
        raise error(_name(field, *place), found, _explain(str(wrong)), remedy) from None
    except UnicodeEncodeError:
        problem = "holds half a character (a lone surrogate)"
        raise error(field or "content", type(data).__name__, problem, remedy) from None
    if not allow_unknown:
        for where, found, known in _unknown(value, data):
            raise error(_name(field, *where), found, "unknown key", nearest(str(where[-1]), known))
    return value


def read_json(
    path: Path,
    kind: type[T],
    *,
    field: str = "",
    remedy: str = "restore the file",
    error: type[UserError] = StorageError,
) -> T:
    """Read a JSON file and check it against `kind`; unknown keys are ignored.

    Raises:
        UserError: of class `error`, naming `field` or the file, if the file cannot be read, is too
            large or too deep, is not JSON, or does not fit.
    """
    field = field or path.name
    try:
        data = parse_json(read_text(path, max_bytes=MAX_JSON_BYTES))
    except Unreadable as wrong:
        raise error(field, str(path), str(wrong), remedy) from None
    try:
        return from_plain(kind, data, field="content", allow_unknown=True)
    except UserError as wrong:
        raise error(field, str(path), wrong.mistake, remedy) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown word: the nearest of the known ones, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word.lower().replace("-", "_"), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"


def _with_nan(kind: inspect.Type, data: Any) -> Any:
    """Return the data with NaN in place of None where only a number is allowed."""
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    if data is None:
        is_number = any(isinstance(k, inspect.FloatType) for k in kinds)
        is_optional = any(isinstance(k, inspect.NoneType) for k in kinds)
        return math.nan if is_number and not is_optional else None
    for k in kinds:
        if isinstance(k, inspect.DataclassType) and isinstance(data, Mapping):
            types = {each.name: each.type for each in k.fields}
            return {n: _with_nan(types[n], v) if n in types else v for n, v in data.items()}
        if isinstance(k, inspect.DictType) and isinstance(data, Mapping):
            return {name: _with_nan(k.value_type, value) for name, value in data.items()}
        if isinstance(k, inspect.VarTupleType) and isinstance(data, list | tuple):
            return [_with_nan(k.item_type, value) for value in data]
        if isinstance(k, inspect.TupleType) and isinstance(data, list | tuple):
            if len(data) == len(k.item_types):
                return [_with_nan(*pair) for pair in zip(k.item_types, data, strict=True)]
    return data


def _explain(message: str) -> str:
    """Return a message of msgspec in a user's words."""
    message, _, place = message.partition(" - at `")
    subject = "a key must be " if place.startswith("key") else "must be "
    if match := re.match(r"Expected `(.*?)`(.*), got", message):
        kinds = [kind for kind in match[1].split(" | ") if kind != "null"]
        return subject + " or ".join(_WORDS.get(k, k) for k in kinds) + match[2]
    if match := re.match(r"Object missing required field `(.*)`", message):
        return f"lacks the key `{match[1]}`"
    return message[:1].lower() + message[1:]


def _locate(kind: Any, data: Any, message: str, *, strict: bool) -> tuple[list[str | int], Any]:
    """Return the keys that lead to the wrong value, and the value, shortened if it is long."""
    place: list[str | int] = []
    found = data = _copied(data)
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", message.rpartition("`$")[2]):
        if index == "...":  # msgspec hides the keys of mappings: the wrong item fails alone as well
            items = dict(found)
            for key, item in items.items():
                found.clear()
                found[key] = item
                if _message(kind, data, strict) == message:
                    place.append(key)
                    found = item
                    break
            else:
                return place, items
        else:
            place.append(name or int(index))
            found = found[place[-1]]
    return place, found if len(repr(found)) <= 120 else reprlib.repr(found)


def _copied(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _copied(item) for key, item in data.items()}
    return [_copied(item) for item in data] if isinstance(data, list | tuple) else data


def _message(kind: Any, data: Any, strict: bool) -> str:
    try:
        msgspec.convert(data, kind, strict=strict)
    except msgspec.ValidationError as wrong:
        return str(wrong)
    return ""


def _name(field: str, *place: str | int) -> str:
    """Return e.g. `field.parts[3].size`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return (field + "".join(steps)).removeprefix(".")


def _unknown(
    value: Any, data: Any, *place: str | int
) -> Iterator[tuple[tuple[str | int, ...], Any, list[str]]]:
    """Yield place and value of each key that no dataclass has, and the keys that it has."""
    items: Iterable[tuple[Any, Any, Any]] = ()
    known = getattr(value, "__dataclass_fields__", None)
    if isinstance(data, list | tuple):
        items = zip(range(len(data)), value, data, strict=False)
    elif known is not None and isinstance(data, Mapping):
        yield from (((*place, k), v, list(known)) for k, v in data.items() if k not in known)
        items = ((key, getattr(value, key), item) for key, item in data.items() if key in known)
    elif isinstance(data, Mapping):
        items = ((key, value.get(key), item) for key, item in data.items())
    for key, inner, item in items:
        if isinstance(item, Mapping | list | tuple):
            yield from _unknown(inner, item, *place, key)


def to_float(value: Any, *, truth: bool = False) -> float | None:
    """Return a number as a float, also one of numpy or a tensor; None for what is none.

    Text, truth values, complex numbers, times and masked values are none, whatever library holds
    them.

    Args:
        value: What may be a number.
        truth: Take a truth value as 0 or 1.

    Example:
        >>> from autopeft.utils.serialize import to_float
        >>> to_float("3"), to_float(True), to_float(3)
        (None, None, 3.0)
    """
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    try:
        plain = value.item() if hasattr(value, "item") else value
        # A clongdouble, a time in nanoseconds and a masked value, which is missing, have no plain
        # value that tells them.
        if kind in ("c", "m", "M") or _is_masked(value) or (isinstance(plain, bool) and not truth):
            return None
        if not hasattr(plain, "__float__") and not hasattr(plain, "__index__"):
            return None  # float() would read text and bytes.
        return float(plain)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return None  # An integer may be too large for a float.


def _is_masked(value: Any) -> bool:
    """Return whether a number of numpy is missing; its `item()` is what lies below the mask."""
    mask = getattr(value, "mask", False)
    # A Series has a method of that name.
    return not callable(mask) and bool(getattr(mask, "any", lambda: mask)())
