"""Measures a model's price table: on fake tensors, without its weights, one block of each kind.

Each kind of block is run alone, forward and backward, once for every set of sources (see
`autopeft.pricing.table`), with `FlopCounterMode`'s formulas and `saved_tensors_hooks`. Fake tensors
of the device that will train choose the attention kernel that device would choose; FLOPs are
therefore exactly what `FlopCounterMode` counts there. (It does not count the fused attention kernel
of CPUs.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from autopeft.errors import ModelError
from autopeft.models.backbone import Backbone, build_meta
from autopeft.models.probe import Run, first_tensor, run_and_count, storage_id, tensors_in
from autopeft.models.topology import RoleMap
from autopeft.pricing import BlockPrice, PriceTable, Usage
from autopeft.pricing.table import ENCODER, HIDDEN, Sources, independent_sets

_FLOAT_BYTES = 4


def measure_prices(
    model: str,
    *,
    auto_class: str,
    model_kwargs: Mapping[str, Any] | None = None,
    revision: str | None = None,
    batch_size: int,
    mean_length: float,
    longest_length: int,
    role_map: RoleMap | None = None,
    device: str = "cpu",
) -> PriceTable:
    """The price table of a model that need not be loaded.

    Args:
        model: Folder or hub id.
        auto_class: Class of transformers, e.g. "AutoModelForSequenceClassification".
        model_kwargs: Further arguments of its loader, e.g. `{"num_labels": 2}`.
        revision: Revision of a hub model.
        batch_size: Rows in a step.
        mean_length: Mean tokens of a padded row: what FLOPs are counted for.
        longest_length: Tokens of the longest row: what memory is counted for.
        role_map: See `autopeft.models.topology`.
        device: Kind of device that will train: "cpu" or "cuda".

    Raises:
        ModelError: if there is no such model, or it is no transformer.
    """
    backbone = build_meta(
        model,
        auto_class=auto_class,
        model_kwargs=model_kwargs,
        revision=revision,
        role_map=role_map,
    )
    return price_table(
        backbone,
        batch_size=batch_size,
        mean_length=mean_length,
        longest_length=longest_length,
        device=device,
    )


def price_table(
    backbone: Backbone,
    *,
    batch_size: int,
    mean_length: float,
    longest_length: int,
    device: str = "cpu",
) -> PriceTable:
    """The price table of a backbone made by `build_meta`."""
    mean, longest = max(1, round(mean_length)), max(1, longest_length)
    model = copy.deepcopy(backbone.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model, device)
        flops = _Measured.of(model, backbone, batch_size, mean, device)
        memory = flops
        if longest != mean:
            memory = _Measured.of(model, backbone, batch_size, longest, device)
    n_params = sum(p.numel() for p in backbone.model.parameters())
    blocks = tuple(_combine(f, m) for f, m in zip(flops.blocks, memory.blocks, strict=True))
    return PriceTable(
        topology=backbone.topology,
        batch_size=batch_size,
        tokens=float(batch_size * mean),
        memory_tokens=float(batch_size * longest),
        base_params=n_params,
        weight_bytes=n_params * _FLOAT_BYTES,
        forward_flops=flops.forward_flops,
        blocks=blocks,
        kinds=flops.kinds,
        tail=_combine_usage(flops.tail, memory.tail),
        head_only=_combine_usage(flops.head_only, memory.head_only),
        bridge=_combine_usage(flops.bridge, memory.bridge),
        workspace_bytes=memory.workspace_bytes,
        float_bytes=_FLOAT_BYTES,
    )


def _combine_usage(flops: Usage, memory: Usage) -> Usage:
    return replace(memory, backward_flops=flops.backward_flops)


def _combine(flops: BlockPrice, memory: BlockPrice) -> BlockPrice:
    """FLOPs of a step of mean length, memory of a step of the longest rows."""
    return replace(
        memory,
        usages={
            sources: _combine_usage(flops.usages[sources], usage)
            for sources, usage in memory.usages.items()
        },
        tokens=flops.tokens,
    )


def _make_fake(model: nn.Module, device: str) -> None:
    """Swaps all tensors for fake ones on a device; must run inside a `FakeTensorMode`."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        # Tied weights stay tied.
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, requires_grad=False) if is_parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
    model.train()


@dataclass
class _Call:
    """How the model called one block.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        times: How often it was called in one forward pass.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    times: int = 1

    @property
    def hidden(self) -> torch.Tensor:
        """The block's own input."""
        found: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found


@dataclass
class _Measured:
    """Everything measured at one length of rows."""

    forward_flops: float
    blocks: list[BlockPrice]
    kinds: tuple[int, ...]
    tail: Usage
    head_only: Usage
    bridge: Usage
    workspace_bytes: float

    @classmethod
    def of(
        cls, model: nn.Module, backbone: Backbone, rows: int, length: int, device: str
    ) -> _Measured:
        """Measures a fake model on rows of one length."""
        whole, (calls, encoder_output, largest) = _first_that_runs(
            model, backbone, rows, length, device
        )
        paths = backbone.layout.blocks
        names = [
            _kind(model.get_submodule(path), calls[layer], backbone, layer)
            for layer, path in enumerate(paths)
        ]
        distinct = list(dict.fromkeys(names))
        blocks = []
        for name in distinct:
            # The last of a kind: a first block may compute what later ones are given (T5's biases).
            layer = len(names) - 1 - names[::-1].index(name)
            roles = {
                role: where
                for (at, role), where in backbone.layout.modules.items()
                if at == layer and role != "block"
            }
            block = model.get_submodule(paths[layer])
            blocks.append(_BlockProber(model, block, roles, calls[layer], encoder_output).price())
        kinds = [distinct.index(name) for name in names]
        forward_flops, tail, head_only = whole.tails(calls)
        bridge = whole.bridge(calls, blocks, kinds, tail)
        return cls(
            forward_flops,
            blocks,
            tuple(kinds),
            tail,
            head_only,
            bridge,
            2.0 * largest,
        )


def _kind(block: nn.Module, call: _Call, backbone: Backbone, layer: int) -> object:
    """Equal for blocks that cost the same."""
    shapes = tuple(
        (name, tuple(p.shape))
        for name, module in block.named_modules()
        if not isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    )
    hidden = tuple(call.hidden.shape)
    is_decoder = layer >= backbone.topology.n_encoder_layers
    return type(block), shapes, hidden, call.times, is_decoder, getattr(block, "attention_type", "")


def _first_that_runs(
    model: nn.Module, backbone: Backbone, rows: int, length: int, device: str
) -> tuple[_Whole, tuple[list[_Call], torch.Tensor | None, float]]:
    """Tries a whole batch, then one without labels, then one without a mask.

    Some losses and masks look into their tensors, and fake tensors hold no values.
    """
    batch = _inputs(model, rows, length, device)
    for without in ((), ("labels",), ("attention_mask",), ("labels", "attention_mask")):
        kept = {name: tensor for name, tensor in batch.items() if name not in without}
        whole = _Whole(model, backbone, kept)
        try:
            return whole, whole.capture()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            failure = error
    raise ModelError(
        "model",
        backbone.base_model or type(model).__name__,
        f"cannot be priced: what it computes depends on the data ({failure})",
        "use a model whose blocks do the same work for every token",
    )


def _inputs(model: nn.Module, rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """A batch of the model's kind, labels included."""
    config: Any = model.config
    for module in model.modules():
        # A cache kept from one run would be read by the next; decoders have a copy of the setting.
        own: Any = getattr(module, "config", None)
        if own is not None:
            own.use_cache = False
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    name = getattr(model, "main_input_name", "input_ids")
    batch: dict[str, torch.Tensor] = {}
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        batch[name] = torch.zeros(rows, channels, height, width, device=device)
    elif name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        batch[name] = torch.zeros(rows, config.num_mel_bins, frames, device=device)
    else:
        batch[name] = torch.ones(rows, length, dtype=torch.long, device=device)
        # Rows are padded as a rule, and then attention takes another path than without a mask.
        batch["attention_mask"] = torch.ones(rows, length, dtype=torch.long, device=device)
    task = type(model).__name__
    if any(word in task for word in ("CausalLM", "LMHead", "ConditionalGeneration")):
        batch["labels"] = torch.ones(rows, length, dtype=torch.long, device=device)
    elif "TokenClassification" in task:
        batch["labels"] = torch.zeros(rows, length, dtype=torch.long, device=device)
    elif "Classification" in task:
        is_float = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        shape = (
            (rows, config.num_labels)
            if config.problem_type == "multi_label_classification"
            else (rows,)
        )
        kind = torch.float32 if is_float else torch.long
        batch["labels"] = torch.zeros(shape, dtype=kind, device=device)
    return batch


class _Whole:
    """The whole model on one batch."""

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
        """The loss, or the first output of a model that has none."""
        output = self.model(**self.batch)
        loss = getattr(output, "loss", None)
        return loss if loss is not None else first_tensor(tuple(output.values()))

    def capture(self) -> tuple[list[_Call], torch.Tensor | None, float]:
        """How each block is called; the encoder's output; the largest tensor's bytes."""
        calls: dict[int, _Call] = {}
        encoder_output: list[torch.Tensor] = []
        largest = [0.0]

        def on_block(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if layer in calls:
                    calls[layer].times += 1
                else:
                    calls[layer] = _Call(args, kwargs)

            return hook

        def on_any(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                largest[0] = max(largest[0], float(tensor.numel() * tensor.element_size()))

        def on_encoder(_: nn.Module, __: Any, output: Any) -> None:
            encoder_output.append(first_tensor(output))

        with ExitStack() as stack, torch.no_grad():
            for layer, path in enumerate(self.layout.blocks):
                block = self.model.get_submodule(path)
                handle = block.register_forward_pre_hook(on_block(layer), with_kwargs=True)
                stack.callback(handle.remove)
            for module in self.model.modules():
                stack.callback(module.register_forward_hook(on_any).remove)
            if self.n_encoder:
                encoder = self.model.get_encoder()  # type: ignore[operator]
                stack.callback(encoder.register_forward_hook(on_encoder).remove)
            self.forward()
        ordered = [calls[layer] for layer in range(len(self.layout.blocks))]
        return ordered, (encoder_output[0] if encoder_output else None), largest[0]

    def _run_from(self, layer: int, times: int) -> Run:
        """A run in which gradients start at the output of a block's last call."""
        left = [times]

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            left[0] -= 1
            if left[0]:
                return None
            start = first_tensor(output).detach().requires_grad_()
            return start if isinstance(output, torch.Tensor) else (start, *output[1:])

        handle = self.model.get_submodule(self.layout.blocks[layer]).register_forward_hook(hook)
        try:
            return run_and_count(self.forward, not_kept=self.model)
        finally:
            handle.remove()

    def tails(self, calls: list[_Call]) -> tuple[float, Usage, Usage]:
        """FLOPs of the forward pass; what surrounds the blocks, with gradients and without."""
        for parameter in self.head:
            parameter.requires_grad_(True)
        try:
            last = len(calls) - 1
            live = self._run_from(last, calls[last].times)
            dead = run_and_count(self.forward, not_kept=self.model) if self.head else Run()
        finally:
            for parameter in self.head:
                parameter.requires_grad_(False)
        return (
            live.forward_flops,
            Usage(live.backward_flops, live.saved_bytes),
            Usage(dead.backward_flops, dead.saved_bytes),
        )

    def bridge(
        self, calls: list[_Call], blocks: list[BlockPrice], kinds: list[int], tail: Usage
    ) -> Usage:
        """What lies between encoder and decoder: a run from the encoder's end, less all known."""
        if not self.n_encoder:
            return Usage()
        for parameter in self.head:
            parameter.requires_grad_(True)
        run = self._run_from(self.n_encoder - 1, calls[self.n_encoder - 1].times)
        for parameter in self.head:
            parameter.requires_grad_(False)
        flops, saved = run.backward_flops - tail.backward_flops, run.saved_bytes - tail.saved_bytes
        for layer in range(self.n_encoder, len(calls)):
            sources = {ENCODER} if layer == self.n_encoder else {ENCODER, HIDDEN}
            usage = blocks[kinds[layer]].usage(frozenset(sources))
            flops -= usage.backward_flops
            saved -= usage.saved_bytes
        return Usage(max(flops, 0.0), max(saved, 0.0))


@dataclass
class _Seen:
    """What hooks on a block's roles saw in one run."""

    live_inputs: set[str] = field(default_factory=set)
    live_outputs: set[str] = field(default_factory=set)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


class _BlockProber:
    """One block, run alone with gradients starting at chosen sources."""

    def __init__(
        self,
        model: nn.Module,
        block: nn.Module,
        roles: Mapping[str, tuple[str, ...]],
        call: _Call,
        encoder_output: torch.Tensor | None,
    ) -> None:
        self.block = block
        self.call = call
        self.runs: dict[Sources, tuple[Run, _Seen]] = {}
        self.model = model
        self.modules = {
            role: [model.get_submodule(path) for path in paths] for role, paths in roles.items()
        }
        self.encoder = None if encoder_output is None else storage_id(encoder_output)
        self.hidden = storage_id(call.hidden)
        self.context = {
            storage_id(t): float(t.numel() * t.element_size())
            for t in tensors_in((call.args, call.kwargs))
            if storage_id(t) not in (self.hidden, self.encoder)
        }
        self.has_encoder = (
            self.encoder is not None
            and any(storage_id(t) == self.encoder for t in tensors_in((call.args, call.kwargs)))
            and self.encoder != self.hidden
        )

    def price(self) -> BlockPrice:
        """Runs the block for every set of sources."""
        names = [*self.modules, HIDDEN, *([ENCODER] if self.has_encoder else [])]
        reach = {}
        for name in names:
            _, seen = self._run(frozenset({name}))
            reach[name] = frozenset(seen.live_outputs - {name})
        usages = {sources: self._usage(sources, reach) for sources in independent_sets(reach)}
        _, seen = self._run(frozenset())
        tokens = {
            role: seen.inputs[role].numel() / seen.inputs[role].shape[-1] for role in seen.inputs
        }
        return BlockPrice(
            usages=usages,
            reach=reach,
            input_of={role: self._input_name(seen, role) for role in seen.inputs},
            repeats=self.call.times,
            tokens=tokens,
            memory_tokens=tokens,
        )

    def _input_name(self, seen: _Seen, role: str) -> str:
        """Roles that read one tensor get one name; what every decoder block reads, one for all."""
        mine = storage_id(seen.inputs[role])
        if mine == self.encoder and self.has_encoder:
            return ENCODER
        return min(other for other, tensor in seen.inputs.items() if storage_id(tensor) == mine)

    def _usage(self, sources: Sources, reach: Mapping[str, frozenset[str]]) -> Usage:
        if not sources:
            return Usage()
        run, seen = self._run(sources)
        input_bytes = {
            role: 0.0 if storage_id(t) in run.kept else float(t.numel() * t.element_size())
            for role, t in seen.inputs.items()
        }
        if any("norm" in reach[source] for source in sources):
            # The same for all sources above which all of the block's normalisations lie.
            plain, _ = self._run(frozenset({HIDDEN}))
            trained, _ = self._run(frozenset({HIDDEN, "norm"}))
            input_bytes["norm"] = max(trained.saved_bytes - plain.saved_bytes, 0.0)
        return Usage(run.backward_flops, run.saved_bytes, frozenset(seen.live_inputs), input_bytes)

    def _run(self, sources: Sources) -> tuple[Run, _Seen]:
        if sources not in self.runs:
            self.runs[sources] = self._run_anew(sources)
        return self.runs[sources]

    def _run_anew(self, sources: Sources) -> tuple[Run, _Seen]:
        seen = _Seen()
        args, kwargs = self._arguments(sources)
        norms = [p for m in self.modules.get("norm", ()) for p in m.parameters(recurse=False)]
        with ExitStack() as stack:
            if "norm" in sources:
                for parameter in norms:
                    parameter.requires_grad_(True)
                    stack.callback(parameter.requires_grad_, False)
            for role, modules in self.modules.items():
                # The block has a normalisation downstream only if all of them are.
                for handle in self._watch(role, modules, role in sources, seen):
                    stack.callback(handle.remove)
            run = run_and_count(
                lambda: first_tensor(self.block(*args, **kwargs)),
                not_kept=self.model,
                shared=self.context,
            )
        return run, seen

    def _arguments(self, sources: Sources) -> tuple[tuple[Any, ...], dict[str, Any]]:
        live = {
            *((self.hidden,) if HIDDEN in sources else ()),
            *((self.encoder,) if ENCODER in sources else ()),
        }

        def fresh(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and storage_id(value) in live:
                return value.detach().requires_grad_()
            return value

        return (
            tuple(fresh(value) for value in self.call.args),
            {name: fresh(value) for name, value in self.call.kwargs.items()},
        )

    def _watch(
        self, role: str, modules: list[nn.Module], is_source: bool, seen: _Seen
    ) -> Iterator[Any]:
        waiting = [len(modules)]

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if role != "norm":
                seen.inputs[role] = args[0]
                if args[0].requires_grad:
                    seen.live_inputs.add(role)

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            if is_source and role != "norm" and not output.requires_grad:
                output = output.detach().requires_grad_()
            waiting[0] -= bool(output.requires_grad)
            if waiting[0] == 0:
                seen.live_outputs.add(role)
            return output

        for module in modules:
            yield module.register_forward_pre_hook(before)
            yield module.register_forward_hook(after)
