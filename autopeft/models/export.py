"""Write a saved adapter in a format of other programs: peft folder, one LoRA, merged model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autopeft.errors import AdapterError, SettingsError
from autopeft.models.attach import Attached
from autopeft.models.backbone import load_processor, load_tokenizer
from autopeft.models.loading import prepare_config, restore_config
from autopeft.models.lora_conversion import MAX_RANK, export_lora
from autopeft.models.merging import merged
from autopeft.models.quantization import NONE
from autopeft.models.saving import checked_dtype, load_adapter, load_attached, save_adapter
from autopeft.utils.files import replaced_folder
from autopeft.utils.quiet import quiet_transformers

FORMATS = ("peft", "lora", "merged")
"""The formats of `export_adapter`."""


@dataclass(frozen=True)
class Exported:
    """An exported adapter.

    Attributes:
        folder: Where it was written.
        largest_difference: Largest difference of a logit from the adapter's own; None if no rows
            were given or the adapter was only copied.
        largest_logit: The largest of the adapter's own logits, for comparison.
        n_rows: Rows compared.
        lost: Module path -> why its adapter was not, or not fully, exported.
    """

    folder: Path
    largest_difference: float | None = None
    largest_logit: float | None = None
    n_rows: int = 0
    lost: Mapping[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Return what was lost and how far the logits differ, one line each."""
        lines = [f"lost: {path}: {why}" for path, why in self.lost.items()]
        if self.largest_difference is not None:
            lines.append(
                f"largest logit difference on {self.n_rows} validation rows: "
                f"{self.largest_difference:.2g} (logits up to {self.largest_logit:.3g})"
            )
        return lines


def export_adapter(
    base_model: str,
    folder: str | Path,
    target: str | Path,
    *,
    format: str,
    rows: Mapping[str, torch.Tensor] | None = None,
    max_rank: int = MAX_RANK,
    allow_lossy: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
) -> Exported:
    """Write a saved adapter in another format; the target appears only when it is complete.

    Args:
        base_model: Folder or hub id of the base model.
        folder: A folder written by `save_adapter`.
        target: Folder to write; it must not exist, or be empty.
        format: One of `FORMATS`.
        rows: A batch to compare logits on.
        max_rank: For "lora": the highest rank of any module.
        allow_lossy: For "lora": write the closest LoRA where no LoRA is equal.
        device: Where to compute.
        dtype: Type of the base model's weights, and so of a merged model's.

    Raises:
        SettingsError: if there is no such format or type.
        AdapterError: if the adapter cannot be loaded, merged or converted.
    """
    if format not in FORMATS:
        raise SettingsError("format", format, "no such format", f"use one of {', '.join(FORMATS)}")
    where = {"device": device, "dtype": checked_dtype(dtype)}
    given = attached = load_attached(base_model, folder, **where)
    place = Path(target)
    own = None if rows is None or format == "peft" else _logits(attached.model, rows)
    if format != "peft" and attached.backbone.quantization != NONE:
        # Merging needs full precision: a quantized weight would lose the change.
        attached = load_attached(base_model, folder, quantization=NONE, **where)
    lost: Mapping[str, str] = {}
    with replaced_folder(place) as draft:
        if format == "peft":
            save_adapter(attached, draft)
        elif format == "merged":
            export_merged(attached, draft, _processor_of(attached, base_model))
        else:
            lost = export_lora(attached, draft, max_rank=max_rank, allow_lossy=allow_lossy).lost
        if place.exists():
            place.rmdir()  # Raises an error if it holds anything.
    if rows is None or own is None:
        return Exported(place, lost=lost)
    if format == "merged":
        with merged(attached):
            exported = _logits(attached.model, rows)
    else:
        # Compare what another program loads from the files.
        given.detach()
        exported = _logits(load_adapter(given.backbone.model, place), rows)
    difference = float((exported - own).abs().max())
    return Exported(place, difference, float(own.abs().max()), len(own), lost)


def _processor_of(attached: Attached, base_model: str) -> Any:
    """Return what turns raw inputs into the model's: a tokenizer, or a processor of other media."""
    backbone = attached.backbone
    revision = backbone.revision
    media = {
        "pixel_values": "AutoImageProcessor",
        "input_values": "AutoFeatureExtractor",
        "input_features": "AutoProcessor",
    }
    loader = media.get(getattr(attached.model, "main_input_name", ""))
    if backbone.auto_class == "AutoModelForAudioClassification":
        loader = "AutoFeatureExtractor"  # Whisper's encoder needs no tokenizer.
    if loader is None:
        for_words = backbone.auto_class == "AutoModelForTokenClassification"
        return load_tokenizer(base_model, revision=revision, for_words=for_words)
    return load_processor(base_model, loader, revision=revision)


def _logits(model: Any, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a batch, or the hidden states of a model without a head."""
    first = next(p for p in model.parameters() if p.is_floating_point())
    kind, is_half = first.device.type, first.dtype in (torch.bfloat16, torch.float16)
    # Adapters in fp32 beside weights in half precision compute under autocast.
    with torch.inference_mode(), torch.autocast(kind, first.dtype if is_half else None, is_half):
        output = model(**{name: rows[name].to(first.device) for name in rows})
        logits: torch.Tensor = output.logits if "logits" in output else output[0]
    return logits.float()


def export_merged(attached: Attached, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write the base model with the adapters merged, for plain transformers, and its tokenizer.

    The candidate stays attached, and the base model keeps its weights.

    Raises:
        AdapterError: if a method in the plan cannot be merged, or the base model is quantized
            (`export_adapter` loads it in full precision).
    """
    if attached.backbone.quantization != NONE:
        raise AdapterError(
            "format", "merged", "the weights are quantized", "attach it to whole weights"
        )
    stuck = [s for part in attached.parts if not part.group.method.mergeable for s in part.layers]
    if stuck:
        raise AdapterError(
            "format", "merged", f"cannot be merged: {', '.join(stuck)}", "export as peft"
        )
    folder, model = Path(folder), attached.model
    config = model.config
    with merged(attached):
        restore_config(config, attached.backbone.config_before)
        try:
            with quiet_transformers():
                model.save_pretrained(folder)  # type: ignore[operator]
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
        finally:
            if attached.backbone.config_before:
                prepare_config(config)
    return folder
