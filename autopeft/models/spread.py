"""A model larger than one device: its blocks on several of them, everything else on the first.

Tokens, targets, hidden states that a head reads and logits are then on one device, so what calls
the model need not know of the others. Hidden states, masks and positions move where blocks do: by
hooks of the blocks' own, because those of accelerate replace `forward`, as several accelerations
and gradient checkpointing do for a while.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import send_to_device
from torch import nn

from autopeft.errors import ModelError
from autopeft.utils.formatting import human_bytes


def device_map(
    model: nn.Module,
    blocks: Sequence[str],
    memory: Mapping[str, float],
    sizes: Mapping[str, float],
    reserved: float = 0.0,
) -> dict[str, str]:
    """Return where each part of a model goes, as accelerate's `dispatch_model` takes it.

    Each device takes the same share of its memory, and blocks that follow one another stay
    together. accelerate's own map fills one device after another, which leaves the last one empty
    and no room for activations on the first.

    Args:
        model: The model, perhaps on `meta`.
        blocks: Path of each block in the order of computation.
        memory: Device -> its free bytes, the first device first.
        sizes: Path of a block -> the bytes of its weights, and "" -> those of all else.
        reserved: Bytes of the first device for other things than weights.

    Raises:
        ModelError: if the weights are more than there is memory for.
    """
    own = dict.fromkeys(blocks)
    total = reserved + sum(sizes.values())
    free = sum(memory.values())
    if total > free:
        problem = (
            f"weights need {human_bytes(total)}, {human_bytes(free)} are free on {len(memory)}"
        )
        remedy = "use quantization=bnb-4bit, or more gpus_per_worker"
        raise ModelError("model", type(model).__name__, f"its {problem} devices", remedy)
    devices = list(memory)
    found = dict.fromkeys(_outside(model, own), devices[0])
    before = reserved + sizes[""]
    ends = list(accumulate(memory.values()))
    for path in own:
        middle = (before + sizes[path] / 2) / total * free
        found[path] = devices[min(bisect(ends, middle), len(devices) - 1)]
        before += sizes[path]
    return found


def _outside(model: nn.Module, blocks: Collection[str]) -> Iterator[str]:
    """Yield the largest modules without a block, and the parameters of those with one."""

    def below(path: str, module: nn.Module) -> Iterator[str]:
        if path in blocks:
            return
        if path and not any(block.startswith(f"{path}.") for block in blocks):
            yield path
            return
        start = f"{path}." if path else ""
        yield from (f"{start}{name}" for name in (*module._parameters, *module._buffers))
        for name, child in module.named_children():
            yield from below(f"{start}{name}", child)

    return below("", model)


def connect(model: nn.Module, blocks: Sequence[str], places: Mapping[str, str]) -> None:
    """Let what blocks take come to their device, and what leaves them return to the first one.

    Args:
        model: The model, with its parts where they belong.
        blocks: Path of each block in the order of computation.
        places: Where they are: a `device_map`.
    """
    remove_hook_from_submodules(model)  # transformers has let accelerate put its own there.
    first = next(iter(places.values()))
    order = list(dict.fromkeys(blocks))
    for path, following in zip(order, [*order[1:], ""], strict=True):
        block, device = model.get_submodule(path), places[path]
        if device == first:
            continue
        block.register_forward_pre_hook(partial(_brought, device), with_kwargs=True)
        # A model computes with its states between two lists of blocks, or calls a block again.
        is_last = path.rpartition(".")[0] != following.rpartition(".")[0]
        if is_last or blocks.count(path) > 1 or places[following] == first:
            block.register_forward_hook(partial(_returned, first))


def _brought(
    device: str, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return send_to_device(args, device), send_to_device(kwargs, device)


def _returned(device: str, _block: nn.Module, _args: Any, output: Any) -> Any:
    return send_to_device(output, device)
