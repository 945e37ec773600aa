"""What a row of text data means: a conversation, a prompt with its completion, or plain text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.tasks.cells import Cell, Message, kind_of, shown, without_none

SEPARATOR = "\n\n"
"""Between an instruction, its input and its output where the tokenizer has no chat template."""


@dataclass(frozen=True)
class Conversation:
    """Messages in turns.

    Attributes:
        messages: Each has a `role` out of `ROLES`, and `content` (text) unless it calls tools;
            whatever else a chat template reads (`tool_calls`, `name`, `reasoning_content`) is
            there as given. An assistant's message with `weight` 0 is not learned.
        n_prompt: Number of messages that are the prompt, of which nothing is learned; None: every
            assistant's message is learned.
        tools: JSON schemas of the tools that the assistant may call; None: no tools.
        template_options: Arguments for the chat template, e.g. `enable_thinking`.
    """

    messages: tuple[Message, ...]
    n_prompt: int | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_options: Mapping[str, Any] | None = None

    @property
    def learned(self) -> tuple[int, ...]:
        """Positions of the messages to learn."""
        return tuple(
            index
            for index, message in enumerate(self.messages)
            if index >= (self.n_prompt or 0)
            and message["role"] == "assistant"
            and message.get("weight", 1) != 0
        )


@dataclass(frozen=True)
class PromptCompletion:
    """A text to continue, which may be empty, and the text to learn."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class PlainText:
    """A text that is learned as a whole."""

    text: str


Row = Conversation | PromptCompletion | PlainText


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the better one first. Both rows have the same prompt."""

    chosen: Conversation | PromptCompletion
    rejected: Conversation | PromptCompletion


@dataclass(frozen=True)
class Unusable:
    """A row from which nothing can be learned.

    Attributes:
        reason: Why, e.g. "no completion"; rows are counted by it.
    """

    reason: str


@dataclass(frozen=True)
class Layout:
    """Columns in which text data usually comes.

    Attributes:
        name: What users call it.
        columns: Role of a column -> the name by which it is recognized.
        optional: Columns that may be missing, likewise.
    """

    name: str
    columns: Mapping[str, str]
    optional: Mapping[str, str]


_AROUND_MESSAGES = {
    "system": "system",
    "tools": "tools",
    "template_options": "chat_template_kwargs",
}

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "preference",
        {"chosen": "chosen", "rejected": "rejected"},
        {"prompt": "prompt", "tools": "tools", "template_options": "chat_template_kwargs"},
    ),
    Layout("messages", {"messages": "messages"}, _AROUND_MESSAGES),
    Layout("ShareGPT conversations", {"messages": "conversations"}, _AROUND_MESSAGES),
    Layout(
        "prompt and completion",
        {"prompt": "prompt", "completion": "completion"},
        {"tools": "tools", "template_options": "chat_template_kwargs"},
    ),
    Layout(
        "question and answer",
        {"instruction": "question", "output": "answer"},
        {"input": "context", "system": "system"},
    ),
    Layout(
        "Alpaca instructions",
        {"instruction": "instruction", "output": "output"},
        {"input": "input", "system": "system"},
    ),
    Layout(
        "instruction and response",
        {"instruction": "instruction", "output": "response"},
        {"input": "context", "system": "system"},
    ),
    Layout("plain text", {"text": "text"}, {}),
)
"""The known layouts; where several fit, the first one is meant."""


def recognize(column_names: Sequence[str]) -> tuple[Layout, dict[str, str]] | None:
    """Return the layout of a table, and which of its columns has which role; None if unknown.

    Letter case does not count.

    Example:
        >>> layout, columns = recognize(["Instruction", "input", "output"])
        >>> layout.name
        'Alpaca instructions'
        >>> columns
        {'instruction': 'Instruction', 'output': 'output', 'input': 'input'}
    """
    present = {name.casefold(): name for name in reversed(column_names)}
    for layout in LAYOUTS:
        if all(name in present for name in layout.columns.values()):
            wanted = {**layout.columns, **layout.optional}
            return layout, {role: present[name] for role, name in wanted.items() if name in present}
    return None


def read_row(
    values: Mapping[str, Any],
    number: int,
    columns: Mapping[str, str] | None = None,
    *,
    has_template: bool = True,
    source: str = "",
) -> Row | Unusable:
    """Return what a row means, or why nothing can be learned from it.

    Args:
        values: Role -> value. The roles are those of a layout: `messages`; `prompt` and
            `completion` (both text, or both messages); `instruction`, `input` and `output`;
            `text`; and `system`, `tools`, `template_options` beside messages or an instruction.
        number: Number of the row in its source, from 1; errors name it.
        columns: Role -> name of the column, for errors; None: the roles.
        has_template: Whether the tokenizer has a chat template. An instruction becomes a
            conversation if so, else a text with `SEPARATOR` between its parts.
        source: File name, or hub id and split, for errors.

    Raises:
        DataError: if a value is of the wrong kind; it names column, row and remedy.

    Example:
        >>> read_row({"prompt": "The sky is", "completion": " blue."}, 1)
        PromptCompletion(prompt='The sky is', completion=' blue.')
        >>> read_row({"prompt": "The sky is", "completion": None}, 2)
        Unusable(reason='no completion')
    """
    cells = _cells(values, number, columns, source)
    if "messages" in cells:
        cell = cells["messages"]
        return Unusable("no messages") if cell.is_missing else _talk(cells, cell.messages(), None)
    if "completion" in cells:
        return _completion_row(cells)
    if "output" in cells:
        return _instruction_row(cells, has_template)
    if "text" in cells:
        text = cells["text"].text()
        return PlainText(text) if text.strip() else Unusable("no text")
    raise ValueError(f"no layout has the roles {sorted(values)}")


def read_preference(
    values: Mapping[str, Any],
    number: int,
    columns: Mapping[str, str] | None = None,
    *,
    source: str = "",
) -> Preference | Unusable:
    """Return the two answers of a row, or why nothing can be learned from it.

    The prompt is a column of its own, or what both answers begin with: for texts their longest
    common beginning, for messages the common ones (as TRL's `extract_prompt` finds it).

    Args:
        values: The roles `chosen`, `rejected` and, unless it is in both answers, `prompt`; each
            text or messages. `system`, `tools` and `template_options` may stand beside messages.
        number: Number of the row in its source, from 1; errors name it.
        columns: Role -> name of the column, for errors; None: the roles.
        source: File name, or hub id and split, for errors.

    Raises:
        DataError: if a value is of the wrong kind; it names column, row and remedy.

    Example:
        >>> read_preference({"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"}, 1).rejected
        PromptCompletion(prompt='1 + 1 = ', completion='3')
    """
    cells = _cells(values, number, columns, source)
    chosen, rejected = cells["chosen"], cells["rejected"]
    for cell in (chosen, rejected):
        if cell.is_missing:
            return Unusable(f"no {cell.role}")
    if chosen.has_messages != rejected.has_messages:
        rejected.fail(
            f"holds {kind_of(rejected.value)}, but {chosen.column!r} {kind_of(chosen.value)}",
            "give text in both, or messages in both",
        )
    if chosen.has_messages:
        return _preferred_messages(cells)
    _check_alone(cells)
    better, worse = chosen.text(), rejected.text()
    if better == worse:
        return Unusable("chosen and rejected are equal")
    if "prompt" in cells:
        prompt = cells["prompt"].text()
    else:
        n_common = _n_common(better, worse)
        if n_common and better[n_common - 1] == " ":
            n_common -= 1  # A space belongs to the word that follows it.
        prompt, better, worse = better[:n_common], better[n_common:], worse[n_common:]
        if not (better.strip() and worse.strip()):
            return Unusable("one answer is the beginning of the other")
    return Preference(PromptCompletion(prompt, better), PromptCompletion(prompt, worse))


@dataclass(frozen=True)
class Meanings:
    """What the rows of a table mean.

    Attributes:
        rows: The usable rows: `Row` or `Preference`.
        source_rows: Index of each in the table, from 0, shape (n_rows,).
        dropped: Why rows were left out -> how many.
    """

    rows: tuple[Any, ...]
    source_rows: NDArray[np.int64]
    dropped: Mapping[str, int]


def read_rows(
    values: Mapping[str, Sequence[Any]],
    columns: Mapping[str, str] | None = None,
    *,
    has_template: bool = True,
    source: str = "",
) -> Meanings:
    """Return what the rows of a table mean; see `read_row` and `read_preference`.

    Args:
        values: Role -> one value a row.
        columns: Role -> name of the column, for errors; None: the roles.
        has_template: Whether the tokenizer has a chat template.
        source: File name, or hub id and split, for errors.

    Raises:
        DataError: if a value is of the wrong kind; it names column, row and remedy.
    """
    rows: list[Any] = []
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for index, row in enumerate(_by_row(values)):
        meaning: Row | Preference | Unusable
        if "chosen" in values:
            meaning = read_preference(row, index + 1, columns, source=source)
        else:
            meaning = read_row(row, index + 1, columns, has_template=has_template, source=source)
        if isinstance(meaning, Unusable):
            dropped[meaning.reason] += 1
        else:
            rows.append(meaning)
            kept.append(index)
    return Meanings(tuple(rows), np.asarray(kept, dtype=np.int64), dict(dropped))


def row_key(row: Row | Preference) -> str:
    """Return the identity of a row: all that it holds; letter case and spacing do not count."""
    if isinstance(row, Preference):
        return f"{row_key(row.chosen)} | {row_key(row.rejected)}"
    if isinstance(row, Conversation):
        whole = [row.messages, row.tools, row.template_options]
        return _folded(json.dumps(whole, ensure_ascii=False, default=str))
    if isinstance(row, PromptCompletion):
        return json.dumps([_folded(row.prompt), _folded(row.completion)], ensure_ascii=False)
    return _folded(row.text)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _by_row(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for row in zip(*values.values(), strict=True):
        yield dict(zip(values, row, strict=True))


def _cells(
    values: Mapping[str, Any], number: int, columns: Mapping[str, str] | None, source: str
) -> dict[str, Cell]:
    names = columns or {}
    return {
        role: Cell(role, names.get(role, role), number, value, source)
        for role, value in values.items()
    }


def _talk(
    cells: Mapping[str, Cell], messages: tuple[Message, ...], n_prompt: int | None
) -> Conversation | Unusable:
    """Return a conversation with the system prompt and the tools that stand beside it."""
    system = cells["system"].text() if "system" in cells else ""
    if system.strip():
        if any(message["role"] in ("system", "developer") for message in messages):
            cells["system"].fail(
                "has a system prompt, and so have its messages", "keep one of the two"
            )
        messages = ({"role": "system", "content": system}, *messages)
        n_prompt = None if n_prompt is None else n_prompt + 1
    conversation = Conversation(messages, n_prompt, _tools(cells), _template_options(cells))
    if not conversation.learned:
        return Unusable("no message of the assistant")
    if any(_is_empty(messages[place]) for place in conversation.learned):
        return Unusable("an empty message of the assistant")
    return conversation


def _is_empty(message: Message) -> bool:
    return not any(
        value.strip() if isinstance(value, str) else value
        for key, value in message.items()
        if key not in ("role", "weight", "name")
    )


def _tools(cells: Mapping[str, Cell]) -> tuple[Mapping[str, Any], ...] | None:
    cell = cells.get("tools")
    if cell is None or cell.is_missing:
        return None
    is_text = isinstance(cell.value, str)  # Only Arrow adds keys with None.
    remedy = 'write a list such as [{"type": "function", "function": {"name": ...}}]'
    tools = cell.items("a list of tools", remedy)
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            cell.fail(f"holds {kind_of(tool)} that is no tool ({shown(tool)})", remedy)
    # Some templates announce tools even if the list is empty.
    return tuple(tool if is_text else without_none(tool) for tool in tools) or None


def _template_options(cells: Mapping[str, Cell]) -> Mapping[str, Any] | None:
    cell = cells.get("template_options")
    if cell is None or cell.is_missing:
        return None
    value = cell.value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = cell.value
    if not isinstance(value, Mapping):
        cell.fail(
            f"holds {kind_of(value)} where arguments of the chat template are meant",
            'write them by name, such as {"enable_thinking": false}',
        )
    options: Mapping[str, Any] = without_none(value)
    return options or None


def _completion_row(cells: Mapping[str, Cell]) -> Row | Unusable:
    prompt, completion = cells["prompt"], cells["completion"]
    if completion.is_missing:
        return Unusable("no completion")
    if prompt.has_messages != completion.has_messages and not prompt.is_missing:
        completion.fail(
            f"holds {kind_of(completion.value)}, but {prompt.column!r} {kind_of(prompt.value)}",
            "give text in both, or messages in both",
        )
    if not completion.has_messages:
        _check_alone(cells)
        return PromptCompletion(prompt.text(), completion.text())
    asked = () if prompt.is_missing else prompt.messages()
    return _talk(cells, (*asked, *completion.messages()), len(asked))


def _check_alone(cells: Mapping[str, Cell]) -> None:
    """Refuse what only a chat template can put into a prompt."""
    for role in ("system", "tools", "template_options"):
        if role in cells and not cells[role].is_missing:
            cells[role].fail(
                "has a value, but its prompt is text", "give the prompt as messages, or drop it"
            )


def _instruction_row(cells: Mapping[str, Cell], has_template: bool) -> Row | Unusable:
    instruction, output = cells["instruction"].text(), cells["output"].text()
    more = cells["input"].text() if "input" in cells else ""
    system = cells["system"].text() if "system" in cells else ""
    if not output.strip():
        return Unusable("no completion")
    asked = SEPARATOR.join(part for part in (instruction, more) if part.strip())
    if not asked:
        return Unusable("no instruction")
    if has_template:
        turn = ({"role": "user", "content": asked}, {"role": "assistant", "content": output})
        return _talk(cells, turn, 1)
    parts = (system, asked, "") if system.strip() else (asked, "")
    return PromptCompletion(SEPARATOR.join(parts), output)


def _preferred_messages(cells: Mapping[str, Cell]) -> Preference | Unusable:
    better, worse = cells["chosen"].messages(), cells["rejected"].messages()
    if better == worse:
        return Unusable("chosen and rejected are equal")
    prompt = cells.get("prompt")
    asked: tuple[Message, ...] = ()
    if prompt is not None and prompt.has_messages:
        asked = prompt.messages()
        n_prompt = len(asked)
        if better[:n_prompt] == asked:
            better = better[n_prompt:]
        if worse[:n_prompt] == asked:
            worse = worse[n_prompt:]
    else:
        n_prompt = _n_common(better, worse)
        text = "" if prompt is None else prompt.text()
        if text.strip() and all(message["role"] != "user" for message in better[:n_prompt]):
            asked = ({"role": "user", "content": text},)
            n_prompt += 1
    rows = []
    for answer in (better, worse):
        row = _talk(cells, (*asked, *answer), n_prompt)
        if isinstance(row, Unusable):
            return row
        rows.append(row)
    return Preference(*rows)


def _n_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the number of equal items that two sequences begin with."""
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def without_messages(conversation: Conversation, start: int, stop: int) -> Conversation:
    """Return a conversation without the messages `start` to `stop - 1`."""
    n_prompt = conversation.n_prompt
    if n_prompt is not None:
        n_prompt -= max(0, min(stop, n_prompt) - start)
    messages = conversation.messages[:start] + conversation.messages[stop:]
    return replace(conversation, messages=messages, n_prompt=n_prompt)
