"""Measure a model's price table on fake tensors, without its weights, one block of each kind.

Each kind of block runs alone, forward and backward, once for every set of sources (see
`autopeft.costs.usage`), with `FlopCounterMode`'s formulas and `saved_tensors_hooks`. Fake tensors
take the attention kernel of the device that will train, so FLOPs are exactly what `FlopCounterMode`
counts there. (It does not count the fused attention kernel of CPUs.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from autopeft.costs import BlockCosts, PriceTable, Topology, Usage
from autopeft.errors import ModelError
from autopeft.models.backbone import Backbone
from autopeft.models.loading import first_line
from autopeft.models.quantization import NONE, quantized_modules, quantized_table
from autopeft.plan import MODEL
from autopeft.profiling.block import BlockCall, BlockProbe
from autopeft.profiling.fake_tensors import (
    AS_CONFIGURED,
    DenseExperts,
    InputShape,
    OneEndPerRow,
    make_fake,
    sample_batch,
    without,
)
from autopeft.profiling.model import Captured, WholeModel, kind_of, prompted, topology_beside
from autopeft.utils.device import is_here


def price_table(
    backbone: Backbone,
    *,
    batch_size: int,
    mean_length: float,
    longest_length: int,
    device: str = "cpu",
    prompt_sizes: Sequence[int] = (),
    inputs: InputShape = AS_CONFIGURED,
    dtype: str = "float32",
    packed: tuple[int, int] | None = None,
) -> PriceTable:
    """Measure the price table of a backbone made by `build_meta`.

    A machine without a GPU does not know a GPU's kernels and measures for the CPU.

    Args:
        backbone: The model.
        batch_size: Rows in a step.
        mean_length: Mean tokens of a padded row; for FLOPs.
        longest_length: Tokens of the longest row; for memory.
        device: Device that will train.
        prompt_sizes: Virtual tokens of the prompts to price; those that do not fit beside the
            longest row are left out.
        inputs: Shape of a row's inputs beside its length.
        dtype: Type of the frozen weights, "float32" or "bfloat16"; with the latter, steps are
            computed under bf16 autocast, with adapters in fp32.
        packed: Sequences and tokens of each in the largest step, where rows are packed; for memory.
            Rows with a prompt are not packed. None: no row is.

    Raises:
        ModelError: if the model computes different things for different data.
    """
    if not is_here(device):
        device = "cpu"
    mean, longest = max(1, round(mean_length)), max(1, longest_length)
    topology = topology_beside(backbone.model, backbone.layout, longest)
    longest_prompt = (topology.shape(0, MODEL) or (0, 0))[0]
    model = copy.deepcopy(backbone.model)
    is_bf16 = dtype == "bfloat16"
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        DenseExperts(),
        OneEndPerRow(),
        torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=is_bf16),
    ):
        make_fake(model, device, getattr(torch, dtype))
        sizes = (0, *(n for n in sorted(set(prompt_sizes)) if n <= longest_prompt))
        tables = {
            size: _table(
                model,
                backbone,
                topology,
                batch_size,
                mean,
                (batch_size, longest) if size or packed is None else packed,
                device,
                size,
                inputs,
            )
            for size in sizes
        }
    return replace(tables.pop(0), longer=tables)


def _table(
    model: nn.Module,
    backbone: Backbone,
    topology: Topology,
    batch_size: int,
    mean: int,
    largest: tuple[int, int],
    device: str,
    prompt_size: int,
    inputs: InputShape,
) -> PriceTable:
    """Measure a fake model with a prompt of `prompt_size` virtual tokens.

    `largest` are the sequences and their tokens in the step that needs most memory.
    """
    with prompted(model, backbone.layout, prompt_size) as prompt:
        measure = partial(_measure, model, backbone, topology, device, prompt, inputs)
        if largest == (batch_size, mean):
            flops = memory = measure(*largest)
        else:
            flops = measure(batch_size, mean, has_memory=False)
            memory = measure(*largest, has_flops=False)
    blocks = tuple(_combine(f, m) for f, m in zip(flops.blocks, memory.blocks, strict=True))
    table = replace(
        memory,
        batch_size=batch_size,
        tokens=float(batch_size * (mean + prompt_size)),
        memory_tokens=float(largest[0] * (largest[1] + prompt_size)),
        forward_flops=flops.forward_flops,
        blocks=blocks,
        kinds=flops.kinds,
        tail=_combine_usage(flops.tail, memory.tail),
        head_only=_combine_usage(flops.head_only, memory.head_only),
        bridge=_combine_usage(flops.bridge, memory.bridge),
        front=_combine_usage(flops.front, memory.front),
    )
    if backbone.quantization == NONE:
        return table
    modules = quantized_modules(backbone.model, backbone.layout.blocks, backbone.quantization)
    return quantized_table(table, modules, backbone.quantization)


def _combine_usage(flops: Usage, memory: Usage) -> Usage:
    return replace(memory, backward_flops=flops.backward_flops)


def _combine(flops: BlockCosts, memory: BlockCosts) -> BlockCosts:
    """Combine the FLOPs of a mean step with the memory of a step of the longest rows."""
    return replace(
        memory,
        usages={
            sources: _combine_usage(flops.usages[sources], usage)
            for sources, usage in memory.usages.items()
        },
        tokens=flops.tokens,
        forward_flops=flops.forward_flops,
    )


def _measure(
    model: nn.Module,
    backbone: Backbone,
    topology: Topology,
    device: str,
    prompt: Sequence[nn.Parameter],
    inputs: InputShape,
    rows: int,
    length: int,
    *,
    has_flops: bool = True,
    has_memory: bool = True,
) -> PriceTable:
    """Measure a fake model on rows of one length, with the parameters of its prompt.

    Without FLOPs or memory, only the other is right in the table: measuring it takes less time.
    """
    whole, captured = _first_that_runs(model, backbone, rows, length, device, inputs)
    calls, encoder_output = captured.calls, captured.encoder_output
    paths = backbone.layout.blocks
    names = [
        _kind(model.get_submodule(path), calls[layer], backbone, layer)
        for layer, path in enumerate(paths)
    ]
    distinct = list(dict.fromkeys(names))
    blocks = []
    context_numbers: dict[int, int] = {}
    for name in distinct:
        # The last of a kind: a first block may compute what later ones get (T5's biases).
        layer = len(names) - 1 - names[::-1].index(name)
        roles = {
            role: where
            for (at, role), where in backbone.layout.modules.items()
            if at == layer and role not in ("block", MODEL)
        }
        block = model.get_submodule(paths[layer])
        probe = BlockProbe(
            *(model, block, roles, calls[layer], encoder_output, context_numbers),
            has_flops=has_flops,
            has_memory=has_memory,
        )
        blocks.append(probe.price())
    kinds = tuple(distinct.index(name) for name in names)
    ends = whole.ends(calls)
    n_params = sum(p.numel() for p in backbone.model.parameters())
    return PriceTable(
        topology=topology,
        batch_size=rows,
        tokens=float(rows * length),
        memory_tokens=float(rows * length),
        base_params=n_params,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        forward_flops=captured.flops,
        blocks=tuple(blocks),
        kinds=kinds,
        tail=ends.tail,
        head_only=ends.head_only,
        bridge=whole.bridge(calls, blocks, kinds, ends.tail),
        front=whole.front(blocks, kinds, ends.tail, prompt) if prompt else Usage(),
        workspace_bytes=ends.scratch_bytes,
        scoring_bytes=ends.scoring_bytes,
        logits=ends.logits,
        float_bytes=2 if torch.is_autocast_enabled(device.partition(":")[0]) else 4,
    )


def _kind(block: nn.Module, call: BlockCall, backbone: Backbone, layer: int) -> object:
    """Return a key that is equal for blocks of equal costs."""
    is_decoder = layer >= backbone.topology.n_encoder_layers
    return kind_of(block, is_decoder), tuple(call.hidden.shape), call.times


def _first_that_runs(
    model: nn.Module, backbone: Backbone, rows: int, length: int, device: str, inputs: InputShape
) -> tuple[WholeModel, Captured]:
    """Try a whole batch, then one without labels, then one without a mask.

    Some losses and masks read the values of their tensors, and fake tensors have none.
    """
    batch = sample_batch(model, rows, length, device, inputs)
    for left_out in ((), ("labels",), ("attention_mask",), ("labels", "attention_mask")):
        kept = without(batch, *left_out, is_encoder_decoder=backbone.topology.n_encoder_layers > 0)
        whole = WholeModel(model, backbone, kept)
        failure: Exception
        try:
            return whole, whole.capture()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            failure = error
        except ValueError as error:
            raise ModelError(
                "model",
                backbone.base_model or type(model).__name__,
                f"refuses inputs of the data's shape ({first_line(error)})",
                "use a processor and a configuration that belong together",
            ) from error
        except RuntimeError as error:
            # Some kernels (grouped products of experts) have no fake version on every device.
            failure = error
            break
    raise ModelError(
        "model",
        backbone.base_model or type(model).__name__,
        f"cannot be priced: what it computes depends on the data ({first_line(failure)})",
        "use a model whose blocks do the same work for every token",
    )
