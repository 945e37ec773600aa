"""Measure one block of a model: its costs for every set of sources of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autopeft.costs import BlockCosts, Usage
from autopeft.costs.usage import ENCODER, HIDDEN, Sources, independent_sets
from autopeft.errors import ModelError
from autopeft.methods import EXPERT_ROLES
from autopeft.profiling.counters import (
    Run,
    first_tensor,
    new_source,
    run_and_count,
    storage_id,
    tensors_in,
)

QUERIES = "@queries"
"""The name of a prefix's input."""


@dataclass
class BlockCall:
    """How the model called one block.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        outputs: What each call of a forward pass returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any] = field(default_factory=list)

    @property
    def times(self) -> int:
        """Calls in one forward pass."""
        return len(self.outputs)

    @property
    def hidden(self) -> torch.Tensor:
        """The block's hidden states."""
        found: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found


@dataclass
class _Seen:
    """What hooks saw in one run: inputs of roles, and roles with live inputs and outputs."""

    live_inputs: set[str] = field(default_factory=set)
    live_outputs: set[str] = field(default_factory=set)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    has_live_heads: bool = False


class _ExpertProducts(TorchFunctionMode):
    """Watch the products of tokens and experts as hooks watch linear modules.

    Args:
        weights: Storage of a parameter -> its role.
        sources: Where gradients start.
        seen: What is written to.
    """

    def __init__(self, weights: Mapping[int, str], sources: Sources, seen: _Seen) -> None:
        super().__init__()
        self.weights, self.sources, self.seen = weights, sources, seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _PRODUCTS or len(args) < 2:
            return output
        role = self.weights.get(storage_id(args[1]))
        if role is None:
            return output
        self.seen.inputs[role] = args[0]
        if args[0].requires_grad:
            self.seen.live_inputs.add(role)
        if role in self.sources and not output.requires_grad:
            output = new_source(output)
        if output.requires_grad:
            self.seen.live_outputs.add(role)
        return output


_PRODUCTS = ("grouped_mm", "_grouped_mm", "bmm", "matmul")
"""Functions of torch that models multiply their experts with."""


_WITH_SCRATCH: tuple[Sources, ...] = (frozenset(), frozenset({HIDDEN}))
"""Sources of the runs of which it counts what they hold at once."""


class BlockProbe:
    """One block, run alone with gradients starting at chosen sources.

    Args:
        model: The fake model.
        block: The block.
        roles: Role -> paths of its modules.
        call: What it is called with.
        encoder_output: What the encoder returns, if there is one.
        context_numbers: Storage -> number of what several blocks share; new ones are added.
        has_flops: Whether to count FLOPs; else those of backward passes are 0.
        has_memory: Whether to count what is kept and what is held at once; else they are 0.
    """

    def __init__(
        self,
        model: nn.Module,
        block: nn.Module,
        roles: Mapping[str, tuple[str, ...]],
        call: BlockCall,
        encoder_output: torch.Tensor | None,
        context_numbers: dict[int, int],
        *,
        has_flops: bool = True,
        has_memory: bool = True,
    ) -> None:
        self.has_flops, self.has_memory = has_flops, has_memory
        self.block = block
        self.call = call
        self.runs: dict[Sources, tuple[Run, _Seen]] = {}
        self.model = model
        self.modules = {
            role: [model.get_submodule(path) for path in paths]
            for role, paths in roles.items()
            if role not in EXPERT_ROLES
        }
        self.experts = {
            storage_id(model.get_parameter(path)): role
            for role, paths in roles.items()
            if role in EXPERT_ROLES
            for path in paths
        }
        if self.modules.pop("attn", None):
            # A prefix changes what the heads pass to the output projection. It is watched first, so
            # that this projection, too, sees a live input.
            self.modules = {"attn": self.modules["attn.o"], **self.modules}
        self.encoder = None if encoder_output is None else storage_id(encoder_output)
        self.hidden = storage_id(call.hidden)
        given = {storage_id(t): t for t in tensors_in((call.args, call.kwargs))}
        self.context = {
            storage: float(tensor.untyped_storage().nbytes())
            for storage, tensor in given.items()
            if storage not in (self.hidden, self.encoder)
        }
        self.context_numbers = context_numbers
        self.has_encoder = self.encoder in given and self.encoder != self.hidden

    def price(self) -> BlockCosts:
        """Run the block for every set of sources.

        Raises:
            ModelError: if experts are not multiplied in a way that is known, so that their adapters
                would seem to cost nothing.
        """
        names = [
            *self.modules,
            *self.experts.values(),
            HIDDEN,
            *([ENCODER] if self.has_encoder else []),
        ]
        reach = {
            name: frozenset(self._run(frozenset({name}))[1].live_outputs - {name}) for name in names
        }
        usages = {sources: self._usage(sources, reach) for sources in independent_sets(reach)}
        run, seen = self._run(frozenset())
        if unseen := [role for role in self.experts.values() if role not in seen.inputs]:
            raise ModelError(
                "model",
                type(self.model).__name__,
                f"cannot be priced: how it multiplies {', '.join(unseen)} is not known",
                'use experts_implementation="grouped_mm" in its configuration',
            )
        whole, _ = self._run(frozenset({HIDDEN}))
        hidden_bytes = float(self.call.hidden.numel() * self.call.hidden.element_size())
        tokens = {role: read.numel() / read.shape[-1] for role, read in seen.inputs.items()}
        return BlockCosts(
            usages=usages,
            reach=reach,
            input_of={role: self._input_name(seen, role) for role in seen.inputs},
            repeats=self.call.times,
            tokens=tokens,
            memory_tokens=tokens,
            forward_flops=run.forward_flops,
            hidden_bytes=hidden_bytes,
            # What a block returns is what the next one gets.
            scratch_bytes=max(0.0, whole.scratch_bytes - hidden_bytes),
            scoring_bytes=run.scratch_bytes,
        )

    def _input_name(self, seen: _Seen, role: str) -> str:
        """Return one name for each tensor that roles read; `ENCODER` for the encoder's output."""
        if role == "attn":
            return QUERIES
        mine = storage_id(seen.inputs[role])
        if mine == self.encoder and self.has_encoder:
            return ENCODER
        return min(
            other
            for other, tensor in seen.inputs.items()
            if storage_id(tensor) == mine and other != "attn"
        )

    def _usage(self, sources: Sources, reach: Mapping[str, frozenset[str]]) -> Usage:
        if not sources:
            return Usage()
        run, seen = self._run(sources)
        input_bytes = {
            role: 0.0 if storage_id(t) in run.kept else float(t.numel() * t.element_size())
            for role, t in seen.inputs.items()
        }
        if seen.has_live_heads:
            input_bytes["attn"] = 0.0  # The attention over the tokens keeps the queries anyway.
        if any("norm" in reach[source] for source in sources):
            # Equal for all sources with all of the block's normalizations downstream.
            plain, _ = self._run(frozenset({HIDDEN}))
            trained, _ = self._run(frozenset({HIDDEN, "norm"}))
            input_bytes["norm"] = max(trained.saved_bytes - plain.saved_bytes, 0.0)
        context = {
            self.context_numbers.setdefault(storage, len(self.context_numbers)): size
            for storage, size in self.context.items()
            if storage in run.kept_shared
        }
        return Usage(
            run.backward_flops, run.saved_bytes, frozenset(seen.live_inputs), input_bytes, context
        )

    def _run(self, sources: Sources) -> tuple[Run, _Seen]:
        if sources in self.runs:
            return self.runs[sources]
        seen = _Seen()
        args, kwargs = self._arguments(sources)
        has_scratch = self.has_memory and sources in _WITH_SCRATCH
        norms = [p for m in self.modules.get("norm", ()) for p in m.parameters(recurse=False)]
        with ExitStack() as stack:
            if "norm" in sources:
                for parameter in norms:
                    parameter.requires_grad_(True)
                    stack.callback(parameter.requires_grad_, False)
            for role, modules in self.modules.items():
                # The role "norm" is live only if all of the block's normalizations are.
                for handle in self._watch(role, modules, role in sources, seen):
                    stack.callback(handle.remove)
            if self.experts:
                stack.enter_context(_ExpertProducts(self.experts, sources, seen))
            run = run_and_count(
                lambda: first_tensor(self.block(*args, **kwargs)),
                not_kept=self.model,
                shared=self.context,
                has_backward=self.has_flops or has_scratch,
                has_saved=self.has_memory,
                has_scratch=has_scratch,
            )
        self.runs[sources] = run, seen
        return run, seen

    def _arguments(self, sources: Sources) -> tuple[tuple[Any, ...], dict[str, Any]]:
        live = {{HIDDEN: self.hidden, ENCODER: self.encoder}.get(source) for source in sources}

        def fresh(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and storage_id(value) in live:
                return new_source(value)
            return value

        return (
            tuple(fresh(value) for value in self.call.args),
            {name: fresh(value) for name, value in self.call.kwargs.items()},
        )

    def _watch(
        self, role: str, modules: list[nn.Module], is_source: bool, seen: _Seen
    ) -> Iterator[Any]:
        if role == "attn":
            yield modules[0].register_forward_pre_hook(self._at_heads(is_source, seen))
            return
        waiting = [len(modules)]

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if role != "norm":
                seen.inputs[role] = args[0]
                if args[0].requires_grad:
                    seen.live_inputs.add(role)

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            if is_source and role != "norm" and not output.requires_grad:
                output = new_source(output)
            waiting[0] -= bool(output.requires_grad)
            if waiting[0] == 0:
                seen.live_outputs.add(role)
            return output

        for module in modules:
            yield module.register_forward_pre_hook(before)
            yield module.register_forward_hook(after)

    def _at_heads(self, is_source: bool, seen: _Seen) -> Any:
        """Return a hook on the output projection that treats its input as a prefix's output."""

        def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
            heads = args[0]
            seen.inputs["attn"] = heads
            seen.has_live_heads = heads.requires_grad
            if seen.live_outputs & {"attn.q", "attn.qkv"}:
                seen.live_inputs.add("attn")
            if is_source and not heads.requires_grad:
                heads = new_source(heads)
            if heads.requires_grad:
                seen.live_outputs.add("attn")
            return (heads, *args[1:])

        return before
