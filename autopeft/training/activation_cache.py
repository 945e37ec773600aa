"""Computes the frozen lower blocks once a row, and serves them to every later step and trial.

Nothing below the lowest adapted block changes while adapters are trained, and dropout there is off
(see `modes`), so the hidden states that enter that block are the same in every epoch, evaluation
and trial. A served forward pass runs the model's own code: embeddings, masks and positions are
computed as ever, but the lower blocks hand on what they are given, and the last of them hands on
the cached states instead. That works for any model whose blocks are called one after the other.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autopeft.models.topology import is_chain
from autopeft.tasks.batch import Batch, collate
from autopeft.tasks.data import SplitName, TaskData
from autopeft.training.batching import evaluation_batches
from autopeft.training.cache_protocol import NO_PREFIX, Prefix
from autopeft.training.hidden_store import HiddenStore
from autopeft.training.precision import Precision

FILL_TOKENS = 4096
"""Padded tokens computed at once when filling."""

TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest difference of the last block's output, relative to its largest value, with and without
the cache. bf16 states are rounded once more when stored."""


class PrefixCache:
    """Cached hidden states of one frozen model, for any lowest adapted block.

    Belongs to a worker and lives as long as its model. When a first check finds that cached and
    computed outputs differ, or the blocks cannot be skipped, it warns once and serves nothing.

    Args:
        model: The frozen model; adapters may come and go above the cut.
        block_paths: Path of each block in the order of computation.
        data: The rows that will pass through.
        device: Where the model is.
        precision: What trainings compute in; bf16 stores bf16, at half the size.
        max_bytes: Size of all states together; the least recently used cut makes room.
        folder: Where to keep them in files that the workers of a machine share; None: in memory.
            Must be empty or belong to the same model, data and precision.

    Attributes:
        fill_seconds: Seconds spent on computing states.
        is_off: True once a check has failed.
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
        self.fill_seconds = 0.0
        # Only of a chain can the lower part be left out.
        self.is_off = not is_chain(self.block_paths)
        self._max_bytes = max_bytes
        self._folder = folder
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._stores: OrderedDict[tuple[int, SplitName], tuple[HiddenStore, int]] = OrderedDict()
        self._cuts: dict[int, _Cut] = {}

    def below(self, lowest_layer: int | None) -> Prefix:
        """What serves the blocks below a plan's lowest adapted one.

        Args:
            lowest_layer: `plan.lowest_layer`; None (no adapter, so a head only): all blocks.
        """
        cut = len(self.block_paths) if lowest_layer is None else lowest_layer
        if cut == 0 or self.is_off:
            return NO_PREFIX
        return self._cuts.setdefault(cut, _Cut(self, cut))

    def switch_off(self, reason: str) -> None:
        """Serves nothing from now on, and says why."""
        self.is_off = True
        self._stores.clear()
        warnings.warn(
            f"the cache of frozen hidden states is off for {type(self.model).__name__}: {reason}; "
            "training is slower but correct",
            stacklevel=2,
        )

    def blocks(self) -> list[nn.Module]:
        """The blocks as they are now: an adapter may have taken a block's place."""
        return [self.model.get_submodule(path) for path in self.block_paths]

    def highest_below(
        self, cut: int, split: SplitName, rows: NDArray[np.int64]
    ) -> AbstractContextManager[None]:
        """Serves these rows from the highest cut below `cut` that has them all, if any has."""
        for lower in sorted((c for c in self._cuts if c < cut), reverse=True):
            held = self._stores.get((lower, split))
            if held is not None and not len(held[0].missing(rows)):
                return self._cuts[lower].skipping_with(held[0], rows)
        return nullcontext()

    def store(self, cut: int, split: SplitName, width: int) -> HiddenStore | None:
        """The states that enter a block, or None where the size limit allows none."""
        key = (cut, split)
        if key in self._stores:
            self._stores.move_to_end(key)
            return self._stores[key][0]
        rows = self.data.splits[split]
        size = HiddenStore.n_bytes(rows, width, self._dtype)
        if size > self._max_bytes:
            return None
        while sum(used for _, used in self._stores.values()) + size > self._max_bytes:
            self._stores.popitem(last=False)
        path = None if self._folder is None else self._folder / f"{split}-{cut}.states"
        store = HiddenStore(rows, width, dtype=self._dtype, device=self.device, path=path)
        self._stores[key] = (store, size)
        return store


class _Cut:
    """Serves the blocks below one cut."""

    def __init__(self, cache: PrefixCache, cut: int) -> None:
        self._cache = cache
        self._cut = cut
        self._is_checked = False
        # Learned from the first captured output:
        self._width = 0
        self._dtype = torch.float32
        self._n_extras = 0

    @property
    def fill_seconds(self) -> float:
        """Seconds the cache has spent on computing states, for all cuts together."""
        return self._cache.fill_seconds

    @contextmanager
    def serving(self, batch: Batch) -> Iterator[None]:
        """Skips the lower blocks for this batch; computes and keeps what is not cached yet."""
        hidden = None if self._cache.is_off else self._hidden(batch)
        if hidden is None:
            yield
            return
        with self._skipping(hidden):
            yield

    def _hidden(self, batch: Batch) -> torch.Tensor | None:
        """What enters the block at the cut, shape (b, t, width); None if it cannot be served."""
        started = time.perf_counter()
        # A store is filled by trainings and evaluations alike, so in neither's mode.
        with torch.inference_mode(False), torch.no_grad():
            if self._width == 0 and not self._learn(batch):
                return None
            store = self._cache.store(self._cut, batch.split, self._width)
            if store is None:
                return None
            missing = store.missing(np.unique(batch.rows))
            if len(missing):
                self._fill(store, batch.split, missing)
            hidden = store.get(batch.rows, self._cache.device, self._dtype)
            is_good = self._is_checked or self._check(batch, hidden)
        if len(missing):
            self._cache.fill_seconds += time.perf_counter() - started
        return hidden if is_good else None

    def _learn(self, batch: Batch) -> bool:
        """Finds out what a block returns; False if that is nothing that can be skipped."""
        output = self._run_to(self._cut - 1, batch)
        first, *extras = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, torch.Tensor) or any(extra is not None for extra in extras):
            self._cache.switch_off("its blocks return more than hidden states")
            return False
        self._n_extras = len(extras) if isinstance(output, tuple) else -1
        self._dtype = first.dtype
        self._width = first.shape[-1]
        return True

    def _fill(self, store: HiddenStore, split: SplitName, rows: NDArray[np.int64]) -> None:
        lengths = self._cache.data.splits[split].lengths[rows]
        for part in evaluation_batches(lengths, FILL_TOKENS):
            batch = collate(self._cache.data, split, rows[part], self._cache.device)
            with self._cache.highest_below(self._cut, split, rows[part]):
                store.put(rows[part], _hidden_of(self._run_to(self._cut - 1, batch)))

    def skipping_with(
        self, store: HiddenStore, rows: NDArray[np.int64]
    ) -> AbstractContextManager[None]:
        """Skips the blocks below this cut for rows that are all cached."""
        return self._skipping(store.get(rows, self._cache.device, self._dtype))

    def _check(self, batch: Batch, hidden: torch.Tensor) -> bool:
        """Compares the last block's output with and without the cache, once."""
        self._is_checked = True
        last = len(self._cache.block_paths) - 1
        # Adapters above the cut may drop out at random: both passes drop the same.
        devices = [self._cache.device] if torch.device(self._cache.device).type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            computed = _hidden_of(self._run_to(last, batch))
            torch.manual_seed(0)
            with self._skipping(hidden):
                served = _hidden_of(self._run_to(last, batch))
        is_token = batch.attention_mask.bool()
        gap = float((computed - served)[is_token].abs().max())
        scale = float(computed[is_token].abs().max())
        if gap <= TOLERANCE[self._cache.precision] * scale:
            return True
        self._cache.switch_off(f"outputs differ by {gap:.2g} of {scale:.2g}")
        return False

    def _run_to(self, layer: int, batch: Batch) -> Any:
        """Runs the model up to and with a block; returns that block's output."""
        block = self._cache.blocks()[layer]

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Reached(output)

        handle = block.register_forward_hook(stop)
        try:
            self._cache.model(**batch.model_inputs())
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise RuntimeError(f"{self._cache.block_paths[layer]} was not called")

    @contextmanager
    def _skipping(self, hidden: torch.Tensor) -> Iterator[None]:
        """Lets the lower blocks hand on what they are given, the last of them `hidden`."""

        def hand_on(hidden_states: torch.Tensor, *_rest: Any, **_options: Any) -> Any:
            return self._as_output(hidden_states)

        def hand_on_cached(*_rest: Any, **_options: Any) -> Any:
            return self._as_output(hidden)

        lower = self._cache.blocks()[: self._cut]
        with ExitStack() as stack:
            for block in lower:
                # An attribute of the instance hides the method of its class; deleting it
                # afterwards shows the method again.
                stack.callback(delattr, block, "forward")
                block.forward = hand_on if block is not lower[-1] else hand_on_cached
            yield

    def _as_output(self, hidden: torch.Tensor) -> Any:
        return hidden if self._n_extras < 0 else (hidden, *[None] * self._n_extras)


class _Reached(Exception):
    """A block was reached: ends a forward pass early, carrying the block's output."""

    def __init__(self, output: Any) -> None:
        super().__init__("reached")
        self.output = output


def _hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in a block's output, shape (b, t, width)."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
