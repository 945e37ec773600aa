"""Turns an attached candidate into what other programs load: a peft folder, or a whole model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from autopeft.errors import AdapterError, SettingsError
from autopeft.models.attach import Attached, LinearView, replace_module
from autopeft.models.backbone import load_tokenizer, own_parameters
from autopeft.models.loading import prepare_config, quiet, restore_config
from autopeft.models.saving import load_attached, save_adapter

FORMATS = ("peft", "merged")
"""What `export_adapter` can write."""


def export_adapter(base_model: str, folder: str | Path, target: str | Path, *, format: str) -> Path:
    """Writes a saved adapter in another format; the target appears only when it is complete.

    Args:
        base_model: Folder or hub id of the base model.
        folder: What `save_adapter` wrote.
        target: Folder to write; must not exist or be empty.
        format: One of `FORMATS`.

    Raises:
        SettingsError: if there is no such format.
        AdapterError: if the adapter cannot be loaded, or not be merged.
    """
    if format not in FORMATS:
        raise SettingsError("format", format, "no such format", f"use one of {', '.join(FORMATS)}")
    attached = load_attached(base_model, folder)
    if format == "merged":
        tokenizer = load_tokenizer(base_model, revision=attached.backbone.revision)
        return _whole(Path(target), lambda place: export_merged(attached, place, tokenizer))
    return _whole(Path(target), lambda place: export_peft(attached, place))


def _whole(target: Path, write: Callable[[Path], object]) -> Path:
    """Lets something be written beside the target, then moves it there."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(partial)
        if target.is_dir():
            target.rmdir()
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def export_peft(attached: Attached, folder: str | Path) -> Path:
    """Writes a standard peft folder, or a folder for each part and `plan.json` for a mixed plan."""
    return save_adapter(attached, folder)


def export_merged(attached: Attached, folder: str | Path, tokenizer: Any = None) -> Path:
    """Writes the base model with the adapters folded in: plain transformers loads it.

    The candidate stays attached and the base keeps its weights.

    Args:
        attached: What to write.
        folder: Where to; made if need be.
        tokenizer: Saved beside the model where given.

    Raises:
        AdapterError: if a method in the plan cannot be merged; names the sites.
    """
    stuck = [s for part in attached.parts if not part.group.method.mergeable for s in part.layers]
    if stuck:
        raise AdapterError(
            "format", "merged", f"cannot be merged: {', '.join(stuck)}", "export as peft"
        )
    folder = Path(folder)
    model = attached.model
    layers = {path: layer for part in attached.parts for path, layer in part.layers.items()}
    config = model.config
    undo: dict[str, list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]]] = {}
    try:
        for path, layer in layers.items():
            original = attached.original(path)
            undo[path] = [(p, p.data, p.data.clone()) for p in own_parameters(original)]
            replace_module(model, path, _merge(layer, original))
        restore_config(config, attached.backbone.config_before)
        with quiet():
            model.save_pretrained(folder)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    finally:
        if attached.backbone.config_before:
            prepare_config(config)
        for path, layer in layers.items():
            if path in undo:
                _unmerge(layer)
                for parameter, data, values in undo[path]:
                    parameter.data = data.copy_(values)
                base = layer.get_base_layer()  # type: ignore[operator]
                if isinstance(base, LinearView):
                    base.look_at(attached.original(path))
            replace_module(model, path, layer)
    return folder


def _merge(layer: Any, original: nn.Module) -> nn.Module:
    """Folds a layer's adapter into its base module; gives the module to save in its place."""
    assert isinstance(layer, BaseTunerLayer)
    layer.merge(safe_merge=True)
    merged: nn.Module = layer.get_base_layer()
    if isinstance(merged, LinearView):
        for name, parameter in original.named_parameters(recurse=False):
            data = getattr(merged, name).data
            parameter.data = (data.t() if name == "weight" else data).contiguous()
        return original
    return merged


def _unmerge(layer: Any) -> None:
    """Makes a layer take its adapter for not merged; its base module's values are not touched."""
    if "ln_tuning_layers" in layer._modules:
        layer.unmerge()  # A mere exchange of modules.
    layer.merged_adapters.clear()
