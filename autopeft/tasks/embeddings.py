"""Fine-tuning of a sentence encoder, so that texts which belong together get similar embeddings.

Sources: in-batch negatives, Henderson et al. (arXiv 1705.00652), as `MultipleNegativesRankingLoss`
of sentence-transformers; CoSENT, Su (2022), as its `CoSENTLoss`; a squared error, as its
`CosineSimilarityLoss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from autopeft.errors import DataError, ModelError, SettingsError
from autopeft.models import checkpoint
from autopeft.tasks.base import Evaluation, FloatArray, Generated, IntArray, Scores, Task
from autopeft.tasks.batch import Batch, Window
from autopeft.tasks.columns import Column, check_kind, find_columns
from autopeft.tasks.data import EncodedSplit, TaskData
from autopeft.tasks.encoding import TOO_LONG, split_of, tokenized, without
from autopeft.tasks.examples import Examples, is_missing
from autopeft.tasks.metrics import Needs
from autopeft.tasks.reading import Table
from autopeft.utils.quiet import quiet_transformers
from autopeft.utils.serialize import read_json

T = TypeVar("T")

LOSSES = ("auto", "ranking", "cosent", "cosine")
POOLINGS = ("auto", "mean", "cls", "last")

_RANKS: Mapping[str, int] = {"recall_at_1": 1, "recall_at_10": 10, "ndcg_at_10": 10}
_ROWS_AT_ONCE = 1024
_PAIRS = ("sentence1", "sentence2", "score")


class Embeddings(Task):
    """Learns embeddings of texts from pairs, triplets, or pairs with scores.

    Rows of anchor and positive (and perhaps a hard negative) are learned by ranking: of all
    positives and negatives of the batch, an anchor's own must be the most similar one. Texts that
    the data joins, directly or through others, are never negatives of each other. Rows of two
    sentences and a score are learned by CoSENT, which takes any scores and uses their order, or by
    the squared error of the cosine.

    Options: `loss` (auto, ranking, cosent or cosine), `scale` (20.0, what cosines are multiplied
    with), `pooling` (auto: as the model's sentence-transformers files say, else mean; or mean, cls
    or last).

    Metrics of ranking count, for each row, the candidates that are at least as similar to its
    anchor as its positive. The candidates are the positives and negatives of the scored rows. The
    loss of a split is that of all its rows in one batch.

    Args:
        labels: Not used.
        pad_id: Id of the padding token.
        metric: Quality to optimize: ndcg_at_10 (default), recall_at_1 or recall_at_10; of pairs
            with scores, spearman (default) or pearson; or loss.
    """

    name = "embeddings"
    description = "embeddings of texts: pairs or triplets that belong together, pairs with scores"
    columns = (
        Column("anchor", "text", "a text, e.g. a query", False, ("query",)),
        Column("positive", "text", "a text that belongs to it", False, ("pos", "passage")),
        Column("negative", "text", "a text that does not", False, ("neg",)),
        Column("sentence1", "text", "the first of two texts with a score", False),
        Column("sentence2", "text", "the second of two texts with a score", False),
        Column("score", "number", "how similar they are", False, ("similarity",)),
    )
    target = "positive"
    identity = ("anchor", "sentence1", "sentence2")
    auto_class = "AutoModel"
    metrics = ("ndcg_at_10", "recall_at_1", "recall_at_10", "spearman", "pearson", "loss")
    predicts: ClassVar[tuple[Needs, ...]] = ("values",)
    options: ClassVar[Mapping[str, Any]] = {"loss": "auto", "scale": 20.0, "pooling": "auto"}
    can_share_batch = False

    pooling: str = "mean"
    is_scored: bool = False

    def check_options(self) -> None:
        """Raise a SettingsError if an option has an impossible value."""
        for name, known in (("loss", LOSSES), ("pooling", POOLINGS)):
            if self.option(name) not in known:
                raise SettingsError(
                    f"task_options.{name}",
                    self.option(name),
                    f"no such {name}",
                    f"use one of {', '.join(known)}",
                )
        if not self.option("scale") > 0:
            raise SettingsError(
                "task_options.scale", self.option("scale"), "must be above 0", "use e.g. 20"
            )

    @classmethod
    def fits_model(cls, config: Any) -> bool:
        """Return whether a model can be an encoder alone; None: unknown, True."""
        return super().fits_model(config) and not getattr(config, "is_encoder_decoder", False)

    @classmethod
    def find_columns(cls, named: Mapping[str, str], table: Table) -> dict[str, str]:
        """Return the source's columns: anchor and positive, or two sentences and a score.

        Raises:
            DataError: if a named column is missing, or neither is there.
        """
        found = find_columns(cls.columns, named, table)
        if {"anchor", "positive"} <= found.keys():
            return {role: found[role] for role in found if role not in _PAIRS}
        if set(_PAIRS) <= found.keys():
            return {role: found[role] for role in _PAIRS}
        shown = ", ".join(map(repr, table.column_names)) or "none"
        raise DataError(
            "positive",
            "",
            f"{table.source} has neither an anchor and a positive nor two sentences and a score",
            f"name them among {shown} with --columns anchor=NAME,positive=NAME",
        )

    def clean(self, table: Table) -> Examples:
        """Return the complete rows of a source, and count the others by what they lack.

        Raises:
            DataError: if a column is missing, a cell is of the wrong kind, or a score is too large
                for the loss.
        """
        names = self.find_columns(self.settings.column_names(), table)
        problems: list[str | None] = [None] * table.n_rows
        columns: dict[str, Sequence[Any]] = {}
        for column in (column for column in self.columns if column.role in names):
            values = table.column(column.role, names[column.role])
            check_kind(column, names[column.role], table, values)
            columns[column.role] = self.clean_column(column, values)
            for row, value in enumerate(columns[column.role]):
                if is_missing(value) and problems[row] is None:
                    problems[row] = f"the {column.role} is missing"
        if "score" in names:
            self._check_scores(columns["score"], names["score"], table)
        elif self.option("loss") not in ("auto", "ranking"):
            raise SettingsError(
                "task_options.loss",
                self.option("loss"),
                f"needs two sentences and a score, which {table.source} does not have",
                "use ranking, or name the columns",
            )
        return Examples.kept(columns, problems, table.source, table.notes)

    def clean_column(self, column: Column, values: Sequence[Any]) -> Sequence[Any]:
        """Return scores as floats."""
        if column.role != "score":
            return values
        return [None if is_missing(value) else float(value) for value in values]

    def _check_scores(self, scores: Sequence[float | None], name: str, table: Table) -> None:
        if self.option("loss") == "ranking":
            raise SettingsError(
                "task_options.loss", "ranking", "needs an anchor and a positive", "use cosent"
            )
        limit = 1.0 if self.option("loss") == "cosine" else np.finfo(np.float32).max
        for row, score in enumerate(scores, start=1):
            if score is not None and not abs(score) <= limit:
                raise DataError(
                    "score",
                    name,
                    f"row {row} of {table.source} holds {score:g}, which is no "
                    + ("cosine" if limit == 1.0 else "finite number"),
                    "divide the scores so that they are from 0 to 1, or use the loss cosent"
                    if limit == 1.0
                    else "correct it",
                )

    def check_rows(self, rows: Examples) -> None:
        """Raise a DataError if there is nothing to tell apart."""
        role = "score" if "score" in rows.columns else "positive"
        if len(rows) and len(set(rows[role])) == 1:
            raise DataError(
                role, rows.source, f"all rows have the same {role}", "give rows that differ"
            )

    def notes(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Say how tokens become an embedding, and which layers of the model are not used."""
        model, revision = self.settings.model, self.settings.model_revision
        if self.option("pooling") != "auto":
            why = ", as task_options.pooling asks"
        elif own_pooling(model, revision):
            why = ", as the model's 1_Pooling/config.json says"
        else:
            why = "; the model says nothing about pooling"
        notes = [f"embeddings are {_SHOWN[self._pooling()]}{why}"]
        if others := layers_after_pooling(model, revision):
            notes.append(f"the model's layers after pooling are left out: {', '.join(others)}")
        return tuple(notes)

    def usage(self, rows: Examples, max_length: int) -> str:
        """Return Python that computes embeddings of unit length."""
        return (
            "import torch\n"
            "from transformers import AutoTokenizer\n\n"
            "tokenizer = AutoTokenizer.from_pretrained(checkpoint)\n"
            "batch = tokenizer(\n"
            f'    ["a text", "another text"], truncation=True, max_length={max_length},\n'
            '    padding=True, padding_side="right", return_tensors="pt",\n'
            ")\n"
            "with torch.no_grad():\n"
            "    hidden = model(**batch)[0]\n"
            'mask = batch["attention_mask"]\n'
            f"pooled = {_POOLED[self._pooling()]}\n"
            "embeddings = torch.nn.functional.normalize(pooled, dim=-1)\n"
            "print(embeddings @ embeddings.T)"
        )

    def _pooling(self) -> str:
        """Return how tokens become an embedding, as the option or the model says."""
        if (asked := str(self.option("pooling"))) != "auto":
            return asked
        return own_pooling(self.settings.model, self.settings.model_revision) or "mean"

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize each text alone: two or three sequences a row.

        "labels" is each row's score; without scores, "group" is equal for texts that must not be
        each other's negatives, and "text" tells equal texts, both of shape (n_rows, k).
        """
        roles = [column.role for column in self.columns if column.role in rows.columns]
        roles = [role for role in roles if role != "score"]
        coded, long = [], set[int]()
        for role in roles:
            found, cut = tokenized(processor, {"text": list(rows[role])}, max_length)
            coded.append(found["input_ids"])
            long |= set(cut)
        dropped: dict[str, int] = {}
        if self.settings.on_long == "drop" and long:
            dropped = {TOO_LONG: len(long)}
            kept = without(long, len(rows))
            coded = [[ids[row] for row in kept] for ids in coded]
            rows, long = rows.take(kept), set()
        arrays: dict[str, NDArray[Any]]
        if "score" in rows.columns:
            arrays = {"labels": np.asarray(rows["score"], dtype=np.float32)}
        else:
            texts, groups = text_groups([rows[role] for role in roles])
            arrays = {"text": texts, "group": groups}
        return split_of(
            rows,
            [ids for row in zip(*coded, strict=True) for ids in row],
            row_arrays=arrays,
            sequences_per_row=len(roles),
            n_truncated=len(long),
            dropped=dropped,
        )

    def bound(self, data: TaskData) -> Self:
        """Return the task for encoded data, with the metrics that fit them.

        Raises:
            SettingsError: if the metric asked for needs other data.
        """
        twin = super().bound(data)
        twin.is_scored = "labels" in data.train.row_arrays
        twin.sequence_names = _PAIRS[:2] if twin.is_scored else ("anchor", "positive", "negative")
        twin.pooling = self._pooling()
        fits = {m.name: m for m in self.measured if twin._fits(m.name, m.needs)}
        if self.settings.metric is None:
            usual = next(name for name in self.metrics if name in fits)
            twin.quality = fits[usual].objective
        elif self.quality.name not in fits:
            raise SettingsError(
                "metric",
                self.quality.name,
                "needs " + ("an anchor and a positive" if twin.is_scored else "pairs with scores"),
                f"use one of {', '.join(fits)}",
            )
        twin.measured = tuple(fits.values())
        return twin

    def _fits(self, name: str, needs: Needs) -> bool:
        return name == "loss" or (needs == "values") == self.is_scored

    # Model

    def windows(self, batch: Batch) -> dict[str, Window]:
        """Return the first token or the last that is not padding, if pooling reads it alone."""
        last = batch.attention_mask.sum(dim=1) - 1
        if self.pooling == "cls":
            return {"first": Window(torch.zeros_like(last), 1)}
        return {"last": Window(last, 1)} if self.pooling == "last" else {}

    def embeddings(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the unit-length embedding of each text, shape (b, k, width), float32."""
        hidden: torch.Tensor = model(**batch.model_inputs())[0]
        mask = batch.attention_mask
        if self.pooling == "cls":
            pooled = hidden[:, 0].float()
        elif self.pooling == "last":
            rows = torch.arange(len(hidden), device=hidden.device)
            pooled = hidden[rows, mask.sum(dim=1) - 1].float()
        else:
            weights = mask[..., None].float()
            pooled = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)
        unit = functional.normalize(pooled, dim=-1)
        return unit.view(len(batch.rows), -1, unit.shape[-1])

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each row among the batch's, and ones.

        CoSENT compares pairs of rows, so each row gets the loss of the whole batch.
        """
        texts = self.embeddings(model, batch)
        scale = float(self.option("scale"))
        if not self.is_scored:
            losses = ranking_losses(texts, batch["group"], batch["text"], scale)
        else:
            cosines = (texts[:, 0] * texts[:, 1]).sum(dim=-1)
            if self.option("loss") == "cosine":
                losses = (cosines - batch.labels) ** 2
            else:
                losses = cosent_loss(cosines, batch.labels, scale).expand(len(cosines))
        return losses, torch.ones(len(batch.rows), device=losses.device)

    def score(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return the embeddings of each row; `summarize` compares all of them."""
        texts = self.embeddings(model, batch)
        ones = torch.ones(len(texts), device=texts.device)
        return {"loss": torch.zeros_like(ones), "weight": ones, "embeddings": texts}

    def summarize(
        self,
        scores: Scores,
        split: EncodedSplit,
        rows: IntArray,
        *,
        generated: Generated | None = None,
        n_draws: int = 0,
    ) -> Evaluation:
        """Return loss, metrics and row qualities, with all scored rows as one batch."""
        texts = torch.from_numpy(np.asarray(scores["embeddings"], dtype=np.float64))
        scale = float(self.option("scale"))
        if self.is_scored:
            cosines = (texts[:, 0] * texts[:, 1]).sum(dim=-1)
            labels = torch.from_numpy(split.row_arrays["labels"][rows].astype(np.float64))
            if self.option("loss") == "cosine":
                losses = (cosines - labels) ** 2
            else:
                losses = cosent_loss(cosines, labels, scale).expand(len(cosines))
            found = {"loss": losses.numpy(), "prediction": cosines.numpy()}
        else:
            group = torch.from_numpy(split.row_arrays["group"][rows])
            text = torch.from_numpy(split.row_arrays["text"][rows])
            found = {
                "loss": ranking_losses(texts, group, text, scale).numpy(),
                "rank": positive_ranks(texts, group, text).numpy(),
            }
        return super().summarize({**scores, **found}, split, rows, n_draws=n_draws)

    def loss_metric(self, name: str, scores: Scores) -> tuple[float, FloatArray]:
        """Return the loss, or a metric of the rank of each row's positive, and its row values."""
        if name not in _RANKS:
            return super().loss_metric(name, scores)
        ranks = scores["rank"].astype(np.float64)
        gains = np.ones_like(ranks) if name.startswith("recall") else 1.0 / np.log2(1.0 + ranks)
        rows: FloatArray = np.where(ranks <= _RANKS[name], gains, 0.0)
        return float(rows.mean()), rows

    def outputs(
        self, needs: Needs, scores: Scores, split: EncodedSplit, rows: IntArray
    ) -> tuple[Any, Any]:
        """Return each row's score and the cosine of its sentences."""
        return split.row_arrays["labels"][rows].astype(np.float64), scores["prediction"]


_SHOWN: Mapping[str, str] = {
    "mean": "the mean of a text's last hidden states",
    "cls": "the last hidden state of a text's first token",
    "last": "the last hidden state of a text's last token",
}

_POOLED: Mapping[str, str] = {
    "mean": "(hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)",
    "cls": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1]",
}
"""The same in Python, for a model card."""


def text_groups(columns: Sequence[Sequence[str]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which texts are equal, and which belong together.

    An anchor belongs to its positives, and all texts that share one belong together. A negative
    joins nothing.

    Args:
        columns: Anchors, positives and perhaps negatives, one of each per row.

    Returns:
        Number of each text, and the smallest number that it belongs to; both (n_rows, k).

    Example:
        >>> from autopeft.tasks.embeddings import text_groups
        >>> texts, groups = text_groups([["q", "r", "s"], ["a", "b", "a"]])
        >>> groups.tolist()  # q and s share the positive a
        [[0, 0], [2, 2], [0, 0]]
    """
    numbers: dict[str, int] = {}
    texts = np.asarray(
        [
            [numbers.setdefault(" ".join(text.casefold().split()), len(numbers)) for text in row]
            for row in zip(*columns, strict=True)
        ],
        dtype=np.int64,
    ).reshape(-1, len(columns))
    parent = list(range(len(numbers)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for anchor, positive in texts[:, :2].tolist():
        first, second = sorted((root(anchor), root(positive)))
        parent[second] = first
    roots = np.asarray([root(node) for node in range(len(parent))], dtype=np.int64)
    return texts, roots[texts]


def ranking_losses(
    texts: torch.Tensor, group: torch.Tensor, text: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the cross-entropy of each anchor's own positive among all candidates, shape (b,).

    Args:
        texts: Embeddings of unit length, shape (b, k, width): anchor, positive, perhaps negative.
        group: Texts of a group are no negatives of each other, shape (b, k), int64.
        text: Number of each text, shape (b, k), int64.
        scale: What cosines are multiplied with.
    """
    losses = []
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        logits, targets = _similarities(texts, group, text, start)
        losses.append(functional.cross_entropy(scale * logits, targets, reduction="none"))
    return torch.cat(losses)


def positive_ranks(texts: torch.Tensor, group: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return the rank of each anchor's positive among all candidates, from 1, shape (b,), int64.

    A candidate that is as similar counts as better; equal texts count once. Arguments are those of
    `ranking_losses`.
    """
    n_rows = len(texts)
    candidates = text[:, 1:].T.reshape(-1)
    first = torch.from_numpy(np.unique(candidates.numpy(), return_index=True)[1])
    ranks = []
    for start in range(0, n_rows, _ROWS_AT_ONCE):
        logits, targets = _similarities(texts, group, text, start)
        own = logits.gather(1, targets[:, None])
        others = logits[:, first].clone()
        others[candidates[first][None] == candidates[targets][:, None]] = -torch.inf
        ranks.append(1 + (others >= own).sum(dim=1))
    return torch.cat(ranks)


def _similarities(
    texts: torch.Tensor, group: torch.Tensor, text: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines of some anchors and all candidates, and the place of each one's positive.

    Candidates are all positives, then all negatives. Those that are no negatives have -inf; an
    anchor's own negative is always one.
    """
    n_rows = len(texts)
    rows = torch.arange(start, min(n_rows, start + _ROWS_AT_ONCE), device=texts.device)
    candidates = texts[:, 1:].transpose(0, 1).reshape(-1, texts.shape[-1])
    belongs = group[rows, 0][:, None] == group[:, 1:].T.reshape(-1)[None]
    place = torch.arange(len(candidates), device=texts.device)[None]
    is_own = place % n_rows == rows[:, None]
    cosines = texts[rows, 0] @ candidates.T
    return cosines.masked_fill(belongs & ~is_own, -torch.inf), rows


def cosent_loss(cosines: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """Return log(1 + the sum of exp(scale * (c_j - c_i)) over all rows i with a larger label).

    Args:
        cosines: Shape (b,).
        labels: Shape (b,).
        scale: What cosines are multiplied with.
    """
    differences = scale * (cosines[None, :] - cosines[:, None])
    is_larger = labels[:, None] > labels[None, :]
    wrong = differences.masked_fill(~is_larger, -torch.inf).reshape(-1)
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), dim=0)


def layers_after_pooling(model: str, revision: str | None = None) -> list[str]:
    """Return the kinds of layers with weights that sentence-transformers puts after the pooling.

    Args:
        model: Folder or hub id.
        revision: Revision of a hub model.
    """
    modules = _json_file(model, "modules.json", list[dict[str, Any]], revision)
    kinds = [str(module.get("type", "")) for module in modules or []]
    known = (".Transformer", ".Pooling", ".Normalize")
    return [kind.rpartition(".")[2] for kind in kinds if not kind.endswith(known)]


def own_pooling(model: str, revision: str | None = None) -> str | None:
    """Return the pooling that a model's sentence-transformers files name, one of `POOLINGS`.

    Args:
        model: Folder or hub id.
        revision: Revision of a hub model.

    Returns:
        None if they name none.

    Raises:
        SettingsError: if it is one that this task does not know.
    """
    config = _json_file(model, "1_Pooling/config.json", dict[str, Any], revision)
    if config is None:
        return None
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else []
    modes += [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    known = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
    known |= {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_lasttoken": "last",
    }
    found = known.get(modes[0]) if len(modes) == 1 else None
    if found is None and modes:
        raise SettingsError(
            "task_options.pooling",
            "auto",
            f"the model pools by {' and '.join(modes)}, which is not known here",
            "set it to mean, cls or last",
        )
    return found


def _json_file(model: str, name: str, kind: type[T], revision: str | None) -> T | None:
    """Return the content of a file beside the model's weights; None if there is none.

    Raises:
        ModelError: if it is damaged, or no `kind`.
    """
    path = Path(model) / name
    if not Path(model).is_dir():
        from transformers.utils import cached_file

        try:
            with quiet_transformers():
                found = cached_file(
                    model,
                    name,
                    revision=revision or "main",
                    local_files_only=checkpoint.is_local_only(model),
                )
        except OSError:
            return None
        path = Path(found or "")
    if not path.is_file():
        return None
    remedy = "download the model again"
    return read_json(path, kind, field="model", remedy=remedy, error=ModelError)
