"""This machine's accelerator, whatever its kind: "cuda" (ROCm too), "xpu", "mps".

Nothing else in autopeft asks for a kind of accelerator or calls its module of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

from autopeft.errors import SettingsError

Device = str | torch.device

_ALIGNED = 16
"""Bytes at which each array of a packed copy begins: kernels read so many at once."""

_UNKNOWN = 2.0**60
"""Bytes of memory where nothing says how much there is."""

DEFAULT = "cuda"
"""What workers are taken to have, if this machine has no accelerator and they have one."""


def accelerator() -> str | None:
    """Return the type of this machine's accelerator, as torch names it; None: it has none."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None else found.type


def n_accelerators() -> int:
    """Return the number of accelerators that torch sees."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def is_accelerator(device: Device) -> bool:
    """Return whether a device is not the CPU."""
    return torch.device(device).type not in ("cpu", "meta")


def is_here(device: Device) -> bool:
    """Return whether this machine has a device of this type."""
    return not is_accelerator(device) or torch.device(device).type == accelerator()


def checked_device(device: Device) -> str:
    """Return the name of a device of this machine.

    Raises:
        SettingsError: if there is no such device here.
    """
    found = accelerator()
    remedy = "use cpu" if found is None else f"use cpu or {found}"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise SettingsError("device", device, "torch knows no such device", remedy) from None
    is_beyond = is_accelerator(place) and (place.index or 0) >= n_accelerators()
    if place.type == "meta" or not is_here(place) or is_beyond:
        raise SettingsError("device", device, "this machine has none", remedy)
    return str(place)


def kind_of(device: Device) -> Literal["cpu", "accelerator"]:
    """Return the key of tables that hold one value for the CPU and one for any accelerator."""
    return "accelerator" if is_accelerator(device) else "cpu"


def synchronize(device: Device) -> None:
    """Wait for an accelerator's queued work, so that a clock measures it."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def empty_cache(device: Device) -> None:
    """Give the memory that torch keeps for later back to the accelerator, for its other users."""
    if is_accelerator(device):
        _module(device).empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation has failed; the device works on."""
    return isinstance(error, torch.OutOfMemoryError)


def is_broken(error: BaseException) -> bool:
    """Return whether a device reports an error that all later work of this process would meet.

    So does a failed communication between devices (NCCL): its partners cannot be reached again.
    """
    lost = getattr(torch.distributed, "DistBackendError", None)  # Some builds have no NCCL.
    if lost is not None and isinstance(error, lost):
        return True
    kind = getattr(torch, "AcceleratorError", None)
    is_fatal = isinstance(error, RuntimeError) if kind is None else isinstance(error, kind)
    return is_fatal and not is_out_of_memory(error) and " error: " in str(error)


def supports_bf16(device: Device) -> bool:
    """Return whether a device computes in bf16 itself. Unknown counts as no."""
    if not is_accelerator(device):
        return True
    check = getattr(_module(device), "is_bf16_supported", None)
    return check is not None and bool(check(including_emulation=False))


def free_memory_bytes(device: Device) -> int | None:
    """Return how much more an accelerator's allocator can hand out; None where it is unknown."""
    module = _module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _total = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def numbered(device: Device, count: int) -> tuple[str, ...]:
    """Return the first devices of a kind by their names.

    Raises:
        SettingsError: if there are fewer.
    """
    if (seen := n_accelerators()) < count:
        problem = f"this worker sees {seen} of them"
        raise SettingsError("gpus_per_worker", count, problem, f"use at most {seen}")
    kind = torch.device(device).type
    return tuple(f"{kind}:{index}" for index in range(count))


def ids_of(device: Device, count: int) -> tuple[str, ...]:
    """Return the ids that NVIDIA's tools give the first devices of a type; () for other makers."""
    if torch.device(device).type != "cuda" or torch.version.hip is not None:
        return ()
    found = (_module(device).get_device_properties(i).uuid for i in range(count))
    return tuple(f"GPU-{each}" for each in found)


def free_memory_of(device: Device, count: int) -> dict[str, float]:
    """Return the name and the free memory of each of the first devices of a kind.

    Where it is unknown, they count as equal.

    Raises:
        SettingsError: if there are fewer.
    """
    names = numbered(device, count)
    free = {name: free_memory_bytes(name) for name in names}
    return {name: _UNKNOWN if n is None else float(n) for name, n in free.items()}


def memory_bytes(device: Device) -> int | None:
    """Return the memory of the smallest accelerator of this type here; None where it is unknown.

    No context is opened on any of them.
    """
    module = _module(device)
    if not hasattr(module, "get_device_properties"):
        return None
    found = (module.get_device_properties(index) for index in range(module.device_count()))
    return min((int(each.total_memory) for each in found), default=None)


def in_double(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in double precision; on the host where its device has none.

    Example:
        >>> import torch
        >>> from autopeft.utils.device import in_double
        >>> in_double(torch.ones(2)).dtype
        torch.float64
    """
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def sent(tensor: torch.Tensor, device: Device) -> torch.Tensor:
    """Return a host's tensor on a device. Nobody waits for the copy."""
    if not is_accelerator(device):
        return tensor
    if torch.device(device).type != "mps":  # Its memory is the host's.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sent_together(arrays: Mapping[str, NDArray[Any]], device: Device) -> dict[str, torch.Tensor]:
    """Return a host's arrays as tensors on a device, with one copy. Nobody waits for it."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if not is_accelerator(device):
        return tensors
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays.values())])
    packed = torch.empty(int(starts[-1]), dtype=torch.uint8)
    places = {
        name: slice(int(start), int(start) + array.nbytes)
        for start, (name, array) in zip(starts, arrays.items(), strict=False)
    }
    for name, tensor in tensors.items():
        packed[places[name]].view(tensor.dtype).copy_(tensor.flatten())
    there = sent(packed, device)
    return {
        name: there[places[name]].view(tensor.dtype).view(tensor.shape)
        for name, tensor in tensors.items()
    }


class RandomState:
    """A random stream of its own, of the host and of one device, or all of its kind.

    Args:
        seed: Where it begins.
        device: The device beside the host; without a number, it is each of its kind.
    """

    def __init__(self, seed: int, device: Device) -> None:
        self._device = device
        with _restored(device):
            torch.default_generator.manual_seed(seed)
            if is_accelerator(device):
                module = _module(device)
                getattr(module, "manual_seed_all", module.manual_seed)(seed)
            self._states = _states(device)

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Continue this stream; restore the process's own afterwards."""
        with _restored(self._device):
            _set_states(self._device, self._states)
            yield
            self._states = _states(self._device)


@contextmanager
def drawn_on_host(seed: int) -> Iterator[None]:
    """Draw all random values of this context from the host's generator, seeded.

    So they are the same ones on any device. All generators are left as they were.
    """
    device = _in_use()
    with _restored(device), ExitStack() as stack:
        if is_accelerator(device):
            stack.enter_context(_HostDraws())  # type: ignore[no-untyped-call]
        torch.default_generator.manual_seed(seed)
        yield


def _in_use() -> str:
    """Return this process's device. An accelerator that nothing has used yet gets no context."""
    found = accelerator()
    if found is None or not getattr(_module(found), "is_initialized", lambda: True)():
        return "cpu"
    return found


class _HostDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator that draws random numbers on the host, and copies its result."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_draw = torch.Tag.nondeterministic_seeded in func.tags
        if not is_draw or not tree_any(_is_elsewhere, (args, kwargs)):
            return func(*args, **kwargs)
        device = next(filter(None, map(_device_of, (*args, *kwargs.values()))))
        drawn = func(*tree_map(_to_host, args), **tree_map(_to_host, kwargs))
        if func._schema.is_mutable:
            return args[0].copy_(drawn)
        return tree_map(lambda value: value.to(device), drawn)


def _device_of(value: Any) -> torch.device | None:
    """Return the accelerator that a value is or lies on, if any."""
    device = value.device if isinstance(value, torch.Tensor) else value
    return device if isinstance(device, torch.device) and is_accelerator(device) else None


def _is_elsewhere(value: Any) -> bool:
    return _device_of(value) is not None


def _to_host(value: Any) -> Any:
    if not _is_elsewhere(value):
        return value
    return value.cpu() if isinstance(value, torch.Tensor) else torch.device("cpu")


@contextmanager
def _restored(device: Device) -> Iterator[None]:
    """Leave the generators of the host and of a device as they were."""
    before = _states(device)
    try:
        yield
    finally:
        _set_states(device, before)


def _states(device: Device) -> list[torch.Tensor]:
    """Return the states of the generators of the host and of a device, or all of its kind."""
    given = (_module(device).get_rng_state(*index) for index in _indices(device))
    return [torch.get_rng_state(), *given]


def _set_states(device: Device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state, index in zip(states[1:], _indices(device), strict=True):
        _module(device).set_rng_state(state, *index)


def _indices(device: Device) -> list[tuple[int, ...]]:
    """Return the arguments that say which generators are meant; there is one "mps" only."""
    if not is_accelerator(device):
        return []
    asked = torch.device(device)
    if asked.type == "mps":
        return [()]
    return [(n,) for n in ([asked.index] if asked.index is not None else range(n_accelerators()))]


def _module(device: Device) -> Any:
    """Return the module of torch for a device's kind."""
    return torch.get_device_module(torch.device(device))
