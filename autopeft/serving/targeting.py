"""Which modules an adapter's configuration targets, as PEFT finds them by their paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FIRST_INDEX = r".*?\.[^.]*\.(?P<index>\d+)\."


def left_out(config: Mapping[str, Any], path: str) -> str:
    """Return the setting by which PEFT leaves out a module that `target_modules` names, or "".

    Written from `peft/tuners/tuners_utils.py` (`check_target_module_exists`), PEFT 0.21.2.

    Example:
        >>> left_out({"layers_to_transform": [0]}, "model.layers.1.self_attn.q_proj")
        'layers_to_transform'
        >>> left_out({"layers_to_transform": [0]}, "model.layers.0.self_attn.q_proj")
        ''
    """
    if is_named(config.get("exclude_modules"), path):
        return "exclude_modules"
    return "layers_to_transform" if _is_of_another_layer(config, path) else ""


def is_named(names: object, path: str) -> bool:
    """Return whether an expression, or a list of ends of paths, names a module."""
    if isinstance(names, str):
        return bool(names) and _match(rf"(?:{names})\Z", path) is not None
    if not isinstance(names, list):
        return False
    return any(f".{path}".endswith(f".{name}") for name in names)


def _is_of_another_layer(config: Mapping[str, Any], path: str) -> bool:
    wanted, targets = config.get("layers_to_transform"), config.get("target_modules")
    # PEFT asks for the layer only where a name in a list is the end of a path.
    if wanted in (None, []) or not isinstance(targets, list) or path in targets:
        return False
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list):
        return False
    forms = [rf"(?:^|.*?\.){each}\.(?P<index>\d+)\." for each in patterns] or [_FIRST_INDEX]
    found = next(filter(None, (_match(form, path) for form in forms)), None)
    layers = wanted if isinstance(wanted, list) else [wanted]
    return found is None or int(found["index"]) not in layers


def _match(form: str, path: str) -> re.Match[str] | None:
    try:
        return re.match(form, path)
    except re.error:  # PEFT raises an error for it, which is no answer about this module.
        return None
