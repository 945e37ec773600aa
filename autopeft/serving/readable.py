"""Checks that a folder is one that PEFT reads: numbers that are numbers, names that are found."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from autopeft.serving.adapter_folder import PEFT_ROOT, AdapterFolder
from autopeft.serving.targeting import left_out

_OWN_NAMES = frozenset(
    ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
) | {"XLORA"}
"""Methods of PEFT whose tensors belong to no module of the model."""

_MALFORMED = re.compile(r"\.lora_[AB]\.(?!(weight|bias)$)")


def wrong_numbers(adapter: AdapterFolder) -> str:
    """Return the setting of a LoRA's size or scaling that is no number PEFT could use."""
    config = adapter.config
    if config.get("peft_type", "LORA") != "LORA":
        return ""
    if "r" in config and not _is_rank(config["r"]):
        return f"r is {config['r']!r}"
    if "lora_alpha" in config and not _is_alpha(config["lora_alpha"]):
        return f"lora_alpha is {config['lora_alpha']!r}"
    return _wrong_pattern(config, "rank_pattern") or _wrong_pattern(config, "alpha_pattern")


def _wrong_pattern(config: Mapping[str, Any], name: str) -> str:
    pattern = config.get(name) or {}
    if not isinstance(pattern, Mapping):
        return f"{name} is {pattern!r}"
    is_right = _is_rank if name == "rank_pattern" else _is_alpha
    for key, value in pattern.items():
        if problem := _no_expression(key):
            return f"{name} has {key!r}: {problem}"
        if not is_right(value):
            return f"{name} gives {key!r} {value!r}"
    return ""


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value != 0


def _no_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        return f"no expression ({error})"
    return ""


def unknown_names(adapter: AdapterFolder) -> str:
    """Return a tensor by whose name PEFT finds no adapter: it leaves such tensors out."""
    kind = str(adapter.config.get("peft_type", "LORA"))
    root = PEFT_ROOT if kind == "LORA" else "base_model."
    for name in adapter.shapes:
        if kind not in _OWN_NAMES and not name.startswith(root):
            return f"{name} does not start with {root}"
        if kind == "LORA" and name.startswith(2 * PEFT_ROOT):
            return f"{name} starts with {PEFT_ROOT} twice"
        if kind == "LORA" and _MALFORMED.search(name):
            return f"{name} has more than weight after lora_A or lora_B"
    return ""


def untargeted(*words: str) -> Callable[[AdapterFolder], str]:
    """Return a check that `target_modules` names each module that has factors.

    Args:
        words: What it may be in place of names or an expression, for a set of the reader's own.
    """

    def broken(adapter: AdapterFolder) -> str:
        targets = adapter.config.get("target_modules")
        if targets is None or targets in words or adapter.config.get("target_parameters"):
            return ""
        if isinstance(targets, str):
            if problem := _no_expression(targets):
                return f"{targets!r} is {problem}"
            known = re.compile(targets)
            paths = [path for path in _paths(adapter) if not known.fullmatch(path)]
        elif isinstance(targets, list):
            ends = tuple(f".{name}" for name in targets)
            paths = [path for path in _paths(adapter) if not f".{path}".endswith(ends)]
        else:
            return f"it is {targets!r}"
        return f"{paths[0]} is not" if paths else ""

    return broken


def not_targeted(adapter: AdapterFolder) -> str:
    """Return a module with factors that the configuration leaves out by another setting."""
    for path in () if adapter.config.get("target_parameters") else _paths(adapter):
        if setting := left_out(adapter.config, path):
            return f"{setting} leaves out {path}"
    return ""


def unknown_type(adapter: AdapterFolder) -> str:
    """Return the method, if PEFT knows none of that name."""
    kind = adapter.config.get("peft_type")
    if adapter.config and (not isinstance(kind, str) or not kind.isupper()):
        return f"peft_type is {kind!r}"
    return adapter.fit.unknown_type


def _paths(adapter: AdapterFolder) -> list[str]:
    return [path.removeprefix(PEFT_ROOT) for path, _, _ in adapter.modules()]
