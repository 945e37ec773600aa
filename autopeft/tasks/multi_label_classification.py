"""Classification of texts, or of pairs of texts, into any number of classes each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from autopeft.errors import DataError
from autopeft.tasks.base import IntArray, Scores
from autopeft.tasks.batch import Batch
from autopeft.tasks.columns import Column, check_kind
from autopeft.tasks.data import SPLITS, EncodedSplit, SplitName
from autopeft.tasks.encoding import encode_texts
from autopeft.tasks.examples import Examples, is_missing
from autopeft.tasks.labels import as_label, check_known, in_order, list_in
from autopeft.tasks.metrics import Needs
from autopeft.tasks.reading import Table
from autopeft.tasks.text_classification import LABEL_NAMES, TextClassification, row_logits


class MultiLabelClassification(TextClassification):
    """Predicts any number of labels per text: those with a probability above 0.5.

    The labels of a row are a list; an empty one means that the row has none. Lists of one length
    that hold only 0 and 1 have a place for each label. There may also be one column of 0 and 1 for
    each label, or text, if the option `separator` says how it is split. The option `label_columns`
    names the columns of 0 and 1; by default, all such columns are taken where no column has lists.

    Args:
        labels: Label names in the order of their index.
        pad_id: Id of the padding token.
        metric: Quality to optimize: f1_micro (default), f1_macro, accuracy (all labels of a row are
            right) or loss.
    """

    name = "multi-label-classification"
    description = "any number of classes for each text, or for each pair of texts"
    columns = (
        *TextClassification.columns[:2],
        Column(
            "label", "any", "the list of classes", False, (*LABEL_NAMES, *("categories", "tags"))
        ),
    )
    metrics = ("f1_micro", "f1_macro", "accuracy", "loss")
    options: ClassVar[Mapping[str, Any]] = {"separator": "", "label_columns": ""}

    @classmethod
    def check_fit(cls, table: Table, names: Mapping[str, str]) -> None:
        """Check that the labels of the first rows are lists: only these are recognized."""
        for column in cls.columns[:2]:
            if column.role in names:
                check_kind(column, names[column.role], table, table.head(names[column.role]))
        if "label" not in names:
            shown = ", ".join(table.column_names)
            problem = f"no column of {table.source} ({shown}) is recognized as the labels"
            raise DataError("label", "", problem, "name it with --label")
        values = table.head(names["label"])
        if not any(list_in(value) is not None for value in values):
            raise DataError(
                "label",
                names["label"],
                f"no column of {table.source} has lists of labels",
                f"name the --task {cls.name} if rows have several labels",
            )

    def clean(self, table: Table) -> Examples:
        """Return the complete rows, each with its sorted labels.

        Raises:
            DataError: if a cell is of the wrong kind.
        """
        names = self.find_columns(self.settings.column_names(), table)
        notes = list(table.notes)
        columns: dict[str, Sequence[Any]] = {}
        for column in self.columns[:2]:
            if column.role in names:
                columns[column.role] = table.column(column.role, names[column.role])
                check_kind(column, names[column.role], table, columns[column.role])
        if self.option("label_columns") or "label" not in names:
            own = self._label_columns(table, set(names.values()))
            columns["label"] = _from_columns(table, own)
            notes.append(f"labels are the columns {', '.join(own)}")
        else:
            n_classes = _n_bits(table.column("label", names["label"]))
            columns["label"] = self._from_lists(table, names["label"], n_classes is not None)
            if n_classes is not None:
                notes.append(f"labels are lists of 0 and 1, one for each of {n_classes} classes")
            n_empty = sum(labels == () for labels in columns["label"])
            if n_empty:
                notes.append(f"{n_empty} rows of {table.source} have no label")
        problems: list[str | None] = [None] * table.n_rows
        for role, values in columns.items():
            for row, value in enumerate(values):
                is_gap = value is None if role == "label" else is_missing(value)
                if is_gap and problems[row] is None:
                    problems[row] = f"the {role} is missing"
        return Examples.kept(columns, problems, table.source, tuple(notes))

    def _from_lists(self, table: Table, name: str, has_bits: bool) -> list[tuple[str, ...] | None]:
        """Return the sorted labels of each row; None: it is unknown which it has."""
        separator = str(self.option("separator"))
        found: list[tuple[str, ...] | None] = []
        for row, value in enumerate(table.column("label", name)):
            if separator and (value is None or isinstance(value, str)):
                # A CSV file has no other way to write an empty list.
                value = [part for part in (value or "").split(separator) if part.strip()]
            if value is None or (isinstance(value, float) and value != value):
                found.append(None)
                continue
            items = list_in(value)
            if items is None or any(_is_no_label(each) for each in items):
                raise DataError(
                    "label",
                    name,
                    f"row {row + 1} of {table.source} holds {' '.join(repr(value).split())[:60]} "
                    "where a list of labels is expected",
                    "give lists, or name the separator of texts with --task-options separator=;",
                )
            own = [i for i, each in enumerate(items) if _bit(each)] if has_bits else items
            found.append(tuple(sorted({str(as_label(each)) for each in own})))
        return found

    def _label_columns(self, table: Table, taken: set[str]) -> list[str]:
        """Return the columns of 0 and 1, as named or found."""
        given = self.option("label_columns")
        own = [part.strip() for part in given.split(";")] if isinstance(given, str) else list(given)
        if given:
            for name in own:
                table.column("label_columns", name)
            return own
        found = [
            name
            for name in table.column_names
            if name not in taken and all(_bit(v) is not None for v in table.column("label", name))
        ]
        if not found:
            raise DataError(
                "label",
                "",
                f"{table.source} has neither a column of lists of labels nor columns of 0 and 1",
                f"name one of {', '.join(map(repr, table.column_names))} with --label",
            )
        return found

    def strata(self, rows: Examples) -> Sequence[Hashable]:
        """Return the rarest label of each row, so that each split gets some of it."""
        counts = Counter(label for labels in rows["label"] for label in labels)
        return [min(labels, key=lambda x: (counts[x], x), default=None) for labels in rows["label"]]

    def check_rows(self, rows: Examples) -> None:
        """Raise a DataError if the labels of the training source cannot be classes."""
        labels = {label for own in rows["label"] for label in own}
        name = self.settings.column_names().get("label", "label")
        if len(rows) and not labels:
            raise DataError("label", name, "no row has a label", "give rows with labels")
        if len(labels) > max(len(rows) / 2, 1):
            raise DataError(
                "label",
                name,
                f"the rows have {len(labels)} different labels in {len(rows)} rows",
                "name a column with lists of classes",
            )

    def labels_of(self, splits: Mapping[SplitName, Examples]) -> tuple[str, ...]:
        """Return the labels of the training rows.

        Raises:
            DataError: if another split has a label that they lack.
        """
        found = {name: {x for own in splits[name]["label"] for x in own} for name in SPLITS}
        return in_order(check_known("label", found), self.model_config)[0]

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize texts or pairs; "labels" is 1 for each label of a row, shape (n_rows, n_labels).

        Its type is float32, as the loss of transformers expects.
        """
        targets = np.asarray([[x in own for x in labels] for own in rows["label"]], np.float32)
        return encode_texts(processor, rows, targets, max_length, on_long=self.settings.on_long)

    pipeline_arguments = ', top_k=None, function_to_apply="sigmoid"'

    def model_kwargs(self) -> dict[str, Any]:
        """Return what a classifier needs, and that its labels do not exclude each other."""
        return {**super().model_kwargs(), "problem_type": "multi_label_classification"}

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean binary cross-entropy of each row's labels, and ones."""
        losses = _losses(row_logits(model, batch), batch.labels)
        return losses, torch.ones_like(losses)

    def score(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return the loss, the probability of each label, and which are predicted, of each row."""
        logits = row_logits(model, batch)
        losses = _losses(logits, batch.labels)
        return {
            "loss": losses,
            "weight": torch.ones_like(losses),
            "scores": logits.sigmoid(),
            "prediction": (logits > 0).long(),
        }

    def outputs(
        self, needs: Needs, scores: Scores, split: EncodedSplit, rows: IntArray
    ) -> tuple[Any, Any]:
        """Return 0 and 1 for each row and label, and the predicted ones or all probabilities."""
        targets = split.row_arrays["labels"][rows].astype(np.int64)
        return targets, scores["scores" if needs == "scores" else "prediction"]


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return each.mean(dim=1)


def _from_columns(table: Table, own: Sequence[str]) -> list[tuple[str, ...] | None]:
    """Return the sorted names of the columns that are 1 in each row; None where one is missing."""
    columns = {}
    for name in own:
        values = table.column("label", name)
        columns[name] = [None if is_missing(value) else _bit(value) for value in values]
        for row, (bit, value) in enumerate(zip(columns[name], values, strict=True)):
            if bit is None and not is_missing(value):
                raise DataError(
                    "label",
                    name,
                    f"row {row + 1} of {table.source} holds {value!r} where 0 or 1 is expected",
                    "correct it, or name other columns with --task-options label_columns=A;B",
                )
    return [
        None if None in bits else tuple(sorted(n for n, b in zip(own, bits, strict=True) if b))
        for bits in zip(*columns.values(), strict=True)
    ]


def _n_bits(values: Sequence[Any]) -> int | None:
    """Return the length of lists that have 0 or 1 for each class; None if they name classes."""
    lists = [items for value in values if (items := list_in(value)) is not None]
    lengths = {len(items) for items in lists}
    if len(lengths) != 1 or any(_bit(each) is None for items in lists for each in items):
        return None
    length = lengths.pop()
    return length if length > 1 else None


def _bit(value: Any) -> bool | None:
    """Return whether a cell says yes (1) or no (0); None if it is neither."""
    text = str(value).strip().casefold()
    return {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}.get(
        text
    )


def _is_no_label(value: Any) -> bool:
    return not isinstance(value, str | int | float) or as_label(value) is None
