"""Tokenizes rows with the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.tasks.data import EncodedSplit
from autopeft.tasks.rows import Rows

_NO_LIMIT = 1_000_000  # A tokenizer without a limit reports an absurdly large one.


def usable_length(tokenizer: Any, max_length: int) -> int:
    """Return `max_length`, or the model's own limit if that is lower."""
    own = int(getattr(tokenizer, "model_max_length", None) or _NO_LIMIT)
    return min(max_length, own) if own < _NO_LIMIT else max_length


def padding_id(tokenizer: Any) -> int:
    """Return the token that pads batches.

    Many decoders have no padding token. The attention mask hides padding, so the end-of-text token
    is used. A decoder that classifies must know which token it is, see
    `TextClassification.model_kwargs`.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def encode_texts(
    tokenizer: Any, rows: Rows, targets: NDArray[np.int64], max_length: int
) -> EncodedSplit:
    """Tokenize texts, or pairs of texts. The longer text of a pair is cut first.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: The texts.
        targets: Label index of each row, shape (n_rows,).
        max_length: Longest row, in tokens, special ones included.
    """
    limit = usable_length(tokenizer, max_length)
    second = {} if rows.second is None else {"text_pair": list(rows.second)}
    coded = tokenizer(
        list(rows.first), **second, truncation=True, max_length=limit, return_attention_mask=False
    )
    type_ids = None
    if rows.second is not None and "token_type_ids" in coded:
        type_ids = _flat(coded["token_type_ids"]).astype(np.int8)
    ids = coded["input_ids"]
    # Only fast tokenizers report what they cut off. Rows at the limit are counted instead: exact
    # enough for a message.
    n_truncated = sum(len(row) >= limit for row in ids)
    return _split(rows, ids, targets, n_truncated, type_ids)


def encode_prompts(tokenizer: Any, rows: Rows, max_length: int) -> EncodedSplit:
    """Tokenize prompts and completions, and append the end-of-text token.

    The prompt is tokenized alone, as it is when the model is used; the completion as the text that
    follows it. A row that is too long loses the beginning of its prompt, because without a
    completion there is nothing to learn.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: Prompts, which may be empty, and completions.
        max_length: Longest row, in tokens.
    """
    limit = usable_length(tokenizer, max_length)
    start = _start_ids(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    plain = {"add_special_tokens": False, "return_attention_mask": False}
    texts = ["".join(both) for both in zip(rows.first, rows.target, strict=True)]
    wholes = tokenizer(texts, **plain)["input_ids"]
    fronts = tokenizer(list(rows.first), **plain)["input_ids"]
    ids: list[list[int]] = []
    prompt_lengths: list[int] = []
    n_truncated = 0
    for front, whole, completion in zip(fronts, wholes, rows.target, strict=True):
        back = whole[len(front) :]
        if whole[: len(front)] != front:
            # The tokenizer would merge the end of the prompt with the start of the completion.
            back = tokenizer(completion, **plain)["input_ids"]
        back = back + end
        room = limit - len(start) - len(back)
        if room < len(front):
            n_truncated += 1
            front = front[len(front) - max(room, 0) :] if room > 0 else []
            back = back[: limit - len(start)]
        ids.append([*start, *front, *back])
        prompt_lengths.append(len(start) + len(front))
    return _split(rows, ids, np.asarray(prompt_lengths, dtype=np.int64), n_truncated)


def _split(
    rows: Rows,
    ids: Sequence[Sequence[int]],
    targets: NDArray[np.int64],
    n_truncated: int,
    type_ids: NDArray[np.int8] | None = None,
) -> EncodedSplit:
    return EncodedSplit(
        tokens=_flat(ids).astype(np.int32),
        offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        targets=targets,
        source_rows=rows.source_rows,
        source=rows.source,
        type_ids=type_ids,
        n_truncated=n_truncated,
    )


def _start_ids(tokenizer: Any) -> list[int]:
    """Return the begin-of-text token, if the tokenizer puts one before a text."""
    begin = tokenizer.bos_token_id
    coded = list(tokenizer("a", return_attention_mask=False)["input_ids"])
    return [int(begin)] if begin is not None and coded[:1] == [begin] else []


def _flat(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64)
