"""Checks of an adapter's folder: each returns what breaks a rule, "" if nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autopeft.serving.adapter_folder import AdapterFolder


@dataclass(frozen=True)
class Rule:
    """One thing that must hold for a folder.

    Attributes:
        text: What must hold.
        source: Project and file that it was read in.
        broken: Returns what breaks it in a folder; "" if nothing does.
    """

    text: str
    source: str
    broken: Callable[[AdapterFolder], str]


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
        if own != adapter.rank_of(path)
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


def no_gguf(adapter: AdapterFolder) -> str:
    """Return whether there is no GGUF file."""
    return "there is no .gguf file" if adapter.gguf is None else ""


def gguf_is(name: str, value: str) -> Callable[[AdapterFolder], str]:
    """Return a check for a setting of the GGUF file."""

    def broken(adapter: AdapterFolder) -> str:
        found = value if adapter.gguf is None else adapter.gguf.get(name)
        return "" if found == value else f"it is {found!r}"

    return broken


def gguf_without_alpha(adapter: AdapterFolder) -> str:
    """Return whether the GGUF file names no alpha."""
    is_absent = adapter.gguf is not None and not adapter.gguf.get("adapter.lora.alpha")
    return "there is none" if is_absent else ""


def gguf_strange(adapter: AdapterFolder) -> str:
    """Return the tensors of the GGUF file that are no factors of a LoRA."""
    known = (".lora_a", ".lora_b", "_norm.weight")
    found = [name for name in adapter.gguf_shapes if not name.endswith(known)]
    return _some(found) if found else ""


def no_modelfile(adapter: AdapterFolder) -> str:
    """Return whether there is no Modelfile beside the GGUF file."""
    has_one = adapter.gguf is None or (adapter.folder / "Modelfile").is_file()
    return "" if has_one else "there is none"


def no_model(adapter: AdapterFolder) -> str:
    """Return whether it is no whole model."""
    return "" if adapter.has_model else "it holds no config.json and model*.safetensors"
