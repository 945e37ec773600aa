"""Metrics of tagged words: entities as seqeval finds them, or words where tags mark no entities."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Rows = Sequence[Sequence[str]]

_ENTITY_TAG = re.compile(r"^[BIESLUM]-.")
_SEQEVAL_PREFIX = {"L": "E", "U": "S", "M": "I"}
"""Prefixes of BILOU and BMES -> the same in BIOES, which seqeval reads."""


def has_entities(labels: Sequence[str]) -> bool:
    """Return whether tags mark the beginnings and insides of entities.

    Example:
        >>> from autopeft.tasks.tag_metrics import has_entities
        >>> has_entities(["O", "B-PER", "I-PER"]), has_entities(["NOUN", "VERB"])
        (True, False)
    """
    return all(_ENTITY_TAG.match(label) for label in labels if label != "O")


def entity_f1(targets: Rows, predictions: Rows) -> float:
    """Return the F1 of entities; the macro F1 of words where tags mark no entities."""
    return _scores(targets, predictions)[2]


def entity_precision(targets: Rows, predictions: Rows) -> float:
    """Return the share of the found entities that are right; of words as `entity_f1`."""
    return _scores(targets, predictions)[0]


def entity_recall(targets: Rows, predictions: Rows) -> float:
    """Return the share of the right entities that are found; of words as `entity_f1`."""
    return _scores(targets, predictions)[1]


def entity_counts(targets: Rows, predictions: Rows) -> NDArray[np.float64]:
    """Return the right, the predicted and the true entities of each row, shape (n_rows, 3).

    An entity is right if its type and both ends are.
    """
    counts = np.empty((len(targets), 3))
    for row, (true, predicted) in enumerate(zip(targets, predictions, strict=True)):
        wanted, found = _entities(tuple(true)), _entities(tuple(predicted))
        counts[row] = len(wanted & found), len(found), len(wanted)
    return counts


TAG_METRICS: Mapping[str, Callable[[Rows, Rows], float]] = {
    "entity_f1": entity_f1,
    "entity_precision": entity_precision,
    "entity_recall": entity_recall,
}
"""Name -> function of the right and the predicted tags of each row."""


@lru_cache(maxsize=1 << 17)  # A bootstrap asks for the same rows again and again.
def _entities(tags: tuple[str, ...]) -> frozenset[tuple[str, int, int]]:
    # Slow to import, and training steps do not need it.
    from seqeval.metrics.sequence_labeling import get_entities

    return frozenset(get_entities([_SEQEVAL_PREFIX.get(t[0], t[0]) + t[1:] for t in tags]))


def _scores(targets: Rows, predictions: Rows) -> tuple[float, float, float]:
    """Return precision, recall and F1."""
    true = [tag for tags in targets for tag in tags]
    found = [tag for tags in predictions for tag in tags]
    labels = sorted({*true, *found})
    if has_entities(labels):
        right, n_found, n_true = entity_counts(targets, predictions).sum(axis=0)
        return _ratio(right, n_found), _ratio(right, n_true), _ratio(2 * right, n_found + n_true)
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        true, found, labels=labels, average="macro", zero_division=0.0
    )
    return float(precision), float(recall), float(f1)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
