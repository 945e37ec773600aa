"""Costs that only running the model tells: latency and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.training.precision import Precision, autocast, synchronize


def measure_latency_ms(
    model: torch.nn.Module,
    data: TaskData,
    *,
    device: str,
    rows: int = 1,
    precision: Precision = "fp32",
    repeats: int = 15,
) -> float:
    """Median milliseconds of one forward pass, the adapters attached and not merged.

    Args:
        model: Model with its adapters.
        data: Its validation rows of median length are what is passed through.
        device: Where the model is.
        rows: Rows a pass.
        precision: What to compute in.
        repeats: Passes timed, after three that warm up.
    """
    lengths = data.validation.lengths
    order = np.argsort(lengths, kind="stable")
    start = max(0, (len(order) - rows) // 2)
    batch = collate(data, "validation", order[start : start + rows], device)
    was_training = model.training
    model.eval()
    milliseconds = []
    with torch.inference_mode(), autocast(precision, device):
        for number in range(repeats + 3):
            synchronize(device)
            started = time.perf_counter()
            model(**batch.model_inputs())
            synchronize(device)
            if number >= 3:
                milliseconds.append(1000 * (time.perf_counter() - started))
    model.train(was_training)
    return statistics.median(milliseconds)


def measure_peak_memory_bytes(
    model: torch.nn.Module, compute_loss: Callable[[], torch.Tensor], *, device: str
) -> int:
    """Peak memory of one training step: weights, saved activations, gradients, optimizer state.

    On a GPU the allocator is asked. On a CPU, where it cannot be, what is known to be alive at the
    peak, the end of the forward pass, is added up: parameters and buffers, every distinct tensor
    saved for the backward pass, and for each trained parameter its gradient and AdamW's two
    moments. Leaves the gradients as they were.

    Args:
        model: Model with its adapters, in the mode to be measured.
        compute_loss: One forward pass, giving the loss.
        device: Where the model is.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = sum(2 * p.numel() * p.element_size() for p in trained)
    kept = [p.grad for p in trained]
    try:
        if torch.device(device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            compute_loss().backward()  # type: ignore[no-untyped-call]
            return int(torch.cuda.max_memory_allocated(device)) + moments
        return _storage_bytes(model, compute_loss) + moments
    finally:
        for parameter, gradient in zip(trained, kept, strict=True):
            parameter.grad = gradient


def _storage_bytes(model: torch.nn.Module, compute_loss: Callable[[], torch.Tensor]) -> int:
    """Bytes of all distinct storages alive at the end of the forward pass, and gradients."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors_of(model)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = compute_loss()
    saved = sum(storage.nbytes() for storage in held.values())
    del loss
    return saved + sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
