"""What all trainings on one loaded model share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from autopeft.tasks.base import Task
from autopeft.tasks.batch import Batch
from autopeft.tasks.data import TaskData
from autopeft.training.acceleration import NO_ACCELERATION, Acceleration
from autopeft.training.attention import known_padding
from autopeft.training.compilation import BlockCompiler
from autopeft.training.optimizers import ADAMW
from autopeft.training.packing import Packing
from autopeft.training.precision import Precision, autocast


@dataclass(frozen=True)
class TrainingSetup:
    """What is trained on, and how a forward pass is computed.

    Attributes:
        task: Computes losses and scores.
        data: The encoded splits.
        device: Device of the model.
        precision: Precision of the computation.
        cache: Skips the frozen blocks below the lowest adapter.
        fp32_cache: The same where rows are scored in fp32, whatever the precision.
        last_block: Skips positions of the last block that are not read.
        compiler: Compiles blocks; None: they are not compiled.
        compiled: Paths of the blocks that it may compile.
        recomputed: Paths of the blocks that are computed again in the backward pass.
        optimizer: A value of the setting `optimizer`.
        packing: Makes the batches of trainings; None: rows are padded.
        micro_batch_tokens: Padded tokens of a training's forward pass at most; None: any number.
    """

    task: Task
    data: TaskData
    device: str = "cpu"
    precision: Precision = "fp32"
    cache: Acceleration = NO_ACCELERATION
    fp32_cache: Acceleration = NO_ACCELERATION
    last_block: Acceleration = NO_ACCELERATION
    compiler: BlockCompiler | None = None
    compiled: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    micro_batch_tokens: int | None = None
    packing: Packing | None = None
    optimizer: str = ADAMW

    @contextmanager
    def forward(self, batch: Batch) -> Iterator[None]:
        """Compute the forward pass on this batch in the precision and with the accelerations."""
        with (
            autocast(self.precision, self.device),
            self.cache.serving(batch),
            self.last_block.serving(batch),
            # The innermost: entering the others may compute other batches.
            known_padding(batch, self.device),
        ):
            yield
