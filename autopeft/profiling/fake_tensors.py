"""Fake tensors: a model whose operations compute shapes only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class InputShape:
    """Shape of a row's inputs beside its length.

    Attributes:
        shapes: Name -> shape of a row's input that is no token, such as the channels, height and
            width of an image; what is missing is as the configuration says.
        source_share: What an encoder reads, as a share of the length.
        target_share: What a decoder beside it writes, as a share of the length.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    source_share: float = 1.0
    target_share: float = 1.0


AS_CONFIGURED = InputShape()


class DenseExperts(TorchFunctionMode):
    """Run products of experts on fake tensors, with one expert for all tokens.

    The fused kernel has no fake version for every dtype (no upstream issue known). One expert for
    all tokens costs as much as several for a share each. `FlopCounterMode` does not count the
    kernel.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            tokens, experts = args[:2]  # (S, in), (n_experts, in, out)
            return tokens @ experts[0]
        return func(*args, **(kwargs or {}))


class OneEndPerRow(TorchFunctionMode):
    """Let the classifiers of BART, T5 and their like find the end of fake rows.

    They select the hidden states at the end token by a mask, whose values fake tensors lack, and
    check that all rows have as many. Each row has one end here, at its last position.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if "unique_consecutive" in name:
            return args[0][:1]
        if name == "__getitem__" and isinstance(args[1], tuple) and args[0].dim() == 3:
            mask = args[1][0]
            if getattr(mask, "dtype", None) == torch.bool and mask.shape == args[0].shape[:2]:
                return args[0][:, -1]
        return func(*args, **(kwargs or {}))


_NONE = torch.empty(0)


def make_fake(model: nn.Module, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Replace all tensors by fake ones on a device; call it inside a `FakeTensorMode`.

    Weights get the `dtype`.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        # Tied weights stay tied.
        if id(tensor) not in made:
            is_parameter = isinstance(tensor, nn.Parameter)
            kind = dtype if is_parameter and tensor.is_floating_point() else tensor.dtype
            new = torch.empty(tensor.shape, dtype=kind, device=device)
            made[id(tensor)] = nn.Parameter(new, requires_grad=False) if is_parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
    model.train()


def sample_batch(
    model: nn.Module, rows: int, length: int, device: str, inputs: InputShape = AS_CONFIGURED
) -> dict[str, torch.Tensor]:
    """Return a batch for the model, labels included, and prepare its configuration.

    Args:
        model: The model.
        rows: Rows of the batch.
        length: Tokens of a row.
        device: Device of the tensors.
        inputs: Shape of a row's inputs beside its length.
    """
    config: Any = model.config
    for module in model.modules():
        # A cache kept by one run would be read by the next one. Decoders copy the setting.
        own: Any = getattr(module, "config", None)
        if own is not None:
            own.use_cache = False
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0

    def whole_numbers(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.long, device=device)

    batch: dict[str, torch.Tensor] = {}
    name = getattr(model, "main_input_name", "input_ids")
    if inputs.shapes:
        for each, shape in inputs.shapes.items():
            if each == "attention_mask":
                batch[each] = whole_numbers(rows, *shape)
            else:
                batch[each] = torch.zeros(rows, *shape, device=device)
    elif name == "pixel_values":
        vision: Any = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        batch[name] = torch.zeros(
            rows, getattr(vision, "num_channels", 3), height, width, device=device
        )
    elif name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        batch[name] = torch.zeros(rows, config.num_mel_bins, frames, device=device)
    else:
        read = max(1, round(length * inputs.source_share))
        batch[name] = whole_numbers(rows, read)
        # Rows are usually padded, and attention takes another path with a mask.
        batch["attention_mask"] = whole_numbers(rows, read)
    if "labels" not in inspect.signature(model.forward).parameters:
        return batch
    task = type(model).__name__
    if "Classification" in task and "Token" not in task:
        if config.problem_type == "multi_label_classification":
            batch["labels"] = torch.zeros(rows, config.num_labels, device=device)
        elif config.num_labels == 1:
            batch["labels"] = torch.zeros(rows, device=device)
        else:
            batch["labels"] = torch.zeros(rows, dtype=torch.long, device=device)
    elif "Token" in task or model.get_output_embeddings() is not None:  # type: ignore[operator]
        batch["labels"] = whole_numbers(rows, max(1, round(length * inputs.target_share)))
    return batch


def without(
    batch: dict[str, torch.Tensor], *names: str, is_encoder_decoder: bool = False
) -> dict[str, torch.Tensor]:
    """Return the batch without some tensors; a decoder without labels gets them as its input."""
    kept = {name: tensor for name, tensor in batch.items() if name not in names}
    if is_encoder_decoder and "labels" in names and batch.get("labels", _NONE).dim() == 2:
        kept["decoder_input_ids"] = batch["labels"]
    return kept
