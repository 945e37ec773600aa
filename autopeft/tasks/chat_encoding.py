"""Turns conversations, prompts and texts into token ids and labels."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autopeft.tasks.chat_turns import (
    ChatTemplate,
    Draft,
    closing_token,
    end_of_turn,
    n_common,
    token_ids,
)
from autopeft.tasks.conversations import (
    Conversation,
    PlainText,
    Preference,
    PromptCompletion,
    Row,
    without_messages,
)
from autopeft.tasks.data import IGNORED
from autopeft.tasks.encoding import TOO_LONG

OnLong = Literal["cut", "drop"]

NOTHING_LEFT = "no token of the completion within max_length"
NO_TOKEN = "the completion adds no token to the prompt"
ONE_TOKEN = "all of it is one token, and nothing comes before the first token of a row"
NO_TURN = "no assistant turn that follows a prompt"

_CHUNK = 1000  # Rows that are tokenized at once: enough to be fast, few enough for the memory.
_MAX_PASSES = 4  # A text cut by n tokens may lose n - 1 of them: tokens at the cut merge anew.


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row as tokens.

    Attributes:
        ids: Token ids, shape (t,), int32.
        labels: The same where a token is learned, else -100; shape (t,), int32. They are not
            shifted.
        prompt_length: Number of tokens before the last turn that is learned: what a model gets
            to generate that turn.
        n_cut: Number of tokens that were cut.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    prompt_length: int
    n_cut: int = 0


@dataclass(frozen=True)
class EncodedRows:
    """Rows as tokens, and what became of the others.

    Attributes:
        rows: The rows that are left.
        kept: Position of each among the rows given, shape (n_rows,), int64.
        dropped: Why rows were dropped -> how many.
        notes: What a user should know of, a line each.
    """

    rows: tuple[Encoded, ...]
    kept: NDArray[np.int64]
    dropped: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def n_cut(self) -> int:
        """Number of rows that were cut."""
        return sum(row.n_cut > 0 for row in self.rows)


def encode_conversation(
    tokenizer: Any, conversation: Conversation, max_length: int, on_long: OnLong = "cut"
) -> Encoded | None:
    """Return one conversation as tokens; None if nothing is left to learn. See `encode_rows`."""
    found = encode_rows(tokenizer, [conversation], max_length, on_long=on_long).rows
    return found[0] if found else None


def encode_rows(
    tokenizer: Any,
    rows: Sequence[Row],
    max_length: int,
    *,
    on_long: OnLong = "cut",
    numbers: Sequence[int] | None = None,
    column: str = "messages",
    role: str = "messages",
    source: str = "",
) -> EncodedRows:
    """Return rows as tokens.

    A conversation is rendered by the tokenizer's chat template. The assistant's turns are learned,
    with the token that ends them, as the template's `{% generation %}` marks them, else as what a
    turn adds to the conversation before it and the header of the turn. Where a template renders
    earlier turns in another way than last ones, these are not learned, and a note says so.

    A prompt with its completion is tokenized as one text: behind a begin-of-text token if the
    tokenizer adds one, before one end-of-text token. A text that a template has already rendered
    gets neither a second time.

    A row longer than `max_length` is dropped, or cut: a conversation loses its oldest exchanges,
    then the beginning of what is left before its last answer, but never its system prompt; a
    prompt loses its beginning; a completion its end, if that is still too long.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: Conversations, prompts with completions, or texts.
        max_length: Longest row, in tokens.
        on_long: What becomes of longer rows.
        numbers: Number of each row in its source, for errors; None: their order, from 1.
        column: Name of the column, for errors.
        role: The setting that names it, for errors.
        source: File name, or hub id and split, for errors.

    Raises:
        DataError: if the tokenizer has no chat template, or its template refuses a conversation.
    """
    encoder = _Encoder(tokenizer, max_length, on_long, column, role, source)
    order = numbers if numbers is not None else range(1, len(rows) + 1)
    found: list[Encoded | None] = []
    for start in range(0, len(rows), _CHUNK):
        stop = start + _CHUNK
        found += encoder.encode(rows[start:stop], order[start:stop])
    kept = [index for index, row in enumerate(found) if row is not None]
    return EncodedRows(
        tuple(row for row in found if row is not None),
        np.asarray(kept, dtype=np.int64),
        dict(encoder.dropped),
        encoder.notes(),
    )


def encode_preferences(
    tokenizer: Any,
    pairs: Sequence[Preference],
    max_length: int,
    *,
    on_long: OnLong = "cut",
    numbers: Sequence[int] | None = None,
    column: str = "chosen",
    role: str = "chosen",
    source: str = "",
) -> EncodedRows:
    """Return pairs of answers as tokens: rows 2 i and 2 i + 1 are those of pair `kept[i]`.

    A pair is dropped with either of its answers, and counted once for each answer that is dropped.
    Arguments and errors are those of `encode_rows`.
    """
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    order = numbers if numbers is not None else range(1, len(pairs) + 1)
    doubled = [number for number in order for _ in range(2)]
    found = encode_rows(
        tokenizer,
        answers,
        max_length,
        on_long=on_long,
        numbers=doubled,
        column=column,
        role=role,
        source=source,
    )
    by_place = dict(zip(found.kept.tolist(), found.rows, strict=True))
    kept = [i for i in range(len(pairs)) if 2 * i in by_place and 2 * i + 1 in by_place]
    rows: list[Encoded] = []
    for pair in kept:
        rows += _same_start(by_place[2 * pair], by_place[2 * pair + 1])
    return EncodedRows(tuple(rows), np.asarray(kept, dtype=np.int64), found.dropped, found.notes)


def _same_start(chosen: Encoded, rejected: Encoded) -> tuple[Encoded, Encoded]:
    """Let both answers begin at the earlier start; a prompt's end may merge with one of them."""
    start = min(chosen.prompt_length, rejected.prompt_length)
    if chosen.n_cut or rejected.n_cut or chosen.prompt_length == rejected.prompt_length:
        return chosen, rejected
    return _learned_from(chosen, start), _learned_from(rejected, start)


def _learned_from(row: Encoded, start: int) -> Encoded:
    labels = row.labels.copy()
    labels[start : row.prompt_length] = row.ids[start : row.prompt_length]
    return replace(row, labels=labels, prompt_length=start)


@dataclass
class _Encoder:
    """Encodes chunks of rows and counts what it had to do."""

    tokenizer: Any
    limit: int
    on_long: OnLong
    column: str
    role: str
    source: str
    dropped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    left_out: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.template = ChatTemplate(self.tokenizer, self.column, self.role, self.source)
        self.start = _start_ids(self.tokenizer)
        eos = self.tokenizer.eos_token_id
        self.bos = self.tokenizer.bos_token_id
        self.end = [] if eos is None else [int(eos)]
        ends = {*self.end, end_of_turn(self.tokenizer)} - {None}
        self.ends = tuple(str(self.tokenizer.convert_ids_to_tokens(token)) for token in ends)

    def encode(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[Encoded | None]:
        """Return the rows as tokens; None for those that are dropped."""
        found: list[Encoded | None] = [None] * len(rows)
        talks: dict[int, Conversation] = {}
        texts: dict[int, PromptCompletion | PlainText] = {}
        for place, row in enumerate(rows):
            if isinstance(row, Conversation):
                talks[place] = row
            else:
                texts[place] = row
        for place, text in zip(texts, self._texts(list(texts.values())), strict=True):
            found[place] = text
        encoded = self._conversations(list(talks.values()), [numbers[place] for place in talks])
        for place, talk in zip(talks, encoded, strict=True):
            found[place] = talk
        return found

    def notes(self) -> tuple[str, ...]:
        """Return what a user should know of, a line each."""
        counts, n_rows = self.counts, self.counts["conversations"]
        found = []
        if counts["turns left out"]:
            found.append(
                f"{counts['turns left out']} of {counts['turns']} assistant turns, in"
                f" {counts['rows left out']} of {n_rows} conversations, add no loss: the chat"
                " template renders them in another way once more turns follow"
            )
        if counts["turns unasked"]:
            found.append(
                f"{counts['turns unasked']} of {counts['turns']} assistant turns add no loss: they"
                " begin their conversation"
            )
        if counts["differ"]:
            found.append(
                f"in {counts['differ']} of {n_rows} conversations the chat template renders the"
                " last answer in another way than it prompts for it; it is learned from where the"
                " two differ"
            )
        if counts["rows changed"]:
            found.append(
                f"in {counts['rows changed']} of {n_rows} conversations the chat template leaves"
                f" out, or changes, what these say: {', '.join(sorted(self.left_out))}"
            )
        if counts["merged"]:
            found.append(
                f"in {counts['merged']} rows the end of the prompt merges with the start of the"
                " completion into one token, which is learned as part of the completion"
            )
        if counts["no end"]:
            found.append(
                "the chat template ends an assistant turn without an end token, so a model does"
                " not learn to stop there"
            )
        return tuple(found)

    def _texts(self, rows: Sequence[PromptCompletion | PlainText]) -> list[Encoded | None]:
        prompts = [row.prompt if isinstance(row, PromptCompletion) else "" for row in rows]
        texts = [
            row.prompt + row.completion if isinstance(row, PromptCompletion) else row.text
            for row in rows
        ]
        tokens = token_ids(self.tokenizer, texts)
        fronts = token_ids(self.tokenizer, prompts)
        found: list[Encoded | None] = []
        for row, text, ids, front in zip(rows, texts, tokens, fronts, strict=True):
            n_front = n_common(front, ids)
            # A rendered chat brings the tokens that stand around a text.
            has_start = bool(self.start) and ids[:1] in (self.start[:1], [self.bos])
            start = [] if has_start else self.start
            end = [] if text.rstrip().endswith(self.ends) else self.end
            ids = [*start, *ids, *end]
            n_prompt, full_length = len(start) + n_front, len(ids)
            n_kept = min(n_prompt, len(self.start))
            if self.on_long == "cut":
                excess = max(0, min(full_length - self.limit, n_prompt - n_kept))
                ids = ids[:n_kept] + ids[n_kept + excess :]
                n_prompt -= excess
            begin = n_prompt if isinstance(row, PromptCompletion) else 0
            draft = Draft(ids, [(begin, len(ids))], is_merged=n_front < len(front))
            found.append(self._finished(draft, full_length))
        return found

    def _conversations(
        self, rows: Sequence[Conversation], numbers: Sequence[int]
    ) -> list[Encoded | None]:
        found: list[Encoded | None] = [None] * len(rows)
        current, waiting = list(rows), list(range(len(rows)))
        lengths: dict[int, int] = {}  # Of rows that are cut, before that.
        for n_passes_left in reversed(range(_MAX_PASSES)):
            rendered = self.template.rendered(
                [current[i] for i in waiting], [numbers[i] for i in waiting]
            )
            shorter: dict[int, Conversation] = {}
            ready = []
            for index, each in zip(waiting, rendered, strict=True):
                n_tokens = len(each.ids)
                less = self._shortened(current[index], n_tokens) if n_passes_left else None
                if less is None:
                    ready.append((index, each))
                else:
                    shorter[index] = less
                    lengths.setdefault(index, n_tokens)
            drafts = self.template.drafts([each for _, each in ready])
            for (index, each), draft in zip(ready, drafts, strict=True):
                n_tokens, less = len(draft.ids), None
                if n_passes_left and n_tokens != len(each.ids):
                    less = self._shortened(current[index], n_tokens)
                if less is None:
                    self._count(draft, each.left_out)
                    found[index] = self._finished(draft, lengths.get(index, n_tokens))
                else:
                    shorter[index] = less
                    lengths.setdefault(index, n_tokens)
            for index, less in shorter.items():
                current[index] = less
            waiting = sorted(shorter)
        return found

    def _shortened(self, row: Conversation, n_tokens: int) -> Conversation | None:
        """Return a shorter conversation; None if it is to stay as it is."""
        if n_tokens <= self.limit or self.on_long == "drop":
            return None
        return shortened(self.template, row, n_tokens, self.limit)

    def _count(self, draft: Draft, left_out: set[str]) -> None:
        counts = self.counts
        counts["rows changed"] += bool(left_out)
        self.left_out |= left_out
        n_left_out = draft.n_turns - draft.n_unasked - len(draft.spans)
        if not counts["conversations"] and draft.spans:
            start, stop = draft.spans[-1]
            counts["no end"] += closing_token(self.tokenizer, draft.ids[start:stop]) is None
        counts["conversations"] += 1
        counts["turns"] += draft.n_turns
        counts["turns unasked"] += draft.n_unasked
        counts["turns left out"] += n_left_out
        counts["rows left out"] += n_left_out > 0
        counts["differ"] += draft.differs

    def _finished(self, draft: Draft, full_length: int) -> Encoded | None:
        """Return a row as it is used; None, and count it, if it is dropped."""
        row = None
        if self.on_long == "drop" and full_length > self.limit:
            self.dropped[TOO_LONG] += 1
        elif not draft.spans:
            self.dropped[NO_TURN] += 1
        else:
            row = _encoded(draft, self.limit, full_length)
            if row is None:
                self.dropped[_why_nothing(draft, self.limit)] += 1
            else:
                self.counts["merged"] += draft.is_merged
        return row


def _why_nothing(draft: Draft, limit: int) -> str:
    """Return why no token of a row can be learned."""
    if len(draft.ids) > limit:
        return NOTHING_LEFT
    return ONE_TOKEN if draft.spans[0][0] < len(draft.ids) else NO_TOKEN


def _encoded(draft: Draft, limit: int, full_length: int) -> Encoded | None:
    """Return a row, its end cut off beyond `limit`; None if nothing is left to learn."""
    ids = np.asarray(draft.ids[:limit], dtype=np.int32)
    labels = np.full_like(ids, IGNORED)
    prompt_length = 0
    for start, stop in draft.spans:
        labels[start:stop] = ids[start:stop]
        if start < limit:
            prompt_length = start
    # Nothing comes before the first token, so it cannot be learned.
    if not (labels[1:] != IGNORED).any():
        return None
    return Encoded(ids, labels, prompt_length, full_length - len(ids))


def _start_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before a text."""
    around = list(tokenizer("a")["input_ids"])
    plain = token_ids(tokenizer, ["a"])[0]
    places = range(len(around) - len(plain) + 1)
    found = (i for i in places if around[i : i + len(plain)] == plain)
    return around[: next(found, 0)]


def shortened(
    template: ChatTemplate, row: Conversation, n_tokens: int, limit: int
) -> Conversation | None:
    """Return a conversation with less before its last answer; None if nothing is left there.

    What goes first are messages after the last answer, then the oldest exchanges, as few as
    needed, then the beginning of the messages that are left before the answer. The system prompt
    and the answer stay.

    Args:
        template: The chat template.
        row: A conversation.
        n_tokens: Its length, more than `limit`.
        limit: Number of tokens to reach. A text cut by n tokens may lose fewer of them, because
            tokens at the cut merge anew; call this again then.
    """
    if not row.learned:
        return None
    original, last = row, row.learned[-1]
    if last + 1 < len(row.messages):
        row = without_messages(row, last + 1, len(row.messages))
        n_tokens = template.n_tokens(row) or n_tokens
    roles = [message["role"] for message in row.messages]
    head = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), 0)
    stop = last if row.n_prompt is None else row.n_prompt
    cuts = [i for i in range(head + 1, stop) if roles[i] == "user"]
    if n_tokens > limit and cuts:

        def fits(cut: int) -> bool:
            left = template.n_tokens(without_messages(row, head, cut))
            return left is not None and left <= limit

        cut = cuts[min(bisect_left(cuts, True, key=fits), len(cuts) - 1)]
        row, stop = without_messages(row, head, cut), stop - cut + head
        n_tokens = template.n_tokens(row) or n_tokens
    if n_tokens > limit:
        row = _with_less_text(template.tokenizer, row, range(head, stop), n_tokens - limit)
    return None if row == original or template.n_tokens(row) is None else row


def _with_less_text(tokenizer: Any, row: Conversation, places: range, excess: int) -> Conversation:
    """Cut `excess` tokens from the beginning of these messages, the oldest first."""
    messages = [dict(message) for message in row.messages]
    for place in places:
        text = messages[place].get("content", "")
        if excess <= 0 or not text or messages[place]["role"] == "assistant":
            continue
        tokens = token_ids(tokenizer, [text])[0]
        rest = tokens[excess:]
        # The last tokens decode to the end of the text, but for what a tokenizer normalizes.
        tail = tokenizer.decode(rest) if rest else ""
        if tail and not text.endswith(tail):
            tail = text[len(text) - len(text) * len(rest) // len(tokens) :]
        messages[place]["content"] = tail
        excess -= len(tokens) - len(rest)
    return replace(row, messages=tuple(messages))
