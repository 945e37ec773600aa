"""Checks of an adapter's folder: each returns what breaks a rule, "" if nothing does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autopeft.serving.adaptable import unlike
from autopeft.serving.adapter_folder import PEFT_ROOT, AdapterFolder
from autopeft.serving.gguf_names import ARCHITECTURES
from autopeft.serving.joined import Joined, absent
from autopeft.serving.older_names import TEXT, older_names

_GGUF_FACTORS = (".lora_a", ".lora_b")

_CONV1D = (".c_attn", ".c_proj", ".c_fc")
"""Ends of the modules whose weights transformers keeps transposed, but PEFT not their factors."""


@dataclass(frozen=True)
class Rule:
    """One thing that must hold for a folder.

    Attributes:
        text: What must hold.
        source: Project and file that it was read in.
        broken: Returns what breaks it in a folder; "" if nothing does.
        is_of_model: Whether the base model's configuration alone breaks it, whatever is trained.
    """

    text: str
    source: str
    broken: Callable[[AdapterFolder], str]
    is_of_model: bool = False

    def problem(self, adapter: AdapterFolder) -> str:
        """Return the rule with what breaks it in a folder, in a line; "" if nothing does."""
        what = self.broken(adapter)
        return f"must hold: {self.text}; {what} ({self.source})" if what else ""


def _some(names: object) -> str:
    """Return the first of some names, and how many more there are."""
    listed = list(names) if isinstance(names, list | tuple) else [names]
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return f"{listed[0]}{more}" if listed else ""


def no_adapter(adapter: AdapterFolder) -> str:
    """Return whether files of an adapter are missing."""
    if not adapter.config:
        return "there is no adapter_config.json"
    return "" if adapter.shapes else "there is no adapter_model.safetensors"


def not_lora(adapter: AdapterFolder) -> str:
    """Return whether it is another method."""
    kind = adapter.config.get("peft_type", "LORA")
    return "" if kind == "LORA" else f"peft_type is {kind}"


def missing(*names: str) -> Callable[[AdapterFolder], str]:
    """Return a check for settings that the configuration must have."""

    def broken(adapter: AdapterFolder) -> str:
        absent = [name for name in names if adapter.config.get(name) in (None, [], "")]
        return f"no {', '.join(absent)}" if adapter.config and absent else ""

    return broken


def is_set(name: str, *, but: object = None) -> Callable[[AdapterFolder], str]:
    """Return a check for a setting that must be off, or have the value `but`."""

    def broken(adapter: AdapterFolder) -> str:
        value = adapter.config.get(name)
        return f"{name} is {value}" if value and value != but else ""

    return broken


def is_expression(name: str, *, but: Sequence[str] = ()) -> Callable[[AdapterFolder], str]:
    """Return a check for a setting that must be a list, or one of the words `but`."""

    def broken(adapter: AdapterFolder) -> str:
        value = adapter.config.get(name)
        return f"{name} is {value!r}" if isinstance(value, str) and value not in but else ""

    return broken


def without_siblings(joined: Sequence[Joined]) -> Callable[[AdapterFolder], str]:
    """Return a check for modules that must have factors because others beside them have."""

    def broken(adapter: AdapterFolder) -> str:
        found = absent((path for path, _, _ in adapter.modules()), joined)
        return f"without {_some(found)}" if found else ""

    return broken


def changes_base(adapter: AdapterFolder) -> str:
    """Return the start of the weights, if PEFT changes the base model's weights for it on load."""
    start = adapter.config.get("init_lora_weights")
    harmless = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    is_harmless = not isinstance(start, str) or start.lower() in harmless
    return "" if is_harmless else f"init_lora_weights is {start}"


def strange(adapter: AdapterFolder) -> str:
    """Return the tensors that are no factors of a LoRA."""
    return _some(adapter.strangers) if adapter.strangers else ""


def unpaired(adapter: AdapterFolder) -> str:
    """Return the modules without two factors that fit."""
    found = adapter.unpaired()
    return _some(found) if found else ""


def _not_one_scaling(adapter: AdapterFolder, scaling: float, what: str) -> str:
    unlike = [
        f"{path} has {own:.4g}, not {scaling:.4g}"
        for path, _, own in adapter.modules()
        if abs(own - scaling) > 1e-6 * max(1.0, abs(scaling))
    ]
    return f"{what}: {_some(unlike)}" if unlike else ""


def vllm_scaling(adapter: AdapterFolder) -> str:
    """Return the modules whose scaling is not the one that vLLM gives all of them."""
    rank = adapter.number("r")
    if not rank:
        return ""
    one = adapter.number("lora_alpha") / (rank**0.5 if adapter.config.get("use_rslora") else rank)
    return _not_one_scaling(adapter, one, "scaling")


def sglang_scaling(adapter: AdapterFolder) -> str:
    """Return the modules whose scaling is not lora_alpha / r."""
    rank = adapter.number("r")
    return _not_one_scaling(adapter, adapter.number("lora_alpha") / rank, "scaling") if rank else ""


def own_rank_scaling(adapter: AdapterFolder) -> str:
    """Return the modules whose scaling is not lora_alpha / their own rank."""
    alpha = adapter.number("lora_alpha")
    unlike = [
        f"{path} has {own:.4g}, not {alpha / rank:.4g}"
        for path, rank, own in adapter.modules()
        if abs(own - alpha / rank) > 1e-6 * max(1.0, abs(own))
    ]
    return f"scaling: {_some(unlike)}" if unlike else ""


def higher_rank(adapter: AdapterFolder) -> str:
    """Return the modules of a rank above r."""
    reserved = adapter.number("r")
    above = [f"{path} has {rank}" for path, rank, _ in adapter.modules() if rank > reserved]
    return _some(above) if above else ""


def rank_of_no_pattern(adapter: AdapterFolder) -> str:
    """Return the modules of another rank than the configuration gives them."""
    if not_lora(adapter):
        return ""
    unlike = [
        f"{path} has {own}, not {adapter.rank_of(path):.0f}"
        for path, own, _ in adapter.modules()
        if own != adapter.rank_of(path) and not adapter.is_of_parameters(path)
    ]
    return _some(unlike) if unlike else ""


def other_rank(adapter: AdapterFolder) -> str:
    """Return the modules of another rank than r."""
    rank = adapter.number("r")
    unlike = [f"{path} has {own}" for path, own, _ in adapter.modules() if own != rank]
    return _some(unlike) if unlike else ""


def rank_above(limit: int) -> Callable[[AdapterFolder], str]:
    """Return a check for an upper limit of r."""

    def broken(adapter: AdapterFolder) -> str:
        return f"r is {adapter.number('r'):.0f}" if adapter.number("r") > limit else ""

    return broken


def base_is(architectures: Collection[str]) -> Callable[[AdapterFolder], str]:
    """Return a check for architectures that the base model must not have."""

    def broken(adapter: AdapterFolder) -> str:
        found = adapter.base_config.get("architectures")
        name = found[0] if isinstance(found, list) and found else None
        return f"it is {name}" if isinstance(name, str) and name in architectures else ""

    return broken


def base_type_is(types: Collection[str]) -> Callable[[AdapterFolder], str]:
    """Return a check for types that the base model must not be of."""

    def broken(adapter: AdapterFolder) -> str:
        kind = adapter.base_config.get("model_type")
        return f"its type is {kind}" if isinstance(kind, str) and kind in types else ""

    return broken


def type_unlike(types: Collection[str]) -> Callable[[AdapterFolder], str]:
    """Return a check for types that a whole model must be of."""

    def broken(adapter: AdapterFolder) -> str:
        kind = adapter.model_config.get("model_type")
        return f"its type is {kind}" if isinstance(kind, str) and kind not in types else ""

    return broken


def base_encodes(*, but: Collection[str]) -> Callable[[AdapterFolder], str]:
    """Return a check that the base model is no encoder-decoder but of some architectures."""

    def broken(adapter: AdapterFolder) -> str:
        name = _encoder_decoder(adapter.base_config)
        return f"it is {name}" if name and name not in but else ""

    return broken


def encodes(adapter: AdapterFolder) -> str:
    """Return the name of a whole model that is an encoder-decoder."""
    name = _encoder_decoder(adapter.model_config)
    return f"it is {name}" if name else ""


def _encoder_decoder(config: Mapping[str, Any]) -> str:
    """Return the architecture of an encoder-decoder, or its type; "" if it is none."""
    if config.get("is_encoder_decoder") is not True:
        return ""
    found = config.get("architectures")
    first = found[0] if isinstance(found, list) and found else config.get("model_type")
    return str(first or "one")


def modules_unlike(names: Collection[str]) -> Callable[[AdapterFolder], str]:
    """Return a check that modules have known names: all that are adapted, or one of the model's."""

    def broken(adapter: AdapterFolder) -> str:
        found = unlike([path for path, _, _ in adapter.modules()], names)
        if not found and len(strangers := unlike(adapter.base_modules, names)) == len(
            adapter.base_modules
        ):
            found = strangers
        return _some(found) if found else ""

    return broken


def no_gguf(adapter: AdapterFolder) -> str:
    """Return whether there is no GGUF file."""
    return "there is no .gguf file" if adapter.gguf is None else ""


def without_gguf_names(adapter: AdapterFolder) -> str:
    """Return the type of a model whose modules have no known names in GGUF."""
    kind = model_type(adapter.model_config or adapter.base_config)
    return f"model_type is {kind}" if kind and kind not in ARCHITECTURES else ""


def model_type(config: Mapping[str, Any]) -> str:
    """Return the type of a model, or of the text model inside it; "" if it names none."""
    return str(_text(config).get("model_type", ""))


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get(TEXT)
    return text if isinstance(text, Mapping) else config


def transposed_by_converter(adapter: AdapterFolder) -> str:
    """Return the modules of a PEFT folder that are GPT-2's `Conv1D`."""
    if adapter.gguf is not None or model_type(adapter.base_config) != "gpt2":
        return ""
    found = [path for path, _, _ in adapter.modules() if path.endswith(_CONV1D)]
    return _some(found) if found else ""


def gguf_is(name: str, value: str) -> Callable[[AdapterFolder], str]:
    """Return a check for a setting of the GGUF file."""

    def broken(adapter: AdapterFolder) -> str:
        found = value if adapter.gguf is None else adapter.gguf.get(name)
        return "" if found == value else f"it is {found!r}"

    return broken


def gguf_without_alpha(adapter: AdapterFolder) -> str:
    """Return the alpha of the GGUF file, if it is no number to scale by."""
    if adapter.gguf is None:
        return ""
    alpha = adapter.gguf.get("adapter.lora.alpha")
    # A whole number or text has another type in the file, at which llama.cpp aborts.
    if isinstance(alpha, float) and math.isfinite(alpha) and alpha:
        return ""
    return "there is none" if alpha is None else f"it is {alpha!r}"


def gguf_empty(adapter: AdapterFolder) -> str:
    """Return whether the GGUF file holds no factors at all."""
    has_some = any(name.endswith(_GGUF_FACTORS) for name in adapter.gguf_shapes)
    return "" if adapter.gguf is None or has_some else "it has none"


def gguf_strange(adapter: AdapterFolder) -> str:
    """Return the tensors of the GGUF file that are no factors of a LoRA."""
    known = (*_GGUF_FACTORS, "_norm.weight")
    found = [name for name in adapter.gguf_shapes if not name.endswith(known)]
    return _some(found) if found else ""


def gguf_of_another_architecture(adapter: AdapterFolder) -> str:
    """Return the architecture of the GGUF file, if it is not the base model's."""
    if adapter.gguf is None:
        return ""
    own = adapter.gguf.get("general.architecture")
    known = ARCHITECTURES.get(model_type(adapter.base_config))
    if own and (known is None or own == known.name):
        return ""
    needed = "" if known is None else f", and {adapter.base_name} is {known.name}"
    return f"it is {own!r}{needed}" if own else "there is none"


def gguf_of_no_tensor(adapter: AdapterFolder) -> str:
    """Return the factors of the GGUF file that belong to no weight of the base model."""
    if adapter.gguf is None:
        return ""
    blocks = _text(adapter.base_config).get("num_hidden_layers")
    found = []
    for name in adapter.gguf_shapes:
        place = re.sub(r"\.lora_[ab]$", "", name)
        block = re.match(r"blk\.(\d+)\.", place)
        is_beyond = isinstance(blocks, int) and block is not None and int(block[1]) >= blocks
        if place != name and (is_beyond or not place.endswith(".weight")):
            found.append(f"{name}, and it has {blocks} blocks" if is_beyond else name)
    found = found or list(adapter.fit.unknown)
    return _some(found) if found else ""


def no_modelfile(adapter: AdapterFolder) -> str:
    """Return whether there is no Modelfile beside the GGUF file."""
    return "there is none" if adapter.gguf is not None and adapter.modelfile is None else ""


def modelfile_of_other_files(adapter: AdapterFolder) -> str:
    """Return what the Modelfile lacks to name a base model and the GGUF file."""
    if adapter.gguf is None or adapter.modelfile is None:
        return ""
    if not adapter.modelfile.base:
        return "it has no FROM"
    if not adapter.modelfile.adapters:
        return "it has no ADAPTER"
    # A folder's GGUF file is meant by the folder's name too.
    fitting = {adapter.folder.resolve(), (adapter.folder / adapter.gguf_name).resolve()}
    for name in adapter.modelfile.adapters:
        if (adapter.folder / Path(name).expanduser()).resolve() in fitting:
            return ""
    return f"ADAPTER is {_some(list(adapter.modelfile.adapters))}, not ./{adapter.gguf_name}"


def lacks_targets(adapter: AdapterFolder) -> str:
    """Return the tensors of targeted modules that the adapter lacks."""
    return _some(list(adapter.fit.missing)) if adapter.config else ""


def of_no_module(adapter: AdapterFolder) -> str:
    """Return the tensors that belong to no module of the base model."""
    return _some(list(adapter.fit.unknown)) if adapter.config else ""


def with_prefix_once(broken: Callable[[AdapterFolder], str]) -> Callable[[AdapterFolder], str]:
    """Return a check for a reader that takes a prefix which is written twice as if it were once."""

    def on_names_as_read(adapter: AdapterFolder) -> str:
        fit = adapter.fit
        meant = {name: PEFT_ROOT + name.replace(PEFT_ROOT, "") for name in fit.unknown}
        unknown = tuple(name for name in fit.unknown if meant[name] not in fit.missing)
        missing = tuple(name for name in fit.missing if name not in meant.values())
        return broken(replace(adapter, fit=replace(fit, missing=missing, unknown=unknown)))

    return on_names_as_read


def of_no_target(adapter: AdapterFolder) -> str:
    """Return the tensors that belong to no module that the configuration targets."""
    return _some([*adapter.fit.unknown, *adapter.fit.untargeted]) if adapter.config else ""


def misshapen(adapter: AdapterFolder) -> str:
    """Return the tensors that do not have the shapes that the base model needs."""
    return _some(list(adapter.fit.misshapen))


def no_model(adapter: AdapterFolder) -> str:
    """Return whether it is no whole model."""
    return "" if adapter.has_model else "it holds no config.json and model*.safetensors"


def no_language_model(adapter: AdapterFolder) -> str:
    """Return whether a whole model has another head than one for the next token."""
    found = adapter.model_config.get("architectures")
    names = [str(name) for name in found] if isinstance(found, list) else []
    known = ("CausalLM", "LMHeadModel", "ConditionalGeneration")
    return "" if not names or any(end in name for name in names for end in known) else names[0]


def without_older_names(adapter: AdapterFolder) -> str:
    """Return the settings of a whole model that only transformers 5 would find."""
    absent = _absent(adapter.model_config, older_names(adapter.model_config))
    return _some(absent) if absent else ""


def _absent(config: Mapping[str, Any], older: Mapping[str, Any], place: str = "") -> list[str]:
    """Return the older names that a configuration lacks, with what they should be."""
    absent = []
    for name, value in older.items():
        if name == TEXT:
            absent += _absent(config[TEXT], value, f"{TEXT}.")
        elif config.get(name) != value:
            absent.append(f"{place}{name} is {config.get(name)}, not {value}")
    return absent


def model_quantized_by(*schemes: str) -> Callable[[AdapterFolder], str]:
    """Return a check for schemes that a whole model must not be quantized by."""

    def broken(adapter: AdapterFolder) -> str:
        found = adapter.model_config.get("quantization_config")
        scheme = found.get("quant_method") if isinstance(found, dict) else None
        return f"quant_method is {scheme}" if scheme in schemes else ""

    return broken
