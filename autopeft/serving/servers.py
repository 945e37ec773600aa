"""The servers: what each of them loads, as a table of rules with their sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autopeft.errors import AdapterError, SettingsError
from autopeft.methods.base import EXPERT_ROLES, LINEAR_ROLES, Method, Shape
from autopeft.serving import readable, rules
from autopeft.serving.adaptable import (
    MLX_MODELS,
    SGLANG_MODULES,
    VLLM_ENCODER_DECODERS,
    VLLM_WITHOUT_LORA,
    WITHOUT_BACKEND,
    WITHOUT_INTERFACE,
    unlike,
)
from autopeft.serving.adapter_folder import AdapterFolder
from autopeft.serving.base_fit import BaseFit
from autopeft.serving.joined import Joined, absent
from autopeft.serving.rules import Rule
from autopeft.utils.arguments import checked_path
from autopeft.utils.serialize import nearest

FORMATS = ("peft", "lora", "merged", "gguf")
"""What is exported: an adapter as it is, as one LoRA, merged, or as one LoRA for llama.cpp."""

MAX_RANK = 128
"""Highest rank of a module of a LoRA by default; few servers take higher ones."""


@dataclass(frozen=True)
class Server:
    """One server, or a library that loads adapters.

    Attributes:
        name: Its name, as `--for` takes it.
        format: The format that it loads; one of `FORMATS`.
        rules: What must hold for a folder.
        ranks: The ranks that it can reserve, ascending; () if it takes any.
        modules: Names of the modules that it can adapt; empty if any.
        joined: Modules that it computes as one; exports hold factors of zeros for those that its
            loader needs and the plan leaves out.
        takes_head: Whether it loads a new head from the adapter's own files.
        takes_experts: Whether it loads adapters of experts, which are bare parameters.
        command: How it is started, with fields base, folder and rank; "" if it is a library.
    """

    name: str
    format: str
    rules: tuple[Rule, ...]
    ranks: tuple[int, ...] = ()
    modules: frozenset[str] = frozenset()
    joined: tuple[Joined, ...] = ()
    takes_head: bool = False
    takes_experts: bool = False
    command: str = ""

    @property
    def max_rank(self) -> int:
        """The highest rank of a module."""
        return self.ranks[-1] if self.ranks else MAX_RANK

    @property
    def is_for_models(self) -> bool:
        """Whether it loads whole models, with the adapter merged."""
        return self.format == "merged"

    def refused(
        self,
        config: Mapping[str, Any],
        *,
        base: Mapping[str, Any] | None = None,
        modules: tuple[str, ...] = (),
    ) -> str:
        """Return the rule that every export over a base model breaks; "" if none must.

        Args:
            config: Content of the model's `config.json`, with the head that is trained.
            base: The same of the base model as it is; default: `config`.
            modules: Paths of its modules for adapters; () if they are unknown.
        """
        base = config if base is None else base
        adapter = AdapterFolder(Path(), model_config=config, base_config=base, base_modules=modules)
        problems = (rule.problem(adapter) for rule in self.rules if rule.is_of_model)
        return next(filter(None, problems), "")

    def unserved_roles(self, places: Mapping[tuple[int, str], tuple[str, ...]]) -> tuple[str, ...]:
        """Return the roles whose modules it can adapt at no rank.

        Args:
            places: (layer, role) -> paths of its modules, of a whole model.
        """
        paths = {path for at in places.values() for path in at}
        roles = {
            role: None
            for (_, role), at in places.items()
            if role in LINEAR_ROLES
            and (
                (self.modules and unlike(at, self.modules))
                or not paths.issuperset(absent(at, self.joined))
            )
        }
        return tuple(roles)

    def takes_method(self, method: Method) -> bool:
        """Return whether it can load what a method becomes, at some site and rank."""
        return method.mergeable if self.is_for_models else method.converts_to_lora

    def takes(self, method: Method, rank: int, role: str, shape: Shape) -> bool:
        """Return whether it can load what a method becomes at a site, with nothing lost."""
        if self.is_for_models:
            return method.mergeable
        is_in_place = role in LINEAR_ROLES or (self.takes_experts and role in EXPERT_ROLES)
        is_low = method.lora_rank(rank, shape) <= self.max_rank
        return method.converts_to_lora and is_in_place and is_low

    def rank_for(self, largest: int) -> int:
        """Return the rank to write for modules of ranks up to `largest`.

        Raises:
            AdapterError: if the server reserves no such rank.
        """
        if not self.ranks:
            return largest
        fitting = [rank for rank in self.ranks if rank >= largest]
        if not fitting:
            problem = f"{self.name} takes ranks up to {self.ranks[-1]}"
            remedy = f"cut it with --max-rank {self.ranks[-1]} --allow-lossy"
            raise AdapterError("rank", largest, problem, remedy)
        return fitting[0]

    def serve_command(self, base: str, folder: str, rank: int) -> str:
        """Return the command that serves a folder; "" if the server is a library."""
        return self.command.format(base=base, folder=folder, rank=rank)


_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_PEFT_HELPER = "vllm: vllm/lora/peft_helper.py"
_VLLM_WEIGHTS = "vllm: vllm/lora/lora_model.py"
_SGLANG_CONFIG = "sglang: python/sglang/srt/lora/lora_config.py"
_SGLANG = "sglang: python/sglang/srt/lora/lora.py"
_SGLANG_TARGETS = "sglang 0.5.23: python/sglang/srt/lora/lora_manager.py"
_CONVERTER = "llama.cpp: convert_lora_to_gguf.py"
_LLAMA_ADAPTER = "llama.cpp: src/llama-adapter.cpp"
_LLAMA_SCALE = "llama.cpp: src/llama-adapter.h"
_MODELFILE = "ollama: docs/modelfile.md"
_MLX = "mlx-lm: mlx_lm/utils.py"
_PEFT_SAVE = "peft: src/peft/utils/save_and_load.py"

_ADAPTER = Rule("is a PEFT folder with safetensors", _PEFT_SAVE, rules.no_adapter)
_NUMBERS = Rule(
    "r, lora_alpha and their patterns hold numbers that PEFT can scale by",
    "peft: src/peft/tuners/lora/layer.py",
    readable.wrong_numbers,
)
_IS_TARGETED = "each module with factors is named by target_modules"
_SHAPES = "tensors have the shapes that the base model needs"
_PAIRS = Rule("each module has a lora_A and a lora_B of one rank", _PEFT_SAVE, rules.unpaired)

_PLAIN_BASE = Rule(
    "leaves the base model's weights as they are",
    "peft: src/peft/tuners/lora/layer.py",
    rules.changes_base,
)


def _without(source: str, *names: str) -> tuple[Rule, ...]:
    """Return a rule for each setting by which PEFT computes what the reader does not."""
    return tuple(Rule(f"has no {name}", source, rules.is_set(name)) for name in names)


# A LoRA over inputs or with factors of other shapes, or over blocks that are there several times.
_OTHER_LORAS = ("layer_replication", "use_bdlora", "use_qalora")

_COMPLETE = Rule(
    "each module that the configuration targets has its tensors",
    "peft: src/peft/tuners/tuners_utils.py",
    # Where some are absent, all servers adapt the other modules alone, and say nothing.
    rules.lacks_targets,
)


_IN_BASE = "each tensor belongs to a module of the base model"

# Its loader reads the factors of the needed ones without a look. A key without one of its own is
# zeros of the value's shape, and an up projection zeros of the gate's.
_SGLANG_JOINED = (
    Joined(("q_proj", "k_proj", "v_proj"), needed=("q_proj", "v_proj")),
    Joined(("gate_proj", "up_proj"), needed=("gate_proj",)),
    Joined(("q_a_proj", "kv_a_proj_with_mqa"), needed=("q_a_proj", "kv_a_proj_with_mqa")),
)

_GGUF = (
    Rule("is a GGUF file", _LLAMA_ADAPTER, rules.no_gguf),
    Rule("general.type is adapter", _LLAMA_ADAPTER, rules.gguf_is("general.type", "adapter")),
    Rule("adapter.type is lora", _LLAMA_ADAPTER, rules.gguf_is("adapter.type", "lora")),
    Rule(
        "general.architecture is the base model's",
        _LLAMA_ADAPTER,
        rules.gguf_of_another_architecture,
    ),
    Rule(
        "adapter.lora.alpha is a finite float32 other than 0",
        _LLAMA_SCALE,
        rules.gguf_without_alpha,
    ),
    Rule("holds factors of a tensor", _LLAMA_ADAPTER, rules.gguf_empty),
    Rule("each tensor has a lora_a and a lora_b of one rank", _LLAMA_ADAPTER, rules.unpaired),
    Rule("holds only the factors of tensors", _LLAMA_ADAPTER, rules.gguf_strange),
    Rule("factors are of weights that the base model has", _LLAMA_ADAPTER, rules.gguf_of_no_tensor),
    Rule(_SHAPES, _LLAMA_ADAPTER, rules.misshapen),
    Rule(
        "is of a model whose modules have known GGUF names",
        "llama.cpp: conversion",
        rules.without_gguf_names,
        is_of_model=True,
    ),
    # What follows is about a PEFT folder that is yet to be converted.
    _NUMBERS,
    Rule("peft_type is LORA", _CONVERTER, rules.not_lora),
    Rule("holds only lora_A and lora_B, no head or embeddings", _CONVERTER, rules.strange),
    Rule("is no DoRA", _CONVERTER, rules.is_set("use_dora")),
    _PLAIN_BASE,
    # It writes the tokens of an aLoRA, which llama.cpp waits for.
    *_without(_CONVERTER, *_OTHER_LORAS),
    Rule(
        "adapts no Conv1D of GPT-2: the converter transposes PEFT's factors as if they were "
        "weights (`autopeft export --for llamacpp` does not)",
        _CONVERTER,
        rules.transposed_by_converter,
    ),
    Rule("scales each module by lora_alpha / its own rank", _LLAMA_SCALE, rules.own_rank_scaling),
)

SERVERS: Mapping[str, Server] = {
    server.name: server
    for server in (
        Server(
            "peft",
            "lora",
            (
                _ADAPTER,
                Rule(
                    "peft_type is one that PEFT knows",
                    "peft: src/peft/config.py",
                    readable.unknown_type,
                ),
                _NUMBERS,
                Rule(
                    "tensors have the names by which PEFT finds them",
                    _PEFT_SAVE,
                    readable.unknown_names,
                ),
                Rule(
                    _IS_TARGETED,
                    "peft: src/peft/tuners/tuners_utils.py",
                    readable.untargeted("all-linear"),
                ),
                Rule(
                    "exclude_modules and layers_to_transform leave out no module with factors",
                    "peft: src/peft/tuners/tuners_utils.py",
                    readable.not_targeted,
                ),
                _PAIRS,
                _COMPLETE,
                Rule(
                    "each tensor belongs to a module that the configuration targets",
                    _PEFT_SAVE,
                    rules.of_no_target,
                ),
                Rule(_SHAPES, _PEFT_SAVE, rules.misshapen),
                Rule(
                    "each module has the rank that the configuration gives it",
                    "peft: src/peft/tuners/lora/model.py",
                    rules.rank_of_no_pattern,
                ),
            ),
            takes_head=True,
            takes_experts=True,
        ),
        Server(
            "vllm",
            "lora",
            (
                _ADAPTER,
                _NUMBERS,
                Rule("peft_type is LORA", _PEFT_HELPER, rules.not_lora),
                Rule("adapts no bare parameters", _PEFT_HELPER, rules.is_set("target_parameters")),
                Rule(
                    "has r, lora_alpha and target_modules",
                    _PEFT_HELPER,
                    rules.missing("r", "lora_alpha", "target_modules"),
                ),
                Rule(
                    "is of a model whose class supports LoRA in vLLM 0.32.0",
                    "vllm: vllm/model_executor/models/registry.py",
                    rules.base_is(VLLM_WITHOUT_LORA),
                    is_of_model=True,
                ),
                Rule(
                    "is of a model that vLLM 0.32.0 has a class for, or whose attention in "
                    "transformers can be replaced",
                    "vllm: vllm/model_executor/models/registry.py",
                    rules.base_type_is(WITHOUT_INTERFACE),
                    is_of_model=True,
                ),
                Rule(
                    "is of no encoder-decoder that vLLM 0.32.0 has no class for, as it has for "
                    "Whisper",
                    "vllm: vllm/model_executor/models/transformers/base.py",
                    rules.base_encodes(but=VLLM_ENCODER_DECODERS),
                    is_of_model=True,
                ),
                Rule(
                    "has no modules_to_save (vLLM 0.32.0 applies one, classifier or score, "
                    "where it serves a cross-encoder)",
                    "vllm: vllm/lora/model_manager.py",
                    rules.is_set("modules_to_save"),
                ),
                Rule("is no DoRA", _PEFT_HELPER, rules.is_set("use_dora")),
                _PLAIN_BASE,
                *_without(_PEFT_HELPER, "lora_bias", "alora_invocation_tokens", *_OTHER_LORAS),
                Rule("trains no bias", _PEFT_HELPER, rules.is_set("bias", but="none")),
                Rule(
                    f"r is at most {_VLLM_RANKS[-1]}",
                    "vllm: vllm/config/lora.py",
                    rules.rank_above(_VLLM_RANKS[-1]),
                ),
                Rule("no module has a rank above r", _VLLM_WEIGHTS, rules.higher_rank),
                Rule("one scaling for all modules: that of r", _PEFT_HELPER, rules.vllm_scaling),
                Rule("holds only lora_A and lora_B", _VLLM_WEIGHTS, rules.strange),
                _PAIRS,
                # Its reader of names leaves out the prefix wherever it is (vllm/lora/utils.py).
                replace(_COMPLETE, broken=rules.with_prefix_once(rules.lacks_targets)),
                Rule(
                    _IN_BASE,
                    "vllm: vllm/lora/model_manager.py",
                    rules.with_prefix_once(rules.of_no_module),
                ),
                Rule(_SHAPES, "vllm: vllm/lora/layers/base_linear.py", rules.misshapen),
            ),
            ranks=_VLLM_RANKS,
            command="vllm serve {base} --enable-lora --max-lora-rank {rank} "
            "--lora-modules adapter={folder}",
        ),
        Server(
            "sglang",
            "lora",
            (
                _ADAPTER,
                _NUMBERS,
                Rule("peft_type is LORA", _SGLANG, rules.not_lora),
                Rule(
                    "adapts no bare parameters", _SGLANG_CONFIG, rules.is_set("target_parameters")
                ),
                Rule(
                    "has r, lora_alpha and target_modules",
                    _SGLANG_CONFIG,
                    rules.missing("r", "lora_alpha", "target_modules"),
                ),
                Rule(
                    "target_modules is a list of names",
                    _SGLANG_TARGETS,
                    rules.is_expression("target_modules", but=("all", "all-linear")),
                ),
                Rule(
                    "is of a model that SGLang 0.5.23 has a class for, or whose attention in "
                    "transformers can be replaced",
                    "sglang: python/sglang/srt/model_loader/utils.py",
                    rules.base_type_is(WITHOUT_BACKEND),
                    is_of_model=True,
                ),
                Rule(
                    "adapts modules by names that SGLang 0.5.23 has shapes for",
                    "sglang: python/sglang/srt/lora/utils.py",
                    rules.modules_unlike(SGLANG_MODULES),
                    is_of_model=True,
                ),
                Rule(
                    _IS_TARGETED,
                    "sglang 0.5.23: python/sglang/srt/lora/mem_pool.py",
                    readable.untargeted("all", "all-linear"),
                ),
                Rule("is no DoRA", _SGLANG_CONFIG, rules.is_set("use_dora")),
                _PLAIN_BASE,
                # It reads none of them, so that it would apply an aLoRA to all tokens.
                *_without(_SGLANG_CONFIG, "alora_invocation_tokens", *_OTHER_LORAS),
                Rule(
                    "each module has rank r",
                    "sglang: python/sglang/srt/lora/mem_pool.py",
                    rules.other_rank,
                ),
                Rule("scales all modules by lora_alpha / r", _SGLANG, rules.sglang_scaling),
                Rule("holds only lora_A and lora_B", _SGLANG, rules.strange),
                _PAIRS,
                Rule(
                    "modules that are computed as one have factors together (zeros will do)",
                    "sglang 0.5.23: python/sglang/srt/lora/lora.py",
                    rules.without_siblings(_SGLANG_JOINED),
                ),
                _COMPLETE,
                Rule(_IN_BASE, _SGLANG, rules.of_no_module),
                Rule(_SHAPES, "sglang: python/sglang/srt/lora/mem_pool.py", rules.misshapen),
            ),
            modules=SGLANG_MODULES,
            joined=_SGLANG_JOINED,
            command="python -m sglang.launch_server --model-path {base} --enable-lora "
            "--max-lora-rank {rank} --lora-paths adapter={folder}",
        ),
        Server(
            "llamacpp",
            "gguf",
            _GGUF,
            command="llama-server -m BASE.gguf --lora {folder}/adapter.gguf",
        ),
        Server(
            "ollama",
            "gguf",
            (
                *_GGUF,
                Rule("has a Modelfile", _MODELFILE, rules.no_modelfile),
                Rule(
                    "the Modelfile names a base model and this adapter",
                    _MODELFILE,
                    rules.modelfile_of_other_files,
                ),
            ),
            command="ollama create adapted -f {folder}/Modelfile",
        ),
        Server(
            "mlx",
            "merged",
            (
                Rule("is a whole model", _MLX, rules.no_model),
                Rule("is a language model", _MLX, rules.no_language_model, is_of_model=True),
                Rule(
                    "is no encoder-decoder, as mlx-lm 0.32.2 has none",
                    "mlx-lm: mlx_lm/models",
                    rules.encodes,
                    is_of_model=True,
                ),
                Rule(
                    "is of a model that mlx-lm 0.32.2 knows, with the names of weights that "
                    "transformers saves",
                    "mlx-lm: mlx_lm/models",
                    rules.type_unlike(MLX_MODELS),
                    is_of_model=True,
                ),
                Rule(
                    "is not quantized by bitsandbytes",
                    _MLX,
                    rules.model_quantized_by("bitsandbytes"),
                ),
                Rule(
                    "config.json has the older names too, which many of its models read",
                    "mlx-lm: mlx_lm/models/llama.py",
                    rules.without_older_names,
                ),
            ),
            command="mlx_lm.server --model {folder}",
        ),
        Server(
            "transformers",
            "merged",
            (
                Rule(
                    "is a whole model",
                    "transformers: src/transformers/modeling_utils.py",
                    rules.no_model,
                ),
            ),
        ),
    )
}
"""Name -> server."""


def find_server(name: str, *, field: str = "for") -> Server:
    """Return the server of that name.

    Raises:
        SettingsError: if there is none.
    """
    if not isinstance(name, str):
        raise SettingsError(field, type(name).__name__, "must be text", f"use {', '.join(SERVERS)}")
    if name not in SERVERS:
        raise SettingsError(field, name, "no such server", nearest(name, SERVERS))
    return SERVERS[name]


def chosen_format(format: str | None, server: str | None, *, others: tuple[str, ...] = ()) -> str:
    """Return the format to write: a server's own, if one is named, or else "peft".

    Args:
        format: As it was asked for.
        server: Name of a server.
        others: Further formats, which no server loads.

    Raises:
        SettingsError: if there is no such format or server, or the two contradict each other.
    """
    known = (*FORMATS, *others)
    if format is not None and format not in known:
        raise SettingsError("format", format, "no such format", f"use one of {', '.join(known)}")
    if server is None:
        return format or "peft"
    own = find_server(server).format
    if format is not None and format != own:
        raise SettingsError("format", format, f"--for {server} writes {own}", "drop --format")
    return own


def check_servable(
    name: str,
    config: Mapping[str, Any],
    *,
    base: Mapping[str, Any] | None = None,
    modules: tuple[str, ...] = (),
) -> None:
    """Check that a server can load what is trained over a base model.

    Args:
        name: The server, as in the setting `servable`.
        config: Content of the model's `config.json`, with the head that is trained.
        base: The same of the base model as it is; default: `config`.
        modules: Paths of its modules for adapters; () if they are unknown.

    Raises:
        SettingsError: if no export over that model could be written for it.
    """
    given: dict[str, Any] = {"base": base, "modules": modules}
    if problem := find_server(name, field="servable").refused(config, **given):
        others = [each.name for each in SERVERS.values() if not each.refused(config, **given)]
        remedy = f"use one of {', '.join(others)}, or leave it out"
        raise SettingsError("servable", name, problem, remedy)


def check_export(
    folder: str | Path, server: str, *, fit: Callable[[AdapterFolder], BaseFit] | None = None
) -> list[str]:
    """Return the rules of a server that an adapter's folder breaks, one line each.

    Args:
        folder: A folder that autopeft or plain peft wrote, or one with a GGUF file.
        server: Name of a server.
        fit: Compares what a folder holds with its base model; without it, rules about the base
            model's modules are kept. `autopeft.check_export` gives it.

    Raises:
        SettingsError: if there is no such server.
        AdapterError: if there is no such folder, or a file in it is damaged.
    """
    kept = find_server(server).rules
    adapter = AdapterFolder.read(checked_path("folder", folder, error=AdapterError))
    if fit is not None:
        adapter = replace(adapter, fit=fit(adapter))
    return [f"{server}: {problem}" for rule in kept if (problem := rule.problem(adapter))]
