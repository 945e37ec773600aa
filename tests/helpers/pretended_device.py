"""Pretends an accelerator on a machine that has none: CPU tensors whose storages are marked.

Within `pretended()` torch says that there is a "cuda" device, or several. What is created on one,
moved to it or computed from what is on it is marked with its index. Where tensors of unlike marks
meet, or a marked and an unmarked one, a RuntimeError names the operator; where the host would wait
for a device, `World.waits` counts it by the line of autopeft that asked. Not seen: what C++ asks a
tensor for, streams, memory, speed and rounding, and sparse tensors.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "cuda"

_ANY = -1
"""Index of what autograd makes for a gradient, on a device that only C++ knows: it meets any."""
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "_linalg_svd"}
"""Operators whose result's value or shape the host needs at once."""

_MAY_MIX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operators that take indices from the host; "copy_" is looked at by itself."""

_OWN_DEVICE: Any = torch._C.TensorBase.device
_OWN_IS_CUDA: Any = torch._C.TensorBase.is_cuda
_OWN_IS_CPU: Any = torch._C.TensorBase.is_cpu


def is_marked(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a pretended device."""
    return index_of(tensor) is not None


def index_of(tensor: torch.Tensor) -> int | None:
    """The index of the pretended device that a tensor is on; None: it is on the host."""
    index: int | None = _of_storage(tensor, "device_index")
    return index


def _of_storage(tensor: torch.Tensor, mark: str) -> Any:
    if tensor.layout is not torch.strided or type(tensor).__name__ == "FakeTensor":
        return None
    return getattr(tensor.untyped_storage(), mark, None)


def _mark(value: Any, index: int) -> Any:
    for tensor in _tensors(value):
        if tensor.layout is torch.strided:
            _set(tensor, "device_index", index)
    return value


def _set(tensor: torch.Tensor, mark: str, value: object) -> None:
    setattr(tensor.untyped_storage(), mark, value)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _names_device(value: Any) -> bool:
    return _named(value) is not None


def _named(value: Any) -> int | None:
    """The index of the device that a value names, if it names one."""
    if isinstance(value, str) and value.split(":")[0] == NAME:
        value = torch.device(value)
    if isinstance(value, torch.device) and value.type == NAME:
        return value.index or 0
    return None


def _first_named(values: Any) -> int | None:
    return next((index for index in map(_named, tree_leaves(values)) if index is not None), None)


def _names_host(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value) == "cpu"


def _line() -> str:
    """The innermost line of autopeft that is running, else of anything but torch."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/autopeft/" in path:
            return f"{path[path.rindex('/autopeft/') + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class World(TorchFunctionMode):
    """Rewrites what Python asks for by the device's name.

    Attributes:
        waits: (kind, line of autopeft) -> how often the host waited there.
        copies: Copies from the host to a device, blocking ones included.
        crossings: Copies from one device to another.
        operators: Number of operators run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies = 0
        self.crossings = 0
        self.operators = 0
        self.inside: int | None = None
        self.replaced: dict[Any, Any] = {}

    def clear(self) -> None:
        """Count from zero."""
        self.waits.clear()
        self.copies = self.crossings = self.operators = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        func = self.replaced.get(func, func)  # torch looks methods up where they were replaced.
        name = getattr(func, "__name__", "")
        if name in ("__get__", "device", "_parse_to", "get_device_module"):
            return func(*args, **kwargs)
        flat = tree_leaves((args, kwargs))
        comes = _first_named(flat)
        if comes is not None:
            if name in ("tensor", "as_tensor"):
                self.arrived(is_quick=False)
            args, kwargs = tree_map(_without_device, (args, kwargs))
        before = self.inside
        self.inside = _index_in(flat) if comes is None else comes
        if name == "backward":
            self.inside = before if self.inside is None else _ANY
        try:
            out = func(*args, **kwargs)
        finally:
            self.inside = before
        return out if comes is None else _mark(out, comes)

    def arrived(self, *, is_quick: bool) -> None:
        """Count a copy to the device."""
        self.copies += 1
        if not is_quick:
            self.waits["host to device", _line()] += 1

    def left(self) -> None:
        """Count a copy to the host."""
        self.waits["device to host", _line()] += 1


def _index_in(values: Any) -> int | None:
    """The device of the first tensor that is on a known one, else on any."""
    found = [index for index in map(index_of, _tensors(values)) if index is not None]
    return next((index for index in found if index != _ANY), _ANY if found else None)


def _methods(world: World) -> dict[str, Any]:
    """What stands for methods of tensors that move them or read them; seen in handlers too."""
    own = torch.Tensor

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        asked = tree_leaves((args, kwargs))
        if args and isinstance(args[0], torch.Tensor):
            comes, goes = index_of(args[0]), not is_marked(args[0])
        else:
            comes, goes = _first_named(asked), any(map(_names_host, asked))
        args, kwargs = tree_map(_without_device, (args, kwargs))
        out = real["to"](tensor, *args, **kwargs)
        here = index_of(tensor)
        if here is not None and goes:
            world.left()
            with torch._C._DisableTorchDispatch():
                return real["clone"](out)
        if comes is None or comes == here:
            return out if here is None else _mark(out, here)
        if here is None:
            world.arrived(is_quick=bool(kwargs.get("non_blocking")) and _is_pinned(tensor))
        else:
            world.crossings += 1
            return _Moved.apply(out, here, comes)  # type: ignore[no-untyped-call]
        return _mark(real["clone"](out) if out.data_ptr() == tensor.data_ptr() else out, comes)

    def numpy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_marked(tensor):
            raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")
        return real["numpy"](tensor, *args, **kwargs)

    def tolist(tensor: torch.Tensor) -> Any:
        if is_marked(tensor):
            world.left()
            with torch._C._DisableTorchDispatch():
                return real["tolist"](tensor)
        return real["tolist"](tensor)

    def pin_memory(tensor: torch.Tensor) -> Any:
        if is_marked(tensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors")
        copy = real["clone"](tensor)
        _set(copy, "is_pinned_memory", True)
        return copy

    replaced = {
        "to": to,
        "cpu": lambda tensor: to(tensor, "cpu"),
        "cuda": lambda tensor, device=0, **kwargs: to(tensor, torch.device(NAME, device), **kwargs),
        "numpy": numpy,
        "tolist": tolist,
        "pin_memory": pin_memory,
    }
    real = {name: getattr(own, name) for name in (*replaced, "clone")}
    world.replaced = {replaced[name]: real[name] for name in replaced}
    return replaced


def _is_pinned(tensor: torch.Tensor) -> bool:
    return bool(_of_storage(tensor, "is_pinned_memory"))


class _Moved(torch.autograd.Function):
    """A copy on another pretended device; its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, source: int, target: int) -> Any:
        ctx.source = source
        return _mark(tensor.clone(), target)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _mark(gradient.clone(), ctx.source), None, None


def _without_device(value: Any) -> Any:
    return "cpu" if _names_device(value) else value


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Checks and marks below autograd."""

    def __init__(self, world: World) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.world = world

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        world, name = self.world, func._schema.name.removeprefix("aten::")
        world.operators += 1
        tensors = _tensors((args, kwargs))
        marked = [tensor for tensor in tensors if is_marked(tensor)]
        if name in ("copy_", "_to_copy"):
            return self._copied(func, name, args, kwargs)
        # Scalars of the host may meet anything.
        strangers = [t for t in tensors if t.dim() and not is_marked(t)]
        may_mix = name in _MAY_MIX and is_marked(args[0])
        found = {str(tensor.device) for tensor in marked if index_of(tensor) != _ANY}
        if marked and strangers and not may_mix:
            found.add("cpu")
        if len(found) > 1:
            both = " and ".join(sorted(found, reverse=True))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {both} ({name})"
            )
        if marked and name in _READS:
            world.waits[name, _line()] += 1
        if marked and name in _MAY_MIX:
            indices = _tensors(args[1])
            if any(index.dtype == torch.bool for index in indices):
                world.waits["boolean index", _line()] += 1
            if any(not is_marked(index) for index in indices):
                world.waits["host to device", _line()] += 1
        index = _index_in(marked)
        if not tensors:
            named = _first_named(kwargs)
            index = world.inside if named is None else named
        is_new = not tensors and index is not None
        if is_new:
            kwargs = {k: torch.device("cpu") if _names_device(v) else v for k, v in kwargs.items()}
        if (marked or is_new) and kwargs.get("generator") is None:
            if any(argument.name == "generator" for argument in func._schema.arguments):
                kwargs["generator"] = _GENERATOR
        if marked and name == "histc" and not args[0].is_floating_point():
            # An accelerator counts whole numbers, and models with experts ask for that there.
            out = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            out = func(*args, **kwargs)
        return out if index is None else _mark(out, index)

    def _copied(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        world = self.world
        if name == "copy_":
            target, source = args[0], args[1]
            if is_marked(target) and is_marked(source):
                world.crossings += index_of(target) != index_of(source)
            elif is_marked(target) != is_marked(source) and source.dim():
                is_quick = len(args) > 2 and args[2] and _is_pinned(source)
                if is_marked(target):
                    world.arrived(is_quick=bool(is_quick))
                elif not is_quick:
                    world.left()
            return func(*args, **kwargs)
        index = index_of(args[0])
        if (named := _named(kwargs.get("device"))) is not None:
            kwargs["device"], index = torch.device("cpu"), named
        out = func(*args, **kwargs)
        return out if index is None else _mark(out, index)


_GENERATOR = torch.Generator()
"""The devices' own random numbers."""


def _cuda(n_devices: int) -> dict[str, Any]:
    """What stands for functions of torch.cuda."""
    return {
        "is_available": lambda: True,
        "device_count": lambda: n_devices,
        "get_device_capability": lambda device=None: (8, 0),
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (8 << 30, 16 << 30),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device=NAME: _GENERATOR.get_state(),
        "set_rng_state": lambda state, device=NAME: _GENERATOR.set_state(state),
        "manual_seed": _GENERATOR.manual_seed,
        "manual_seed_all": _GENERATOR.manual_seed,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "_is_in_bad_fork": lambda: False,
    }


def _grouped(lists: Any, with_indices: bool) -> Any:
    """What stands for torch's grouping of tensors, which would take all of them for the host's."""
    groups: dict[Any, Any] = {}
    for place, first in enumerate(lists[0]):
        each = groups.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for found, tensors in zip(each[0], lists, strict=True):
            if tensors:
                found.append(tensors[place])
        each[1].append(place)
    return groups if with_indices else {key: (found, []) for key, (found, _) in groups.items()}


def _accelerator(n_devices: int) -> dict[str, Any]:
    """What stands for functions of torch.accelerator."""
    return {
        "is_available": lambda: True,
        "device_count": lambda: n_devices,
        "current_accelerator": lambda check_available=False: torch.device(NAME),
        "current_device_index": lambda: 0,
        "current_stream": lambda device=None: SimpleNamespace(is_capturing=lambda: False),
        "synchronize": lambda device=None: None,
    }


@contextlib.contextmanager
def pretended(n_devices: int = 1) -> Iterator[World]:
    """A world with accelerators of one kind."""
    real = torch.amp.autocast_mode.autocast.__init__
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def host(device: str = "cpu") -> str:
        return "cpu" if device.split(":")[0] == NAME else device

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        real(self, host(device_type), *args, **kwargs)

    def device(tensor: torch.Tensor) -> torch.device:
        index = index_of(tensor)
        return _OWN_DEVICE.__get__(tensor) if index is None else torch.device(NAME, max(0, index))

    def is_cuda(tensor: torch.Tensor) -> bool:
        return is_marked(tensor) or _OWN_IS_CUDA.__get__(tensor)

    def is_cpu(tensor: torch.Tensor) -> bool:
        return not is_marked(tensor) and _OWN_IS_CPU.__get__(tensor)

    world = World()
    with contextlib.ExitStack() as stack:

        def patch(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value, create=True))

        for name, value in _cuda(n_devices).items():
            patch(torch.cuda, name, value)
        for name, value in _accelerator(n_devices).items():
            patch(torch.accelerator, name, value)
        patch(torch.amp.autocast_mode.autocast, "__init__", init)
        patch(torch._C, "_group_tensors_by_device_and_dtype", _grouped)
        patch(torch, "is_autocast_enabled", lambda d="cpu": enabled(host(d)))
        patch(torch, "get_autocast_dtype", lambda d="cpu": dtype(host(d)))
        for name, value in _methods(world).items():
            patch(torch.Tensor, name, value)
        patch(torch.Tensor, "device", property(device))
        patch(torch.Tensor, "is_cuda", property(is_cuda))
        patch(torch.Tensor, "is_cpu", property(is_cpu))
        stack.enter_context(world)
        stack.enter_context(_Operators(world))
        yield world
