"""The servers: what each of them loads, as a table of rules with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autopeft.errors import AdapterError, SettingsError
from autopeft.methods.base import EXPERT_ROLES, LINEAR_ROLES, Method, Shape
from autopeft.serving import rules
from autopeft.serving.adapter_folder import AdapterFolder
from autopeft.serving.rules import Rule
from autopeft.utils.serialize import nearest

MAX_RANK = 128
"""Highest rank of a module of a LoRA by default; few servers take higher ones."""


@dataclass(frozen=True)
class Server:
    """One server, or a library that loads adapters.

    Attributes:
        name: Its name, as `--for` takes it.
        format: The format that it loads; one of `autopeft.models.export.FORMATS`.
        rules: What must hold for a folder.
        ranks: The ranks that it can reserve, ascending; () if it takes any.
        takes_head: Whether it loads a new head from the adapter's own files.
        takes_experts: Whether it loads adapters of experts, which are bare parameters.
        command: How it is started, with fields base, folder and rank; "" if it is a library.
    """

    name: str
    format: str
    rules: tuple[Rule, ...]
    ranks: tuple[int, ...] = ()
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
_CONVERTER = "llama.cpp: convert_lora_to_gguf.py"
_LLAMA_ADAPTER = "llama.cpp: src/llama-adapter.cpp"
_LLAMA_SCALE = "llama.cpp: src/llama-adapter.h"
_PEFT_SAVE = "peft: src/peft/utils/save_and_load.py"

_ADAPTER = Rule("is a PEFT folder with safetensors", _PEFT_SAVE, rules.no_adapter)
_PAIRS = Rule("each module has a lora_A and a lora_B of one rank", _PEFT_SAVE, rules.unpaired)

_GGUF = (
    Rule("is a GGUF file", _LLAMA_ADAPTER, rules.no_gguf),
    Rule("general.type is adapter", _LLAMA_ADAPTER, rules.gguf_is("general.type", "adapter")),
    Rule("adapter.type is lora", _LLAMA_ADAPTER, rules.gguf_is("adapter.type", "lora")),
    Rule("adapter.lora.alpha is above 0", _LLAMA_SCALE, rules.gguf_without_alpha),
    Rule("each tensor has a lora_a and a lora_b of one rank", _LLAMA_ADAPTER, rules.unpaired),
    Rule("holds only the factors of tensors", _LLAMA_ADAPTER, rules.gguf_strange),
    # What follows is about a PEFT folder that is yet to be converted.
    Rule("peft_type is LORA", _CONVERTER, rules.not_lora),
    Rule("holds only lora_A and lora_B, no head or embeddings", _CONVERTER, rules.strange),
    Rule("is no DoRA", _CONVERTER, rules.is_set("use_dora")),
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
                _PAIRS,
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
                Rule("peft_type is LORA", _PEFT_HELPER, rules.not_lora),
                Rule("adapts no bare parameters", _PEFT_HELPER, rules.is_set("target_parameters")),
                Rule(
                    "has r, lora_alpha and target_modules",
                    _PEFT_HELPER,
                    rules.missing("r", "lora_alpha", "target_modules"),
                ),
                Rule("has no modules_to_save", _PEFT_HELPER, rules.is_set("modules_to_save")),
                Rule("is no DoRA", _PEFT_HELPER, rules.is_set("use_dora")),
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
                Rule("peft_type is LORA", _SGLANG, rules.not_lora),
                Rule(
                    "adapts no bare parameters", _SGLANG_CONFIG, rules.is_set("target_parameters")
                ),
                Rule(
                    "has r, lora_alpha and target_modules",
                    _SGLANG_CONFIG,
                    rules.missing("r", "lora_alpha", "target_modules"),
                ),
                Rule("is no DoRA", _SGLANG_CONFIG, rules.is_set("use_dora")),
                Rule(
                    "each module has rank r",
                    "sglang: python/sglang/srt/lora/mem_pool.py",
                    rules.other_rank,
                ),
                Rule("scales all modules by lora_alpha / r", _SGLANG, rules.sglang_scaling),
                Rule("holds only lora_A and lora_B", _SGLANG, rules.strange),
                _PAIRS,
            ),
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
            (*_GGUF, Rule("has a Modelfile", "ollama: docs/modelfile.md", rules.no_modelfile)),
            command="ollama create adapted -f {folder}/Modelfile",
        ),
        Server(
            "mlx",
            "merged",
            (Rule("is a whole model", "mlx-lm: mlx_lm/utils.py", rules.no_model),),
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
    if name not in SERVERS:
        raise SettingsError(field, name, "no such server", nearest(name, SERVERS))
    return SERVERS[name]


def check_export(folder: str | Path, server: str) -> list[str]:
    """Return the rules of a server that an adapter's folder breaks, one line each.

    Args:
        folder: A folder that autopeft or plain peft wrote, or one with a GGUF file.
        server: Name of a server.

    Raises:
        SettingsError: if there is no such server.
        AdapterError: if there is no such folder, or a file in it is damaged.

    Example:
        >>> autopeft.export("runs/first", pick="baseline", server="peft", to="exported/for_peft")
        Exported(...)
        >>> autopeft.check_export("exported/for_peft", server="peft")
        []
    """
    adapter = AdapterFolder.read(folder)
    return [
        f"{server}: must hold: {rule.text}; {what} ({rule.source})"
        for rule in find_server(server).rules
        if (what := rule.broken(adapter))
    ]
