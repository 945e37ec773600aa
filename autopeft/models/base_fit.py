"""Compare an adapter's tensors with its base model, built on the `meta` device without weights.

PEFT itself finds the targeted modules and renames tensors of older versions, as when it loads the
adapter; no weight is read or made.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from peft import PeftModel, PeftType
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from autopeft.errors import AdapterError, ModelError
from autopeft.models.gguf_lora import gguf_shapes
from autopeft.models.loading import first_line, load_config
from autopeft.models.method_hooks import ADAPTER_NAME, no_boft_extension
from autopeft.models.peft_config import ForeignConfig, check_before_peft, read_peft_config
from autopeft.models.saving import PEFT_ROOT, TASK_TYPES
from autopeft.serving.adapter_folder import AdapterFolder
from autopeft.serving.base_fit import BaseFit
from autopeft.utils.quiet import quiet_transformers

_LOADERS = (
    *TASK_TYPES,
    "AutoModelForMaskedLM",
    "AutoModelForAudioClassification",
    "AutoModelForCTC",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModel",
)
"""Classes of transformers for a base model, where the adapter does not name its own."""

_PEFT_TYPES = frozenset(each.value for each in PeftType)
"""What PEFT itself knows; autopeft's own tuners are in its tables too, in this process."""

_TWICE = ".modules_to_save."
"""Part of the second name of a tensor that is trained as a whole."""

_OTHER_SIZE = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)


def fit_of(adapter: AdapterFolder) -> BaseFit:
    """Return how the tensors of an adapter's folder fit the modules of its base model."""
    is_gguf = adapter.gguf is not None and not adapter.config
    if not is_gguf and not (adapter.config and adapter.shapes):
        return BaseFit(not_compared="there is no adapter")
    kind = adapter.config.get("peft_type")
    if not is_gguf and not (isinstance(kind, str) and kind in _PEFT_TYPES):
        return BaseFit(
            unknown_type=f"peft_type is {kind!r}", not_compared=f"its peft_type is {kind!r}"
        )
    try:
        given = None if is_gguf else read_peft_config(adapter.folder)
    except AdapterError as error:
        return BaseFit(not_compared=f"it {error.problem}")
    if given is not None and (given.is_prompt or kind == PeftType.XLORA):
        return BaseFit()  # Its tensors belong to no module.
    if adapter.base_folder is None:
        where = f"{adapter.base_name} is not on this machine"
        return BaseFit(not_compared=where if adapter.base_name else "none is named")
    try:
        config, _ = load_config(str(adapter.base_folder), model_kwargs=None, revision=None)
    except ModelError as error:
        return BaseFit(not_compared=f"{adapter.base_name}: {error.problem}")
    if given is None:
        return _gguf_fit(adapter, config)
    paths = _paths(adapter, given)
    base = _base_for(set(paths.values()), _makers(config, adapter.config, given.task_type))
    if base is None:
        return BaseFit(not_compared=f"no class of transformers builds {adapter.base_name}")
    try:
        check_before_peft(adapter.folder, base)
    except AdapterError as error:
        return BaseFit(not_compared=f"it {error.problem}")
    try:
        modules = {name for name, _ in base.named_modules()}
        found = _peft_fit(adapter, base)
    except Exception as error:  # PEFT raises errors of many types for files of others.
        problem = f"PEFT could not attach it to {adapter.base_name} without weights"
        return BaseFit(not_compared=f"{problem} ({first_line(error)})")
    # Another server finds modules by the tensors' names alone.
    here = [name for name in found.unknown if paths.get(name) in modules]
    elsewhere = tuple(name for name in found.unknown if name not in here)
    return replace(found, unknown=elsewhere, untargeted=tuple(here))


def _gguf_fit(adapter: AdapterFolder, config: Any) -> BaseFit:
    """Compare the factors of a GGUF file with the base model's weights, as llama.cpp does."""
    base = None
    for make in _makers(config, {}, None):
        if (base := _built(make)) is not None:
            break
    known = {} if base is None else gguf_shapes(base, config)
    own = {} if adapter.gguf is None else adapter.gguf
    if not known or own.get("general.architecture") is None:
        return BaseFit(not_compared=f"the names of {adapter.base_name} in GGUF are not known")
    unknown, misshapen = [], []
    for name, shape in adapter.gguf_shapes.items():
        place, dot, side = name.rpartition(".lora_")
        # A tied output layer has no tensor; that of embeddings is laid out in another way.
        if not dot or place in ("output.weight", "token_embd.weight") or len(shape) != 2:
            continue
        if place not in known:
            unknown.append(name)
            continue
        out_width, in_width = known[place]
        if (shape[1] != in_width) if side == "a" else (shape[0] != out_width):
            wanted = (shape[0], in_width) if side == "a" else (out_width, shape[1])
            misshapen.append(f"{name} is {list(shape)}, not {list(wanted)}")
    return BaseFit(unknown=tuple(unknown), misshapen=tuple(misshapen))


def _paths(adapter: AdapterFolder, given: ForeignConfig) -> dict[str, str]:
    """Return each tensor of an adapter's modules -> the path of its module."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(given.peft_type), "lora_")
    found = {
        name: name.removeprefix(PEFT_ROOT).rsplit(f".{prefix}", 1)[0]
        for name in adapter.shapes
        if f".{prefix}" in name
    }
    return {name: re.sub(r"(\.base_layer)+$", "", path) for name, path in found.items()}


def _base_for(paths: set[str], makers: Iterator[Any]) -> nn.Module | None:
    """Return the base model in the class that has most of the modules that an adapter names."""
    best: nn.Module | None = None
    most = -1
    for make in makers:
        base = _built(make)
        if base is None:
            continue
        found = len(paths.intersection(name for name, _ in base.named_modules()))
        if found > most:
            best, most = base, found
        if found == len(paths):
            break
    return best


def _makers(config: Any, row: Mapping[str, Any], task_type: str | None) -> Iterator[Any]:
    """Yield functions that make the base model, in the likeliest classes first."""
    auto = row.get("auto_mapping")
    named = auto.get("base_model_class") if isinstance(auto, Mapping) else None
    architectures = config.architectures or ()
    for name in (named, *(() if task_type else architectures)):
        yield from _of_class(name, config)
    first = [name for name, task in TASK_TYPES.items() if task == task_type]
    for loader in first:
        yield from _of_loader(loader, config)
    for name in architectures if task_type else ():
        yield from _of_class(name, config)
    for loader in _LOADERS:
        if loader not in first:
            yield from _of_loader(loader, config)


def _of_class(name: object, config: Any) -> Iterator[Any]:
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        yield lambda: kind(copy.deepcopy(config))


def _of_loader(name: str, config: Any) -> Iterator[Any]:
    loader = getattr(transformers, name)
    if type(config) in loader._model_mapping:
        yield lambda: loader.from_config(copy.deepcopy(config), trust_remote_code=False)


def _built(make: Any) -> nn.Module | None:
    try:
        with torch.device("meta"), quiet_transformers(), _without_warnings():
            built: nn.Module = make()
    except Exception:  # A configuration of others, or a class that is not for it.
        return None
    return built


def _peft_fit(adapter: AdapterFolder, base: nn.Module) -> BaseFit:
    """Attach an adapter without its values as PEFT does; tell which tensors fit."""
    kind = PeftType(adapter.config["peft_type"])
    with _without_warnings(), no_boft_extension():
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(adapter.folder))
        config.inference_mode = True
        wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        try:
            model = wrapper(base, config, ADAPTER_NAME, low_cpu_mem_usage=True)
        except NoMatchingPeftModuleError:
            return BaseFit(unknown=tuple(adapter.shapes))
        least, most = (
            get_peft_model_state_dict(model, save_embedding_layers=with_embeddings)
            for with_embeddings in (False, True)
        )
        return _compared(adapter, model, least, most)


def _compared(
    adapter: AdapterFolder, model: Any, least: Mapping[str, Any], most: Mapping[str, Any]
) -> BaseFit:
    """Compare an adapter's tensors with those that its modules in a model have."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(model.peft_config[ADAPTER_NAME].peft_type, "lora_")
    missing: list[str] = []
    misshapen: list[str] = []
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in adapter.shapes.items():
        wanted = most.get(name)
        if wanted is not None and tuple(wanted.shape) != shape:
            # A head has as many outputs as its task, which the base model does not tell; ranks
            # have rules of their own.
            if f".{prefix}" in name and _widths(name, shape) != _widths(name, tuple(wanted.shape)):
                misshapen.append(f"{name} is {list(shape)}, not {list(wanted.shape)}")
            shape = tuple(wanted.shape)
        tensors[name] = torch.empty(shape, device="meta")
    for name, tensor in least.items():
        # PEFT renames what holds factors; what it trains as a whole, it looks up by this name.
        if name not in tensors and f".{prefix}" not in name:
            missing.append(name)
            tensors[name] = torch.empty(tensor.shape, device="meta")
    try:
        result = set_peft_model_state_dict(
            model, tensors, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True
        )
    except RuntimeError as error:
        found = _OTHER_SIZE.findall(str(error))
        if not found:
            raise
        renamed = [f"{_plain(name)} is {own}, not {other}" for name, own, other in found]
        return BaseFit(missing=tuple(missing), misshapen=(*misshapen, *renamed))
    missing += [name for key in result.missing_keys if (name := _plain(key)) in least]
    unplaced = {_plain(key) for key in result.unexpected_keys}
    # PEFT writes embeddings that were resized and trained as a whole by two names, and reads one.
    known = adapter.shapes.keys() - unplaced
    unknown = [name for name in unplaced if name.replace(_TWICE, ".") not in known]
    return BaseFit(
        missing=tuple(sorted(set(missing))),
        unknown=tuple(sorted(set(unknown))),
        misshapen=tuple(sorted(misshapen)),
    )


def _widths(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a factor's shape without its rank; the whole shape of another tensor."""
    side = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$", name)
    if side is None or len(shape) < 2:
        return shape
    return shape[1:] if side[1] == "A" else (shape[0], *shape[2:])


def _plain(key: str) -> str:
    """Return the name in a file of a tensor in a model, which has the adapter's name too."""
    return re.sub(rf"\.{ADAPTER_NAME}(?=\.|$)", "", key)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignore what PEFT warns of: it is found here, and told as rules."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
