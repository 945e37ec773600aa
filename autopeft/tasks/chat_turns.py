"""Renders conversations with the tokenizer's chat template and finds the turns to learn."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError

from autopeft.errors import DataError
from autopeft.tasks.cells import Message, row_name
from autopeft.tasks.conversations import Conversation

_MAX_MERGED = 3  # Tokens of a prompt's end that may merge with what follows.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer can render conversations."""
    return bool(getattr(tokenizer, "chat_template", None))


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the token with which the chat template ends a turn of the assistant, None if none.

    Generation stops at it; it need not be the end-of-text token.
    """
    if not has_chat_template(tokenizer):
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except _TEMPLATE_ERRORS:
        return None
    return closing_token(tokenizer, token_ids(tokenizer, [text])[0])


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of texts, without special tokens around them."""
    if not texts:
        return []
    coded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    ids: list[list[int]] = coded["input_ids"]
    return ids


def n_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens with which both rows begin."""
    if second[: len(first)] == first:
        return len(first)
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def closing_token(tokenizer: Any, ids: Sequence[int]) -> int | None:
    """Return the last token that is not spaces, if it is an added one, as end tokens are."""
    for token in reversed(ids):
        if tokenizer.decode([token]).strip():
            return int(token) if token in tokenizer.added_tokens_decoder else None
    return None


@dataclass(frozen=True)
class Rendered:
    """A conversation in the form that the chat template takes, its text and its tokens."""

    row: Conversation
    text: str
    ids: list[int]

    @property
    def left_out(self) -> set[str]:
        """Roles of messages whose text is not in the conversation's, and "tools" likewise."""
        contents = [(str(m["role"]), str(m.get("content", ""))) for m in self.row.messages]
        for tool in self.row.tools or ():
            contents.append(("tools", str(tool.get("function", tool).get("name", ""))))
        return {
            role
            for role, text in contents
            # Templates may strip a text, or write it as JSON.
            if text.strip() not in self.text and json.dumps(text)[1:-1] not in self.text
        }


@dataclass(frozen=True)
class Draft:
    """Tokens of a row before they are cut.

    Attributes:
        ids: Token ids.
        spans: Start and end of what is learned, in order.
        n_turns: Number of turns that were to be learned.
        n_unasked: Number of them that have nothing before them which the template could render.
        is_merged: Whether the end of a prompt merges with the start of its completion.
        differs: Whether the template renders the last answer in another way than it prompts for it.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    n_turns: int = 1
    n_unasked: int = 0
    is_merged: bool = False
    differs: bool = False


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        tokenizer: A tokenizer of transformers.
        column: Name of the column with the conversations, for errors.
        role: The setting that names it, for errors.
        source: File name, or hub id and split, for errors.
    """

    tokenizer: Any
    column: str
    role: str = "messages"
    source: str = ""
    _marked: dict[bool, bool] = field(default_factory=dict)

    def rendered(self, rows: Sequence[Conversation], numbers: Sequence[int]) -> list[Rendered]:
        """Return conversations as texts and tokens.

        Args:
            rows: Conversations.
            numbers: Number of each in its source, for errors.

        Raises:
            DataError: if there is no chat template, or it refuses a conversation.
        """
        if rows and not has_chat_template(self.tokenizer):
            raise DataError(
                self.role,
                self.column,
                f"{row_name(numbers[0], self.source)} is a conversation, but the tokenizer has no"
                " chat template",
                "use an instruction-tuned model, set the tokenizer's chat_template, or give prompt"
                " and completion as text",
            )
        found = [self._rendered(row, n) for row, n in zip(rows, numbers, strict=True)]
        ids = token_ids(self.tokenizer, [text for _, text in found])
        return [Rendered(*both, tokens) for both, tokens in zip(found, ids, strict=True)]

    def drafts(self, rendered: Sequence[Rendered]) -> list[Draft]:
        """Return which tokens of conversations are learned."""
        rows = [each.row for each in rendered]
        # A prompt with one answer needs no marks: whatever follows the prompt is learned.
        several = [i for i, row in enumerate(rows) if row.n_prompt != len(row.messages) - 1]
        found: dict[int, Draft] = {}
        for group in _same_options(rows, several):
            if self._is_marked(rows[group[0]].tools is not None):
                found.update(self._marked_drafts(rows, group))
        plain = [i for i in range(len(rows)) if i not in found]
        found.update(zip(plain, self._unmarked_drafts([rendered[i] for i in plain]), strict=True))
        return [found[i] for i in range(len(rows))]

    def n_tokens(self, row: Conversation) -> int | None:
        """Return the length of a conversation; None if the template refuses it."""
        text = self._beginning(row, len(row.messages))
        return None if text is None else len(token_ids(self.tokenizer, [text])[0])

    def _render(self, row: Conversation, stop: int | None = None, *, prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [dict(message) for message in row.messages[:stop]],
            tokenize=False,
            add_generation_prompt=prompt,
            **_options(row),
        )
        return text

    def _beginning(self, row: Conversation, stop: int, *, prompt: bool = False) -> str | None:
        """Return the text of the first messages; None if the template refuses them."""
        if stop == 0:
            return None
        try:
            return self._render(row, stop, prompt=prompt)
        except _TEMPLATE_ERRORS:
            return None

    def _rendered(self, row: Conversation, number: int) -> tuple[Conversation, str]:
        """Return a conversation in the form that the template takes, and its text."""
        try:
            return row, self._render(row)
        except _TEMPLATE_ERRORS as error:
            # Some templates, DeepSeek's for one, want a tool call's arguments as JSON text.
            written = replace(row, messages=tuple(map(_arguments_as_text, row.messages)))
            text = self._beginning(written, len(row.messages)) if written != row else None
            if text is not None:
                return written, text
            reason = " ".join(str(error).split())[:200]
            if isinstance(error, TemplateSyntaxError):
                raise DataError(
                    self.role,
                    self.column,
                    f"the tokenizer's chat template cannot be read ({reason})",
                    "correct the tokenizer's chat_template, or take that of the original model",
                ) from error
            raise DataError(
                self.role,
                self.column,
                f"{row_name(number, self.source)} is refused by the tokenizer's chat template"
                f" ({reason})",
                "change the roles or their order in that row, or use a model whose template takes"
                " them",
            ) from error

    # Templates that mark what the assistant generates

    def _is_marked(self, has_tools: bool) -> bool:
        """Return whether the template marks the assistant's turns, each with its end token."""
        if has_tools not in self._marked:
            template = self.tokenizer.get_chat_template(tools=[] if has_tools else None)
            self._marked[has_tools] = (
                _GENERATION.search(template) is not None
                and bool(getattr(self.tokenizer, "is_fast", False))
                and self._marks_the_end(template)
            )
        return self._marked[has_tools]

    def _marks_the_end(self, template: str) -> bool:
        """Return whether the marks include the end token of an answer.

        A turn follows the answer, because some templates put the end token before the next turn.
        """
        turns = ("user", "assistant", "user")
        messages = [{"role": role, "content": "a"} for role in turns]
        try:
            coded = self._with_marks([messages], {"chat_template": template})
        except _TEMPLATE_ERRORS:
            return False
        ids, mask = coded["input_ids"][0], coded["assistant_masks"][0]
        learned = [token for token, is_learned in zip(ids, mask, strict=True) if is_learned]
        return closing_token(self.tokenizer, learned) is not None

    def _with_marks(self, messages: Sequence[Sequence[Message]], options: dict[str, Any]) -> Any:
        return self.tokenizer.apply_chat_template(
            [[dict(message) for message in each] for each in messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **options,
        )

    def _marked_drafts(
        self, rows: Sequence[Conversation], group: Sequence[int]
    ) -> dict[int, Draft]:
        """Return the rows at `group` whose learned turns the marks tell."""
        chosen = [rows[i] for i in group]
        coded = self._with_marks([row.messages for row in chosen], _options(chosen[0]))
        fronts = [self._beginning(row, row.n_prompt or 0, prompt=True) or "" for row in chosen]
        prompts = token_ids(self.tokenizer, fronts)
        found = {}
        for index, row, ids, mask, prompt in zip(
            group, chosen, coded["input_ids"], coded["assistant_masks"], prompts, strict=True
        ):
            spans, learned = _runs(mask), row.learned
            turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
            if len(spans) == len(turns):
                spans = [span for span, i in zip(spans, turns, strict=True) if i in learned]
            elif learned != tuple(turns):
                continue  # Which mark belongs to which turn is unknown.
            start = n_common(prompt, ids)
            spans = [(max(begin, start), end) for begin, end in spans if end > start]
            if spans:
                found[index] = Draft(ids, spans, n_turns=len(spans))
        return found

    # All other templates

    def _unmarked_drafts(self, rendered: Sequence[Rendered]) -> list[Draft]:
        """Return rows whose turns are found by rendering the conversation up to each of them."""
        turns = [self._turns(each) for each in rendered]
        pieces = [_pieces(each.text, parts) for each, parts in zip(rendered, turns, strict=True)]
        ids = self._ids({piece for row in pieces for piece in row})
        found: dict[int, Draft] = {}
        for place, (each, row) in enumerate(zip(rendered, pieces, strict=True)):
            if row and list(chain.from_iterable(ids[piece] for piece in row)) == each.ids:
                ends = np.cumsum([len(ids[piece]) for piece in row[:-1]]).tolist()
                spans = list(zip(ends[::2], ends[1::2], strict=True))
                found[place] = Draft(each.ids, spans, len(spans))
        # What is left: turns that the template changes, or whose tokens merge with their header.
        left = [place for place in range(len(rendered)) if place not in found]
        texts = {text for place in left for turn in turns[place] for text in turn if text}
        ids = self._ids(texts) | {rendered[place].text: rendered[place].ids for place in left}
        added = frozenset(self.tokenizer.added_tokens_decoder) if left else frozenset()
        for place in left:
            found[place] = _draft(rendered[place].text, turns[place], ids, added)
        return [found[place] for place in range(len(rendered))]

    def _turns(self, each: Rendered) -> list[tuple[str | None, str | None]]:
        """Return the text up to each turn to learn, with its header, and the text with it."""
        end, last = self.tokenizer.eos_token, len(each.row.messages) - 1
        found = []
        for turn in each.row.learned:
            before = self._beginning(each.row, turn, prompt=True)
            after = each.text if turn == last else self._beginning(each.row, turn + 1)
            if after is not None and end and not each.text.startswith(after):
                # Some templates, Phi's for one, end a conversation with a token of its own.
                bare = after.removesuffix(end)
                after = bare if each.text.startswith(bare) else after
            found.append((before, after))
        return found

    def _ids(self, texts: Iterable[str]) -> dict[str, list[int]]:
        order = sorted(texts)
        return dict(zip(order, token_ids(self.tokenizer, order), strict=True))


def _pieces(text: str, turns: Sequence[tuple[str | None, str | None]]) -> list[str]:
    """Return a text in pieces: before a turn, the turn, and so on; empty if it is not made so.

    Tokenizing pieces costs less than tokenizing the text up to each turn. Where the tokens of the
    pieces are those of the text, each piece ends where a token ends.
    """
    found, place = [], 0
    for end in chain.from_iterable(turns):
        if end is None or len(end) < place or not text.startswith(end):
            return []
        found.append(text[place : len(end)])
        place = len(end)
    return [*found, text[place:]] if found else []


def _draft(
    text: str,
    turns: Sequence[tuple[str | None, str | None]],
    ids: Mapping[str, list[int]],
    added: Container[int],
) -> Draft:
    """Return the tokens of a conversation and the spans of its turns.

    Args:
        text: The conversation.
        turns: For each turn to learn, the text up to it, with its header, and the text with it;
            None if the template refuses that.
        ids: The tokens of all these texts.
        added: Tokens that the tokenizer adds to its vocabulary, such as end tokens.
    """
    asked = [(before, after) for before, after in turns if before is not None]
    n_unasked = len(turns) - len(asked)
    if not asked:
        return Draft(ids[text], [], len(turns), n_unasked)
    end_of_last = asked[-1][1]
    if end_of_last is not None and _boundary(end_of_last, text, ids, added) is None:
        text = end_of_last  # What follows changes the last turn, and is not learned anyway.
    spans = []
    is_merged = differs = False
    for number, (before, after) in enumerate(asked, start=1):
        start = _boundary(before, text, ids)
        stop = None if after is None else _boundary(after, text, ids, added)
        if start is not None:
            is_merged |= start < len(ids[before])
        elif number == len(asked):
            start, differs = n_common(ids[before], ids[text]), True
        if start is not None and stop is not None and start < stop:
            spans.append((start, stop))
    return Draft(ids[text], spans, len(turns), n_unasked, is_merged, differs)


def _boundary(
    beginning: str, text: str, ids: Mapping[str, list[int]], ends: Container[int] = ()
) -> int | None:
    """Return how many tokens of a text its beginning has; None if it is not its beginning.

    Not counted are last tokens of the beginning that merge with what follows them, and tokens of
    `ends`, which some templates put behind a conversation only.
    """
    n_tokens = n_common(ids[beginning], ids[text])
    rest = ids[beginning][n_tokens:]
    is_beginning = text.startswith(beginning) or all(token in ends for token in rest)
    return n_tokens if is_beginning and len(rest) <= _MAX_MERGED else None


def _same_options(rows: Sequence[Conversation], places: Iterable[int]) -> Iterable[Sequence[int]]:
    """Group rows that are rendered with the same tools and options."""
    groups: dict[str, list[int]] = {}
    for place in places:
        groups.setdefault(json.dumps(_options(rows[place]), default=str), []).append(place)
    return groups.values()


def _options(row: Conversation) -> dict[str, Any]:
    tools = None if row.tools is None else [dict(tool) for tool in row.tools]
    return {"tools": tools, **(row.template_options or {})}


def _runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and end of each run of ones."""
    edges = np.flatnonzero(np.diff(np.asarray([0, *mask, 0])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _arguments_as_text(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
        for c in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
