"""Find out which of the last block's hidden states a model's head reads.

Most classifiers read one token of each text: an encoder's first, a decoder's last. All else that
the last block computes for other tokens, except keys and values, is unused; see
`autopeft.training.last_block`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from autopeft.costs.usage import NARROW_ROLES
from autopeft.models.backbone import Backbone
from autopeft.models.layout import Layout, is_chain


def n_logit_weights(backbone: Backbone) -> int:
    """Return the number of weights of the output embedding, 0 without one."""
    embedding: Any = backbone.model.get_output_embeddings()  # type: ignore[operator]
    return 0 if embedding is None else int(embedding.weight.numel())


def n_logits(backbone: Backbone) -> int:
    """Return the logits of a position, 0 without an output embedding."""
    embedding: Any = backbone.model.get_output_embeddings()  # type: ignore[operator]
    return 0 if embedding is None else int(embedding.weight.shape[0])


def narrow_modules(model: nn.Module, layout: Layout) -> tuple[str, ...]:
    """Return the paths of the last block's largest modules that treat every position alone."""
    last = layout.topology.n_layers - 1
    found_at = [layout.modules.get((last, role), ()) for role in NARROW_ROLES]
    linear = {paths[0] for paths in found_at if len(paths) == 1}
    allowed = linear | set(layout.modules.get((last, "norm"), ()))

    def find(path: str) -> list[str]:
        module = model.get_submodule(path)
        owners = [
            f"{path}.{inner}" if inner else path
            for inner, part in module.named_modules()
            if next(part.parameters(recurse=False), None) is not None
        ]
        if linear.intersection(owners) and allowed.issuperset(owners):
            return [path]
        return [found for name, _ in module.named_children() for found in find(f"{path}.{name}")]

    return tuple(find(layout.blocks[last]))


def read_positions(
    backbone: Backbone, loss: Callable[[nn.Module], torch.Tensor], rows: int, length: int
) -> torch.Tensor | None:
    """Return which of the last block's hidden states a loss depends on.

    This is where gradients arrive, with random weights around the blocks; neither blocks nor
    embeddings are computed.

    Args:
        backbone: Made by `build_meta`.
        loss: Computes the loss of a model on a batch on the CPU.
        rows: Rows of that batch.
        length: Tokens of each row.

    Returns:
        True where a state is read, shape (rows, length); None if that cannot be determined.
    """
    if not is_chain(backbone.layout.blocks):
        return None
    model = _hollow(backbone)
    width = backbone.topology.shape(backbone.topology.n_layers - 1, "block")
    assert width is not None, "every block has a width"
    generator = torch.Generator().manual_seed(0)
    for shape in _OUTPUTS:
        hidden = torch.randn(rows, length, width[0], generator=generator).requires_grad_()
        try:
            calls = _stand_in(model, backbone.layout.blocks, shape(hidden))
            loss(model).backward()  # type: ignore[no-untyped-call]
        except Exception:  # A model's own code may raise anything if a block returns another type.
            continue
        if hidden.grad is not None and calls == [1] * len(calls):
            return hidden.grad.abs().sum(dim=-1) > 0
    return None


_OUTPUTS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
    lambda hidden: hidden,
)
"""What blocks return, in this order: a model that expects a tuple might unpack a tensor."""


def _hollow(backbone: Backbone) -> nn.Module:
    """Return a copy with embeddings that return zeros and random weights around the blocks."""
    model = copy.deepcopy(backbone.model)
    inside = tuple(f"{path}." for path in backbone.layout.blocks)
    generator = torch.Generator().manual_seed(0)
    vocabulary: Any = model.get_output_embeddings()  # type: ignore[operator]
    for path, module in model.named_modules():
        if path.startswith(inside) or path in backbone.layout.blocks:
            continue
        if isinstance(module, nn.Embedding):
            module.forward = _zeros(module.embedding_dim)  # type: ignore[method-assign]
            continue
        if module is vocabulary:
            module.forward = _few_logits(vocabulary.in_features, vocabulary.out_features)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.randn(parameter.shape, generator=generator)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model.eval()


def _zeros(width: int) -> Callable[..., torch.Tensor]:
    # Some embeddings take more than one argument (OPT's of positions).
    return lambda ids, *_, **__: torch.zeros(*ids.shape, width)


def _few_logits(width: int, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function for logits that repeats a few: the real product would need all weights."""
    weight = torch.randn(width, 16, generator=torch.Generator().manual_seed(0))
    return lambda x: (x @ weight).repeat(*[1] * (x.dim() - 1), -(-size // 16))[..., :size]


def _stand_in(model: nn.Module, blocks: Sequence[str], output: Any) -> list[int]:
    """Let every block return `output`; the result counts the calls of each."""
    calls = [0] * len(blocks)

    def returning(layer: int) -> Callable[..., Any]:
        def forward(*_: Any, **__: Any) -> Any:
            calls[layer] += 1
            return output

        return forward

    for layer, path in enumerate(blocks):
        model.get_submodule(path).forward = returning(layer)
    return calls
