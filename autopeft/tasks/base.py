"""The Task base class, and what an evaluation returns."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.costs.objectives import PERPLEXITY, Objective
from autopeft.errors import SettingsError
from autopeft.models.backbone import load_tokenizer
from autopeft.models.loading import auto_loader, position_limit
from autopeft.tasks.batch import Batch, Window
from autopeft.tasks.columns import Column, check_kind, find_columns
from autopeft.tasks.data import TEXT_INPUTS, EncodedSplit, OutputScale, SplitName, TaskData
from autopeft.tasks.examples import Examples, is_missing
from autopeft.tasks.labels import has_head
from autopeft.tasks.metrics import (
    METRICS,
    Metric,
    Needs,
    bootstrap_draws,
    evaluate_metric,
    find_metric,
    is_metric,
    resample,
)
from autopeft.utils.extremes import bounded

if TYPE_CHECKING:
    from autopeft.settings import SearchSettings
    from autopeft.tasks.reading import Table

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_SAME = 1e-3
"""Relative difference between a quality and the mean of its rows above which it is none of them."""

_REHEARSED = 64
"""Validation rows on which metrics are tried before anything is spent."""

Generated = tuple[Sequence[str], Sequence[str], Sequence[str]]
"""Prompts, references and what a model wrote, one text per row."""
Scores = Mapping[str, NDArray[Any]]
"""Name -> one value per row, shape (n_rows, ...): "loss", "weight" and what the task predicts."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split.

    Attributes:
        loss: Mean loss: per row, or per learned token.
        metrics: Every metric of the task by name.
        rows: Quality of each row in the order of the split, shape (n_rows,), larger is better.
            A paired bootstrap resamples these.
        draws: The quality, signed so that larger is better, on resamples of the rows, shape
            (n_draws,); empty where the quality is a mean over `rows`. Of a perplexity, the loss.

    Example:
        >>> right = np.array([1.0, 0.0, 1.0, 1.0])
        >>> float(autopeft.Evaluation(0.41, {"accuracy": right.mean()}, right).metrics["accuracy"])
        0.75
    """

    loss: float
    metrics: Mapping[str, float]
    rows: FloatArray
    draws: FloatArray | None = None


class Task(ABC):
    """One kind of problem: its columns, cleaning, encoding, loss, prediction and metrics.

    A search configures a task with its settings, encodes the data with it, and binds it to them.
    Subclass it for a problem of your own, and pass an object as `task`, or register it.

    Attributes:
        name: Its name in the settings.
        description: One line for `autopeft tasks`.
        columns: What it reads from a source.
        target: Role of the column to be learned; a split that has no values there is ignored.
        identity: Roles of the columns that tell rows apart: rows equal there never fall into
            different splits. None: all of them.
        auto_class: Name of the class of transformers that loads a model for it.
        input_names: Names of the tensors that the model's forward gets.
        sequence_names: Names of a row's sequences of tokens, for `autopeft preview`, e.g. "chosen"
            and "rejected"; the last one is that of what a decoder beside an encoder writes.
        metrics: Names of the metrics that every evaluation reports; the first is the default
            quality.
        predicts: What `outputs` can give a metric (`Metric.needs`); the first is what a function of
            the user's gets.
        space: The search space of searches that name none: as the setting `space`.
        options: Name -> default of what the setting `task_options` may change.
        can_share_batch: Whether rows of several adapters may be computed in one batch.
        can_pack: Whether several rows may follow each other in one sequence of the model.
        is_autoregressive: Whether the loss needs a model that does not see later tokens.
        auto_precision: Precision where the settings leave it open; "auto": the faster one.
        settings: The settings of the search.
        model_config: The configuration of the model, from transformers; None where not needed.
        processor: The model's tokenizer or processor; None until it is loaded.
        quality: The objective that a search optimizes.
        measured: The metrics of an evaluation, the quality among them.
        labels: Label names in the order of their index.
        pad_id: Id of the padding token.

    Example:
        >>> from autopeft.tasks.regression import Regression
        >>> class Stars(Regression):
        ...     name = "stars"
        ...     description = "the stars of each review"
        ...     metrics = ("mae", "loss")
        >>> issubclass(Stars, autopeft.Task), Stars().quality.name
        (True, 'mae')
    """

    name: ClassVar[str]
    description: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    target: ClassVar[str]
    identity: ClassVar[tuple[str, ...]] = ()
    auto_class: ClassVar[str]
    input_names: ClassVar[tuple[str, ...]] = TEXT_INPUTS
    sequence_names: tuple[str, ...] = ()
    metrics: ClassVar[tuple[str, ...]]
    predicts: ClassVar[tuple[Needs, ...]] = ()
    space: ClassVar[str | Mapping[str, Any]] = "default"
    options: ClassVar[Mapping[str, Any]] = {}
    auto_precision: ClassVar[str] = "auto"
    can_share_batch: ClassVar[bool] = True
    can_pack: ClassVar[bool] = False
    is_autoregressive: ClassVar[bool] = False

    settings: SearchSettings
    model_config: Any = None
    processor: Any = None
    quality: Objective
    measured: tuple[Metric, ...]
    labels: tuple[str, ...] = ()
    pad_id: int = 0

    def __init__(
        self, labels: tuple[str, ...] = (), pad_id: int = 0, metric: str | None = None
    ) -> None:
        self.labels = labels
        self.pad_id = pad_id
        self._measure(metric)

    def _measure(self, asked: str | None) -> None:
        """Set `measured` and `quality`."""
        usual = [METRICS[name] for name in self.metrics]
        chosen = usual[0]
        if asked is not None:
            named = {metric.name: metric for metric in usual}
            found = named.get(asked)
            if found is None and is_metric(asked):
                found = find_metric(asked, (*self.predicts, "loss")[0])
            if found is None or (asked not in named and found.needs not in self.predicts):
                remedy = f"use one of {self.metric_names()}"
                if found is None:
                    remedy += ", a scorer of scikit-learn or package.module:name"
                raise SettingsError("metric", asked, f"not measured by {self.name}", remedy)
            chosen = found
        self.quality = chosen.objective
        self.measured = (*(m for m in usual if m.name != chosen.name), chosen)

    @classmethod
    def metric_names(cls) -> str:
        """Return the names of all registered metrics that the task can measure."""
        others = (m.name for m in METRICS.parts() if m.needs in cls.predicts)
        return ", ".join(dict.fromkeys((*cls.metrics, *others)))

    # Before the data is read

    def configured(self, settings: SearchSettings, model_config: Any = None) -> Self:
        """Return the task for a search.

        Args:
            settings: The settings of the search.
            model_config: The configuration of its model, from transformers.

        Raises:
            SettingsError: if it does not measure the metric asked for.
        """
        twin = copy.copy(self)
        twin.settings, twin.model_config = settings, model_config
        twin._measure(settings.metric)
        roles = [column.role for column in self.columns]
        for role, name in settings.column_names().items():
            if role not in roles:
                remedy = f"name columns for {', '.join(roles)}, or another --task"
                raise SettingsError(role, name, f"{self.name} reads no such column", remedy)
        for name, value in (settings.task_options or {}).items():
            if name not in self.options:
                remedy = f"use {', '.join(self.options)}" if self.options else "leave it out"
                raise SettingsError("task_options", name, f"{self.name} has no such option", remedy)
            if isinstance(self.options[name], float) and not isinstance(value, float | int):
                raise SettingsError(f"task_options.{name}", value, "must be a number", "correct it")
        twin.check_options()
        return twin

    def option(self, name: str) -> Any:
        """Return the value of an option, as the settings or the default give it."""
        return (self.settings.task_options or {}).get(name, self.options[name])

    def check_options(self) -> None:  # noqa: B027  (most tasks have none)
        """Raise a SettingsError if an option has an impossible value."""

    @classmethod
    def fits_model(cls, config: Any) -> bool:
        """Return whether `auto_class` loads models of this configuration; None: unknown, True.

        An encoder-decoder can be loaded as a decoder alone, which is not what its user means.
        """
        if config is None:
            return True
        if cls.is_autoregressive and getattr(config, "is_encoder_decoder", False):
            return False
        mapping = getattr(auto_loader(cls.auto_class), "_model_mapping", None)
        return mapping is None or type(config) in mapping or bool(getattr(config, "auto_map", None))

    @classmethod
    def find_columns(cls, named: Mapping[str, str], table: Table) -> dict[str, str]:
        """Return the source's column for each role that it has.

        Args:
            named: Role -> column, as the settings name them.
            table: The source.

        Raises:
            DataError: if a named column is missing, or a required one is not recognized.
        """
        return find_columns(cls.columns, named, table)

    @classmethod
    def check_fit(cls, table: Table, names: Mapping[str, str]) -> None:
        """Check the first rows of a source whose columns have been found.

        Args:
            table: The source.
            names: Role -> column.

        Raises:
            DataError: if they are not what this task learns from.
        """
        for column in cls.columns:
            if column.role in names:
                check_kind(column, names[column.role], table, table.head(names[column.role]))

    def load_processor(self, model: str, revision: str | None = None) -> Any:
        """Return what `encode` needs of the model: its tokenizer, unless a task says otherwise.

        Raises:
            ModelError: if the model has none.
        """
        return load_tokenizer(model, revision=revision)

    def length_limit(self) -> int | None:
        """Return the longest sequence that the model takes, in tokens; None: unknown."""
        return None if self.model_config is None else position_limit(self.model_config)

    # From rows to arrays

    def usual_length(self, splits: Mapping[SplitName, Examples]) -> int | None:
        """Return the default `max_length` of inputs without tokens; None: they have no length."""
        return None

    def clean(self, table: Table) -> Examples:
        """Return the complete rows of a source, and count the others by what they lack.

        Raises:
            DataError: if a column is missing, or a cell is of the wrong kind.
        """
        names = self.find_columns(self.settings.column_names(), table)
        columns: dict[str, Sequence[Any]] = {}
        problems: list[str | None] = [None] * table.n_rows
        for column in self.columns:
            if column.role not in names:
                continue
            values = table.column(column.role, names[column.role])
            check_kind(column, names[column.role], table, values)
            columns[column.role] = self.clean_column(column, values)
            if column.is_required or column.role in self.settings.column_names():
                for row, value in enumerate(columns[column.role]):
                    if is_missing(value) and problems[row] is None:
                        problems[row] = f"the {column.role} is missing"
        return Examples.kept(columns, problems, table.source, table.notes)

    def clean_column(self, column: Column, values: Sequence[Any]) -> Sequence[Any]:
        """Return the cells of a column as the task uses them; None where one is missing."""
        return values

    def strata(self, rows: Examples) -> Sequence[Hashable]:
        """Return what splits balance, one value per row; by default nothing."""
        return [0] * len(rows)

    def check_rows(self, rows: Examples) -> None:  # noqa: B027  (most tasks take any rows)
        """Raise a DataError if the rows of the training source cannot be learned from."""

    def labels_of(self, splits: Mapping[SplitName, Examples]) -> tuple[str, ...]:
        """Return the label names in the order of their index; by default there are none."""
        return ()

    def output_scale(self, splits: Mapping[SplitName, Examples]) -> OutputScale | None:
        """Return what turns the model's output into the unit of the data; None: it has none.

        A new head is trained without it and saved with it inside.
        """
        return None

    def replaces_head(self, labels: tuple[str, ...]) -> bool:
        """Return whether the model's output layer is new even if its checkpoint has one.

        It is where nobody can tell which of its outputs means what.
        """
        return False

    @classmethod
    def has_head(cls, config: Any) -> bool:
        """Return whether a checkpoint was saved with a head of this task's kind.

        Args:
            config: The model's configuration, from transformers; None: unknown.
        """
        return has_head(config, cls.auto_class.removeprefix("AutoModelFor"))

    def notes(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Return what a user should know about the data or the model, one sentence each."""
        return ()

    def usage(self, rows: Examples, max_length: int) -> str:
        """Return Python that uses the loaded `model`, for the model card; by default none.

        `checkpoint` is the name of what the model's tokenizer or processor is loaded from.

        Args:
            rows: Training rows.
            max_length: Longest sequence, in tokens; 0 without tokens.
        """
        return ""

    @abstractmethod
    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Encode rows for the model, each sequence at most `max_length` tokens long.

        A row that cannot be encoded is left out and counted in `dropped`.
        """

    def bound(self, data: TaskData) -> Self:
        """Return the task for encoded data, ready to compute losses and scores."""
        twin = copy.copy(self)
        twin.labels, twin.pad_id = data.labels, data.pad_id
        return twin

    # Model

    def on_base_model(
        self, model: torch.nn.Module, data: TaskData, device: str | torch.device
    ) -> TaskData:
        """Return the data with what only the base model tells, computed once by each worker.

        Args:
            model: The base model without adapters.
            data: The encoded data, one split a call: each in the precision that it is scored in.
            device: Device of the model.
        """
        return data

    def model_kwargs(self) -> dict[str, Any]:
        """Return arguments for `from_pretrained`, e.g. the labels."""
        return {}

    def windows(self, batch: Batch) -> Mapping[str, Window]:
        """Return the positions where a model may read its last hidden states, by name.

        Which one it reads, if any, depends on the model (`autopeft.profiling.output_positions`).
        Without windows, the last block computes all positions.
        """
        return {}

    # Training and evaluation

    @abstractmethod
    def row_losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's summed loss and its number of terms, both float32 of shape (b,)."""

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of a batch, a differentiable float32 scalar."""
        losses, weights = self.row_losses(model, batch)
        return losses.sum() / weights.sum().clamp(min=1.0)

    def probe_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return a scalar that reads the hidden states that `loss` reads.

        Called before there is a base model, so without what `on_base_model` adds to the data.
        """
        return self.loss(model, batch)

    def losses(self, model: torch.nn.Module, batch: Batch, n_parts: int) -> torch.Tensor:
        """Return the mean loss of each of `n_parts` equal parts of a batch, shape (n_parts,)."""
        losses, weights = self.row_losses(model, batch)
        sums = losses.view(n_parts, -1).sum(dim=1)
        return sums / weights.view(n_parts, -1).sum(dim=1).clamp(min=1.0)

    @abstractmethod
    def score(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return "loss" and "weight" as `row_losses` does, and what `summarize` needs of each row.

        Called under `torch.inference_mode()`. Tensors stay on the device, shape (b, ...).
        """

    def needs_text(self) -> bool:
        """Return whether a metric is of generated text."""
        return any(metric.needs == "text" for metric in self.measured)

    def generate(
        self, model: Any, data: TaskData, split: SplitName, rows: IntArray, device: Any
    ) -> Generated:
        """Return what the model writes for rows of a split; only for tasks that predict text.

        Args:
            model: The model with its adapters, in evaluation mode.
            data: The encoded data.
            split: Name of the split.
            rows: Positions in the split.
            device: Device of the model.
        """
        raise NotImplementedError(f"{self.name} generates no text")

    def outputs(
        self, needs: Needs, scores: Scores, split: EncodedSplit, rows: IntArray
    ) -> tuple[Any, Any]:
        """Return (targets, predictions) for metrics that need predictions of a kind.

        Args:
            needs: One of `predicts` but "text"; see `Metric`.
            scores: What `score` returned, for all rows.
            split: The encoded rows.
            rows: Positions of the scored rows in the split, shape (n_rows,).
        """
        raise NotImplementedError(f"{self.name} predicts no {needs}")

    def check_metrics(self, data: TaskData) -> None:
        """Compute each metric once on made-up predictions: another row's right ones.

        Raises:
            SettingsError: if a metric of the user's fails, or returns no finite number.
        """
        split = data.validation
        rows = np.arange(min(len(split), _REHEARSED), dtype=np.int64)
        for metric in self.measured:
            if metric.needs == "text":
                prompts, references = self.prompts_and_references(split, rows)
                evaluate_metric(metric, references, np.roll(references, 1).tolist(), prompts)
            elif metric.needs in ("labels", "scores", "values") and "labels" in split.row_arrays:
                targets = split.row_arrays["labels"][rows]
                predictions = np.roll(targets, 1, axis=0)
                if metric.needs == "scores" and targets.ndim == 1:
                    predictions = 0.9 * np.eye(len(self.labels))[predictions]
                    predictions += 0.1 / len(self.labels)
                whole = metric.for_classes(len(self.labels))
                kind = np.float64 if metric.needs == "values" else np.int64
                evaluate_metric(whole, targets.astype(kind), predictions)

    def prompts_and_references(
        self, split: EncodedSplit, rows: IntArray
    ) -> tuple[list[str], list[str]]:
        """Return what is given and what is right as text; only for tasks that predict text."""
        raise NotImplementedError(f"{self.name} generates no text")

    def loss_metric(self, name: str, scores: Scores) -> tuple[float, FloatArray]:
        """Return a metric that the loss alone tells, and the quality of each row for it.

        Args:
            name: "loss", or another name in `metrics` that the task computes itself.
            scores: What `score` returned, for all rows.
        """
        if name != "loss":
            raise NotImplementedError(f"{self.name} does not compute {name}")
        n_terms = max(1.0, float(scores["weight"].sum()))
        rows: FloatArray = -scores["loss"] / np.maximum(scores["weight"], 1.0)
        return float(scores["loss"].sum()) / n_terms, rows

    def summarize(
        self,
        scores: Scores,
        split: EncodedSplit,
        rows: IntArray,
        *,
        generated: Generated | None = None,
        n_draws: int = 0,
    ) -> Evaluation:
        """Return loss, metrics and row qualities.

        Args:
            scores: What `score` returned, for all rows.
            split: The encoded rows.
            rows: Positions of the scored rows in the split, shape (n_rows,).
            generated: What the model wrote, perhaps for fewer rows; None: metrics of text are left
                out.
            n_draws: Resamples of the rows, for a quality that is no mean over them.

        Raises:
            SettingsError: if a metric of the user's fails, or returns no finite number.
        """
        loss, row_losses = self.loss_metric("loss", scores)
        values: dict[str, float] = {}
        quality_rows, draws = row_losses, None
        for metric in self.measured:
            prompts: Sequence[str] | None = None
            is_quality = metric.name == self.quality.name
            if metric.needs == "loss":
                values[metric.name], per_row = self.loss_metric(metric.name, scores)
                if is_quality:
                    quality_rows = per_row
                    # A perplexity is compared by its logarithm: one that diverged has no variance.
                    name = "loss" if metric.name == PERPLEXITY else metric.name
                    if n_draws and not self._is_row_mean(name, scores):
                        draws = self._loss_draws(name, scores, n_draws)
                continue
            if metric.needs == "text":
                if generated is None:
                    continue
                prompts, targets, predictions = generated
            else:
                targets, predictions = self.outputs(metric.needs, scores, split, rows)
            metric = metric.for_classes(len(self.labels))
            values[metric.name], found = evaluate_metric(metric, targets, predictions, prompts)
            if is_quality and found is not None:
                quality_rows = self.quality.sign() * found
            elif is_quality and n_draws:
                sign = self.quality.sign()
                draws = sign * bootstrap_draws(metric, targets, predictions, n_draws, 0, prompts)
        return Evaluation(loss, values, quality_rows, draws)

    def _is_row_mean(self, name: str, scores: Scores) -> bool:
        """Return whether a metric that the loss tells is the mean of rows, as heavy as each other.

        A loss of tokens is not where rows have unlike numbers of them: a few long rows may decide
        it, and most rows tell another order of two models.
        """
        value, rows = self.loss_metric(name, scores)
        weights = scores["weight"]
        difference = abs(self.quality.sign() * value - float(rows.mean()))
        is_equal = difference <= _SAME * max(1.0, abs(value))
        return is_equal and bool((weights == weights[0]).all())

    def _loss_draws(self, name: str, scores: Scores, n: int) -> FloatArray:
        """Return a metric that the loss tells on resamples of the rows, larger is better; (n,)."""
        n_rows = len(scores["weight"])
        values = np.empty(n)
        for i in range(n):
            index = resample(n_rows, np.random.default_rng([0, i]))
            taken = {key: each[index] for key, each in scores.items()}
            values[i], _ = self.loss_metric(name, taken)
        return bounded(self.quality.sign() * values)
