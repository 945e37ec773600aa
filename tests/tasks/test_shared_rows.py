"""Rows that two sources have in common, whatever their layout."""

from __future__ import annotations

from typing import Any

import pytest

from autopeft.errors import UserError
from autopeft.tasks.reading import read
from autopeft.tasks.shared_rows import without_shared

_PROMPT, _ANSWER = "which film was the best one", "the one with the good plot"
_PAIR = {"prompt": _PROMPT, "completion": f" {_ANSWER}"}
_CHAT = [{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": _ANSWER}]


def _n_kept(kept: list[Any], own: list[Any], *, is_text: bool = True) -> int:
    table, given = read("retain", kept)["train"], read("data", own)["train"]
    found, places = without_shared("retain", table, [given], "give others", is_text=is_text)
    assert found.n_rows == len(places)
    return found.n_rows


@pytest.mark.parametrize(
    "shared",
    [{"messages": _CHAT}, {"text": f"{_PROMPT}  {_ANSWER}"}, {"text": _ANSWER}, {"text": _PROMPT}],
)
@pytest.mark.parametrize("own", [_PAIR, {"messages": _CHAT}])
def test_a_text_is_found_in_another_layout(shared: dict[str, Any], own: dict[str, Any]) -> None:
    (name,) = shared
    other = [{"role": "user", "content": "another"}] if name == "messages" else "a text of its own"
    assert _n_kept([shared, {name: other}], [own]) == 1
    with pytest.raises(UserError, match="all 1 row are also in the search's data"):
        _n_kept([shared], [own])


def test_a_short_text_or_a_part_is_no_shared_row() -> None:
    own = [{"prompt": "is it", "completion": "yes"}, _PAIR]
    assert _n_kept([{"text": "yes"}, {"text": "is it yes"}, {"text": f"{_PROMPT} again"}], own) == 3
    new = {"prompt": _PROMPT, "completion": "none of them was as good"}
    assert _n_kept([new], own) == 1


def test_the_same_text_with_another_label_is_another_row() -> None:
    own = [{"text": _PROMPT, "label": "a question"}]
    rows = [{"text": _PROMPT, "label": "neutral"}]
    assert _n_kept(rows, own, is_text=False) == 1
