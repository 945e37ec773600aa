"""Names of classes, and their order in a checkpoint that already has a head."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from autopeft.errors import DataError
from autopeft.tasks.data import SplitName


def as_label(value: Any) -> str | None:
    """Return a label's name: a whole number loses its decimal point, spaces around go.

    Example:
        >>> from autopeft.tasks.labels import as_label
        >>> as_label(2.0), as_label(" good "), as_label(True), as_label(float("nan"))
        ('2', 'good', 'True', None)
    """
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def label_order(label: str) -> tuple[int, float, str]:
    """Return a key that sorts numbers by value and before words, so that "10" follows "9"."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def in_order(labels: Collection[str], config: Any) -> tuple[tuple[str, ...], bool]:
    """Return the labels in the order of the model's outputs, and whether the checkpoint knows it.

    A fine-tuned classifier names its outputs (`id2label`, else `label2id`). Where these are the
    names in the data, letter case aside, its order and all its classes are taken, so that its head
    stays of use. Where they are not, nobody can tell which output means what, and the labels are
    sorted.

    Args:
        labels: Label names in the data.
        config: The model's configuration, from transformers; None: unknown.

    Example:
        >>> from types import SimpleNamespace
        >>> from autopeft.tasks.labels import in_order
        >>> in_order({"neg", "pos"}, SimpleNamespace(id2label={0: "POS", 1: "NEG"}))
        (('pos', 'neg'), True)
        >>> in_order({"neg", "pos"}, SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"}))
        (('neg', 'pos'), False)
    """
    named = dict(getattr(config, "id2label", None) or {})
    ids = {index: name for name, index in (getattr(config, "label2id", None) or {}).items()}
    places = range(len(named))
    outputs = [[str(m[i]) for i in places] for m in (named, ids) if set(m) == set(places)]
    # Without names of its own, a classifier calls its outputs LABEL_0, LABEL_1, ...
    plain = [re.sub(r"^LABEL_(?=\d+$)", "", name) for name in next(iter(outputs), ())]
    for names in (*outputs, plain):
        for spelling in (str, str.casefold):
            spelled = {spelling(label): label for label in labels}
            known = [spelling(name) for name in names]
            is_clear = len(set(known)) == len(known) and len(spelled) == len(labels)
            if is_clear and set(spelled) <= set(known):
                found = (spelled.get(k, name) for k, name in zip(known, names, strict=True))
                return tuple(found), True
    return tuple(sorted(labels, key=label_order)), False


def has_head(config: Any, kind: str) -> bool:
    """Return whether a checkpoint was saved with a head of a kind, e.g. "SequenceClassification".

    Args:
        config: The model's configuration, from transformers; None: unknown.
        kind: Part of the name of transformers' class for it.
    """
    return any(kind in str(name) for name in getattr(config, "architectures", None) or ())


def check_known(role: str, found: Mapping[SplitName, set[str]]) -> set[str]:
    """Return the labels of the training rows.

    Args:
        role: What the labels mean to the task, for errors.
        found: Split -> labels in it.

    Raises:
        DataError: if another split has a label that they lack.
    """
    for name, labels in found.items():
        unknown = sorted(labels - found["train"])
        if unknown:
            raise DataError(
                role,
                unknown[0],
                f"occurs in {name} but in no training row",
                "add training rows with it, or drop it",
            )
    return found["train"]


def list_in(value: Any) -> list[Any] | None:
    """Return the list in a cell, which may be text such as "['anger', 'fear']"; None if it is none.

    pandas writes lists to CSV files in Python's notation.

    Example:
        >>> from autopeft.tasks.labels import list_in
        >>> list_in(["a", "b"]), list_in("['a', 'b']"), list_in('["a"]'), list_in("[a]")
        (['a', 'b'], ['a', 'b'], ['a'], None)
    """
    if isinstance(value, str):
        value = _written(value, "[", "]")
    return list(value) if isinstance(value, list | tuple) else None


def mapping_in(value: Any) -> Mapping[str, Any] | None:
    """Return the mapping in a cell, which may be text; None if it is none.

    Example:
        >>> from autopeft.tasks.labels import mapping_in
        >>> mapping_in("{'en': 'good', 'de': 'gut'}"), mapping_in("{good}")
        ({'en': 'good', 'de': 'gut'}, None)
    """
    if isinstance(value, str):
        value = _written(value, "{", "}")
    return value if isinstance(value, Mapping) else None


def _written(text: str, start: str, end: str) -> Any:
    """Return what a text between brackets says in JSON or in Python's notation; None if nothing."""
    text = text.strip()
    if text[:1] != start or text[-1:] != end:
        return None
    try:
        return json.loads(text)
    except RecursionError:
        return None
    except ValueError:
        try:
            return ast.literal_eval(text)
        # A deep text is too much for Python's parser, or for its memory.
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None


def fraction_in(values: Sequence[Any]) -> Any:
    """Return a number with a fraction if most values are numbers, so that they are no classes.

    None if they are classes. A comma before the decimals counts as well.

    Example:
        >>> from autopeft.tasks.labels import fraction_in
        >>> fraction_in([1, "2.5", None]), fraction_in([1.0, 2.0]), fraction_in(["2.5", "a"])
        ('2.5', None, None)
        >>> fraction_in(["3", "4,5", "NA"])
        '4,5'
    """
    n_values = n_numbers = 0
    found = None
    for value in values:
        if as_label(value) is None:
            continue
        n_values += 1
        try:
            number = float(value.replace(",", ".") if isinstance(value, str) else value)
        except (TypeError, ValueError):
            continue
        n_numbers += 1
        if found is None and math.isfinite(number) and not number.is_integer():
            found = value
    return found if 2 * n_numbers > n_values else None
