"""Classification of the words of a text, such as names of persons and places (NER)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from autopeft.errors import DataError, ModelError
from autopeft.models.backbone import joins_words, load_tokenizer
from autopeft.tasks.base import FloatArray, IntArray, Scores, Task
from autopeft.tasks.batch import Batch
from autopeft.tasks.columns import Column
from autopeft.tasks.data import IGNORED, SPLITS, EncodedSplit, SplitName, TaskData
from autopeft.tasks.encoding import TOO_LONG, flat, split_of
from autopeft.tasks.examples import Examples
from autopeft.tasks.labels import as_label, check_known, in_order, list_in
from autopeft.tasks.metrics import Needs
from autopeft.tasks.reading import Table
from autopeft.tasks.tag_metrics import has_entities
from autopeft.utils.device import sent
from autopeft.utils.quiet import quiet_transformers

_TAG_NAMES = ("ner_tags", "ner", "labels", "label", "pos_tags", "chunk_tags", "upos")


class TokenClassification(Task):
    """Predicts one tag per word; the first token of a word has its label, as in transformers' NER.

    Words beyond `max_length` are cut, counted, and neither learned nor scored. Tags such as B-PER
    and I-PER (also BIOES, BILOU) are scored by entities, as seqeval does: one is right if its type
    and both ends are. Other tags, such as parts of speech, are scored by words: F1, precision and
    recall are then means over the tags.

    Args:
        labels: Tag names in the order of their index.
        pad_id: Id of the padding token.
        metric: Quality to optimize: entity_f1 (default), entity_precision, entity_recall,
            token_accuracy or loss.
    """

    name = "token-classification"
    description = "one tag for each word: named entities, parts of speech"
    columns = (
        Column("tokens", "any", "the list of words", names=("words",)),
        Column("tags", "any", "the list of tags, one for each word", names=_TAG_NAMES),
    )
    target = "tags"
    identity = ("tokens",)
    auto_class = "AutoModelForTokenClassification"
    metrics = ("entity_f1", "entity_precision", "entity_recall", "token_accuracy", "loss")
    predicts = ("tags",)
    n_words: int = 0
    """Words of the longest row."""

    @classmethod
    def check_fit(cls, table: Table, names: Mapping[str, str]) -> None:
        """Check the first rows of a source.

        Raises:
            DataError: if they are no lists of words and tags.
        """
        _read_rows(table, names, table.head(names["tokens"]), table.head(names["tags"]))

    def load_processor(self, model: str, revision: str | None = None) -> Any:
        """Return the model's tokenizer, which must tell which word a token is of.

        Raises:
            ModelError: if it cannot.
        """
        tokenizer = load_tokenizer(model, revision=revision, for_words=True)
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                "model",
                model,
                f"its tokenizer ({type(tokenizer).__name__}) does not tell the word of a token",
                "use a model with a fast tokenizer",
            )
        return tokenizer

    def clean(self, table: Table) -> Examples:
        """Return the rows that have words and tags, and count the others.

        Raises:
            DataError: if a cell is of the wrong kind, or a row has more words than tags or fewer.
        """
        names = self.find_columns(self.settings.column_names(), table)
        columns, problems = _read_rows(
            table,
            names,
            table.column("tokens", names["tokens"]),
            table.column("tags", names["tags"]),
        )
        return Examples.kept(columns, problems, table.source, table.notes)

    def strata(self, rows: Examples) -> Sequence[Hashable]:
        """Return the rarest tag of each row, so that each split gets some of it."""
        counts = Counter(tag for tags in rows["tags"] for tag in tags)
        return [min(tags, key=lambda tag: (counts[tag], tag)) for tags in rows["tags"]]

    def check_rows(self, rows: Examples) -> None:
        """Raise a DataError if all words of the training source have the same tag."""
        tags = {tag for own in rows["tags"] for tag in own}
        if len(tags) == 1:
            name = self.settings.column_names().get("tags", "tags")
            problem = f"all words have the tag {tags.pop()!r}"
            raise DataError("tags", name, problem, "give rows of at least two tags")

    def labels_of(self, splits: Mapping[SplitName, Examples]) -> tuple[str, ...]:
        """Return the tags of the training rows.

        Raises:
            DataError: if another split has a tag that they lack.
        """
        found = {name: {tag for own in splits[name]["tags"] for tag in own} for name in SPLITS}
        return in_order(check_known("tags", found), self.model_config)[0]

    def replaces_head(self, labels: tuple[str, ...]) -> bool:
        """Return whether the checkpoint has no head of this kind for these tags."""
        config = self.model_config
        return not self.has_head(config) or not in_order(labels, config)[1]

    def notes(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Say what decides how tags are scored and words are joined, and if a head is replaced."""
        notes = []
        if not has_entities(labels):
            notes.append(
                "the tags have no B- and I-, so entity_f1 is the mean F1 of the tags over words"
            )
        if self.has_head(self.model_config) and self.replaces_head(labels):
            names = ", ".join(map(str, (self.model_config.id2label or {}).values()))
            notes.append(f"the model's head knows other tags ({names}); a new head is trained")
        if self.processor is not None and joins_words(self.processor):
            notes.append("the tokenizer puts no spaces between words")
        elif getattr(self.processor, "add_prefix_space", False):
            notes.append("the tokenizer is loaded with add_prefix_space=True")
        return tuple(notes)

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize words; "labels" is the tag's index at the first token of a word, else -100."""
        index = {label: i for i, label in enumerate(labels)}
        ids: list[list[int]] = []
        kinds: list[list[int]] = []
        targets: list[list[int]] = []
        problems: list[str | None] = []
        n_cut = n_cut_words = n_empty_words = 0
        with quiet_transformers():
            coded = processor(
                [list(words) for words in rows["tokens"]],
                is_split_into_words=True,
                truncation=True,
                max_length=max_length,
                return_attention_mask=False,
            )
        for row, tags in enumerate(rows["tags"]):
            words = coded.word_ids(row)
            beyond = {w for more in coded.encodings[row].overflowing for w in more.word_ids}
            kept = set(words) - {None}
            if beyond and self.settings.on_long == "drop":
                problems.append(TOO_LONG)
                continue
            n_cut += bool(beyond)
            n_cut_words += len(beyond - kept - {None})
            n_empty_words += len(tags) - len((beyond | kept) - {None})
            if not kept:
                problems.append("no word has a token")
                continue
            problems.append(None)
            ids.append(coded["input_ids"][row])
            if "token_type_ids" in coded:
                kinds.append(coded["token_type_ids"][row])
            targets.append(
                [
                    IGNORED if word is None or word == before else index[tags[word]]
                    for before, word in zip([None, *words[:-1]], words, strict=True)
                ]
            )
        notes = []
        if n_cut_words:
            notes.append(f"{_words(n_cut_words)} of {rows.source} cut at {max_length} tokens")
        if n_empty_words:
            notes.append(f"{_words(n_empty_words)} of {rows.source} without a token or a label")
        places = np.asarray([i for i, problem in enumerate(problems) if problem is None], np.int64)
        token_arrays: dict[str, NDArray[Any]] = {"labels": flat(targets).astype(np.int32)}
        if any(map(any, kinds)):
            token_arrays["token_type_ids"] = flat(kinds).astype(np.int8)
        return split_of(
            rows.take(places),
            ids,
            token_arrays=token_arrays,
            n_truncated=n_cut,
            dropped=dict(Counter(problem for problem in problems if problem is not None)),
            notes=tuple(notes),
        )

    def bound(self, data: TaskData) -> Self:
        """Return the task for encoded data, ready to compute losses and scores."""
        twin = super().bound(data)
        twin.n_words = max(
            int(np.add.reduceat(_is_labeled(split).astype(np.int64), split.offsets[:-1]).max())
            for split in data.splits.values()
        )
        return twin

    def usage(self, rows: Examples, max_length: int) -> str:
        """Return Python that tags the words of a text, each by its first token."""
        return (
            "from transformers import AutoTokenizer, pipeline\n\n"
            "tokenizer = AutoTokenizer.from_pretrained(checkpoint)\n"
            "tag = pipeline(\n"
            '    "token-classification", model=model, tokenizer=tokenizer, '
            'aggregation_strategy="first"\n'
            ")\n"
            'print(tag("Words with spaces between them ."))'
        )

    def model_kwargs(self) -> dict[str, Any]:
        """Return size of the head and tag names."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed cross-entropy and the number of labeled words of each row."""
        losses, _ = _token_losses(model, batch)
        return losses.sum(dim=1), (batch.labels != IGNORED).sum(dim=1).float()

    def score(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return summed loss, numbers of labeled and of right words, and tags (b, n_words).

        Beyond the words of a row, tags are -1.
        """
        losses, logits = _token_losses(model, batch)
        is_labeled = batch.labels != IGNORED
        labeled = batch.on_host("labels") != IGNORED
        rows, columns = labeled.nonzero()
        words = (labeled.cumsum(axis=1) - 1)[labeled]
        row, column, word = sent(torch.from_numpy(np.stack([rows, columns, words])), logits.device)
        tags = torch.full((len(is_labeled), self.n_words), -1, device=logits.device)
        found = logits.argmax(dim=-1)
        tags[row, word] = found[row, column]
        return {
            "loss": losses.sum(dim=1),
            "weight": is_labeled.sum(dim=1).float(),
            "correct": ((found == batch.labels) & is_labeled).sum(dim=1).float(),
            "prediction": tags.to(torch.int16),
        }

    def outputs(
        self, needs: Needs, scores: Scores, split: EncodedSplit, rows: IntArray
    ) -> tuple[Any, Any]:
        """Return the right and the predicted tags of each row's labeled words."""
        is_labeled, labels = _is_labeled(split), split.token_arrays["labels"]
        names = np.asarray(self.labels, dtype=object)
        targets, predictions = [], []
        for place, row in enumerate(rows):
            span = slice(split.offsets[row], split.offsets[row + 1])
            true = labels[span][is_labeled[span]]
            targets.append(tuple(names[true]))
            predictions.append(tuple(names[scores["prediction"][place][: len(true)]]))
        return targets, predictions

    def loss_metric(self, name: str, scores: Scores) -> tuple[float, FloatArray]:
        """Return the loss, or the share of words with the right tag, and each row's."""
        if name != "token_accuracy":
            return super().loss_metric(name, scores)
        right, n_words = scores["correct"], scores["weight"]
        return float(right.sum() / n_words.sum()), right / n_words


def _is_labeled(split: EncodedSplit) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = split.token_arrays["labels"] != IGNORED
    return found


def _token_losses(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token, (b, t), 0 where it has no label; and logits (b, t, n)."""
    logits: torch.Tensor = model(**batch.model_inputs()).logits.float()
    # Tokens of a prompt may stand before a row's own.
    logits = logits[:, -batch.labels.shape[1] :]
    losses = functional.cross_entropy(
        logits.transpose(1, 2), batch.labels, reduction="none", ignore_index=IGNORED
    )
    return losses, logits


# Rows


def _read_rows(
    table: Table, names: Mapping[str, str], words: Sequence[Any], tags: Sequence[Any]
) -> tuple[dict[str, list[Any]], list[str | None]]:
    """Return the words and tags of each row, and why a row is left out, None if it is not.

    Raises:
        DataError: if a cell is no list of words or tags, or a row has more words than tags or
            fewer.
    """
    columns: dict[str, list[Any]] = {"tokens": [], "tags": []}
    problems: list[str | None] = []
    for row, cells in enumerate(zip(words, tags, strict=True)):
        problem = None
        lists: list[list[str]] = []
        for role, cell in zip(columns, cells, strict=True):
            items = [] if _is_gap(cell) else list_in(cell)
            if items is None:
                _refuse(role, names, row, table, cell, "a list is expected")
            if not items and problem is None:
                problem = f"the {role} are missing"
            lists.append([_item(role, names, row, table, item) for item in items])
        if problem is None and len(lists[0]) != len(lists[1]):
            raise DataError(
                "tags",
                names["tags"],
                f"row {row + 1} of {table.source} has {len(lists[0])} tokens and "
                f"{len(lists[1])} tags",
                "give one tag for each token",
            )
        problems.append(problem)
        for role, items in zip(columns, lists, strict=True):
            columns[role].append(tuple(items))
    return columns, problems


def _item(role: str, names: Mapping[str, str], row: int, table: Table, item: Any) -> str:
    if role == "tokens":
        if not isinstance(item, str):
            _refuse(role, names, row, table, item, "a word is expected")
        return item
    label = as_label(item) if isinstance(item, str | int) and not isinstance(item, bool) else None
    if label is None:
        _refuse(role, names, row, table, item, "a tag is expected")
    return label


def _is_gap(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and cell != cell) or cell == ""


def _refuse(
    role: str, names: Mapping[str, str], row: int, table: Table, cell: Any, what: str
) -> NoReturn:
    shown = " ".join(repr(cell).split())[:60]
    raise DataError(
        role,
        names[role],
        f"row {row + 1} of {table.source} holds {shown} where {what}",
        f"give lists of words and of tags, or name another column with --columns {role}=NAME",
    )


def _words(count: int) -> str:
    return f"{count} word{'' if count == 1 else 's'}"
