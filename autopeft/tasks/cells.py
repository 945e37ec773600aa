"""One value of a row, as text, as a list or as the messages of a conversation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from autopeft.errors import DataError
from autopeft.tasks.labels import list_in

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of messages that chat templates know."""

_ROLE_NAMES: Mapping[str, str] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Role as data has it, ShareGPT's names among them -> role as chat templates know it."""

_TOOL_CALL_ROLES = ("function_call", "tool_call")
"""ShareGPT's roles of an assistant's message whose text is the call of a tool."""

_MESSAGES_AS_TEXT = re.compile(r"""^\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
_MESSAGES_REMEDY = 'write a list such as [{"role": "user", "content": "Hello"}, ...]'


@dataclass(frozen=True)
class Cell:
    """One value of a row, which an error can name.

    Attributes:
        role: What it means, and the setting that names its column.
        column: Name of its column.
        number: Number of its row in the source, from 1.
        value: The value.
        source: File name, or hub id and split; "" if unknown.
    """

    role: str
    column: str
    number: int
    value: Any
    source: str = ""

    def fail(self, problem: str, remedy: str) -> NoReturn:
        """Raise a DataError that names the row."""
        where = row_name(self.number, self.source)
        comma = "," if problem.startswith("message ") else ""
        raise DataError(self.role, self.column, f"{where}{comma} {problem}", remedy)

    @property
    def is_missing(self) -> bool:
        """Whether there is no value: None, NaN, or nothing but spaces."""
        value = self.value
        if isinstance(value, float):
            return math.isnan(value)
        return value is None or (isinstance(value, str) and not value.strip())

    @property
    def has_messages(self) -> bool:
        """Whether the value is meant as messages: a list, or its JSON text."""
        if isinstance(self.value, str):
            return _are_messages(self.value)
        return as_list(self.value) is not None

    def text(self) -> str:
        """Return the value as text; a missing one is empty.

        Raises:
            DataError: unless it is text or a number.
        """
        value = self.value.item() if isinstance(self.value, np.generic) else self.value
        if isinstance(value, str):
            if _are_messages(value):
                self.fail(
                    f"holds a list of messages written as text ({shown(value)})",
                    "name that column as `messages`, or give text",
                )
            return value
        if self.is_missing:
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            is_whole = isinstance(value, float) and value.is_integer()
            return str(int(value) if is_whole else value)
        self.fail(
            f"holds {kind_of(value)} where text is meant ({shown(value)})",
            "give text, or name another column",
        )

    def items(self, what: str, remedy: str) -> list[Any]:
        """Return the value as a list; text is read as JSON, or as pandas writes lists to CSV.

        Raises:
            DataError: unless it is a list.
        """
        value = self.value
        if isinstance(value, str) and value.lstrip().startswith("["):
            if (written := list_in(value)) is None:
                self.fail(
                    f"holds text that is no JSON where {what} is meant ({shown(value)})",
                    "write the column with json.dumps, or use a JSONL or Parquet file",
                )
            value = written
        found = as_list(value)
        if found is None:
            self.fail(f"holds {kind_of(value)} where {what} is meant ({shown(value)})", remedy)
        return found

    def messages(self) -> tuple[Message, ...]:
        """Return the value as messages in OpenAI's form.

        Raises:
            DataError: unless it is a list of messages with known roles and contents.
        """
        items = self.items("a list of messages", _MESSAGES_REMEDY)
        return tuple(self._message(item, place) for place, item in enumerate(items, start=1))

    def _message(self, item: Any, place: int) -> Message:
        if not isinstance(item, Mapping):
            self.fail(
                f"holds a list whose item {place} is {kind_of(item)} where a message is meant"
                f" ({shown(item)})",
                _MESSAGES_REMEDY,
            )
        # Arrow gives all messages of a column the same keys, with None where there is no value.
        given = {str(key): value for key, value in item.items() if value is not None}
        written = given.pop("role", given.pop("from", None))
        content = given.pop("content", given.pop("value", None))
        role = _ROLE_NAMES.get(written.strip().casefold()) if isinstance(written, str) else None
        if role is None:
            problem = "has no role" if written is None else f"has the role {written!r}"
            self.fail(f"message {place} {problem}", f"use one of {', '.join(ROLES)}")
        if written.strip().casefold() in _TOOL_CALL_ROLES:
            given["tool_calls"], content = self._calls_in(content, place), None
        if "function_call" in given:  # OpenAI's earlier form
            given["tool_calls"] = [given.pop("function_call")]
        calls = given.pop("tool_calls", None)
        message: dict[str, Any] = {"role": role}
        if content is not None:
            message["content"] = self._content(content, place)
        elif not (role == "assistant" and calls):
            self.fail(f"message {place} ({role}) has no content", _MESSAGES_REMEDY)
        if calls:
            message["tool_calls"] = self._calls(calls, place)
        return {**message, **given}

    def _content(self, content: Any, place: int) -> str:
        """Return a message's text; a list of text parts, as OpenAI writes it, is joined."""
        if isinstance(content, str):
            return content
        parts = as_list(content)
        if parts is None:
            self.fail(f"message {place} has {kind_of(content)} as content", "give text as content")
        texts: list[str] = []
        for part in parts:
            is_part = isinstance(part, Mapping)
            text = part.get("text") if is_part else None
            if not isinstance(text, str) or part.get("type", "text") != "text":
                kind = repr(part.get("type")) if is_part else kind_of(part)
                self.fail(
                    f"message {place} has a part that is not text ({kind})",
                    "leave such rows out: this task learns from text",
                )
            texts.append(text)
        return "".join(texts)

    def _calls_in(self, content: Any, place: int) -> list[Any]:
        """Return the calls in the text of ShareGPT's `function_call` message."""
        try:
            found = json.loads(content)
        except (TypeError, ValueError, RecursionError):
            self.fail(
                f"message {place} calls a tool, but its text is no JSON ({shown(content)})",
                'write {"name": ..., "arguments": {...}}',
            )
        return found if isinstance(found, list) else [found]

    def _calls(self, calls: Any, place: int) -> list[Any]:
        """Return tool calls with arguments as mappings, which is what chat templates expect."""
        found = []
        for call in as_list(calls) or [calls]:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                self.fail(
                    f"message {place} has a tool call without a name ({shown(call)})",
                    'write {"function": {"name": ..., "arguments": {...}}}',
                )
            arguments = function.get("arguments")
            if isinstance(arguments, str):  # OpenAI's form
                try:
                    arguments = json.loads(arguments or "{}")
                except (ValueError, RecursionError):
                    self.fail(
                        f"message {place} calls {function['name']!r} with arguments that are no"
                        f" JSON ({shown(arguments)})",
                        "write the arguments with json.dumps",
                    )
            else:
                arguments = without_none(arguments or {})
            rest = {key: value for key, value in call.items() if value is not None}
            for key in ("name", "arguments", "function"):
                rest.pop(key, None)
            found.append(
                {"type": "function", **rest, "function": {**function, "arguments": arguments}}
            )
        return found


def _are_messages(text: str) -> bool:
    """Return whether a text is a list of messages; other JSON may be what a model shall write."""
    if not _MESSAGES_AS_TEXT.match(text):
        return False
    items = list_in(text)
    return items is None or all(
        isinstance(item, Mapping)
        and not item.keys().isdisjoint(("role", "from"))
        and not item.keys().isdisjoint(("content", "value", "tool_calls"))
        for item in items
    )


def row_name(number: int, source: str) -> str:
    """Return how an error names a row."""
    return f"row {number} of {source}" if source else f"row {number}"


def as_list(value: Any) -> list[Any] | None:
    """Return a list as such; None if it is none. Columns of lists may be a struct of lists."""
    if isinstance(value, Mapping):
        columns = list(value.values())
        is_struct = all(isinstance(column, list) for column in columns) and columns
        if not is_struct or len({len(column) for column in columns}) > 1:
            return None
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(value, np.ndarray):
        return list(value)
    return list(value) if isinstance(value, list | tuple) else None


def without_none(value: Any) -> Any:
    """Drop what is None in mappings: Arrow adds the keys of other rows, with None."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple | np.ndarray):
        return [without_none(item) for item in value]
    return value


def kind_of(value: Any) -> str:
    """Return what a value is, in words."""
    if value is None:
        return "no value"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple | np.ndarray) else type(value).__name__


def shown(value: Any) -> str:
    """Return the beginning of a value."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
