"""Write a saved adapter in a format of other programs: peft folder, one LoRA, merged model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from autopeft.costs.constraints import parse_bytes
from autopeft.errors import AdapterError, ModelError, SettingsError
from autopeft.models.adapter_files import HEAD_FILE, SavedPlan
from autopeft.models.attach import Attached
from autopeft.models.backbone import load_processor, load_tokenizer
from autopeft.models.gguf_lora import write_gguf, write_modelfile
from autopeft.models.loading import own_dtype, prepare_config, restore_config
from autopeft.models.lora_conversion import export_lora
from autopeft.models.merging import cast, merged
from autopeft.models.quantization import NONE
from autopeft.models.requantize import (
    check_requantizable,
    dequantize_into,
    load_written,
    quantized_copy,
)
from autopeft.models.saving import DTYPES, checked_dtype, load_adapter, load_attached, save_adapter
from autopeft.models.served import as_served
from autopeft.serving.older_names import add_older_names
from autopeft.serving.servers import (
    MAX_RANK,
    SERVERS,
    Server,
    check_export,
    chosen_format,
    find_server,
)
from autopeft.utils.device import checked_device, is_out_of_memory
from autopeft.utils.files import replaced_folder
from autopeft.utils.quiet import quiet_transformers

FLOAT = "float32"
"""Type in which adapters are computed."""

MAX_SHARD_SIZE = 5 * 10**9
"""Default of `export_adapter`: bytes of the largest file of a merged model."""


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
        missing: What is not beside the adapter, and why, one line each.
        rank: The rank of all modules of a LoRA; 0 for other formats.
        head_file: File of the new head, if it is one of its own; else "".
        format: The format.
        server: The server that it was written for; "" if for none.
        serve: The command that serves it; "" if there is none.
        quantization: How the weights of a merged model are stored.
        is_lossy: Whether it may answer otherwise than the adapter, beyond rounding: some layers
            were approximated, or it has, or is loaded over, other weights than those that the
            adapter was trained over.
        trained_over: How those weights were quantized, where they are others; else "none".
        converted: Its quality on the test split beside the adapter's, in one line; "" if it was not
            scored.
        pushed_to: Address on the hub; "" if it was not pushed.
    """

    folder: Path
    largest_difference: float | None = None
    largest_logit: float | None = None
    n_rows: int = 0
    lost: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    rank: int = 0
    head_file: str = ""
    format: str = "peft"
    server: str = ""
    serve: str = ""
    quantization: str = NONE
    is_lossy: bool = False
    trained_over: str = NONE
    converted: str = ""
    pushed_to: str = ""

    def notes(self) -> list[str]:
        """Return what was lost or is missing, and how far the logits differ, one line each."""
        lines = [f"lost: {path}: {why}" for path, why in self.lost.items()]
        lines += self.missing
        if self.head_file:
            loader = self.server or self.format
            lines.append(f"the new head is in {self.head_file}: {loader} holds none")
        if self.trained_over != NONE:
            lines.append(f"lossy: {self._other_weights()}")
        if self.largest_difference is not None:
            lines.append(
                f"largest logit difference on {self.n_rows} validation rows: "
                f"{self.largest_difference:.2g} (logits up to {self.largest_logit:.3g})"
            )
        if self.converted:
            lines.append(f"as exported: {self.converted}")
        return lines

    def _other_weights(self) -> str:
        """Return over which weights it was trained, and over which it answers."""
        trained = f"it was trained over {self.trained_over} weights"
        if self.quantization != NONE:
            return f"{trained}, and the merged ones are rounded again"
        if self.format == "merged":
            return f"{trained}, and is merged into whole ones"
        return f"{trained}, and {self.server or 'the code in its card'} loads whole ones"


class Scorer(Protocol):
    """Scores what was written, as other programs load it."""

    def see_base(self, model: Any) -> None:
        """Take what the task needs of the base model without adapters."""

    def score(self, model: Any) -> None:
        """Score the model that was written."""


def export_adapter(
    base_model: str,
    folder: str | Path,
    target: str | Path,
    *,
    format: str | None = None,
    server: str | None = None,
    rows: Mapping[str, torch.Tensor] | None = None,
    max_rank: int | None = None,
    allow_lossy: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    requantize: bool = False,
    scorer: Scorer | None = None,
    finish: Callable[[Path, Exported], Exported] | None = None,
) -> Exported:
    """Write a saved adapter in another format; the target appears only when it is complete.

    Args:
        base_model: Folder or hub id of the base model.
        folder: A folder written by `save_adapter`.
        target: Folder to write; it must not exist, or be empty.
        format: One of `autopeft.serving.servers.FORMATS`; default: the server's, or "peft".
        server: The server to write for; see `autopeft.serving.servers`.
        rows: A batch to compare logits on.
        max_rank: For "lora" and "gguf": the highest rank of any module; default: the highest
            that the server takes, or 128.
        allow_lossy: For "lora" and "gguf": write the closest LoRA where no LoRA is equal.
        device: Where to compute.
        dtype: Type of a merged model's weights; default: the base model's own. It is merged in
            fp32. For other formats: of the base model's weights while it is exported; default:
            "float32".
        max_shard_size: For "merged": the largest file of weights, such as "5GB" or "5GiB", or
            bytes; default: `MAX_SHARD_SIZE`.
        requantize: For "merged": merge into the dequantized weights of a quantized base model, and
            quantize the result in the same way; else it is merged into the whole weights.
        scorer: Scores what was written; not for "peft", which is a copy.
        finish: Writes what else belongs into the folder, which is not yet at its place, and returns
            what is known of it then.

    Raises:
        SettingsError: if there is no such format, server, type or device, nothing to quantize
            again, or an option has no effect on the format.
        AdapterError: if the adapter cannot be loaded, merged or converted, or the server would not
            load it.
    """
    format = chosen_format(format, server)
    found = None if server is None else find_server(server)
    check_options(
        format,
        max_rank=max_rank,
        allow_lossy=allow_lossy,
        device=device,
        dtype=dtype,
        max_shard_size=max_shard_size,
        requantize=requantize,
    )
    is_merged = format == "merged"
    where = {"device": device, "dtype": FLOAT if is_merged else dtype or FLOAT}
    shard = MAX_SHARD_SIZE
    if max_shard_size is not None:
        # transformers reads fewer units than are taken here.
        shard = max(1, int(parse_bytes("max_shard_size", max_shard_size)))
    if requantize:
        check_requantizable(SavedPlan.read(Path(folder)).quantization)
    with _room(device, "its weights"):
        given = attached = load_attached(base_model, folder, **where)
    seen = as_served(given.backbone)
    if found is not None and (problem := found.refused(**seen)):
        others = [
            each.name
            for each in SERVERS.values()
            if each.is_for_models >= found.is_for_models and not each.refused(**seen)
        ]
        raise AdapterError("for", found.name, problem, f"use --for {' or '.join(others)}")
    quantization = given.backbone.quantization
    weights = dtype or _stored_dtype(base_model, attached.backbone.revision)
    place = Path(target)
    own = None if rows is None or format == "peft" else _logits(attached.model, rows)
    if format != "peft" and quantization != NONE:
        # Merging needs full precision: a quantized weight would lose the change. And what loads a
        # LoRA loads the base model as it is saved, which is what it is measured over.
        with _room(device, f"its whole weights beside those in {quantization}"):
            attached = load_attached(base_model, folder, quantization=NONE, **where)
    if format != "peft" and given is not attached:
        given.detach()
    if requantize:
        dequantize_into(given.backbone, attached)
    if scorer is not None:
        with _parked(attached) if given is attached else nullcontext():
            scorer.see_base(given.backbone.model)
    exported = Exported(
        place,
        format=format,
        server=server or "",
        quantization=quantization if requantize else NONE,
        is_lossy=format != "peft" and quantization != NONE,
        trained_over=NONE if format == "peft" else quantization,
    )
    with replaced_folder(place) as draft, TemporaryDirectory() as spare:
        if format == "peft":
            save_adapter(attached, draft)
        elif requantize:
            export_merged(attached, spare)
            quantized_copy(
                Path(spare),
                draft,
                attached.backbone,
                quantization=quantization,
                device=device,
                dtype=weights,
                max_shard_size=shard,
            )
        elif is_merged:
            export_merged(attached, draft, dtype=weights, max_shard_size=shard)
        else:
            # What peft alone would load of a GGUF file's factors tells the difference.
            lora = draft if format == "lora" else Path(spare)
            conversion = export_lora(
                attached,
                lora,
                max_rank=max_rank or (MAX_RANK if found is None else found.max_rank),
                allow_lossy=allow_lossy,
                rank_for=(lambda largest: largest) if found is None else found.rank_for,
                head_apart=format == "gguf" or not (found is None or found.takes_head),
                joined=() if found is None else found.joined,
            )
            rank = next(iter(conversion.factors.values())).rank
            head_file = HEAD_FILE if (lora / HEAD_FILE).is_file() else ""
            lost = conversion.lost
            is_lossy = exported.is_lossy or bool(lost)
            exported = replace(
                exported, lost=lost, rank=rank, head_file=head_file, is_lossy=is_lossy
            )
            if format == "gguf":
                write_gguf(conversion.factors, attached.model.config, draft)
                write_modelfile(base_model, draft)
                if head_file:
                    shutil.copy(lora / HEAD_FILE, draft)
            if own is not None or scorer is not None:
                attached.detach()
                written = _loaded_lora(attached.backbone.model, lora)
                exported = _judged(exported, own, written, rows, scorer)
        if is_merged:
            add_older_names(draft)
        missing = _write_companions(attached, base_model, draft)
        broken = [] if found is None else check_export(draft, found.name)
        if found is not None and broken:
            raise _refusal(found, broken[0].removeprefix(f"{found.name}: "))
        if is_merged and (own is not None or scorer is not None):
            auto_class = attached.backbone.auto_class
            del attached, given  # Two models would not fit where one does.
            written = load_written(draft, auto_class, device=device, dtype=weights)
            exported = _judged(exported, own, written, rows, scorer)
        serve = "" if found is None else found.serve_command(base_model, str(target), exported.rank)
        exported = replace(exported, missing=missing, serve=serve)
        if finish is not None:
            exported = finish(draft, exported)
        if place.exists():
            place.rmdir()  # Raises an error if it holds anything.
    return exported


def check_options(
    format: str,
    *,
    max_rank: int | None = None,
    allow_lossy: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    requantize: bool = False,
) -> None:
    """Check the options of `export_adapter`: what they name, and that they have an effect.

    Raises:
        SettingsError: if one has none on the format, or names no rank, size, type or device.
    """
    checked_device(device)
    if dtype is not None:
        checked_dtype(dtype)
    if max_shard_size is not None:
        parse_bytes("max_shard_size", max_shard_size)
    if requantize and format != "merged":
        problem = f"format={format} holds no weights of the base model"
        raise SettingsError("requantize", True, problem, "use --format merged")
    if format not in ("lora", "gguf"):
        name, value = ("allow_lossy", True) if max_rank is None else ("max_rank", max_rank)
        if max_rank is not None or allow_lossy:
            problem = f"has no effect on format={format}, which holds no LoRA of one rank"
            raise SettingsError(name, value, problem, "leave it out, or use --format lora")
    if format != "merged" and max_shard_size is not None:
        problem = f"has no effect on format={format}, which holds no weights of the base model"
        raise SettingsError(
            "max_shard_size", max_shard_size, problem, "leave it out, or use --format merged"
        )
    is_count = isinstance(max_rank, int) and not isinstance(max_rank, bool) and max_rank >= 1
    if max_rank is not None and not is_count:
        problem = "must be a whole number, and `max_rank >= 1` must hold"
        raise SettingsError("max_rank", max_rank, problem, "use e.g. 64")


def _stored_dtype(base_model: str, revision: str | None) -> str:
    """Return the base model's own type of weights, if a merged model can have it."""
    own = own_dtype(base_model, revision=revision)
    # What is narrower, or of whole numbers, is stored beside scales that a merge has not.
    if own not in (*DTYPES, "float64"):
        problem = f"is the type of the base model's weights, and none of {', '.join(DTYPES)}"
        raise SettingsError("dtype", own, problem, "give --dtype bfloat16")
    return own


@contextmanager
def _room(device: str, what: str) -> Iterator[None]:
    """Say in this context that the base model finds no memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_full = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not is_full and not is_out_of_memory(error):
            raise
        problem = f"has no memory to load the base model: {what}"
        remedy = "use a larger device, or --format peft, which needs no other weights"
        raise SettingsError("device", device, problem, remedy) from None


def _refusal(server: Server, problem: str) -> AdapterError:
    """Return the error for an export that a server would not load."""
    remedy = "use --for transformers" if server.is_for_models else "export it as merged"
    return AdapterError("for", server.name, problem, remedy)


def _loaded_lora(base: Any, folder: Path) -> Any:
    """Return what another program loads from the files of a LoRA."""
    if (folder / HEAD_FILE).is_file():
        base.load_state_dict(load_file(folder / HEAD_FILE), strict=False)
    return load_adapter(base, folder)


@contextmanager
def _parked(attached: Attached) -> Iterator[None]:
    """Take a candidate out of its model in this context."""
    attached.park()
    try:
        yield
    finally:
        attached.unpark()


def _judged(
    exported: Exported, own: torch.Tensor | None, model: Any, rows: Any, scorer: Scorer | None
) -> Exported:
    """Compare the logits of what was written with the adapter's own, and score it."""
    if scorer is not None:
        scorer.score(model)
    return exported if own is None else _compared(exported, own, model, rows)


def _compared(exported: Exported, own: torch.Tensor, model: Any, rows: Any) -> Exported:
    """Return the export with the largest difference of a model's logits from the adapter's own."""
    difference = float((_logits(model, rows) - own).abs().max())
    return replace(
        exported,
        largest_difference=difference,
        largest_logit=float(own.abs().max()),
        n_rows=len(own),
    )


def _write_companions(attached: Attached, base_model: str, folder: Path) -> tuple[str, ...]:
    """Write tokenizer or processor, chat template and generation config; return what is missing."""
    model: Any = attached.model
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    try:
        processor = _processor_of(attached, base_model)
    except ModelError as error:
        return (f"no tokenizer or processor beside it: {error.problem}",)
    with quiet_transformers():
        processor.save_pretrained(folder)
    return ()


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


def export_merged(
    attached: Attached,
    folder: str | Path,
    *,
    dtype: str = FLOAT,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Path:
    """Write the base model with the adapters merged, for plain transformers.

    The candidate stays attached, and the base model keeps its weights.

    Args:
        attached: The candidate.
        folder: Folder to write.
        dtype: Type of the weights.
        max_shard_size: The largest file of weights, in bytes.

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
    with merged(attached), cast(model, getattr(torch, dtype)):
        restore_config(config, attached.backbone.config_before)
        try:
            with quiet_transformers():
                model.save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[operator]
        finally:
            if attached.backbone.config_before:
                prepare_config(config)
    return folder
