"""Checks a metric: finite, the same each time, and better for right predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autopeft.tasks.metrics import Metric, evaluate_metric, find_metric
from autopeft.testing.requirement import Requirement

_N_ROWS, _N_LABELS = 24, 3
_TEXTS = ("good 1", "bad 2", "42", "the film of 7", "Paris, 5")
_TAGS = ("O", "B-PER", "I-PER", "B-LOC")


def check_metric(metric: Any) -> None:
    """Check that a metric can be the quality of a search.

    On made-up predictions of the kind that it needs, it is a finite number, or one for each row;
    the same each time, in any order of the rows and in another process; within its bounds; not
    worse for right predictions than for wrong ones; and it leaves its arguments as they are.

    Args:
        metric: The function, the `Metric`, or its name.

    Raises:
        AssertionError: if it does not; the message is one line.
        SettingsError: if it is no metric.

    Example:
        >>> import numpy as np
        >>> from autopeft.testing import check_metric
        >>> check_metric("f1")
        >>> def lucky(targets, predictions):
        ...     return float(np.random.random())
        >>> check_metric(lucky)
        Traceback (most recent call last):
        ...
        AssertionError: metric lucky: is 0... and then 0... for the same predictions; ...
    """
    part = find_metric(metric)
    require = Requirement(f"metric {part.name}")
    if part.function is None:
        return  # The task computes it.
    whole = part.for_classes(_N_LABELS)
    targets, perfect, wrong = _rows(part)
    given = _Given(whole, require, targets)
    elsewhere = _Given(require.pickled(whole), require, targets)
    right = given(perfect)
    other = given(wrong)
    for again in (given(wrong), elsewhere(wrong)):
        text = f"is {other} and then {again} for the same predictions; nothing else may decide it"
        require.that(again == other, text)
    order = np.random.default_rng(1).permutation(_N_ROWS)
    moved = _Given(whole, require, _taken(targets, order))(_taken(wrong, order))
    text = f"is {other}, and {moved} for the same rows in another order"
    require.that(bool(np.isclose(moved, other)), text)
    sign = part.objective.sign()
    text = f"is {right} for right predictions and {other} for wrong ones, but is {part.direction}d"
    require.that(sign * right >= sign * other, f"{text}; set direction")
    low, high = part.bounds
    for value in (right, other):
        require.that(low <= value <= high, f"is {value}, outside of its bounds {part.bounds}")


class _Given:
    """The metric for some targets."""

    def __init__(self, metric: Metric, require: Requirement, targets: Any) -> None:
        self._metric, self._require, self._targets = metric, require, targets

    def __call__(self, predictions: Any) -> float:
        prompts = [f"question {n}" for n in range(_N_ROWS)]
        prompts = prompts if self._metric.needs == "text" else []
        with self._require.no_error(f"computing it from {self._metric.needs}"):
            value, _ = evaluate_metric(self._metric, self._targets, predictions, prompts)
        return value


def _rows(metric: Metric) -> tuple[Any, Any, Any]:
    """Return targets, and right and wrong predictions of what the metric needs."""
    rng = np.random.default_rng(0)
    if metric.needs == "text":
        texts = _drawn(rng, _TEXTS)
        return texts, texts, ["something else"] * _N_ROWS
    if metric.needs == "tags":
        tags = [_drawn(rng, _TAGS)[: 3 + n % 3] for n in range(_N_ROWS)]
        return tags, tags, [["O"] * len(row) for row in tags]
    if metric.needs == "values":
        numbers = rng.random(_N_ROWS) * 4 + 1
        return numbers, numbers, 6.0 - numbers
    labels = np.arange(_N_ROWS, dtype=np.int64) % _N_LABELS
    others = (labels + 1) % _N_LABELS
    if metric.needs == "scores":
        sure = 0.7 * np.eye(_N_LABELS) + 0.1
        return labels, sure[labels], sure[others]
    return labels, labels, others


def _drawn(rng: np.random.Generator, words: Sequence[str]) -> list[str]:
    return [words[i] for i in rng.integers(len(words), size=_N_ROWS)]


def _taken(values: Any, order: Any) -> Any:
    return values[order] if isinstance(values, np.ndarray) else [values[i] for i in order]
