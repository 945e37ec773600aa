"""Classification of texts, or of pairs of texts, into one class each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from autopeft.errors import DataError
from autopeft.tasks.base import IntArray, Scores, Task
from autopeft.tasks.batch import Batch, Window
from autopeft.tasks.columns import Column
from autopeft.tasks.data import SPLITS, EncodedSplit, SplitName
from autopeft.tasks.encoding import encode_texts
from autopeft.tasks.examples import Examples
from autopeft.tasks.labels import as_label, check_known, fraction_in, in_order, list_in
from autopeft.tasks.metrics import Needs
from autopeft.tasks.reading import Table

TEXT_NAMES = ("sentence", "review", "content", "document", "tweet", "headline", "comment", "body")
FIRST_NAMES = ("sentence1", "premise", "question1", "text1", "text_a", "sentence_a")
SECOND_NAMES = ("sentence2", "hypothesis", "question2", "text2", "text_b", "sentence_b", "question")
LABEL_NAMES = ("labels", "class", "category", "sentiment", "target", "gold_label", "is_duplicate")


class TextClassification(Task):
    """Predicts one label per text.

    Args:
        labels: Label names in the order of their index.
        pad_id: Id of the padding token.
        metric: Quality to optimize: accuracy (default), f1, matthews or loss.
    """

    name = "text-classification"
    description = "one class for each text, or for each pair of texts"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", "text", "the text to classify", names=(*TEXT_NAMES, *FIRST_NAMES)),
        Column("text_pair", "text", "the second text of a pair", False, SECOND_NAMES),
        Column("label", "label", "the class", names=LABEL_NAMES),
    )
    target = "label"
    identity: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    auto_class = "AutoModelForSequenceClassification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "matthews", "loss")
    predicts: ClassVar[tuple[Needs, ...]] = ("labels", "scores")

    task_of_lists: ClassVar[str] = "multi-label-classification"
    """The task for labels that are lists; "": none."""
    task_of_numbers: ClassVar[str] = "regression"
    """The task for labels that are numbers with fractions; "": none."""

    @classmethod
    def check_fit(cls, table: Table, names: Mapping[str, str]) -> None:
        """Check the first rows; lists and fractions are no classes.

        Raises:
            DataError: if they are not what this task learns from.
        """
        cls._check_labels(table, names["label"], table.head(names["label"]))
        super().check_fit(table, names)

    @classmethod
    def _check_labels(cls, table: Table, name: str, values: Sequence[Any]) -> None:
        for row, value in enumerate(values):
            if list_in(value) is not None:
                shown = " ".join(str(value).split())[:60]
                raise DataError(
                    "label",
                    name,
                    f"row {row + 1} of {table.source} holds a list ({shown})"
                    " where one class is expected",
                    f"use --task {cls.task_of_lists}"
                    if cls.task_of_lists
                    else "name another column",
                )
        if (fraction := fraction_in(values)) is not None:
            remedy = "name a column with classes"
            if cls.task_of_numbers:
                remedy = f"use --task {cls.task_of_numbers}, or {remedy}"
            raise DataError(
                "label",
                name,
                f"the column of {table.source} holds numbers such as {fraction}, "
                "which are no classes",
                remedy,
            )

    def clean(self, table: Table) -> Examples:
        """Return the complete rows of a source, and count the others by what they lack.

        Raises:
            DataError: if a column is missing, or labels are lists or numbers with fractions.
        """
        name = self.find_columns(self.settings.column_names(), table)["label"]
        self._check_labels(table, name, table.column("label", name))
        return super().clean(table)

    def clean_column(self, column: Column, values: Sequence[Any]) -> Sequence[Any]:
        """Return labels as text: a whole number loses its decimal point."""
        return [as_label(value) for value in values] if column.role == "label" else values

    def strata(self, rows: Examples) -> Sequence[Hashable]:
        """Return the labels."""
        return rows["label"]

    def check_rows(self, rows: Examples) -> None:
        """Raise a DataError if the labels of the training source cannot be classes."""
        labels = set(rows["label"])
        name = self.settings.column_names().get("label", "label")
        if len(labels) == 1:
            raise DataError(
                "label",
                name,
                f"the column has one class only ({labels.pop()!r})",
                "give rows of at least two classes",
            )
        if labels and len(labels) > len(rows) / 2:
            raise DataError(
                "label",
                name,
                f"the column has {len(labels)} different values in {len(rows)} rows",
                "name a column with classes, or another --task (see `autopeft tasks`)",
            )

    def labels_of(self, splits: Mapping[SplitName, Examples]) -> tuple[str, ...]:
        """Return the labels of the training rows.

        Raises:
            DataError: if another split has a label that they lack.
        """
        labels = check_known("label", {name: set(splits[name]["label"]) for name in SPLITS})
        return in_order(labels, self.model_config)[0]

    def notes(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Say so if the checkpoint's head is replaced."""
        if not self.has_head(self.model_config) or not self.replaces_head(labels):
            return ()
        names = ", ".join(map(str, (getattr(self.model_config, "id2label", None) or {}).values()))
        return (f"the model's head knows other classes ({names}); a new head is trained",)

    def replaces_head(self, labels: tuple[str, ...]) -> bool:
        """Return whether the checkpoint has no head of this kind for these labels."""
        config = self.model_config
        return not self.has_head(config) or not in_order(labels, config)[1]

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize texts or pairs; "labels" is the index of each row's label."""
        index = {label: i for i, label in enumerate(labels)}
        targets = np.asarray([index[label] for label in rows["label"]], dtype=np.int64)
        return encode_texts(processor, rows, targets, max_length, on_long=self.settings.on_long)

    pipeline_arguments: ClassVar[str] = ""
    """What transformers' pipeline is called with besides the text, e.g. ", top_k=None"."""

    def usage(self, rows: Examples, max_length: int) -> str:
        """Return Python that classifies a text, or a pair, with transformers' pipeline."""
        is_pair = "text_pair" in rows.columns
        text = '{"text": "a text", "text_pair": "another"}' if is_pair else '"a text"'
        limits = f"truncation=True, max_length={max_length}"
        return (
            "from transformers import AutoTokenizer, pipeline\n\n"
            "tokenizer = AutoTokenizer.from_pretrained(checkpoint)\n"
            'classify = pipeline("text-classification", model=model, tokenizer=tokenizer)\n'
            f"print(classify({text}, {limits}{self.pipeline_arguments}))"
        )

    def model_kwargs(self) -> dict[str, Any]:
        """Return size of the head, label names and padding token.

        A decoder's classifier reads the last token that is not padding, so it must know the padding
        token; many decoders define none.
        """
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "pad_token_id": self.pad_id,
        }

    def windows(self, batch: Batch) -> dict[str, Window]:
        """Return the first token (most encoders) and the last that is not padding (decoders)."""
        is_token = batch.input_ids != self.pad_id
        columns = torch.arange(batch.input_ids.shape[1], device=is_token.device)
        last = (columns * is_token).argmax(dim=1)  # (b,)
        return {"first": Window(torch.zeros_like(last), 1), "last": Window(last, 1)}

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of each row, and ones."""
        losses = functional.cross_entropy(row_logits(model, batch), batch.labels, reduction="none")
        return losses, torch.ones_like(losses)

    def score(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return the loss and the predicted label of each row."""
        logits = row_logits(model, batch)
        losses = functional.cross_entropy(logits, batch.labels, reduction="none")
        scores = {
            "loss": losses,
            "weight": torch.ones_like(losses),
            "prediction": logits.argmax(dim=-1),
        }
        if any(metric.needs == "scores" for metric in self.measured):
            scores["probabilities"] = logits.softmax(dim=-1)
        return scores

    def outputs(
        self, needs: Needs, scores: Scores, split: EncodedSplit, rows: IntArray
    ) -> tuple[Any, Any]:
        """Return the index of each row's label, and the predicted one or all probabilities."""
        return split.row_arrays["labels"][rows], scores[
            "probabilities" if needs == "scores" else "prediction"
        ]


def row_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits of each row, shape (b, n_labels), float32 in any precision."""
    logits: torch.Tensor = model(**batch.model_inputs()).logits
    return logits.float()
