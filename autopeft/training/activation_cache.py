"""Caches what the frozen blocks below the lowest adapter compute, for all steps and all trials.

Nothing below the lowest adapted block changes while adapters are trained, and dropout is off there
(`autopeft.training.trainer.train_adapters_only`). So the hidden states that enter that block are
the same in every epoch, evaluation and trial. A served forward pass runs the model's own code:
embeddings, masks and positions are computed as usual, but the lower blocks return their input
unchanged, and the last of them returns the cached states. This works for any model whose blocks
are called one after another.
"""

from __future__ import annotations

import errno
import hashlib
import math
import mmap
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import nn

from autopeft.models.layout import is_chain
from autopeft.tasks.batch import Batch, collate, token_cells, token_positions
from autopeft.tasks.data import EncodedSplit, SplitName, TaskData
from autopeft.training.acceleration import (
    NO_ACCELERATION,
    TOLERANCE,
    Acceleration,
    verified,
    warn_off,
    without_gradients,
)
from autopeft.training.batching import evaluation_batches
from autopeft.training.precision import Precision
from autopeft.utils.device import (
    RandomState,
    free_memory_bytes,
    is_accelerator,
    sent,
    sent_together,
)
from autopeft.utils.files import is_full
from autopeft.utils.hardware import available_memory_bytes
from autopeft.utils.scratch import ensure_copy

FILL_TOKENS = 4096
"""Padded tokens computed at once when filling."""

DEVICE_SHARE = 0.25
"""Share of an accelerator's free memory for states; trainings need the rest."""

MEMORY_SHARE = 0.25
"""Share of the machine's free memory for states of all workers, where the disk has no room."""

LEFT_FREE_SHARE, LEFT_FREE_BYTES = 0.05, 256 * 2**20
"""A disk is not filled up with states: other files of the search need room, too."""

IN_USE_SECONDS = 60.0
"""A file that was used this recently is not removed for another one: two workers would compute
their states again and again. For as long, no room is asked for what was refused."""


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
        max_bytes: Limit on the size of all states, of all workers that share a folder. The least
            recently used cut is dropped first.
        folder: Folder of files that the workers of a machine share; None: keep the states in
            memory. What fits on an accelerator is kept there, by each worker for itself.
        identity: What the states depend on beside the classes of the model and the shapes of the
            data: workers that differ in it do not read each other's files.
        device_share: Share of an accelerator's free memory that states may take.
        memory_share: Share of the machine's free memory that this worker's states may take where
            the folder's disk has no room.

    Attributes:
        problem: What the user should know of the room for states; "" if nothing.
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
        identity: str = "",
        device_share: float = DEVICE_SHARE,
        memory_share: float = MEMORY_SHARE,
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
        self.problem = ""
        self._device_share = device_share
        self._memory_share = memory_share
        self._device_bytes = math.inf
        self._folder = folder
        self._stores = OrderedDict[tuple[int, Precision, SplitName], ActivationStore]()
        self._refused: dict[tuple[int, Precision, SplitName], float] = {}
        named = f"{identity} {type(model).__name__} {len(self.block_paths)}"
        self._identity = hashlib.sha256(named.encode()).hexdigest()[:12]
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

    def limit_on_device(self, n_bytes: float) -> None:
        """Keep at most so many bytes of states on an accelerator: trainings need the rest."""
        self._device_bytes = max(0.0, n_bytes)
        self._drop_over(self._device_bytes, self.device)

    def leave_device(self) -> None:
        """Keep no states on an accelerator from now on: trainings need its memory."""
        self._device_share = 0.0
        self._make_room(0, 0, self.device)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks as they are now: an adapter may have replaced one."""
        return [self.model.get_submodule(path) for path in self.block_paths]

    def highest_below(
        self, cut: int, precision: Precision, batch: Batch
    ) -> AbstractContextManager[None]:
        """Serve a batch from the highest cut below `cut` that holds all of them, if any."""
        lower_ones = (key for key in self._cuts if key[0] < cut and key[1] == precision)
        for lower in sorted(lower_ones, reverse=True):
            held = self._stores.get((*lower, batch.split))
            if held is not None and not len(held.missing(batch.sequences)):
                own = self._cuts[lower]
                return own.skipping(own.states(held, batch))
        return nullcontext()

    def store(
        self, cut: int, precision: Precision, split: SplitName, width: int
    ) -> ActivationStore | None:
        """Return the states that enter a block, or None if there is no room for them."""
        key = (cut, precision, split)
        if (held := self._stores.get(key)) is not None:
            if held.is_there():
                self._stores.move_to_end(key)
                return held
            del self._stores[key]  # Another worker needed the room.
        if time.monotonic() - self._refused.get(key, -math.inf) < IN_USE_SECONDS:
            return None
        rows = self.data.splits[split]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        size = ActivationStore.size_of(rows, width, dtype)
        try:
            place = self._place(f"{split}-{cut}-{str(dtype).removeprefix('torch.')}", size, rows)
            store = ActivationStore(rows, width, dtype=dtype, **place)
        except OSError as error:
            self._refused[key] = time.monotonic()
            reason = f"{error.strerror or error} for {size / 2**30:.2g} GiB"
            if not self.problem:
                self.problem = f"{self.description} is off: {reason}; trainings are slower"
                warn_off(self.description, reason)
            return None
        self._stores[key] = store
        return store

    def _place(self, name: str, size: int, rows: EncodedSplit) -> dict[str, Any]:
        """Make room for the states of rows; return where they go, as keywords of the store.

        Raises:
            OSError: if there is none.
        """
        if is_accelerator(self.device):
            used = sum(s.n_bytes for s in self._stores.values() if s.is_on(self.device))
            free = free_memory_bytes(self.device)
            room = 0 if free is None else int(self._device_share * (free + used))
            if self._make_room(size, min(room, self._max_bytes, self._device_bytes), self.device):
                return {"device": self.device}
        if self._folder is None:
            if not self._make_room(size, self._max_bytes, "cpu"):
                raise OSError(f"activation_cache_gb is {self._max_bytes / 2**30:.2g}, too little")
            return {}
        path = self._folder / f"{self._identity}-{name}.states"
        try:
            reserve(path, size, self._max_bytes, len(rows.offsets) - 1)
        except OSError as error:
            limit = min(self._max_bytes, self._memory_share * (available_memory_bytes() or 0))
            if not (is_full(error) and self._make_room(size, limit, "cpu")):
                raise
            self.problem = (
                f"{self.description} is in memory: {self._folder.parent} has no room for "
                f"{size / 2**30:.2g} GiB"
            )
            return {}
        return {"path": path}

    def _make_room(self, size: int, limit: float, device: str) -> bool:
        """Drop the least recently used states of a device until there is room; False: never."""
        if size > limit:
            return False
        self._drop_over(limit - size, device)
        return True

    def _drop_over(self, limit: float, device: str) -> None:
        """Drop the least recently used states of a device until the others are within a limit."""
        ours = [(key, store) for key, store in self._stores.items() if store.is_on(device)]
        used = sum(store.n_bytes for _, store in ours)
        for key, store in ours:
            if used <= limit:
                break
            del self._stores[key]
            used -= store.n_bytes


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

    def leave_device(self) -> None:
        """Keep no states on an accelerator from now on."""
        self._cache.leave_device()

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
        with without_gradients():
            if self._width == 0 and not self._learn(batch):
                return None
            store = self._cache.store(self._cut, self._precision, batch.split, self._width)
            if store is None:
                return None
            missing = store.missing(np.unique(batch.sequences))
            if len(missing):
                self._fill(store, batch.split, missing)
            hidden = self.states(store, batch)
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
            with self._cache.highest_below(self._cut, self._precision, batch):
                store.put(batch.sequences, hidden_of(self._run_to(self._cut - 1, batch)))

    def states(self, store: ActivationStore, batch: Batch) -> torch.Tensor:
        """Return what enters the block at the cut for a batch that is all cached."""
        cells = batch.cells
        if cells is None:
            cells = token_cells(self._cache.data.splits[batch.split], batch.sequences)
        return store.get(cells, self._cache.device, self._dtype)

    def _check(self, batch: Batch, hidden: torch.Tensor) -> bool:
        """Compare the last block's output with and without the cache, once."""
        self._is_checked = True
        last = len(self._cache.block_paths) - 1
        # Adapters above the cut may use dropout: both passes draw the same numbers.
        device = self._cache.device
        with RandomState(0, device).resumed():
            plain = hidden_of(self._run_to(last, batch))
        with RandomState(0, device).resumed():
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


def room_on_disk(folder: Path) -> int:
    """Return the bytes that states may take in a folder."""
    usage = shutil.disk_usage(folder)
    return max(0, usage.free - min(LEFT_FREE_BYTES, int(LEFT_FREE_SHARE * usage.total)))


def reserve(path: Path, size: int, limit: int, n_sequences: int) -> None:
    """Make a file whose room on the disk is certain, and remove older ones over a limit.

    Writing to mapped memory for which the disk has no room would kill the process. Processes that
    still map a removed file go on with it until they notice (`ActivationStore.is_there`).

    Args:
        path: The file; it may be there already.
        size: Its bytes.
        limit: Bytes that all files of its kind may have in its folder.
        n_sequences: Bytes of the file beside it, which tells what is filled.

    Raises:
        OSError: if the limit or the disk has no room.
    """
    ensure_copy(path.parent)
    with FileLock(path.parent / ".lock"):
        if path.exists():
            os.utime(path)
            return
        known = {p: p.stat() for p in path.parent.glob(f"*{path.suffix}")}
        used = sum(status.st_size for status in known.values())
        for oldest, status in sorted(known.items(), key=lambda item: item[1].st_mtime):
            if used + size <= limit or time.time() - status.st_mtime < IN_USE_SECONDS:
                break
            oldest.unlink()
            _filled(oldest).unlink(missing_ok=True)
            used -= status.st_size
        if used + size > limit:
            raise OSError(f"activation_cache_gb is {limit / 2**30:.2g}, too little")
        if size + n_sequences > room_on_disk(path.parent):
            # Asked for before: on some file systems, a reservation that fails fills the disk first.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _allocate(_filled(path), n_sequences)
        _allocate(path, size)


def _allocate(path: Path, size: int) -> None:
    """Make a file of zeros that are on the disk, or none."""
    draft = path.with_name(f"{path.name}.draft")
    try:
        with draft.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                for start in range(0, size, 2**20):
                    file.write(bytes(min(2**20, size - start)))
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _filled(path: Path) -> Path:
    """Return the file that tells which sequences a file of states holds."""
    return path.with_name(f"{path.name}.filled")


def _mapped(path: Path, dtype: torch.dtype, n_values: int) -> tuple[torch.Tensor, int]:
    """Return the values of a reserved file, shared with others that map it, and its inode.

    Raises:
        OSError: if it is gone, or not of this size: mapping more than a file has kills who writes.
    """
    size = n_values * dtype.itemsize
    with path.open("r+b") as file:
        status = os.fstat(file.fileno())
        if status.st_size != size:
            raise OSError(f"{path} has {status.st_size} bytes, not {size}")
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype), status.st_ino


class ActivationStore:
    """Hidden states of a split's sequences, in memory or in a file that workers share.

    One state per token, concatenated like the split's tokens, and filled one by one; a last one of
    zeros stands for padding. With a file, every process that opens it sees the sequences that any
    of them has filled. Two that fill the same one at once write the same values, so no lock is
    needed; it is marked as filled only after its values are written. The file must have been
    made by `reserve`. Without a `path` the states are kept on the device.

    Attributes:
        n_bytes: Size of all states.
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
        self._path = path
        self.n_bytes = self.size_of(split, width, dtype)
        n_states, n_sequences = len(split.tokens) + 1, len(split.offsets) - 1
        # A training cannot write to what is allocated in inference mode, where the caller may be.
        with torch.inference_mode(False):
            if path is None:
                self._states = torch.empty(n_states, width, dtype=dtype, device=device)
                self._states[-1] = 0.0
                self._filled = torch.zeros(n_sequences, dtype=torch.uint8)
            else:
                states, self._file = _mapped(path, dtype, n_states * width)
                self._states = states.view(n_states, width)
                self._filled, _ = _mapped(_filled(path), torch.uint8, n_sequences)
        self._is_filled: NDArray[np.uint8] = self._filled.numpy()

    @staticmethod
    def size_of(split: EncodedSplit, width: int, dtype: torch.dtype) -> int:
        """Return the bytes of a split's states."""
        return (len(split.tokens) + 1) * width * dtype.itemsize

    def is_on(self, device: str | torch.device) -> bool:
        """Return whether the states are in a device's memory, and in no file."""
        same = is_accelerator(self._states.device) == is_accelerator(device)
        return self._path is None and same

    def is_there(self) -> bool:
        """Return whether nobody has removed the file, if there is one, and mark it as used."""
        if self._path is None:
            return True
        try:
            os.utime(self._path)
            return self._path.stat().st_ino == self._file
        except FileNotFoundError:
            return False

    def missing(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the sequences that are not filled yet."""
        is_missing: NDArray[np.bool_] = self._is_filled[sequences] == 0
        return sequences[is_missing]

    def put(self, sequences: NDArray[np.int64], hidden: torch.Tensor) -> None:
        """Fill sequences (b,) with their states, padded on the right, shape (b, t, width)."""
        positions, is_token = token_positions(self._split, sequences)
        places = {"row": positions[is_token], "flat": np.flatnonzero(is_token)}
        flat = hidden.flatten(0, 1)
        here = sent_together(places, flat.device)
        picked = flat.index_select(0, here["flat"]).to(self._states.dtype)
        rows = here["row"].to(self._states.device)
        self._states.index_copy_(0, rows, picked.to(self._states.device))
        self._is_filled[sequences] = 1

    def get(
        self, cells: NDArray[np.int64], device: str | torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the states of tokens, shape (b, t, width), zero where a cell (b, t) is -1."""
        # Padding must be finite: it is masked by a weight of 0, and 0 times garbage may be NaN.
        flat = torch.from_numpy(np.where(cells < 0, len(self._states) - 1, cells).ravel())
        hidden = self._states.index_select(0, sent(flat, self._states.device))
        if not is_accelerator(hidden.device):
            hidden = sent(hidden, device)
        return hidden.to(dtype).view(*cells.shape, -1)
