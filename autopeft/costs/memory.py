"""What of a device's memory a training can use, and what the price table needs to say so."""

from __future__ import annotations

from dataclasses import dataclass

CONTEXT_BYTES = 600 * 2**20
"""What a process holds on an accelerator before its first tensor: its context and libraries."""

_USABLE = 0.95
"""Share of the memory that an allocator can fill: blocks of unlike sizes leave gaps."""


@dataclass(frozen=True)
class Moments:
    """What an optimizer keeps for each trained parameter.

    Attributes:
        value_bytes: Bytes of both moments of a parameter.
        least_values: Parameters of the smallest tensor for which that holds; smaller ones keep both
            moments in fp32.
    """

    value_bytes: float = 8.0
    least_values: int = 0


FP32_MOMENTS = Moments()


def usable_bytes(memory: float, *, processes: int = 1) -> float:
    """Return what each of some processes can allocate of a device's memory.

    Example:
        >>> from autopeft.costs.memory import usable_bytes
        >>> round(usable_bytes(24e9) / 1e9, 1)
        22.2
    """
    return max(0.0, _USABLE * memory / processes - CONTEXT_BYTES)
