"""Computes the last block only at the positions whose output is read.

A classifier's head reads one token of each text, and a causal LM's loss reads the completion. The
keys and values of the last block are needed at all positions, but its queries, its feed-forward
part and the modules around them only where the output is read. So these modules get those positions
only, and the others are filled with zeros. What is learned stays the same, because no gradient
comes from a position that is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn

from autopeft.tasks.base import Task
from autopeft.tasks.batch import Batch, Window
from autopeft.training.acceleration import TOLERANCE, verified, without_gradients
from autopeft.training.activation_cache import block_output, hidden_of
from autopeft.training.attention import AttentionFunction, attention_through
from autopeft.training.precision import Precision


class LastBlock:
    """Narrows the last block of one model to the positions that are read, for any adapters.

    Belongs to a worker and lives as long as its model. If a check finds that outputs differ, it
    warns once and turns itself off.

    Args:
        model: The model; adapters may be attached and detached.
        block: Path of its last block.
        modules: Paths of the modules in that block that compute each position on its own; see
            `autopeft.profiling.output_positions.narrow_modules`.
        task: Defines the windows.
        window: Name of the window that this model reads.
        precision: Precision of the trainings.

    Attributes:
        is_off: True if a check has failed.
        setup_seconds: Always 0.
    """

    def __init__(
        self,
        model: nn.Module,
        block: str,
        modules: Sequence[str],
        task: Task,
        window: str,
        *,
        precision: Precision = "fp32",
    ) -> None:
        self.is_off = False
        self.setup_seconds = 0.0
        self._model = model
        self._block = block
        self._modules = tuple(modules)
        self._task = task
        self._window = window
        self._precision: Precision = precision
        self._checked: set[frozenset[str]] = set()

    @contextmanager
    def serving(self, batch: Batch) -> Iterator[None]:
        """Narrow the last block to the positions of this batch that are read."""
        length = batch.input_ids.shape[1]
        # Getting a window's size may wait for an accelerator.
        window = None if self.is_off else self._task.windows(batch)[self._window]
        if window is None or window.size >= length or not self._is_good(batch, window):
            yield
        else:
            with self._narrowed(window, length):
                yield

    def leave_device(self) -> None:
        """Keep nothing, as before."""

    def _is_good(self, batch: Batch, window: Window) -> bool:
        """Compare the block's output with and without narrowing, once per kind of adapter."""
        # The classes of the block's modules and parents; a prompt replaces a parent.
        names = self._block.split(".")
        parents = [_at(self._model, ".".join(names[:n])) for n in range(1, len(names))]
        inner = _at(self._model, self._block).modules()
        kinds = frozenset(type(module).__name__ for module in (*parents, *inner))
        if kinds in self._checked:
            return True
        self._checked.add(kinds)
        length = batch.input_ids.shape[1]
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()  # With dropout the narrow pass would draw fewer random numbers.
        try:
            with without_gradients():
                whole = self._output(batch)
                with self._narrowed(window, length):
                    narrow = self._output(batch)
        finally:
            for module, mode in modes:
                module.training = mode
        if whole.shape[1] != length:
            return True  # A prompt precedes the tokens, and nothing is narrowed.
        is_read = window.mask(length)
        what = f"skipping unread positions of {type(self._model).__name__}'s last block"
        self.is_off = not verified(
            narrow[is_read], whole[is_read], TOLERANCE[self._precision], what=what
        )
        return not self.is_off

    def _output(self, batch: Batch) -> torch.Tensor:
        """Return the last block's output, shape (b, t, width)."""
        return hidden_of(block_output(self._model, _at(self._model, self._block), batch))

    @contextmanager
    def _narrowed(self, window: Window, length: int) -> Iterator[None]:
        block = _at(self._model, self._block)
        positions = _Positions(window, length, next(block.parameters()).device)
        with ExitStack() as stack:
            for path in self._modules:
                for handle in _narrow(_at(self._model, path), positions):
                    stack.callback(handle.remove)
            inside = frozenset(id(module) for module in block.modules())
            stack.enter_context(
                attention_through(lambda usual: _narrow_queries(usual, inside, positions))
            )
            yield


def _at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path of the bare model, even if an adapter has replaced a parent."""
    module = model
    for name in path.split("."):
        while not hasattr(module, name) and hasattr(module, "base_layer"):
            module = module.base_layer  # type: ignore[assignment]
        module = getattr(module, name)
    return module


class _Positions:
    """The positions of a window in one batch of texts of equal length, on the block's device."""

    def __init__(self, window: Window, length: int, device: torch.device) -> None:
        self.length = length
        self.columns = window.columns().to(device)  # Positions in each text, shape (rows, size).
        self.rows, self.size = self.columns.shape
        offsets = torch.arange(self.rows, device=self.columns.device)[:, None] * length
        # The same as indices into all tokens concatenated, shape (rows * size,).
        self.flat = (offsets + self.columns).flatten()

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, length, ...) -> (rows, size, ...)."""
        positions, narrow = getattr(x, _SPREAD_FROM, (None, None))
        if positions is self:
            assert isinstance(narrow, torch.Tensor), "kept by spread"
            return narrow
        picked = _Pick.apply(x.flatten(0, 1), self.flat)  # type: ignore[no-untyped-call]
        return cast("torch.Tensor", picked.view(self.rows, self.size, *x.shape[2:]))

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, size, ...) -> (rows, length, ...), zeros elsewhere."""
        n_tokens = self.rows * self.length
        full = _scattered(x.flatten(0, 1), self.flat, n_tokens)
        full = full.view(self.rows, self.length, *x.shape[2:])
        # The next module of the block picks the same positions. Keeping them here saves the search
        # and avoids gradients of the full size.
        setattr(full, _SPREAD_FROM, (self, x))
        return full

    def fits(self, x: Any) -> bool:
        """Return whether an argument holds one vector per token."""
        return isinstance(x, torch.Tensor) and x.shape[:-1] == (self.rows, self.length)


_SPREAD_FROM = "_autopeft_spread_from"


def _scattered(x: torch.Tensor, index: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """(n, ...) -> (n_tokens, ...), zeros at all positions that are not in `index`."""
    return x.new_zeros(n_tokens, *x.shape[1:]).index_copy_(0, index, x)


class _Pick(torch.autograd.Function):
    """(n_tokens, ...) -> (n, ...); its gradient is scattered, since positions are unique."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.n_tokens = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return _scattered(gradient, index, ctx.n_tokens), None


def _narrow(module: nn.Module, positions: _Positions) -> Iterator[Any]:
    """Register hooks that pass only these positions to a module, in its first call."""
    calls = [0]

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls[0] += 1
        # Later calls are not on the tokens (DeBERTa projects relative positions).
        if calls[0] > 1 or not any(map(positions.fits, (*args, *kwargs.values()))):
            calls[0] += 1
            return None
        return (
            tuple(positions.pick(x) if positions.fits(x) else x for x in args),
            {key: positions.pick(x) if positions.fits(x) else x for key, x in kwargs.items()},
        )

    def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return positions.spread(output) if calls[0] == 1 else None

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after)


def _narrow_queries(
    usual: AttentionFunction, inside: frozenset[int], positions: _Positions
) -> AttentionFunction:
    """Return attention with queries at these positions only, in modules of the last block."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        is_tokens = query.shape[0] == positions.rows and (
            query.shape[2] == key.shape[2] == positions.length
        )
        if id(module) not in inside or not is_tokens or options.get("position_bias") is not None:
            return usual(module, query, key, value, attention_mask, **options)
        is_causal = options.pop("is_causal", None)
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        if attention_mask is not None:
            mask = _mask_rows(attention_mask, positions)
        elif is_causal:
            keys = torch.arange(positions.length, device=query.device)
            mask = (keys <= positions.columns[:, :, None])[:, None]  # (rows, 1, size, keys)
        else:
            mask = None
        narrow = positions.pick(query.transpose(1, 2)).transpose(1, 2)
        output, _ = usual(module, narrow, key, value, mask, is_causal=False, **options)
        return positions.spread(output), None

    return attend


def _mask_rows(mask: torch.Tensor, positions: _Positions) -> torch.Tensor:
    """(rows or 1, heads or 1, length or 1, keys) -> (rows, heads or 1, size or 1, keys)."""
    if mask.shape[2] == 1:
        return mask
    index = positions.columns[:, None, :, None]  # (rows, 1, size, 1)
    return torch.take_along_dim(mask.expand(positions.rows, -1, -1, -1), index, dim=2)
