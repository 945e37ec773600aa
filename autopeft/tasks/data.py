"""The encoded data of a search: flat arrays that workers share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autopeft.costs.objectives import Objective
from autopeft.settings import SearchSettings
from autopeft.tasks.summary import DataSummary

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What the forward of a text model gets, as far as the data has it."""

IGNORED = -100
"""The label of a token that adds no loss, as in torch and transformers."""


@dataclass(frozen=True)
class Ragged:
    """Rows of unlike length, concatenated.

    Attributes:
        values: All rows one after another, shape (n_values, ...).
        offsets: Row i is `values[offsets[i]:offsets[i + 1]]`, shape (n_rows + 1,), int64.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Values of each row, shape (n_rows,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class EncodedSplit:
    """Rows of a split, ready for the model.

    A row has `sequences_per_row` sequences of tokens: one for most tasks, two for a preference
    (chosen, rejected). The sequences of row i are `i * sequences_per_row` and those that follow.
    A task without tokens, such as images, has none and keeps its inputs in `row_arrays`.

    Attributes:
        tokens: Token ids of all sequences, shape (n_tokens,), int32.
        offsets: Sequence i is `tokens[offsets[i]:offsets[i + 1]]`, shape (n_sequences + 1,), int64.
        source_rows: Index of each row in its source, from 0, shape (n_rows,), int64. It identifies
            the rows for anyone who scores them again.
        source: File name, or hub id and split.
        token_arrays: Name -> one value per token, shape (n_tokens,): "labels" (-100: no loss),
            "token_type_ids".
        row_arrays: Name -> one value per row, shape (n_rows, ...): "labels", "pixel_values",
            "input_features".
        ragged: Name -> rows of their own lengths, such as the "labels" of a decoder beside an
            encoder.
        texts: Name -> one text per row that tells a user what the row's input is.
        sequences_per_row: Sequences of tokens in a row.
        palettes: Name of a row array of bytes, shape (n_rows, channels, ...) -> the number that
            each byte stands for, shape (channels, 256), float32. The bytes need a quarter of the
            memory.
        tokens_per_row: What the model makes of a row in a split without tokens, e.g. patches.
        n_truncated: Number of rows that were cut to the longest allowed length.
        dropped: Reason -> rows that could not be encoded.
        notes: What else was noticed, one sentence each.

    Example:
        >>> split = autopeft.EncodedSplit(
        ...     tokens=np.array([2, 7, 3, 2, 8, 9, 3], np.int32),
        ...     offsets=np.array([0, 3, 7]),
        ...     source_rows=np.array([0, 1]),
        ...     source="reviews.csv",
        ...     row_arrays={"labels": np.array([1, 0])},
        ... )
        >>> len(split), split.lengths.tolist()
        (2, [3, 4])
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    source_rows: NDArray[np.int64]
    source: str
    token_arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    row_arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    ragged: Mapping[str, Ragged] = field(default_factory=dict)
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sequences_per_row: int = 1
    palettes: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    tokens_per_row: int = 1
    n_truncated: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.source_rows)

    def first(self, n_rows: int) -> EncodedSplit:
        """Return the first rows."""
        n = min(n_rows, len(self))
        offsets = self.offsets[: n * self.sequences_per_row + 1]
        end = int(offsets[-1]) if len(offsets) else 0

        def shorter(rows: Ragged) -> Ragged:
            return Ragged(rows.values[: rows.offsets[n]], rows.offsets[: n + 1])

        return replace(
            self,
            tokens=self.tokens[:end],
            offsets=offsets,
            source_rows=self.source_rows[:n],
            token_arrays={name: values[:end] for name, values in self.token_arrays.items()},
            row_arrays={name: values[:n] for name, values in self.row_arrays.items()},
            ragged={name: shorter(rows) for name, rows in self.ragged.items()},
            texts={name: texts[:n] for name, texts in self.texts.items()},
        )

    @classmethod
    def joined(cls, splits: Sequence[EncodedSplit]) -> EncodedSplit:
        """Return the rows of several splits of one source, one split after another."""
        first = splits[0]

        def together(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate(list(arrays))

        def ends(offsets: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
            lengths = together([np.diff(each) for each in offsets])
            return np.append(0, np.cumsum(lengths)).astype(np.int64)

        return replace(
            first,
            tokens=together([split.tokens for split in splits]),
            offsets=ends([split.offsets for split in splits]),
            source_rows=together([split.source_rows for split in splits]),
            token_arrays={
                name: together([split.token_arrays[name] for split in splits])
                for name in first.token_arrays
            },
            row_arrays={
                name: together([split.row_arrays[name] for split in splits])
                for name in first.row_arrays
            },
            ragged={
                name: Ragged(
                    together([split.ragged[name].values for split in splits]),
                    ends([split.ragged[name].offsets for split in splits]),
                )
                for name in first.ragged
            },
            texts={n: tuple(t for split in splits for t in split.texts[n]) for n in first.texts},
            n_truncated=sum(split.n_truncated for split in splits),
        )

    @property
    def has_tokens(self) -> bool:
        """Whether the rows have sequences of tokens."""
        return len(self.offsets) > 1

    @cached_property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence, shape (n_sequences,)."""
        return np.diff(self.offsets)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Length of each row's longest sequence, shape (n_rows,), or `tokens_per_row`."""
        if not self.has_tokens:
            return np.full(len(self), self.tokens_per_row, dtype=np.int64)
        longest: NDArray[np.int64] = self.sequence_lengths.reshape(
            len(self), self.sequences_per_row
        ).max(axis=1)
        for rows in self.ragged.values():
            longest = np.maximum(longest, rows.lengths)
        return longest

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield every array with a name of its own, in a fixed order."""
        yield "tokens", self.tokens
        yield "offsets", self.offsets
        for kind, arrays in (("token", self.token_arrays), ("row", self.row_arrays)):
            for name in sorted(arrays):
                yield f"{kind}:{name}", arrays[name]
        for name in sorted(self.palettes):
            yield f"palette:{name}", self.palettes[name]
        for name in sorted(self.ragged):
            yield f"ragged:{name}", self.ragged[name].values
            yield f"ragged:{name}:offsets", self.ragged[name].offsets


@dataclass(frozen=True)
class OutputScale:
    """What a model's output is in the unit of the data: shift + factor * output.

    Attributes:
        shift: What is added.
        factor: What the output is multiplied with.
    """

    shift: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths of the training rows, which the price of a candidate depends on.

    Attributes:
        mean_padded: Mean padded length of a length-bucketed batch, in tokens.
        longest: Tokens of the longest row.
        mean_targets: Mean number of positions per row that need logits: 1 for classification.
        most_targets: The same of the row that has most of them.
        source_share: Padded tokens that an encoder reads, as a share of `mean_padded`.
        target_share: Padded tokens that a decoder beside it writes, likewise.
    """

    mean_padded: float
    longest: int
    mean_targets: float
    most_targets: float = 1.0
    source_share: float = 1.0
    target_share: float = 1.0


@dataclass(frozen=True)
class TaskData:
    """The encoded data of a search.

    Attributes:
        task: Name of the task it was encoded for.
        splits: Split name -> rows.
        labels: Label names, index = target; empty if the task has none.
        pad_id: Token id that pads batches; the attention mask hides it.
        input_names: Names of the tensors that the model's forward gets, as far as a batch has them.
        max_length: Longest sequence allowed, in tokens.
        dropped: Reason -> number of rows dropped for it.
        n_duplicates: Rows dropped from train or validation because a later split has them too.
        notes: What else was noticed when reading, one sentence each.
        output_scale: The model's output in the unit of the data; a saved head has it inside. None:
            outputs have no unit.
        columns: Role -> column of the training source.
        available: Split name -> rows that there were, where a setting took fewer.
        replaces_head: Whether the model's output layer is new even if its checkpoint has one.
        usage: Python that uses the trained model; see `Task.usage`.
        second: What a trained model is scored on beside these rows: text that it should not forget,
            and further tasks.
    """

    task: str
    splits: Mapping[SplitName, EncodedSplit]
    labels: tuple[str, ...]
    pad_id: int
    input_names: tuple[str, ...] = TEXT_INPUTS
    max_length: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    n_duplicates: int = 0
    notes: tuple[str, ...] = ()
    output_scale: OutputScale | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    available: Mapping[SplitName, int] = field(default_factory=dict)
    replaces_head: bool = False
    usage: str = ""
    second: tuple[SecondTask, ...] = ()

    @property
    def train(self) -> EncodedSplit:
        """Rows to train on."""
        return self.splits["train"]

    @property
    def validation(self) -> EncodedSplit:
        """Rows that the search scores."""
        return self.splits["validation"]

    @property
    def test(self) -> EncodedSplit:
        """Rows that only the confirmation scores."""
        return self.splits["test"]

    @property
    def n_dropped(self) -> int:
        """Rows dropped for any reason but being a duplicate."""
        return sum(self.dropped.values())

    @property
    def n_truncated(self) -> int:
        """Number of rows that were cut to the longest allowed length."""
        return sum(split.n_truncated for split in self.splits.values())

    @property
    def input_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of one row of each input that is no token: pixels, sounds."""
        arrays = self.train.row_arrays
        return {name: a.shape[1:] for name, a in arrays.items() if name in self.input_names}

    @property
    def n_bytes(self) -> int:
        """Size of all arrays, which the workers share."""
        own = sum(a.nbytes for split in self.splits.values() for _, a in split.arrays())
        return own + sum(each.data.n_bytes for each in self.second)

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over all arrays and labels, those of `second` too."""
        digest = hashlib.sha256(repr((self.task, self.labels, self.pad_id)).encode())
        for second in self.second:
            digest.update(second.fingerprint.encode())
        for split in (self.splits[name] for name in SPLITS if name in self.splits):
            for key, array in split.arrays():
                digest.update(f"{key}{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
            for key, texts in sorted(split.texts.items()):
                digest.update(repr((key, texts)).encode())
        return digest.hexdigest()[:16]

    def summary(self) -> DataSummary:
        """Return what was read, dropped and cut."""
        return DataSummary(
            rows={name: len(rows) for name, rows in self.splits.items()},
            dropped_rows=self.n_dropped,
            labels=self.labels,
            fingerprint=self.fingerprint,
            task=self.task,
            columns=self.columns,
            sources={name: rows.source for name, rows in self.splits.items()},
            dropped=self.dropped,
            n_duplicates=self.n_duplicates,
            n_cut=self.n_truncated,
            max_length=self.max_length,
            available={str(name): count for name, count in self.available.items()},
            notes=self.notes,
            usage=self.usage,
        )

    def length_statistics(self, batch_size: int) -> LengthStatistics:
        """Return the lengths of training rows in batches of `batch_size` rows of similar length."""
        order = np.argsort(self.train.lengths, kind="stable")
        lengths = self.train.lengths[order]
        n_full = max(1, len(lengths) // batch_size)
        # The longest row of each batch of sorted rows; training batches come close to it.
        ends = np.minimum(np.arange(1, n_full + 1) * batch_size, len(lengths)) - 1
        mean_padded = float(lengths[ends].mean())
        shares: dict[str, float] = {}
        n_targets = most = 1.0
        labels = self.train.token_arrays.get("labels")
        written = self.train.ragged.get("labels")
        if written is not None:
            labels = written.values

            def share(of: NDArray[np.int64]) -> float:
                """Return the mean of the longest in each batch."""
                longest = [part.max() for part in np.array_split(of[order], n_full)]
                return float(np.mean(longest)) / mean_padded

            if self.train.has_tokens:
                shares["source_share"] = min(1.0, share(self.train.sequence_lengths))
            shares["target_share"] = min(1.0, share(written.lengths))
        if labels is not None:
            is_target = labels != IGNORED
            n_targets = float(is_target.sum()) / len(self.train)
            offsets = self.train.offsets if written is None else written.offsets
            before = np.append(0, np.cumsum(is_target))[offsets[:: self.train.sequences_per_row]]
            most = float(np.diff(before).max())
        return LengthStatistics(
            mean_padded=mean_padded,
            longest=int(lengths[-1]),
            mean_targets=n_targets,
            most_targets=most,
            **shares,
        )


@dataclass(frozen=True)
class SecondTask:
    """Rows of another source than the search's, on which what it trains is scored too.

    Attributes:
        quality: What the score is to the search: "forgetting", or NAME.METRIC.
        metric: Its name in the second task.
        settings: Name the second task, its metric and its options.
        data: The encoded rows: those of "validation" score trials, those of "test" finalists. With
            "test" alone, it scores both. Labels and the scale of outputs are the search's.
        is_over_base: Whether the score of the bare base model is subtracted, so that it counts
            what the training changed.

    Example:
        >>> from autopeft.costs.objectives import Objective
        >>> rows = autopeft.EncodedSplit(
        ...     np.array([2, 7, 3], np.int32), np.array([0, 3]), np.array([0]), "notes.txt"
        ... )
        >>> data = TaskData("sft", {"test": rows}, labels=(), pad_id=0)
        >>> settings = autopeft.SearchSettings(task="sft")
        >>> second = SecondTask(Objective("forgetting", "minimize"), "loss", settings, data, True)
        >>> second.split("validation"), second.name
        ('test', 'forgetting')
    """

    quality: Objective
    metric: str
    settings: SearchSettings
    data: TaskData
    is_over_base: bool = False

    @property
    def name(self) -> str:
        """Name of the quality."""
        return self.quality.name

    def split(self, name: SplitName) -> SplitName:
        """Return the split that is scored where the search scores its split of that name."""
        return name if name in self.data.splits else "test"

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over its rows, and over how they are scored."""
        settings = self.settings
        options = tuple(sorted((settings.task_options or {}).items()))
        scored = (self.name, self.metric, settings.generation_rows, options, self.is_over_base)
        return hashlib.sha256(repr((scored, self.data.fingerprint)).encode()).hexdigest()[:16]
