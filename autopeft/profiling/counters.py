"""Count the FLOPs of a forward and backward pass, and the bytes kept in between."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Run:
    """The costs of one forward and backward pass.

    Attributes:
        forward_flops: FLOPs of the forward pass.
        backward_flops: FLOPs of the backward pass.
        saved_bytes: Bytes kept for the backward pass, without weights and shared storages.
        scratch_bytes: The most that is held at once, beyond what is kept.
        kept: The storages that make up `saved_bytes`.
        kept_shared: Shared storages that were kept.
    """

    forward_flops: float = 0.0
    backward_flops: float = 0.0
    saved_bytes: float = 0.0
    scratch_bytes: float = 0.0
    kept: frozenset[int] = frozenset()
    kept_shared: frozenset[int] = frozenset()


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count what `FlopCounterMode` counts, with its formulas.

    That class also watches modules, with hooks that keep graphs alive, so memory could not be
    measured while it counts.

    Attributes:
        flops: Count so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all storages made in this context, as an allocator holds them.

    Attributes:
        live: Bytes that are held now.
        peak: The most that was held at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # Views of what was given share its storage, and in-place operations return it.
        given = {
            id_ for tensor in tensors_in((args, kwargs or {})) for id_ in storage_sizes(tensor)
        }
        for tensor in (part for whole in tensors_in(out) for part in _dense(whole)):
            storage = tensor.untyped_storage()
            if storage_id(tensor) not in given and storage not in self._known:
                self._known[storage] = True
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, size)
        return out

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def _free(self, size: int) -> None:
        self.live -= size


class _Kept:
    """Hold a saved tensor as long as autograd does."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def storage_id(tensor: torch.Tensor) -> int:
    """Return a number that is equal for tensors that share memory, while one of them is alive."""
    return int(tensor.untyped_storage()._cdata)


def storage_sizes(tensor: torch.Tensor) -> dict[int, float]:
    """Return storage -> bytes that a tensor uses; sparse tensors have several storages."""
    return {storage_id(part): float(part.numel() * part.element_size()) for part in _dense(tensor)}


def _dense(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors that a sparse one is made of, or the tensor itself."""
    is_sparse = tensor.layout is torch.sparse_coo
    return (tensor._indices(), tensor._values()) if is_sparse else (tensor,)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)


def first_tensor(value: Any) -> torch.Tensor:
    """Return the first tensor in a module's output."""
    return next(tensors_in(value))


def new_source(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values with gradients starting here; unlike a leaf, it can be changed."""
    return tensor.detach().requires_grad_().clone()


def run_and_count(
    forward: Callable[[], torch.Tensor],
    *,
    not_kept: nn.Module,
    shared: Mapping[int, float] | None = None,
    live: LiveBytes | None = None,
    has_backward: bool = True,
    has_saved: bool = True,
    has_scratch: bool = True,
) -> Run:
    """Count a forward pass, and a backward pass if the result requires a gradient.

    Args:
        forward: Returns the tensor where the backward pass starts.
        not_kept: A model whose parameters and buffers are not counted as kept.
        shared: Storages that are not counted in `saved_bytes` but reported.
        live: Counts what is held; `forward` may restart it.
        has_backward: Whether to run backward; else its FLOPs are 0.
        has_saved: Whether to count what is kept; else nothing is.
        has_scratch: Whether to count what is held at once, which takes longest; else it is 0.

    Returns:
        The counts. A tensor counts as kept if autograd still holds it at the end of the forward
        pass, and once however often it was saved.
    """
    held: list[weakref.ref[_Kept]] = []

    def pack(tensor: torch.Tensor) -> _Kept:
        # Detached, or an operation that saves its own result would keep itself alive.
        kept = _Kept(tensor.detach())
        held.append(weakref.ref(kept))
        return kept

    held_bytes = live or LiveBytes()
    with FlopCount() as counter, held_bytes if has_scratch else nullcontext():
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor)
        with hooks if has_saved else nullcontext():
            result = forward()
        forward_flops = counter.flops
        own = {storage_id(t) for t in (*not_kept.parameters(), *not_kept.buffers())}
        sizes: dict[int, float] = {}
        for reference in held:
            kept = reference()
            for key, size in storage_sizes(kept.tensor).items() if kept is not None else ():
                if key not in own:
                    sizes[key] = max(sizes.get(key, 0.0), size)
            del kept
        if result.requires_grad and has_backward:
            torch.autograd.backward(result, torch.ones_like(result))
        backward_flops = counter.flops - forward_flops
    kept_shared = frozenset(sizes).intersection(shared or {})
    saved = sum(size for key, size in sizes.items() if key not in kept_shared)
    return Run(
        forward_flops,
        backward_flops,
        saved,
        max(0.0, held_bytes.peak - saved) if has_scratch else 0.0,
        frozenset(sizes) - kept_shared,
        kept_shared,
    )
