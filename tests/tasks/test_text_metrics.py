"""Each metric of texts, on small texts with the right value beside."""

from __future__ import annotations

import builtins
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

import autopeft
from autopeft.errors import SettingsError
from autopeft.tasks.metrics import METRICS, Metric, evaluate_metric, find_metric
from autopeft.tasks.text_metrics import _Words, last_number

Rows = list[float]


def rows_of(metric: Any, references: list[str], texts: list[str]) -> Rows:
    prompts = [f"prompt {row}" for row in range(len(texts))]
    value, rows = evaluate_metric(find_metric(metric, "text"), references, texts, prompts)
    assert rows is not None
    assert value == pytest.approx(rows.mean())
    return [float(row) for row in rows]


@pytest.mark.parametrize(
    ("reference", "text", "exact", "f1"),
    [
        ("The Eiffel Tower", "eiffel tower.", 1.0, 1.0),
        ("a cat sat", "the cat ran", 0.0, 0.5),
        ("red red blue", "red blue blue", 0.0, 2 / 3),
        ("", "", 1.0, 1.0),
        ("x", "", 0.0, 0.0),
        ("theme", "them", 0.0, 0.0),
    ],
)
def test_exact_match_and_f1_do_not_see_case_articles_and_punctuation(
    reference: str, text: str, exact: float, f1: float
) -> None:
    assert rows_of("exact_match", [reference], [text]) == [exact]
    assert rows_of("token_f1", [reference], [text]) == pytest.approx([f1])


def test_rouge_counts_words_pairs_and_order() -> None:
    reference, text = "the cat sat on the mat", "the cat lay on a mat"
    assert rows_of("rouge1", [reference], [text]) == pytest.approx([4 / 6])
    assert rows_of("rouge2", [reference], [text]) == pytest.approx([1 / 5])
    assert rows_of("rougeL", [reference], [text]) == pytest.approx([4 / 6])


def test_rouge_reads_words_as_its_package_does_and_other_scripts_too() -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    text = "It's 3.5% of the state-of-the-art, snake_case & U.S. e-mail!"
    assert _Words().tokenize(text) == DefaultTokenizer().tokenize(text)
    assert rows_of(
        "rouge1", ["Привет, мир", "東京です"], ["привет мир", "東京だ"]
    ) == pytest.approx([1.0, 2 * 2 / 7])


def test_rouge_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SettingsError, match=r"rouge-score; pip install autopeft\[text\]"):
        rows_of("rouge1", ["a"], ["a"])


def test_json_is_valid_or_not() -> None:
    texts = [
        '{"a": [1, null]}',
        ' "text" \n',
        "{'a': 1}",
        '{"a": NaN}',
        "",
        '{"a": 1} x',
        "[" * 9999,
    ]
    assert rows_of("json_valid", [""] * 7, texts) == [1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("3 and 4 make 7.", "7"),
        ("the total is $1,234.50", "1234.5"),
        ("12,345,678 people", "12345678"),
        ("1,23", "23"),
        ("x = -5", "-5"),
        ("10-3", "3"),
        ("\u22122.5 degrees", "-2.5"),
        ("about .5", "0.5"),
        ("3 then #### 18 apples", "18"),
        ("first 3 #### none", "3"),
        ("no number", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value() -> None:
    texts = ["so it is 1,000.0", "999", "none"]
    assert rows_of("number_match", ["thought #### 1000"] * 3, texts) == [1, 0, 0]
    with pytest.raises(SettingsError, match="reference of row 2 holds no number: 'none'"):
        rows_of("number_match", ["1", "none"], ["1", "1"])


def test_a_pattern_extracts_what_is_compared() -> None:
    metric = r"regex=^Answer: (\w+)"
    texts = ["Answer: B\nAnswer: C", "C", "Answer:  C", "Answer: C "]
    assert rows_of(metric, ["C", "C", "Answer: C", "why\nAnswer: C"], texts) == [1, 0, 0, 1]
    assert rows_of(r"regex=\d+", ["7"], ["6 7"]) == [1]
    with pytest.raises(SettingsError, match=r"metric='regex=\(': is no regular expression"):
        find_metric("regex=(")


def test_a_function_of_the_user_is_called_for_each_row() -> None:
    def ends(prompt: str, reference: str, generated: str) -> bool:
        return generated.endswith(reference) and prompt.startswith("prompt")

    assert rows_of(ends, ["a", "b"], ["ba", "ba"]) == [1, 0]
    assert rows_of(lambda reference, text: len(text) / 2, ["a"], ["abc"]) == [1.5]


def _starts_alike(prompt: str, reference: str, generated: str) -> bool:
    return generated[:1] == reference[:1]


def _longer(prompt: str, reference: str, generated: str) -> bool:
    return len(generated) > len(reference)


_starts_alike.needs = "text"  # type: ignore[attr-defined]


@pytest.mark.parametrize("batched", [False, True])
def test_a_function_gets_the_same_however_it_is_named(
    batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starts(prompts: list[str], references: list[str], generated: list[str]) -> list[bool]:
        return [_starts_alike(*row) for row in zip(prompts, references, generated, strict=True)]

    starts.batched = True  # type: ignore[attr-defined]
    function: Any = starts if batched else _starts_alike
    monkeypatch.setattr(METRICS, "_items", dict(METRICS._items))
    autopeft.register_metric("registered_here", function, needs="text")
    ways: list[Any] = [function, "registered_here", Metric("one", "maximize", function, "text")]
    for metric in (*ways, "" if batched else f"{__name__}:_starts_alike"):
        assert not metric or rows_of(metric, ["ab", "ba"], ["ax", "ax"]) == [1, 0], metric
    autopeft.register_metric("registered_here", function, needs="text")  # a cell that is run again
    with pytest.raises(SettingsError, match="registered twice"):
        autopeft.register_metric("registered_here", _longer, needs="text")


def test_a_batched_function_gets_all_rows() -> None:
    def lengths(prompts: list[str], references: list[str], generated: list[str]) -> list[int]:
        return [len(text) for text in generated]

    with pytest.raises(SettingsError, match=r"lengths.*row 1.*one number per row.*`batched`"):
        rows_of(lengths, ["a", "b"], ["abc", "a"])
    lengths.batched = True  # type: ignore[attr-defined]
    assert rows_of(lengths, ["a", "b"], ["abc", "a"]) == [3, 1]


@pytest.mark.parametrize("value", [b"1", np.array("1"), 1j, np.ma.masked])
def test_a_value_of_a_row_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(SettingsError, match="for row 1, but must return one number per row"):
        rows_of(lambda prompt, reference, text: value, ["a", "b"], ["abc", "a"])


def test_a_function_with_other_arguments_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"must take .prompt, reference, generated text"):
        find_metric(lambda text: 1.0, "text")
