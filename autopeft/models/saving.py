"""Save an attached candidate, and load it again with the same logits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from autopeft.costs import check_plan
from autopeft.errors import AdapterError, ModelError, SettingsError, SpaceError
from autopeft.models.adapter_files import (
    CONFIG_FILE,
    HEAD_FILE,
    PART,
    PLAN_FILE,
    TENSOR_FILE,
    SavedPlan,
    check_numbers,
    damaged,
    holds_plan,
    read_tensors,
    write_tensors,
)
from autopeft.models.attach import Attached, Part, attach, constants
from autopeft.models.backbone import Backbone, load_backbone, load_tokenizer
from autopeft.models.method_hooks import ADAPTER_NAME, hooks_for, no_boft_extension
from autopeft.models.output_scale import in_unit
from autopeft.models.peft_config import check_before_peft, read_peft_config, tensor_shapes
from autopeft.models.quantization import NONE, is_quantized
from autopeft.utils.arguments import checked_path, checked_text
from autopeft.utils.device import checked_device
from autopeft.utils.quiet import ignored, quiet_peft

PEFT_ROOT = "base_model.model."
"""Start of every module's name in peft's files, where the tuner is `PeftModel.base_model`."""

TASK_TYPES: Mapping[str, str] = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def save_adapter(
    attached: Attached,
    folder: str | Path,
    *,
    base_model: str = "",
    revision: str | None = None,
    extra: Mapping[str, Any] | None = None,
    shift: float = 0.0,
    factor: float = 1.0,
) -> Path:
    """Save adapters and head, with the name of the base model.

    Args:
        attached: The candidate.
        folder: Folder to write; created if needed. It is returned.
        base_model: Folder or hub id of the base model; default: the backbone's.
        revision: Its revision on the hub; default: the backbone's.
        extra: Further JSON for `plan.json`.
        shift: The output of the saved head is shift + factor * the trained one's, so that it is in
            the unit of the data.
        factor: See `shift`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backbone = attached.backbone
    saved = SavedPlan(
        candidate=attached.candidate,
        base_model=base_model or backbone.base_model,
        revision=revision or backbone.revision,
        auto_class=backbone.auto_class,
        model_kwargs=backbone.model_kwargs,
        role_map=backbone.role_map,
        head=backbone.head,
        extra=extra or {},
        quantization=backbone.quantization,
        replaces_head=backbone.replaces_head,
    )
    head = head_tensors(attached)
    if head and (shift, factor) != (0.0, 1.0):
        head = in_unit(attached.model, head, shift, factor)
    for part, place in zip(attached.parts, part_folders(attached.parts), strict=True):
        is_whole = place == "."
        (folder / place).mkdir(exist_ok=True)
        config = part.group.config(attached.candidate.train)
        config.base_model_name_or_path = saved.base_model
        config.revision = saved.revision
        config.inference_mode = True
        tensors = part_tensors(part)
        if is_whole and head:
            # For some task types peft guesses that there is a new head, so the type is set only
            # where there is one.
            config.task_type = TASK_TYPES.get(backbone.auto_class)
            config.modules_to_save = whole_modules(attached.model, backbone.head)
            tensors |= {f"{PEFT_ROOT}{name}": t for name, t in head.items()}
        elif backbone.auto_class == "AutoModelForCausalLM":
            config.task_type = "CAUSAL_LM"
        config.save_pretrained(str(folder / place))
        write_tensors(folder / place / TENSOR_FILE, tensors)
    if head and len(attached.parts) != 1:
        write_tensors(folder / HEAD_FILE, head)
    saved.write(folder)
    return folder


def whole_modules(model: nn.Module, paths: tuple[str, ...]) -> list[str]:
    """Return the outermost modules that contain nothing but the modules at some paths.

    peft adds a classifier's "classifier" by itself, and then rejects RoBERTa's "classifier.dense"
    inside it.
    """
    inside = {id(p) for path in paths for p in model.get_submodule(path).parameters(recurse=False)}

    def outermost(path: str) -> str:
        parent = path.rpartition(".")[0]
        is_whole = parent and all(id(p) in inside for p in model.get_submodule(parent).parameters())
        return outermost(parent) if is_whole else path

    return sorted({outermost(path) for path in paths})


def part_folders(parts: tuple[Part, ...]) -> tuple[str, ...]:
    """Return the folder of each part; a single one has the whole folder."""
    if len(parts) == 1:
        return (".",)
    return tuple(f"{PART}{i}-{part.group.method.name}" for i, part in enumerate(parts))


class _LikePeftModel(nn.Module):
    """A part with the attributes of a `PeftModel` that methods with shared state read."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.base_model = part.tuner
        self.peft_config = part.tuner.peft_config


def part_tensors(part: Part) -> dict[str, torch.Tensor]:
    """Return a part's tensors by their names in peft's files."""
    held = get_peft_model_state_dict(
        _LikePeftModel(part), adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    paths = {name: path for path, name in part.holder_names.items()}

    def standard(key: str) -> str:
        if not key.startswith(PEFT_ROOT):
            return key
        name, _, rest = key.removeprefix(PEFT_ROOT).partition(".")
        return f"{PEFT_ROOT}{paths[name]}.{rest}"

    return {standard(key): tensor for key, tensor in held.items()}


def head_tensors(attached: Attached) -> dict[str, torch.Tensor]:
    """Return the new head's tensors by their names in the model."""
    return {
        f"{path}.{name}": parameter
        for path in attached.backbone.head
        for name, parameter in attached.model.get_submodule(path).named_parameters(recurse=False)
    }


def load_adapter(
    base: str | Path | nn.Module,
    folder: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> Any:
    """Load a saved adapter onto its base model.

    Args:
        base: Folder or hub id of the base model, or the model itself.
        folder: A folder written by `save_adapter`, or any peft folder with safetensors.
        device: Where to load a base model that is given by name; default: the CPU.
        dtype: Type of its weights and the adapter's, e.g. "bfloat16"; default: "float32".

    Returns:
        The model with the adapter, in evaluation mode; a `PeftModel` for another peft folder.

    Raises:
        AdapterError: if the folder is damaged, unsafe or does not fit; the base is then unchanged.
        ModelError: if the base model cannot be loaded.
        SettingsError: if there is no such type, or a model is to be moved.

    Example:
        >>> result = autopeft.SearchResult.read("runs/first")
        >>> model = autopeft.load_adapter(result.base_model, result.best.folder)
        >>> model.training
        False
    """
    folder = checked_path("folder", folder, error=AdapterError)
    if isinstance(base, str | os.PathLike):
        base = os.path.expanduser(checked_text("base", os.fspath(base), _BASE, error=ModelError))
    elif not isinstance(base, nn.Module):
        raise ModelError("base", type(base).__name__, "is neither a name nor a model", _BASE)
    if not isinstance(base, str) and (device is not None or dtype is not None):
        name, value = ("dtype", dtype) if device is None else ("device", device)
        problem = "is for a base model given by name; this one is loaded already"
        raise SettingsError(name, value, problem, "move the model itself")
    where = {
        "device": checked_device("cpu" if device is None else device),
        "dtype": checked_dtype("float32" if dtype is None else dtype),
    }
    if not holds_plan(folder) and (folder / CONFIG_FILE).is_file():
        model = _load_foreign(base, folder, **where)
    else:
        attached = load_attached(base, folder, **where)
        model = attached.model
        for part in attached.parts if dtype is not None else ():
            for layer in part.layers.values():
                for values, name, tensor in constants(layer):
                    if tensor.is_floating_point():
                        values[name] = tensor.to(getattr(torch, where["dtype"]))
    if dtype is not None and not is_quantized(model):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


DTYPES = ("float32", "bfloat16", "float16")
"""Types of weights to load in."""


_BASE = "give the folder, hub id or model that the adapter was trained on"


def checked_dtype(dtype: str) -> str:
    """Return the name of a type of weights.

    Raises:
        SettingsError: if there is none.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SettingsError("dtype", dtype, "no such type", f"use one of {', '.join(DTYPES)}")
    return dtype


def load_attached(
    base: str | nn.Module,
    folder: str | Path,
    *,
    quantization: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Attached:
    """Load a folder written by `save_adapter` like `load_adapter`; return the attached candidate.

    A base model given by name gets `quantization` (default: the one it had when it was saved), lies
    on the `device` and has weights of the `dtype`; the adapter's stay fp32.
    """
    folder = Path(folder)
    if not holds_plan(folder):
        problem = f"has no {PLAN_FILE} of autopeft's"
        raise AdapterError("adapter", str(folder), problem, "use a folder autopeft saved")
    saved = SavedPlan.read(folder)
    if quantization is not None:
        saved = replace(saved, quantization=quantization)
    backbone, undo = _backbone_for(base, saved, device, dtype)
    try:
        check_plan(backbone.topology, saved.candidate.plan)
        attached = attach(backbone, saved.candidate, seed=0)
    except (SpaceError, AttributeError) as error:
        _restore_grad(backbone.model, undo)
        raise damaged(folder / PLAN_FILE, f"does not fit the model: {error}") from error
    try:
        fill(attached, folder)
    except BaseException:
        attached.detach()
        _restore_grad(backbone.model, undo)
        raise
    return attached


def _backbone_for(
    base: str | nn.Module, saved: SavedPlan, device: str, dtype: str
) -> tuple[Backbone, list[bool]]:
    """Return the backbone, and which parameters of a given model required a gradient before."""
    if isinstance(base, str):
        backbone = load_backbone(
            base,
            auto_class=saved.auto_class,
            model_kwargs=saved.model_kwargs,
            revision=saved.revision if base == saved.base_model else None,
            device=device,
            dtype=dtype,
            role_map=saved.role_map,
            quantization=saved.quantization,
            replaces_head=saved.replaces_head,
        )
        if backbone.head != saved.head:
            raise AdapterError(
                "adapter",
                saved.base_model,
                f"was saved with the new modules {list(saved.head)}, "
                f"this base model has {list(backbone.head)}",
                "use the base model it was trained on",
            )
        return backbone, []
    undo = [p.requires_grad for p in base.parameters()]
    try:
        backbone = Backbone(
            base,
            head=saved.head,
            replaces_head=saved.replaces_head,
            role_map=saved.role_map,
            base_model=saved.base_model,
            revision=saved.revision,
            auto_class=saved.auto_class,
            model_kwargs=saved.model_kwargs,
            quantization=saved.quantization if is_quantized(base) else NONE,
        )
        _set_padding(base, saved.model_kwargs.get("pad_token_id"))
    except AttributeError as error:
        _restore_grad(base, undo)
        raise AdapterError(
            "adapter", list(saved.head), f"the model lacks a module: {error}", "use its base model"
        ) from error
    return backbone, undo


def _set_padding(model: Any, pad_id: int | None) -> None:
    """Tell a model without a padding token which one it is: a decoder's classifier must know."""
    if pad_id is not None and model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = pad_id


def _restore_grad(model: nn.Module, undo: list[bool]) -> None:
    for parameter, required in zip(model.parameters(), undo, strict=False):
        parameter.requires_grad_(required)


def fill(attached: Attached, folder: Path) -> None:
    """Fill an attached candidate; all files are read and checked before a tensor is copied."""
    head = head_tensors(attached)
    is_whole = len(attached.parts) == 1
    loads = []
    for part, place in zip(attached.parts, part_folders(attached.parts), strict=True):
        expected = part_tensors(part)
        if is_whole:
            expected |= {f"{PEFT_ROOT}{name}": t for name, t in head.items()}
        loads.append((part, read_tensors(folder / place / TENSOR_FILE, expected)))
    if is_whole:
        found_head = {name: loads[0][1].pop(f"{PEFT_ROOT}{name}") for name in head}
    else:
        found_head = read_tensors(folder / HEAD_FILE, head) if head else {}
    for part, tensors in loads:
        _set_part(part, tensors)
    with torch.no_grad():
        for name, tensor in found_head.items():
            head[name].copy_(tensor)
    attached.model.eval()


def _set_part(part: Part, tensors: Mapping[str, torch.Tensor]) -> None:
    # Longest first: one path may be the beginning of another.
    paths = sorted(part.holder_names, key=len, reverse=True)
    renamed = {}
    for key, tensor in tensors.items():
        path = next((p for p in paths if key.startswith(f"{PEFT_ROOT}{p}.")), None)
        if path is not None:
            key = PEFT_ROOT + part.holder_names[path] + key.removeprefix(PEFT_ROOT + path)
        renamed[key] = tensor
    with quiet_peft():
        result = set_peft_model_state_dict(_LikePeftModel(part), renamed, adapter_name=ADAPTER_NAME)
    if result.unexpected_keys:
        raise RuntimeError(f"peft did not place {result.unexpected_keys[:3]}")
    hooks_for(part.group.method.name).after_load(part.layers)


HEAD_APART = f"is written for a server, which takes no head: that is apart, in {HEAD_FILE}"
"""What is wrong with an export whose adapter alone is no whole classifier."""


def _load_foreign(
    base: str | nn.Module, folder: Path, *, device: str = "cpu", dtype: str = "float32"
) -> Any:
    """Load a peft folder that autopeft did not write."""
    config = read_peft_config(folder)
    if isinstance(base, str):
        if (folder / HEAD_FILE).is_file():
            raise AdapterError(
                "adapter",
                str(folder),
                HEAD_APART,
                "give the model with its head as the card shows, or export with --format lora",
            )
        names = {task_type: name for name, task_type in TASK_TYPES.items()}
        auto_class = names.get(str(config.task_type), "AutoModel")
        kwargs = _head_of_files(folder, config.modules_to_save or ())
        name = base
        base = load_backbone(
            name, auto_class=auto_class, model_kwargs=kwargs, device=device, dtype=dtype
        ).model
        if auto_class == "AutoModelForSequenceClassification":
            _set_padding(base, _padding_of(name))
    return place_peft_folder(base, folder)


_OTHER_BASE = ("size mismatch", "not found in the base model", "No modules were targeted")
"""What peft says of an adapter that was trained on another model."""


def place_peft_folder(base: nn.Module, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """Put a peft folder's adapter into a model; each tensor of one must be in the other.

    Args:
        base: The model; it is changed.
        folder: Holds `adapter_config.json` and safetensors.
        is_trainable: Whether the adapter's parameters require a gradient.

    Raises:
        AdapterError: if the folder is damaged, unsafe, of an unknown type or of another model.
    """
    if not (folder / TENSOR_FILE).is_file():
        read_tensors(folder / TENSOR_FILE, {})
    config = read_peft_config(folder)
    check_before_peft(folder, base)
    _check_vocabulary(base, folder)
    try:
        # peft reads an attribute of transformers by its old name (no upstream issue known), and
        # warns of tensors that a folder lacks, which are checked below.
        with quiet_peft(), ignored(FutureWarning), ignored(UserWarning), no_boft_extension():
            # peft loads a prompt to be used only, so what was trained is marked here.
            is_prompt = is_trainable and config.is_prompt
            model = PeftModel.from_pretrained(
                base, str(folder), is_trainable=is_trainable and not is_prompt
            ).eval()
            if is_prompt:
                _unfreeze_prompt(model)
    except Exception as error:  # Files of others raise errors of many types.
        text = " ".join(str(error).split())[:300]
        if isinstance(error, KeyError):  # Of a head that is saved whole.
            raise damaged(folder / TENSOR_FILE, f"lacks {text}") from error
        if any(words in text for words in _OTHER_BASE):
            remedy = f"use the model it was trained on: {config.base_model_name_or_path}"
            problem = f"does not fit the base model ({text})"
            raise AdapterError("adapter", str(folder), problem, remedy) from error
        raise damaged(folder, f"peft cannot load it ({text})") from error
    _check_tensors(model, folder)
    return model


def _check_vocabulary(base: nn.Module, folder: Path) -> None:
    """Check that saved embeddings are of as many tokens as the base model has.

    Where tokens were added for a training, the model that an adapter names has too few of them.
    """
    find: Any = getattr(base, "get_input_embeddings", lambda: None)
    embedding = None
    with suppress(NotImplementedError, AttributeError):
        embedding = find()
    own = tuple(getattr(getattr(embedding, "weight", None), "shape", ()))
    path = next((name for name, module in base.named_modules() if module is embedding), None)
    shapes = tensor_shapes(folder)
    for name in (f"{PEFT_ROOT}{path}.weight", f"{PEFT_ROOT}{path}.base_layer.weight"):
        found = shapes.get(name, ())
        if len(found) == len(own) == 2 and found[1] == own[1] and found[0] != own[0]:
            raise AdapterError(
                "adapter",
                str(folder),
                f"has embeddings of {found[0]} tokens, and the base model of {own[0]}: tokens were "
                "added for its training",
                f"give a copy of the base model after model.resize_token_embeddings({found[0]}), "
                "saved with the adapter's tokenizer",
            )


def _unfreeze_prompt(model: PeftModel) -> None:
    prompts = [name for name, _ in model.named_parameters() if name.startswith("prompt_encoder.")]
    # CPT learns what it adds to embeddings of the base model, which it keeps.
    added = {name for name in prompts if ".delta_embedding." in name} or set(prompts)
    for name, parameter in model.named_parameters():
        if name in added or f".modules_to_save.{ADAPTER_NAME}." in name:
            parameter.requires_grad_(True)


def _check_tensors(model: PeftModel, folder: Path) -> None:
    """Check that peft placed every tensor of a folder as it is.

    peft leaves out what it does not know, and casts numbers of any kind.
    """
    path = folder / TENSOR_FILE
    with quiet_peft():
        least, most = (
            get_peft_model_state_dict(model, save_embedding_layers=with_embeddings)
            for with_embeddings in (False, True)
        )
    with safe_open(path, "pt") as file:
        found = set(file.keys())
        for names, problem in (
            (set(least) - found, "lacks"),
            (found - set(most), "has, and its type has no,"),
        ):
            if names:
                raise damaged(path, f"{problem} {len(names)} tensors, the first {min(names)}")
        for name in sorted(found):
            check_numbers(path, name, file.get_tensor(name), most[name].dtype)


def _head_of_files(folder: Path, heads: Sequence[str]) -> dict[str, Any]:
    """Return how many outputs the head in a peft folder has, as an argument for `load_backbone`."""
    widths = []
    for name, shape in tensor_shapes(folder).items():
        path = name.removeprefix(PEFT_ROOT)
        is_head = any(path.startswith(f"{head}.") for head in heads)
        if is_head and path.endswith("weight") and len(shape) == 2:
            widths.append(shape[0])
    return {"num_labels": min(widths)} if widths else {}


def _padding_of(model: str) -> int | None:
    """Return the token that pads a model's texts, as far as its tokenizer says so."""
    try:
        tokenizer = load_tokenizer(model)
    except ModelError:
        return None
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), None)
