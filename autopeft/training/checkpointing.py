"""Gradient checkpointing: blocks keep their inputs only and are computed again when needed.

Only the blocks at and above the lowest adapter keep anything for the backward pass, so the blocks
below are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Let these blocks be computed again in the backward pass, which must run in this context.

    Args:
        model: A model, perhaps with adapters.
        blocks: Paths of its blocks.
    """
    with ExitStack() as stack:
        for path in blocks:
            block = model.get_submodule(path)
            # An attribute of the instance hides the method of its class, or an attribute before.
            own = vars(block).get("forward")
            plain = block.forward
            block.forward = partial(checkpoint, plain, use_reentrant=False)
            stack.callback(restore_forward, block, own)
        yield


def restore_forward(block: nn.Module, own: object) -> None:
    """Put back what hid the class's method before: `own`, or nothing."""
    del block.forward
    if own is not None:
        block.forward = own  # type: ignore[assignment]
