"""Prompt tuning: virtual tokens among the embeddings of a whole encoder or decoder.

Source: Lester et al. (arXiv 2104.08691). The layer wraps the model without its head, such as
`LlamaForCausalLM.model`. The model gets longer rows, mask and token types included, and its outputs
are cut to the given tokens. So heads, losses and pooling outside see what they always see.

With causal attention the prompt comes first; otherwise after the first token, so that pooling
inside finds [CLS] in its place. Positions are counted as the model does.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopeft.models.sites import can_start_from_embeddings, max_positions, reads_backwards_only
from autopeft.models.tuners.common import StandInLayer, StandInModel, TargetedConfig, register


@dataclass
class PromptConfig(TargetedConfig):
    """Configuration of a `PromptModel`; `r` is the number of virtual tokens.

    `target_modules` names the model without its head, such as "bert", "transformer" or "model".
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PROMPT_TOKENS"


class PromptLayer(StandInLayer):
    """A model without its head, with virtual tokens in every row."""

    adapter_layer_names = ("prompt_tuning_tokens",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        if not can_start_from_embeddings(base_layer):
            raise TypeError(
                f"{type(base_layer).__name__} cannot have a prompt: it does not start from text "
                "embeddings alone"
            )
        self.prompt_tuning_tokens = nn.ParameterDict()
        self._names = tuple(inspect.signature(base_layer.forward).parameters)
        self._max_positions = max_positions(base_layer)
        self._n_before = 0 if reads_backwards_only(base_layer) else 1

    def add(self, adapter_name: str, size: int, config: PromptConfig) -> None:
        """Add an adapter, initialized with random tokens of the vocabulary."""
        table: Any = self._embeddings()
        with torch.no_grad():
            if config.init_weights:
                ids = torch.randint(table.num_embeddings, (size,))
                start = table(ids.to(table.weight.device))
            else:
                start = torch.randn(size, table.embedding_dim).to(table.weight)
                start = start * table.weight.std()
        self.prompt_tuning_tokens[adapter_name] = nn.Parameter(start.clone())

    def _embeddings(self) -> nn.Module:
        found: nn.Module = self.base_layer.get_input_embeddings()  # type: ignore[operator]
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the model does."""
        layer: Any = self  # peft's half of it
        names = () if layer.disable_adapters else layer.active_adapters
        tokens = [
            self.prompt_tuning_tokens[name] for name in names if name in self.prompt_tuning_tokens
        ]
        if not tokens:
            return self.base_layer(*args, **kwargs)
        call = dict(zip(self._names, args, strict=False)) | kwargs
        # transformers 5.24 calls it `cache`.
        past = call.get("past_key_values", call.get("cache"))
        n_new = sum(len(each) for each in tokens)
        if past is not None and past.get_seq_length():
            # The prompt is among the cached keys of an earlier pass.
            return self.base_layer(**_after_prompt(call, n_new))
        embedded, n_given = self._embedded(call)
        if self._max_positions is not None and n_given + n_new > self._max_positions:
            raise ValueError(
                f"rows of {n_given} tokens and {n_new} virtual ones exceed the model's "
                f"{self._max_positions} positions; use shorter rows (max_length) or fewer virtual "
                "tokens"
            )
        prompt = torch.cat(tokens).to(embedded.dtype)
        output = self.base_layer(**_with_prompt(call, embedded, prompt, self._n_before))
        return _cut(output, n_given, n_new, self._n_before)

    def _embedded(self, call: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """Pop the tokens from a call; return their embeddings, (b, t, width), and t."""
        ids, embedded = call.pop("input_ids", None), call.pop("inputs_embeds", None)
        if (ids is None) == (embedded is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        embedded = self._embeddings()(ids) if embedded is None else embedded
        return embedded, embedded.shape[1]


def n_virtual_tokens(model: nn.Module) -> int:
    """Return the number of virtual tokens before a model's own."""
    layers = (module for module in model.modules() if isinstance(module, PromptLayer))
    return sum(len(each) for layer in layers for each in layer.prompt_tuning_tokens.values())


class PromptModel(StandInModel):
    """Puts a `PromptLayer` around the target model."""

    prefix = "prompt_tuning_"
    tuner_layer_cls = PromptLayer


def _with_prompt(
    call: Mapping[str, Any], embedded: torch.Tensor, prompt: torch.Tensor, at: int
) -> dict[str, Any]:
    """Return the call with the prompt, shape (n, width), inserted before token `at`."""
    rows, n_new = len(embedded), len(prompt)
    longer = dict(call)

    def insert(given: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([given[:, :at], new, given[:, at:]], dim=1)

    longer["inputs_embeds"] = insert(embedded, prompt.expand(rows, -1, -1))
    mask = call.get("attention_mask")
    if mask is not None:
        _check_mask(mask)
        longer["attention_mask"] = insert(mask, mask.new_ones(len(mask), n_new))
    kinds = call.get("token_type_ids")
    if kinds is not None:
        longer["token_type_ids"] = insert(kinds, kinds[:, :1].expand(-1, n_new))
    positions = call.get("position_ids")
    if positions is not None:
        _check_positions(positions)
        own = torch.arange(n_new, device=positions.device).expand(len(positions), -1)
        own = own + positions[:, :1] + 1 if at else own
        longer["position_ids"] = torch.cat(
            [positions[:, :at], own.to(positions.dtype), positions[:, at:] + n_new], dim=1
        )
    return longer


def _after_prompt(call: Mapping[str, Any], n_new: int) -> dict[str, Any]:
    """Return a call that continues after n tokens that its caller does not know of."""
    later = dict(call)
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if mask is not None:
        _check_mask(mask)
        later["attention_mask"] = torch.cat([mask.new_ones(len(mask), n_new), mask], dim=1)
    if positions is not None:
        _check_positions(positions)
        later["position_ids"] = positions + n_new
    return later


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError("a model with a prompt takes a mask of shape (rows, tokens) only")


def _check_positions(positions: torch.Tensor) -> None:
    if positions.dim() != 2:
        raise ValueError("a model with a prompt takes positions of shape (rows, tokens) only")


def _cut(output: Any, n_given: int, n_new: int, at: int) -> Any:
    """Return a model's output without the states of the prompt."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(each) for each in value)
        is_states = isinstance(value, torch.Tensor) and value.dim() == 3
        if not is_states or value.shape[1] != n_given + n_new:
            return value
        if not at:
            return value[:, n_new:]
        return torch.cat([value[:, :at], value[:, at + n_new :]], dim=1)

    if isinstance(output, tuple):
        return cut(output)
    for name in ("last_hidden_state", "hidden_states"):
        if output.get(name) is not None:
            output[name] = cut(output[name])
    return output


register("PROMPT_TOKENS", PromptConfig, PromptModel)
