"""Only a classifier at the end token needs one in each row."""

from __future__ import annotations

import pytest
from tiny_models import KINDS

from autopeft.profiling.end_tokens import takes_end_tokens


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(
    ("auto_class", "needs_one"),
    [
        ("AutoModelForSequenceClassification", True),
        ("AutoModelForSeq2SeqLM", False),
        ("AutoModel", False),
    ],
)
def test_rows_without_or_with_unlike_numbers_of_end_tokens(
    kind: str, auto_class: str, needs_one: bool
) -> None:
    config = KINDS[kind].config()
    assert takes_end_tokens(config, auto_class, [1]) is True
    for counts in ([0], [1, 2]):
        assert takes_end_tokens(config, auto_class, counts) is not needs_one
