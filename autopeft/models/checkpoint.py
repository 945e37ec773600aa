"""The shapes of a checkpoint's tensors, without loading it, and whether it is here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from safetensors import SafetensorError, safe_open

from autopeft.errors import ModelError
from autopeft.utils.online import is_hub_reachable
from autopeft.utils.serialize import read_json

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
    elif folder.exists():
        raise ModelError("model", model, "is no folder", "name the folder that holds the model")
    elif looks_like_path(model):
        raise ModelError("model", model, "no such folder", "check the path")


@dataclass(frozen=True)
class _Index:
    """The index file of a checkpoint in several files: the file of each tensor."""

    weight_map: Mapping[str, str]


def is_local_only(model: str) -> bool:
    """Return whether only local files can be used: a folder, or a hub that cannot be reached."""
    return Path(model).is_dir() or not is_hub_reachable()


def shapes(model: str, revision: str | None = None) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of each tensor of a checkpoint, or None if only loading it would tell."""
    folder = Path(model)
    if not folder.is_dir():
        return _hub_shapes(model, revision)
    files = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = read_json(index, _Index, field="model", error=ModelError).weight_map
        files = [folder / name for name in sorted(set(weight_map.values()))]
    if not files or not all(file.is_file() for file in files):
        return None
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ModelError(
                "model", str(file), f"is no safetensors file ({error})", "download it again"
            ) from error
    return found


def _hub_shapes(model: str, revision: str | None) -> dict[str, tuple[int, ...]] | None:
    cached = huggingface_hub.try_to_load_from_cache(model, _CONFIG, revision=revision)
    if isinstance(cached, str):
        found = shapes(str(Path(cached).parent))
        if found is not None:
            return found
    if not is_hub_reachable():
        return None
    try:
        metadata = huggingface_hub.get_safetensors_metadata(model, revision=revision)
    except Exception:  # No safetensors, or a gated model: loading it gives the error.
        return None
    files = metadata.files_metadata.values()
    return {name: tuple(each.shape) for file in files for name, each in file.tensors.items()}
