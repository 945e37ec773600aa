"""The tensors in a checkpoint, without loading it, and whether the hub can be reached."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import huggingface_hub
from safetensors import safe_open
from torch import nn

from autopeft.errors import ModelError
from autopeft.utils.serialize import read_json

_PROBE_SECONDS = 4.0
_CONFIG = "config.json"


def looks_like_path(model: str) -> bool:
    """Return whether a name can only be a folder, not a hub id."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model


def check_exists(model: str) -> None:
    """Check what can be checked without a network.

    Raises:
        ModelError: if the name is empty, or a folder that does not exist or has no model.
    """
    if not model:
        raise ModelError("model", model, "no model is named", "give a folder or a hub id")
    folder = Path(model)
    if folder.is_dir():
        if not (folder / _CONFIG).is_file():
            raise ModelError(
                "model",
                model,
                f"the folder has no {_CONFIG}",
                "use a folder made by save_pretrained",
            )
    elif folder.is_file() or looks_like_path(model):
        raise ModelError("model", model, "no such folder", "check the path")


@lru_cache(maxsize=1)
def _is_hub_reachable() -> bool:
    """Ask the hub once, briefly: its own client would retry for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(
            huggingface_hub.constants.ENDPOINT, timeout=_PROBE_SECONDS
        )
    except Exception:  # Any error of the HTTP library means that the hub cannot be reached.
        return False
    return True


@dataclass(frozen=True)
class _Index:
    """The index file of a checkpoint in several files: the file of each tensor."""

    weight_map: Mapping[str, str]


def is_local_only(model: str) -> bool:
    """Return whether only local files can be used: a folder, or a hub that cannot be reached."""
    return Path(model).is_dir() or not _is_hub_reachable()


def keys(model: str, revision: str | None = None) -> frozenset[str] | None:
    """Return the names of the tensors in a checkpoint, or None if only loading it would tell."""
    folder = Path(model)
    if not folder.is_dir():
        return _hub_keys(model, revision)
    for index in sorted(folder.glob("*.index.json")):
        return frozenset(read_json(index, _Index, field="model", error=ModelError).weight_map)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return frozenset(names)


def _hub_keys(model: str, revision: str | None) -> frozenset[str] | None:
    cached = huggingface_hub.try_to_load_from_cache(model, _CONFIG, revision=revision)
    if isinstance(cached, str):
        found = keys(str(Path(cached).parent))
        if found is not None:
            return found
    if not _is_hub_reachable():
        return None
    try:
        metadata = huggingface_hub.get_safetensors_metadata(model, revision=revision)
    except Exception:  # No safetensors, or a gated model: loading it gives the error.
        return None
    return frozenset(metadata.weight_map)


def new_modules(model: nn.Module, names: Collection[str] | None) -> tuple[str, ...]:
    """Return the paths of the modules around the base model whose weights a checkpoint lacks.

    Args:
        model: The model to be loaded, on any device.
        names: Names of the checkpoint's tensors; None if unknown: then all such modules count.
    """
    prefix = getattr(model, "base_model_prefix", "")
    start = f"{prefix}."

    held = None if names is None else {name.removeprefix(start) for name in names}
    found = set()
    # Tied weights appear once, under their first name, so a tied head does not count as new.
    for name, _ in model.named_parameters():
        around = not name.startswith(start) or "pooler" in name.split(".")
        if around and prefix and (held is None or name.removeprefix(start) not in held):
            found.add(name.rpartition(".")[0])
    return tuple(sorted(found))
