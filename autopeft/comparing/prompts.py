"""Which prompts and prefixes of peft can be scored, on which task."""

from __future__ import annotations

from torch import nn

from autopeft.comparing.sources import Source
from autopeft.errors import AdapterError
from autopeft.models.peft_config import ForeignConfig
from autopeft.models.saving import TASK_TYPES
from autopeft.models.sites import max_positions, reads_backwards_only
from autopeft.tasks.data import TaskData

_IN_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
"""Kinds that add keys and values, no tokens: a row's own tokens stay where they are."""

_PLACED = ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS")
"""Tasks of peft whose scores are found where tokens stand before a row's own."""


def check_prompt(
    source: Source, config: ForeignConfig, base: nn.Module, auto_class: str, data: TaskData
) -> None:
    """Check that peft would use a prompt on these rows, and that its scores can be read.

    Raises:
        AdapterError: if not.
    """
    expected, folder = TASK_TYPES.get(auto_class, "FEATURE_EXTRACTION"), str(source.folder)
    if config.task_type != expected:
        # peft leaves a prompt out, or reads the wrong outputs, where the types differ.
        problem = f"is {config.peft_type} for task_type {config.task_type}, not {expected}"
        raise AdapterError("adapter", folder, problem, "name the --task it was trained for")
    if config.peft_type == "MULTITASK_PROMPT_TUNING":
        problem = "is MULTITASK_PROMPT_TUNING: each row needs the number of its task"
        raise AdapterError("adapter", folder, problem, "leave it out")
    if config.peft_type not in _IN_THE_CACHE:
        if expected not in _PLACED:
            problem = f"is {config.peft_type}: its virtual tokens count among those of each row"
            raise AdapterError("adapter", folder, problem, "leave it out")
        if expected == "SEQ_CLS" and reads_backwards_only(base):
            # transformers then takes the output at the end of the padding.
            problem = (
                f"is {config.peft_type}: behind it, a decoder does not find a row's last token"
            )
            raise AdapterError("adapter", folder, problem, "leave it out")
    _check_room(folder, config.num_virtual_tokens or 0, base, data)


def _check_room(folder: str, n_virtual: int, base: nn.Module, data: TaskData) -> None:
    limit = max_positions(base)
    rows = [data.test, *(second.data.splits[second.split("test")] for second in data.second)]
    longest = max(int(split.lengths.max(initial=0)) for split in rows)
    if limit is not None and n_virtual + longest > limit:
        problem = (
            f"puts {n_virtual} virtual tokens before rows of up to {longest}, and the model has "
            f"{limit} positions"
        )
        remedy = f"use --max-length {limit - n_virtual}"
        raise AdapterError("adapter", folder, problem, remedy)
