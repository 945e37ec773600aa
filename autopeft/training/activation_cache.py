"""Caches what the frozen blocks below the lowest adapter compute, for all steps and all trials.

Nothing below the lowest adapted block changes while adapters are trained, and dropout is off there
(`autopeft.training.trainer.train_adapters_only`). So the hidden states that enter that block are
the same in every epoch, evaluation and trial. A served forward pass runs the model's own code:
embeddings, masks and positions are computed as usual, but the lower blocks return their input
unchanged, and the last of them returns the cached states. This works for any model whose blocks
are called one after another.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autopeft.models.layout import is_chain
from autopeft.tasks.batch import Batch, collate, token_positions
from autopeft.tasks.data import EncodedSplit, SplitName, TaskData
from autopeft.training.acceleration import (
    NO_ACCELERATION,
    TOLERANCE,
    Acceleration,
    verified,
    warn_off,
)
from autopeft.training.batching import evaluation_batches
from autopeft.training.precision import Precision

FILL_TOKENS = 4096
"""Padded tokens computed at once when filling."""


class ActivationCache:
    """Cached hidden states of one frozen model, for any lowest adapted block.

    Belongs to a worker and lives as long as its model. If a first check finds that cached and
    computed outputs differ, or the blocks cannot be skipped, it warns once and turns itself off.

    Args:
        model: The frozen model. Adapters may be attached and detached above the cut.
        block_paths: Path of each block in the order of computation.
        data: The rows that will be served.
        device: Device of the model.
        precision: Precision of the trainings; bf16 stores bf16, at half the size.
        max_bytes: Limit on the size of all states. The least recently used cut is dropped first.
        folder: Folder of files that the workers of a machine share; None: keep the states in
            memory. Must be empty or belong to the same model, data and precision.

    Attributes:
        setup_seconds: Seconds spent on computing states.
        is_off: True if the cache serves nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        block_paths: Sequence[str],
        data: TaskData,
        *,
        device: str = "cpu",
        precision: Precision = "fp32",
        max_bytes: int = 2 << 30,
        folder: Path | None = None,
    ) -> None:
        self.model = model
        self.block_paths = tuple(block_paths)
        self.data = data
        self.device = device
        self.precision = precision
        self.setup_seconds = 0.0
        self.description = f"the activation cache of {type(model).__name__}"
        # Lower blocks can be skipped only if the blocks form a chain, and states are kept by token.
        self.is_off = not (is_chain(self.block_paths) and data.train.has_tokens)
        self._max_bytes = max_bytes
        self._folder = folder
        self._stores = OrderedDict[tuple[int, Precision, SplitName], tuple[ActivationStore, int]]()
        self._cuts: dict[tuple[int, Precision], _Cut] = {}

    def below(self, lowest_layer: int | None, precision: Precision | None = None) -> Acceleration:
        """Return what skips the blocks below a plan's lowest adapted one; None (a head): all.

        `precision` replaces that of the trainings.
        """
        cut = len(self.block_paths) if lowest_layer is None else lowest_layer
        if cut == 0 or self.is_off:
            return NO_ACCELERATION
        key = (cut, precision or self.precision)
        return self._cuts.setdefault(key, _Cut(self, *key))

    def turn_off(self) -> None:
        """Serve nothing from now on."""
        self.is_off = True
        self._stores.clear()

    def blocks(self) -> list[nn.Module]:
        """Return the blocks as they are now: an adapter may have replaced one."""
        return [self.model.get_submodule(path) for path in self.block_paths]

    def highest_below(
        self, cut: int, precision: Precision, split: SplitName, sequences: NDArray[np.int64]
    ) -> AbstractContextManager[None]:
        """Serve these sequences from the highest cut below `cut` that holds all of them, if any."""
        lower_ones = (key for key in self._cuts if key[0] < cut and key[1] == precision)
        for lower in sorted(lower_ones, reverse=True):
            held = self._stores.get((*lower, split))
            if held is not None and not len(held[0].missing(sequences)):
                own = self._cuts[lower]
                return own.skipping(own.states(held[0], sequences))
        return nullcontext()

    def store(
        self, cut: int, precision: Precision, split: SplitName, width: int
    ) -> ActivationStore | None:
        """Return the states that enter a block, or None if the size limit leaves no room."""
        key = (cut, precision, split)
        if key in self._stores:
            self._stores.move_to_end(key)
            return self._stores[key][0]
        rows = self.data.splits[split]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        size = len(rows.tokens) * width * dtype.itemsize
        if size > self._max_bytes:
            return None
        while sum(used for _, used in self._stores.values()) + size > self._max_bytes:
            self._stores.popitem(last=False)
        name = f"{split}-{cut}-{precision}.states"
        path = None if self._folder is None else self._folder / name
        store = ActivationStore(rows, width, dtype=dtype, device=self.device, path=path)
        self._stores[key] = (store, size)
        return store


class _Cut:
    """Skips the blocks below one cut, in one precision."""

    def __init__(self, cache: ActivationCache, cut: int, precision: Precision) -> None:
        self._cache = cache
        self._cut = cut
        self._precision: Precision = precision
        self._is_checked = False
        # Learned from the first captured output:
        self._width = 0
        self._dtype = torch.float32
        self._n_extras = 0

    @property
    def setup_seconds(self) -> float:
        """Seconds the cache has spent on computing states, for all cuts together."""
        return self._cache.setup_seconds

    @contextmanager
    def serving(self, batch: Batch) -> Iterator[None]:
        """Skip the lower blocks for this batch; compute and keep what is not cached yet."""
        hidden = None if self._cache.is_off else self._hidden(batch)
        with nullcontext() if hidden is None else self.skipping(hidden):
            yield

    def _hidden(self, batch: Batch) -> torch.Tensor | None:
        """Return what enters the block at the cut, shape (b, t, width); None if unavailable."""
        started = time.perf_counter()
        # Trainings and evaluations both fill a store, so it is filled in the mode of neither.
        with torch.inference_mode(False), torch.no_grad():
            if self._width == 0 and not self._learn(batch):
                return None
            store = self._cache.store(self._cut, self._precision, batch.split, self._width)
            if store is None:
                return None
            missing = store.missing(np.unique(batch.sequences))
            if len(missing):
                self._fill(store, batch.split, missing)
            hidden = self.states(store, batch.sequences)
            is_good = self._is_checked or self._check(batch, hidden)
        if len(missing):
            self._cache.setup_seconds += time.perf_counter() - started
        return hidden if is_good else None

    def _learn(self, batch: Batch) -> bool:
        """Find out what a block returns; False if a block with that output cannot be skipped."""
        output = self._run_to(self._cut - 1, batch)
        first, *extras = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, torch.Tensor) or any(extra is not None for extra in extras):
            self._cache.turn_off()
            warn_off(self._cache.description, "its blocks return more than hidden states")
            return False
        self._n_extras = len(extras) if isinstance(output, tuple) else -1
        self._dtype = first.dtype
        self._width = first.shape[-1]
        return True

    def _fill(self, store: ActivationStore, split: SplitName, sequences: NDArray[np.int64]) -> None:
        source = self._cache.data.splits[split]
        rows = np.unique(sequences // source.sequences_per_row)
        for part in evaluation_batches(source.lengths[rows], FILL_TOKENS):
            batch = collate(self._cache.data, split, rows[part], self._cache.device)
            with self._cache.highest_below(self._cut, self._precision, split, batch.sequences):
                store.put(batch.sequences, hidden_of(self._run_to(self._cut - 1, batch)))

    def states(self, store: ActivationStore, sequences: NDArray[np.int64]) -> torch.Tensor:
        """Return what enters the block at the cut for sequences that are all cached."""
        return store.get(sequences, self._cache.device, self._dtype)

    def _check(self, batch: Batch, hidden: torch.Tensor) -> bool:
        """Compare the last block's output with and without the cache, once."""
        self._is_checked = True
        last = len(self._cache.block_paths) - 1
        # Adapters above the cut may use dropout: both passes draw the same numbers.
        devices = [self._cache.device] if torch.device(self._cache.device).type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            plain = hidden_of(self._run_to(last, batch))
            torch.manual_seed(0)
            with self.skipping(hidden):
                served = hidden_of(self._run_to(last, batch))
        is_token = batch.attention_mask.bool()
        tolerance = TOLERANCE[self._precision]
        if verified(served[is_token], plain[is_token], tolerance, what=self._cache.description):
            return True
        self._cache.turn_off()
        return False

    def _run_to(self, layer: int, batch: Batch) -> Any:
        """Run the model up to and including a block; return that block's output."""
        return block_output(self._cache.model, self._cache.blocks()[layer], batch)

    @contextmanager
    def skipping(self, hidden: torch.Tensor) -> Iterator[None]:
        """Make the lower blocks return their input, and the last of them `hidden`."""

        def return_input(hidden_states: torch.Tensor, *_rest: Any, **_options: Any) -> Any:
            return self._as_output(hidden_states)

        def return_cached(*_rest: Any, **_options: Any) -> Any:
            return self._as_output(hidden)

        lower = self._cache.blocks()[: self._cut]
        with ExitStack() as stack:
            for block in lower:
                # An attribute of the instance hides the method of its class; deleting it
                # afterwards restores the method.
                stack.callback(delattr, block, "forward")
                block.forward = return_input if block is not lower[-1] else return_cached
            yield

    def _as_output(self, hidden: torch.Tensor) -> Any:
        return hidden if self._n_extras < 0 else (hidden, *[None] * self._n_extras)


class _Reached(Exception):
    """Ends a forward pass at a block; its argument is that block's output."""


def block_output(model: nn.Module, block: nn.Module, batch: Batch) -> Any:
    """Run the model up to and including a block; return that block's output."""

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        raise _Reached(output)

    handle = block.register_forward_hook(stop)
    try:
        model(**batch.model_inputs())
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise RuntimeError(f"the block {type(block).__name__} was not called")


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states in a block's output, shape (b, t, width)."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class ActivationStore:
    """Hidden states of a split's sequences, in memory or in a file that workers share.

    One state per token, concatenated like the split's tokens, and filled one by one. With a file,
    every process that opens it sees the sequences that any of them has filled. Two that fill
    the same one at once write the same values, so no lock is needed; it is marked as filled
    only after its values are written. Without a `path` the states are kept on the device.
    """

    def __init__(
        self,
        split: EncodedSplit,
        width: int,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        path: Path | None = None,
    ) -> None:
        self._split = split
        n_tokens, n_sequences = len(split.tokens), len(split.offsets) - 1
        # A training cannot write to what is allocated in inference mode, where the caller may be.
        with torch.inference_mode(False):
            if path is None:
                self._states = torch.empty(n_tokens, width, dtype=dtype, device=device)
                self._filled = torch.zeros(n_sequences, dtype=torch.uint8)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._states = torch.from_file(
                    str(path), shared=True, size=n_tokens * width, dtype=dtype
                ).view(n_tokens, width)
                self._filled = torch.from_file(
                    f"{path}.filled", shared=True, size=n_sequences, dtype=torch.uint8
                )
        self._is_filled: NDArray[np.uint8] = self._filled.numpy()

    def missing(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the sequences that are not filled yet."""
        is_missing: NDArray[np.bool_] = self._is_filled[sequences] == 0
        return sequences[is_missing]

    def put(self, sequences: NDArray[np.int64], hidden: torch.Tensor) -> None:
        """Fill sequences (b,) with their states, padded on the right, shape (b, t, width)."""
        positions, is_token = token_positions(self._split, sequences)
        tokens = torch.from_numpy(is_token).to(hidden.device)
        self._states[positions[is_token]] = hidden[tokens].to(
            self._states.device, self._states.dtype
        )
        self._is_filled[sequences] = 1

    def get(
        self, sequences: NDArray[np.int64], device: str | torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the states of filled sequences, shape (b, t, width), zero beyond an end."""
        positions, is_token = token_positions(self._split, sequences)
        flat = torch.from_numpy(positions.ravel()).to(self._states.device)
        hidden = self._states.index_select(0, flat).to(device, dtype)
        hidden = hidden.view(*positions.shape, -1)
        # Padding must be finite: it is masked by a weight of 0, and 0 times garbage may be NaN.
        padding = torch.from_numpy(~is_token).to(device)
        return hidden.masked_fill(padding[..., None], 0.0)
