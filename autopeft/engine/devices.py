"""What the workers train on: accelerators of this machine or of a Ray cluster, or cores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopeft.costs.memory import usable_bytes
from autopeft.utils.device import accelerator, memory_bytes, n_accelerators
from autopeft.utils.hardware import available_memory_bytes

WORKER_BYTES = 700 * 2**20
"""A worker's memory without its model: Python, torch, transformers and Ray."""


@dataclass(frozen=True)
class Devices:
    """The devices of all workers.

    Attributes:
        kind: Their type, as torch names it.
        count: How many there are; 0 if the workers have cores only.
        memory_bytes: Memory of the smallest of them, or what is free on this machine; None: it is
            not known.
        cores: Cores of a cluster; None: those of this machine.
        is_shared: Whether this process uses one of them, too.
        of_nodes: How many each machine of a cluster has; empty: all are in one.
    """

    kind: str = "cpu"
    count: int = 0
    memory_bytes: int | None = None
    cores: int | None = None
    is_shared: bool = False
    of_nodes: tuple[int, ...] = ()

    @property
    def most_per_worker(self) -> int:
        """Devices of the machine with most of them: a worker is on one machine."""
        return max(self.of_nodes, default=self.count)

    def without_accelerators(self) -> Devices:
        """Return the cores alone."""
        free = None if self.cores is not None else available_memory_bytes()
        return Devices(memory_bytes=free, cores=self.cores)

    def workers(self, share: float) -> int:
        """Return how many workers have room, with a share of a device each, or several devices.

        A worker's share lies on one device, so 2 devices at 0.4 have room for 4, not 5.
        """
        if share >= 1.0:
            each = self.of_nodes or (self.count,)
            return max(1, sum(math.floor(count / share) for count in each))
        return max(1, self.count * per_device(share))

    def room(self, share: float, *, block_bytes: float = 0.0) -> float | None:
        """Return the bytes that one worker can allocate; None where it is not known.

        On cores it is all that is free: several workers may not need the most at once. Blocks are
        not split, so of several devices each but the last may have less left than one of them.

        Args:
            share: Share of a device, or how many of them.
            block_bytes: Bytes of a block's weights.
        """
        if self.memory_bytes is None:
            return None
        if not self.count:
            return max(0.0, float(self.memory_bytes - WORKER_BYTES))
        taken = self.memory_bytes - usable_bytes(self.memory_bytes) if self.is_shared else 0.0
        usable = usable_bytes(self.memory_bytes - taken, processes=per_device(share))
        several = max(1, int(share))
        return max(0.0, several * usable - (several - 1) * block_bytes)

    def holding(self, needed: float, *, block_bytes: float) -> int | None:
        """Return the fewest devices of one machine, two at least, that hold so many bytes.

        None: not even all of them do, or their memory is not known. See `room`.
        """
        for count in range(2, self.most_per_worker + 1):
            room = self.room(count, block_bytes=block_bytes)
            if room is not None and room >= needed:
                return count
        return None


def per_device(share: float) -> int:
    """Return how many workers share a device."""
    return max(1, math.floor(1.0 / share + 1e-9)) if share else 1


def devices_here() -> Devices:
    """Return the devices of this machine."""
    kind = accelerator()
    if kind is None:
        return Devices(memory_bytes=available_memory_bytes())
    return Devices(kind, n_accelerators(), memory_bytes(kind), is_shared=True)
