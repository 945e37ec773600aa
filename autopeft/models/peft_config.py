"""The configuration of a peft folder of others, checked before peft acts on it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import PeftType, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import nn

from autopeft.errors import AdapterError
from autopeft.models.adapter_files import CONFIG_FILE, REMEDY, TENSOR_FILE, damaged
from autopeft.utils.expressions import endless
from autopeft.utils.serialize import read_json

_SMALL = 256
"""Sizes up to this are not compared with the tensors: what peft makes of them is small."""

_NO_SIZE = re.compile(
    r"alpha|lambda|seed|key|index|ids$|warmup|step|tinit|tfinal|deltaT|interval|niter|init_task"
    r"|top_?k|transform|^encoder_"
)
"""Whole numbers of peft 0.21.2 that size no tensor; a prompt's encoder is only made to train it."""

_RANKS = ("r", "rank_pattern")

_FIRST_FACTOR = re.compile(r"\.lora_(embedding_)?A(\.weight)?$")


@dataclass(frozen=True)
class ForeignConfig:
    """What autopeft itself reads of an `adapter_config.json`; peft reads all of it."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    modules_to_save: tuple[str, ...] | None = None
    megatron_config: Any = None
    tokenizer_kwargs: Any = None
    num_virtual_tokens: int | None = None

    @property
    def is_prompt(self) -> bool:
        """Whether the adapter is a prompt or a prefix."""
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type)]
        return issubclass(kind, PromptLearningConfig)


def read_peft_config(folder: Path) -> ForeignConfig:
    """Read and check the configuration of a peft folder that autopeft did not write."""
    path = folder / CONFIG_FILE
    config = read_json(path, ForeignConfig, field="adapter", remedy=REMEDY, error=AdapterError)
    for name in ("megatron_config", "tokenizer_kwargs"):
        if getattr(config, name) is not None:
            # peft imports the module, or passes the arguments, that the file names.
            raise damaged(path, f"sets {name}, which is refused")
    if config.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        problem = f"is of the type {config.peft_type}, which peft {peft.__version__} does not know"
        raise AdapterError("adapter", str(folder), problem, "install the peft that saved it")
    return config


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a peft folder, without reading the tensors."""
    path = folder / TENSOR_FILE
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise damaged(path, f"is not a safetensors file ({error})") from error


def check_before_peft(folder: Path, base: nn.Module) -> None:
    """Check that peft can act on a configuration in reasonable time and memory.

    It makes modules as large as the configuration says, and reads the tensors afterwards.

    Raises:
        AdapterError: if the configuration names a size that the tensors do not have, a number that
            is not finite, or an expression whose matching does not end.
    """
    path = folder / CONFIG_FILE
    config = read_json(path, dict[str, Any], field="adapter", remedy=REMEDY, error=AdapterError)
    shapes = tensor_shapes(folder)
    largest = max((n for shape in shapes.values() for n in shape), default=0)
    ranks = [shape[0] for name, shape in shapes.items() if shape and _FIRST_FACTOR.search(name)]
    for name, value in config.items():
        limit = max(ranks, default=largest) if name in _RANKS else largest
        for number in _numbers(value):
            if not math.isfinite(number):
                raise damaged(path, f"has {name}={number}, which is not finite")
            if number > max(limit, _SMALL) and not _NO_SIZE.search(name):
                problem = f"has {name}={number:.6g}, and its tensors have at most {limit}"
                raise damaged(path, problem)
    names = [name for name, _ in base.named_modules()]
    if problem := endless(config, names):
        raise AdapterError("adapter", str(path), problem, "name the modules in a list")


def _numbers(value: object) -> Iterator[float]:
    """Yield the numbers in a field, of all modules or of each."""
    for each in value.values() if isinstance(value, Mapping) else (value,):
        if isinstance(each, int | float) and not isinstance(each, bool):
            yield each
