"""Metrics of generated texts: each gives one value per row, and their mean is the metric."""

from __future__ import annotations

import inspect
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial, update_wrapper
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.errors import SettingsError
from autopeft.utils.serialize import to_float

FloatArray = NDArray[np.float64]
Texts = Sequence[str]
RowFunction = Callable[[str, str, str], float]
TextFunction = Callable[[Texts | None, Texts, Texts], Any]


class Batched(partial[Any]):
    """A function of (prompts, references, texts) of all rows: one value for each, or for all."""

    batched = True


def _rows(function: RowFunction, prompts: Texts | None, references: Texts, texts: Texts) -> Any:
    """Return a function's value of (prompt, reference, text) for each row, shape (n_rows,)."""
    starts = [""] * len(texts) if prompts is None else prompts
    triples = zip(starts, references, texts, strict=True)
    return np.array([function(*row) for row in triples], dtype=float)


# Exact match and F1, as SQuAD defines them: without case, punctuation and articles.

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return a text in lower case without punctuation, articles and spaces that do not matter."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _exact_match(prompt: str, reference: str, text: str) -> float:
    return float(normalized(reference) == normalized(text))


def _token_f1(prompt: str, reference: str, text: str) -> float:
    wanted, found = normalized(reference).split(), normalized(text).split()
    if not wanted or not found:
        return float(wanted == found)
    n_shared = (Counter(wanted) & Counter(found)).total()
    return 2.0 * n_shared / (len(wanted) + len(found))


# ROUGE, by the package that papers use

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


class _Words:
    """Splits a text into words of any script; rouge-score's own tokenizer knows a-z and 0-9 only.

    For English texts both agree. In scripts without spaces a word is a character.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words in lower case."""
        return _WORD.findall(text.lower())


def _rouge(name: str, prompts: Texts | None, references: Texts, texts: Texts) -> FloatArray:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        problem = "needs the package rouge-score"
        raise SettingsError("metric", name, problem, "pip install autopeft[text]") from None
    scorer = RougeScorer([name], tokenizer=_Words())
    pairs = zip(references, texts, strict=True)
    return np.array([scorer.score(*pair)[name].fmeasure for pair in pairs], dtype=float)


# Error rates of transcripts: errors in all rows, as a share of all words or characters


def _error_rate(name: str, prompts: Texts | None, references: Texts, texts: Texts) -> float:
    try:
        import jiwer
    except ImportError:
        raise SettingsError(
            "metric", name, "needs the package jiwer", "pip install autopeft[text]"
        ) from None
    return float(getattr(jiwer, name)(list(references), list(texts)))


# JSON and numbers


def _json_valid(prompt: str, reference: str, text: str) -> float:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, or of what follows its last "####"; None without one."""
    found = _NUMBER.findall(text.rpartition("####")[2]) or _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def _number_match(prompts: Texts | None, references: Texts, texts: Texts) -> FloatArray:
    wanted = [last_number(reference) for reference in references]
    if None in wanted:
        row = wanted.index(None)
        raise SettingsError(
            "metric",
            "number_match",
            f"the reference of row {row + 1} holds no number: {references[row][:60]!r}",
            "use a metric of texts, such as exact_match",
        )
    pairs = zip(wanted, texts, strict=True)
    return np.array([number == last_number(text) for number, text in pairs], dtype=float)


def regex_match(pattern: str) -> TextFunction:
    """Return a function that is 1 in rows where what a pattern extracts equals the reference.

    The last match counts: its first group, or all of it. A reference without a match is compared as
    it is.

    Args:
        pattern: A regular expression of Python.

    Raises:
        SettingsError: if the pattern is none.
    """
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        problem = f"is no regular expression ({error})"
        raise SettingsError("metric", f"regex={pattern}", problem, "correct it") from None
    return Batched(_rows, partial(_regex_match, compiled))


def _regex_match(pattern: re.Pattern[str], prompt: str, reference: str, text: str) -> float:
    wanted, found = _extracted(pattern, reference), _extracted(pattern, text)
    return float(found is not None and found == (reference.strip() if wanted is None else wanted))


def _extracted(pattern: re.Pattern[str], text: str) -> str | None:
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    return ((last[1] if pattern.groups else last[0]) or "").strip()


# A user's function


def by_row(name: str, function: Callable[..., Any]) -> TextFunction:
    """Return a metric's function that calls a user's function for each row.

    Args:
        name: The metric's name, for errors.
        function: Takes (prompt, reference, generated text), or (reference, generated text), of one
            row and returns a number or a bool; with a true attribute `batched`, it takes lists of
            all rows and returns one value per row.

    Raises:
        SettingsError: if the function takes another number of arguments.
    """
    if isinstance(function, Batched):
        return function
    n_arguments = next((n for n in (3, 2) if _takes(function, n)), None)
    if n_arguments is None:
        raise SettingsError(
            "metric",
            name,
            "must take (prompt, reference, generated text) or (reference, generated text)",
            "correct the function",
        )
    # It counts as the user's own where a name is registered again.
    return update_wrapper(Batched(_user_rows, name, function, n_arguments), function, updated=())


def _takes(function: Callable[..., Any], n: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * n)
    except TypeError:
        return False
    except ValueError:  # A function of C without a signature.
        return n == 2
    return True


def _user_rows(
    name: str,
    function: Callable[..., Any],
    n_arguments: int,
    prompts: Texts | None,
    references: Texts,
    texts: Texts,
) -> Any:
    starts = [""] * len(texts) if prompts is None else list(prompts)
    columns = [starts, list(references), list(texts)][3 - n_arguments :]
    if getattr(function, "batched", False):
        returned = np.asanyarray(function(*columns))  # A masked array stays one.
        if returned.shape != (len(texts),):
            problem = f"returns shape {returned.shape} for {len(texts)} rows"
            raise SettingsError("metric", name, problem, "return one number per row")
        return returned
    values = [function(*row) for row in zip(*columns, strict=True)]
    numbers = [to_float(value, truth=True) for value in values]
    for row, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if number is None or np.ndim(value) != 0:
            problem = f"returns {value!r:.60} for row {row + 1}, but must return one number per row"
            remedy = "correct the function, or set its attribute `batched` to take all rows at once"
            raise SettingsError("metric", name, problem, remedy)
    return np.array(numbers, dtype=float)


ERROR_RATES: Mapping[str, Callable[..., float]] = {
    "wer": Batched(_error_rate, "wer"),
    "cer": Batched(_error_rate, "cer"),
}
"""Name -> function of (prompts, references, generated texts) that is better when smaller, and no
mean over rows."""

TEXT_METRICS: Mapping[str, TextFunction] = {
    "exact_match": Batched(_rows, _exact_match),
    "token_f1": Batched(_rows, _token_f1),
    "rouge1": Batched(_rouge, "rouge1"),
    "rouge2": Batched(_rouge, "rouge2"),
    "rougeL": Batched(_rouge, "rougeL"),
    "json_valid": Batched(_rows, _json_valid),
    "number_match": Batched(_number_match),
}
"""Name -> function of (prompts, references, generated texts) that gives one value per row; all are
better when larger."""
