"""Measure a whole model: how it calls its blocks, what surrounds them, and room for a prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autopeft.costs import BlockCosts, Topology, Usage
from autopeft.costs.usage import ENCODER, HIDDEN, NO_USAGE, Logits
from autopeft.models.backbone import Backbone
from autopeft.models.layout import Layout
from autopeft.models.method_hooks import ADAPTER_NAME
from autopeft.models.modules import replace_module
from autopeft.models.sites import max_positions
from autopeft.models.tuners import PromptConfig, PromptLayer
from autopeft.plan import MODEL
from autopeft.profiling.block import BlockCall
from autopeft.profiling.counters import (
    FlopCount,
    LiveBytes,
    Run,
    first_tensor,
    new_source,
    run_and_count,
    tensors_in,
)


class _Reached(Exception):
    """Ends a forward pass before the logits; its argument is what they are computed from."""


@dataclass(frozen=True)
class Captured:
    """One forward pass.

    Attributes:
        calls: How each block is called.
        encoder_output: What the encoder returned, if there is one.
        flops: FLOPs of the whole pass.
    """

    calls: list[BlockCall]
    encoder_output: torch.Tensor | None
    flops: float


@dataclass(frozen=True)
class Ends:
    """What follows the blocks.

    Attributes:
        tail: What follows, if the last block's output needs a gradient.
        scratch_bytes: The most that it holds at once, beyond what it keeps.
        head_only: The same as `tail` if only a new head is trained.
        scoring_bytes: The most that what follows holds at once without gradients.
        logits: The output embedding, if there is one.
    """

    tail: Usage
    scratch_bytes: float
    head_only: Usage
    scoring_bytes: float
    logits: Logits | None


class WholeModel:
    """A whole fake model and one batch."""

    def __init__(
        self, model: nn.Module, backbone: Backbone, batch: Mapping[str, torch.Tensor]
    ) -> None:
        self.model = model
        self.batch = batch
        self.layout = backbone.layout
        self.n_encoder = backbone.topology.n_encoder_layers
        self.head = [
            p for path in backbone.head for p in model.get_submodule(path).parameters(recurse=False)
        ]

    def forward(self) -> torch.Tensor:
        """Return the loss, or the first output of a model that has none."""
        output = self.model(**self.batch)
        loss = getattr(output, "loss", None)
        return loss if loss is not None else first_tensor(tuple(output.values()))

    def capture(self) -> Captured:
        """Run the model once, and each kind of block once: the others return what it returned."""
        calls: dict[int, BlockCall] = {}
        encoder_output: list[torch.Tensor] = []

        def on_block(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                calls.setdefault(layer, BlockCall(args, kwargs)).outputs.append(out)

            return hook

        def on_encoder(_: nn.Module, __: Any, output: Any) -> None:
            encoder_output.append(first_tensor(output))

        with ExitStack() as stack, torch.no_grad(), FlopCount() as counter:
            for path, run in self._once_a_kind(counter).items():
                stack.enter_context(_forward_of(self.model.get_submodule(path), run))
            for layer, path in enumerate(self.layout.blocks):
                block = self.model.get_submodule(path)
                handle = block.register_forward_hook(on_block(layer), with_kwargs=True)
                stack.callback(handle.remove)
            if self.n_encoder:
                encoder = self.model.get_encoder()  # type: ignore[operator]
                stack.callback(encoder.register_forward_hook(on_encoder).remove)
            self.forward()
        ordered = [calls[layer] for layer in range(len(self.layout.blocks))]
        return Captured(ordered, encoder_output[0] if encoder_output else None, counter.flops)

    def _once_a_kind(self, counter: FlopCount) -> dict[str, Callable[..., Any]]:
        """Return path -> what runs a block only if none like it has run on inputs like its."""
        known: dict[object, tuple[Any, float]] = {}

        def once(block: nn.Module, is_decoder: bool) -> Callable[..., Any]:
            kind, plain = kind_of(block, is_decoder), block.forward

            def run(*args: Any, **kwargs: Any) -> Any:
                key = kind, tuple(tuple(t.shape) for t in tensors_in((args, kwargs)))
                if key in known:
                    counter.flops += known[key][1]
                else:
                    before = counter.flops
                    out = plain(*args, **kwargs)
                    known[key] = (out, counter.flops - before)
                return known[key][0]

            return run

        return {
            path: once(self.model.get_submodule(path), layer >= self.n_encoder)
            for layer, path in enumerate(self.layout.blocks)
        }

    @contextmanager
    def _without_blocks(self, calls: Sequence[BlockCall]) -> Iterator[None]:
        """Let the blocks return what they returned before: fake tensors have no other values."""

        def stub(call: BlockCall) -> Callable[..., Any]:
            outputs = itertools.cycle(call.outputs)
            return lambda *_, **__: next(outputs)

        with ExitStack() as stack:
            for path, call in dict(zip(self.layout.blocks, calls, strict=True)).items():
                stack.enter_context(_forward_of(self.model.get_submodule(path), stub(call)))
            yield

    def _run_from(
        self, layer: int, times: int, forward: Callable[[], torch.Tensor] | None = None
    ) -> Run:
        """Run with gradients that start at the output of a block's last call."""
        left, live = [times], LiveBytes()

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            left[0] -= 1
            if left[0]:
                return None
            start = new_source(first_tensor(output))
            live.restart()
            return start if isinstance(output, torch.Tensor) else (start, *output[1:])

        handle = self.model.get_submodule(self.layout.blocks[layer]).register_forward_hook(hook)
        try:
            return run_and_count(forward or self.forward, not_kept=self.model, live=live)
        finally:
            handle.remove()

    def _before_logits(self) -> torch.Tensor:
        """Run up to the output embedding; return what it reads."""

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        handle = self._output_embedding().register_forward_pre_hook(stop)
        try:
            self.forward()
        except _Reached as reached:
            found: torch.Tensor = reached.args[0]
            return found
        finally:
            handle.remove()
        raise RuntimeError("the output embedding was not called")

    def _output_embedding(self) -> Any:
        return self.model.get_output_embeddings()  # type: ignore[operator]

    def ends(self, calls: list[BlockCall]) -> Ends:
        """Return what follows the blocks."""
        last, times = len(calls) - 1, calls[-1].times
        logits = None
        with self._without_blocks(calls):
            if self._output_embedding() is not None:
                before = self._run_from(last, times, self._before_logits)
                logits = Logits(int(self._output_embedding().weight.shape[0]), before.saved_bytes)
            with torch.no_grad():
                scoring = self._run_from(last, times)
            with _trained(self.head):
                live = self._run_from(last, times)
                dead = run_and_count(self.forward, not_kept=self.model) if self.head else Run()
        return Ends(
            Usage(live.backward_flops, live.saved_bytes),
            live.scratch_bytes,
            Usage(dead.backward_flops, dead.saved_bytes),
            scoring.scratch_bytes,
            logits,
        )

    def front(
        self,
        blocks: Sequence[BlockCosts],
        kinds: Sequence[int],
        tail: Usage,
        prompt: Sequence[nn.Parameter],
    ) -> Usage:
        """Return what lies between a prompt and the first block."""
        with _trained((*prompt, *self.head)):
            run = run_and_count(self.forward, not_kept=self.model)
        usages = [
            blocks[kind].usage(frozenset({HIDDEN}))
            for kind in kinds
            for _ in range(blocks[kind].repeats)
        ]
        return _rest(run, tail, usages)

    def bridge(
        self,
        calls: Sequence[BlockCall],
        blocks: Sequence[BlockCosts],
        kinds: Sequence[int],
        tail: Usage,
    ) -> Usage:
        """Return what lies between encoder and decoder."""
        if not self.n_encoder:
            return NO_USAGE
        with _trained(self.head):
            run = self._run_from(self.n_encoder - 1, calls[self.n_encoder - 1].times)
        first, *others = kinds[self.n_encoder :]
        usages = [blocks[first].usage(frozenset({ENCODER}))]
        usages += [blocks[kind].usage(frozenset({ENCODER, HIDDEN})) for kind in others]
        return _rest(run, tail, usages)


def kind_of(block: nn.Module, is_decoder: bool) -> object:
    """Return a key that is equal for blocks of equal costs on equal inputs."""
    shapes = tuple(
        (name, tuple(p.shape))
        for name, module in block.named_modules()
        if not isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    )
    return type(block), shapes, is_decoder, getattr(block, "attention_type", "")


@contextmanager
def _forward_of(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a block's forward pass."""
    # An attribute of the instance hides the method of its class.
    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def _rest(run: Run, tail: Usage, blocks: Sequence[Usage]) -> Usage:
    """Return what a run costs beyond the blocks and what follows them."""
    context: dict[int, float] = {}
    flops, saved = run.backward_flops - tail.backward_flops, run.saved_bytes - tail.saved_bytes
    for usage in blocks:
        flops -= usage.backward_flops
        saved -= usage.saved_bytes
        context |= usage.context
    return Usage(max(flops, 0.0), max(saved - sum(context.values()), 0.0))


@contextmanager
def _trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters require gradients while the context is open."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def topology_beside(model: nn.Module, layout: Layout, n_tokens: int) -> Topology:
    """Return the topology with prompts limited to the positions beside a row of `n_tokens`."""
    topology, site = layout.topology, layout.topology.shape(0, MODEL)
    if site is None:
        return topology
    (path,) = layout.modules[0, MODEL]
    positions = max_positions(model.get_submodule(path))
    if positions is None:
        return topology
    limit = (min(site[0], max(positions - n_tokens, 0)), site[1])
    return replace(topology, shapes={**topology.shapes, MODEL: limit})


@contextmanager
def prompted(model: nn.Module, layout: Layout, size: int) -> Iterator[tuple[nn.Parameter, ...]]:
    """Wrap the model with a frozen prompt of `size` tokens, 0 for none; yield its parameters."""
    if not size:
        yield ()
        return
    (path,) = layout.modules[0, MODEL]
    base = model.get_submodule(path)
    layer = PromptLayer(base, ADAPTER_NAME)
    layer.start(ADAPTER_NAME, size, PromptConfig(r=size))
    prompt = tuple(layer.own_parameters())
    for parameter in prompt:
        parameter.requires_grad_(False)
    replace_module(model, path, layer.train(model.training))
    try:
        yield prompt
    finally:
        replace_module(model, path, base)
