"""Compiles the blocks of a model for trainings, with `torch.compile`, where that pays.

Each block is compiled on its own: blocks whose adapters have the same shapes share a graph, in one
training and in those after it. Only the forward and backward passes of training steps are compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from autopeft.errors import TrainingFailure
from autopeft.training.acceleration import TOLERANCE, Acceleration, verified, warn_off
from autopeft.training.checkpointing import restore_forward
from autopeft.training.precision import Precision
from autopeft.training.step_clock import StepClock
from autopeft.training.stopwatch import Stopwatch
from autopeft.utils.device import is_broken, synchronize
from autopeft.utils.formatting import one_line

MAX_GRAPHS = 64
"""Graphs that torch keeps for the blocks of a model. Guards are checked one graph after another."""

N_TIMED = 3
"""Steps that are timed before it is decided whether to compile, and passes that are compared."""

MOST_SAVED = 0.5
"""Share of a step that compiling saves at most, as long as it has not been measured."""

LEAST_SECONDS = 2.0
"""Seconds that compiling a block takes at least, as long as it has not been measured."""

WHAT = "torch_compile"

Kind = frozenset[str]
"""The classes of modules in a training's blocks."""


class BlockCompiler:
    """What one worker's trainings know of compiling. Lives as long as its model.

    Args:
        must_pay: Whether a training is compiled only where that takes less time in all.
        backend: As in `torch.compile`.
        options: As in `torch.compile`.

    Attributes:
        must_pay: As given.
        problem: What the user should know, in one line; "" if nothing.
        saved_share: Kind of adapted blocks -> share of a step that compiling saves, as measured.
        refused: The kinds that cannot be compiled.
    """

    def __init__(
        self,
        *,
        must_pay: bool,
        backend: str | Callable[..., Any] = "inductor",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.must_pay = must_pay
        self.problem = ""
        self.saved_share: dict[Kind, float] = {}
        self.refused: set[Kind] = set()
        self._backend = backend
        self._options = dict(options) if options else None
        self._known: set[Any] = set()
        self._seconds, self._n_compiled = 0.0, 0

    def compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is compiled at its first calls, for texts of any length."""
        return torch.compile(forward, dynamic=True, backend=self._backend, options=self._options)

    def seconds_for(self, signatures: frozenset[Any]) -> float:
        """Return about how long it takes to compile what is not compiled yet."""
        each = self._seconds / self._n_compiled if self._n_compiled else LEAST_SECONDS
        return each * len(signatures - self._known)

    def note(self, seconds: float, signatures: frozenset[Any] = frozenset()) -> None:
        """Remember seconds of compiling, and what has been compiled."""
        self._seconds += max(0.0, seconds)
        self._n_compiled += len(signatures - self._known)
        self._known |= signatures

    def forget(self) -> None:
        """Drop all that is compiled."""
        torch.compiler.reset()
        self._known.clear()


class CompiledSteps:
    """The steps of one training, with compiled blocks where that pays.

    Before blocks are used compiled, loss and gradients are compared with the plain ones.

    Args:
        compiler: Of the worker.
        model: The model with its adapters.
        blocks: Paths of the blocks to compile.
        parameters: Those that are trained.
        clock: The training's.
        cache: Serves the steps; filling it is not timed.
        precision: Precision of the training.
        device: Device of the training.

    Attributes:
        seconds: Seconds spent so far on compiling, comparing and measuring.
    """

    def __init__(
        self,
        compiler: BlockCompiler,
        model: nn.Module,
        blocks: Sequence[str],
        parameters: Sequence[nn.Parameter],
        *,
        clock: StepClock,
        cache: Acceleration,
        precision: Precision = "fp32",
        device: str = "cpu",
    ) -> None:
        self.seconds = 0.0
        self._compiler = compiler
        self._model = model
        self._parameters = parameters
        self._clock = clock
        self._cache = cache
        self._precision: Precision = precision
        self._device = device
        self._blocks = tuple(model.get_submodule(path) for path in blocks)
        self._kind: Kind = frozenset(
            type(module).__name__ for block in self._blocks for module in block.modules()
        )
        self._signatures = frozenset(map(_signature, self._blocks))
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._plain_seconds: list[float] = []
        self._usual = 0.0
        self._is_used = False
        self._is_over = False

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Use the compiled blocks in this context, if they are in use now."""
        if not self._is_used:
            yield
            return
        # Beyond the limit torch would compute plainly, and not say so.
        limits = {"recompile_limit": MAX_GRAPHS, "fail_on_recompile_limit_hit": True}
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(limits))
            stack.enter_context(warnings.catch_warnings())
            # Tracing meets what torch warns of in users' code.
            warnings.filterwarnings("ignore", module=r"torch\.")
            for block in self._blocks:
                own = vars(block).get("forward")
                if block not in self._forwards:
                    self._forwards[block] = self._compiler.compiled(block.forward)
                stack.callback(restore_forward, block, own)
                block.forward = partial(self._call, self._forwards[block])
            yield

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Compiling the blocks of a large model takes minutes.
        self._clock.within_step()
        return forward(*args, **kwargs)

    def run(self, compute: Callable[[], torch.Tensor], n_left: int) -> torch.Tensor:
        """Compute a step, compiled if that pays.

        Args:
            compute: Computes the gradients of the step, in a context of `compiled`; returns its
                loss.
            n_left: Steps that are certain to come, this one included.

        Returns:
            The loss. The gradients are those of this step alone.
        """
        if not self._is_used and self._is_worth(n_left):
            watch = Stopwatch(self._cache)
            try:
                self._is_used = self._check(compute)
            finally:
                self.seconds += watch.seconds()
        if self._is_used:
            return self._guarded(compute)
        # On an accelerator timing waits for all queued work.
        if not self._compiler.must_pay or len(self._plain_seconds) == N_TIMED:
            return compute()
        loss, seconds = self._timed(compute)
        self._plain_seconds.append(seconds)
        return loss

    def _is_worth(self, n_left: int) -> bool:
        compiler = self._compiler
        if self._is_over or self._kind in compiler.refused:
            return False
        if not compiler.must_pay:
            return True
        if len(self._plain_seconds) < N_TIMED:
            return False
        share = compiler.saved_share.get(self._kind, MOST_SAVED)
        seconds = min(n_left * min(self._plain_seconds), self._clock.seconds_left)
        return share * seconds > compiler.seconds_for(self._signatures)

    def _check(self, compute: Callable[[], torch.Tensor]) -> bool:
        """Return whether compiled blocks can be used, and are faster where they must pay."""
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()  # Compiled dropout draws other random numbers.
        try:
            plain, plain_seconds = self._result(compute)
            self._is_used = True
            fast, first_seconds = self._result(compute)
            if not verified(fast, plain, TOLERANCE[self._precision], what=WHAT):
                self._refuse("compiled blocks compute other results")
                return False
            if not self._compiler.must_pay:
                self._compiler.note(first_seconds - plain_seconds, self._signatures)
                return True
            pairs = [self._compare(compute) for _ in range(N_TIMED)]
        except (torch.OutOfMemoryError, TrainingFailure):
            raise
        except Exception as error:
            if is_broken(error):
                raise
            self._step_aside(error)
            return False
        finally:
            self._is_used = False
            self._clear()
            for module, mode in modes:
                module.training = mode
        plain_seconds, fast_seconds = (min(seconds) for seconds in zip(*pairs, strict=True))
        return self._pays(plain_seconds, fast_seconds, first_seconds - fast_seconds)

    def _compare(self, compute: Callable[[], torch.Tensor]) -> tuple[float, float]:
        """Return the seconds of a plain and of a compiled pass."""
        self._is_used = False
        _, plain_seconds = self._result(compute)
        self._is_used = True
        _, fast_seconds = self._result(compute)
        return plain_seconds, fast_seconds

    def _pays(self, plain: float, fast: float, compiling: float) -> bool:
        """Note what was measured; return whether the rest of this training is faster compiled."""
        compiler, saved = self._compiler, plain - fast
        compiler.note(compiling, self._signatures)
        compiler.saved_share[self._kind] = saved / plain
        verdict = f"pays from {compiling / saved:.0f} steps on" if saved > 0 else "does not pay"
        compiler.problem = (
            f"{WHAT}=auto {verdict}: a step takes {fast:.3g} s compiled and {plain:.3g} s "
            f"plain, and compiling {len(self._signatures)} kinds of blocks took {compiling:.3g} s"
        )
        self._is_over = saved <= 0
        return saved > 0

    def _result(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
        """Return a pass's loss and gradients, one after another, and its seconds."""
        loss, seconds = self._timed(compute)
        found = [
            loss.reshape(1),
            *(p.grad.flatten() for p in self._parameters if p.grad is not None),
        ]
        device = loss.device  # A model may be spread over several.
        result = torch.cat([each.to(device, torch.float32) for each in found])
        self._clear()
        return result, seconds

    def _timed(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
        synchronize(self._device)
        watch = Stopwatch(self._cache)
        loss = compute()
        synchronize(self._device)
        return loss, watch.seconds()

    def _guarded(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute a step with compiled blocks; plainly, if another length makes them fail."""
        n_graphs, watch = _n_graphs(), Stopwatch(self._cache)
        try:
            return compute()
        except (torch.OutOfMemoryError, TrainingFailure):
            raise
        except Exception as error:
            if is_broken(error):
                raise
            self._is_used = False
            self._step_aside(error)
        finally:
            if _n_graphs() > n_graphs:
                # A step's own part is small beside it.
                self.seconds += watch.seconds()
                self._compiler.note(watch.seconds())
        self._clear()
        return compute()

    def _step_aside(self, error: Exception) -> None:
        if type(error).__name__ == "FailOnRecompileLimitHit":
            self._compiler.forget()
            self._is_over = True
            reason = f"trials differ in more than {MAX_GRAPHS} kinds of blocks; the next begin anew"
            self._compiler.problem = f"{WHAT} is off for a trial: {reason}"
        else:
            reason = one_line(error)[:200]
            self._refuse(reason)
        warn_off(WHAT, reason)

    def _refuse(self, reason: str) -> None:
        """Compile no blocks of this kind any more."""
        self._compiler.refused.add(self._kind)
        self._compiler.problem = f"{WHAT} is off: {reason}; training is slower but correct"

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _signature(block: nn.Module) -> Any:
    """Return what decides about the graph of a block: its modules and their parameters' shapes."""
    return tuple(
        (
            path,
            type(module).__name__,
            tuple((name, p.shape, p.dtype) for name, p in module.named_parameters(recurse=False)),
        )
        for path, module in block.named_modules()
    )


def _n_graphs() -> int:
    """Return how many graphs torch has made in this process."""
    return int(counters["stats"]["unique_graphs"])
