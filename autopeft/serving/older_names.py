"""Names of a model's settings that other programs still read, beside those of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopeft.errors import AdapterError
from autopeft.utils.files import write_text
from autopeft.utils.serialize import read_json, strict_json

_ROTARY = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""Model type -> setting of `rope_parameters` -> its older name, where that is another one."""

_EXPERTS = {"num_local_experts": "num_experts"}
_RENAMED = {"gpt2": {"n_positions": "n_ctx"}, "qwen3_moe": _EXPERTS, "qwen3_vl_moe_text": _EXPERTS}
"""Model type -> name -> older name."""

_TWO_ROTARIES = frozenset({"gemma3_text", "gemma3n_text"})
"""Model types with one set of rotary settings for each type of layer, both by older names."""

TEXT = "text_config"
"""The setting that holds those of a text model beside models of images or sounds."""


def older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a `config.json` by their older names.

    Transformers 5 moved `rope_theta`, `rope_scaling` and `partial_rotary_factor` into
    `rope_parameters` and reads both. A program that reads only the older names takes its default
    in their place, without a word: mlx-lm does so for Llama and Mistral. Those of a text model
    beside models of images or sounds stay under `text_config`, where mlx-lm reads them
    (`mlx_lm/models/gemma3.py`, `mistral3.py`).

    Args:
        config: Content of a model's `config.json`.

    Example:
        >>> older_names({"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}})
        {'rope_theta': 100000.0}
    """
    kind = str(config.get("model_type", ""))
    found = {
        old: config[new]
        for new, old in _RENAMED.get(kind, {}).items()
        if config.get(new) is not None
    }
    rotary = config.get("rope_parameters")
    rotary = rotary if isinstance(rotary, Mapping) else {}
    if kind in _TWO_ROTARIES:
        local = rotary.get("sliding_attention") or {}
        if "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
        rotary = rotary.get("full_attention") or {}
    names = _ROTARY.get(kind, {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if isinstance(rotary.get(name), int | float):
            found[names.get(name, name)] = rotary[name]
    scaling = rotary.get("rope_type", "default")
    if scaling != "default":
        others = {name: value for name, value in rotary.items() if name != "rope_theta"}
        # `type` is what `rope_type` was called before.
        found["rope_scaling"] = {**others, "type": scaling}
    text = config.get(TEXT)
    if isinstance(text, Mapping) and (inner := older_names(text)):
        found[TEXT] = inner
    return found


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `config.json` with the older names beside those of transformers 5."""
    older = older_names(config)
    if TEXT in older:
        older[TEXT] = with_older_names(config[TEXT])
    return dict(sorted({**config, **older}.items()))


def add_older_names(folder: Path) -> None:
    """Write the older names into the `config.json` of a model's folder."""
    path = folder / "config.json"
    config = read_json(
        path, dict[str, Any], field="model", remedy="export it again", error=AdapterError
    )
    write_text(path, strict_json(with_older_names(config)))
