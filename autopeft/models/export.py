"""Turns an attached candidate into what other programs load: a peft folder, or a whole model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autopeft.errors import AdapterError, SettingsError
from autopeft.models.attach import Attached
from autopeft.models.backbone import load_tokenizer
from autopeft.models.loading import prepare_config, quiet, restore_config
from autopeft.models.merging import merged
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
    config = model.config
    with merged(attached):
        restore_config(config, attached.backbone.config_before)
        try:
            with quiet():
                model.save_pretrained(folder)  # type: ignore[operator]
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
        finally:
            if attached.backbone.config_before:
                prepare_config(config)
    return folder
