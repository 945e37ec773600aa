"""Checks an adapter method: its price, its start, its gradients, its files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from autopeft.methods import Method
from autopeft.methods.registry import METHODS
from autopeft.models.attach import Attached, attach
from autopeft.models.merging import merged
from autopeft.models.saving import load_attached, save_adapter
from autopeft.plan import AdapterPlan, Candidate
from autopeft.profiling.counters import run_and_count
from autopeft.testing.requirement import Requirement, registered
from autopeft.testing.tiny_models import (
    DECODER,
    ENCODER,
    LENGTH,
    TinyModel,
    backbone_of,
    batch_for,
    candidate_of,
    changed,
    disturb,
    logits_of,
    plan_of,
    prices_of,
    prompt_sizes_of,
    state_of,
)
from autopeft.utils.formatting import one_line

_LARGE = ((4096, 4096), (6144, 6144))
"""Shapes that have room for any rank; some ranks must divide one of them."""


def check_method(method: Any, *, models: Sequence[TinyModel] = (ENCODER, DECODER)) -> None:
    """Check that a method keeps the contract of `autopeft.methods.Method`.

    At random sites and ranks of tiny models: the price is the number of parameters that are
    trained; FLOPs and kept bytes are those of a real step; a fresh adapter leaves the outputs as
    they are if it says so; every parameter gets a gradient; detaching restores the model; files
    give the same outputs again; a merged model computes the same if it says so.

    Args:
        method: The method, its class, or its name.
        models: Where it is tried; one without a site for it is skipped.

    Raises:
        AssertionError: if it does not; the message is one line.
        SpaceError: if it is no method.

    Example:
        >>> from dataclasses import replace
        >>> import autopeft.methods
        >>> from autopeft.testing import check_method
        >>> check_method(replace(autopeft.methods.get("ia3"), name="my_ia3"))
        >>> check_method(replace(autopeft.methods.get("lora"), name="mine", min_rank=100))
        Traceback (most recent call last):
        ...
        AssertionError: method mine: no site of a tiny BERT or a tiny Llama can have it; ...
    """
    part = METHODS.resolve("method", method)
    require = Requirement(f"method {part.name}")
    known = METHODS[part.name] if part.name in METHODS else part
    is_free = not type(known).__module__.startswith("autopeft.methods") or known == part
    require.that(is_free, "the name is that of a method of autopeft; rename it")
    never = [
        rank
        for rank in part.default_ranks
        if not any(part.is_legal_rank(rank, shape) for shape in _LARGE)
    ]
    text = f"default_ranks has {never}, which is_legal_rank refuses even at {_LARGE[0]}"
    require.that(not never or len(never) == len(part.default_ranks), text)
    require.that(require.pickled(part) == part, "it is another method after pickling")
    try:
        with registered(METHODS, part.name, part):
            tried = [_check_on(part, model, require) for model in models]
    except BaseException:
        backbone_of.cache_clear()  # A broken method may have left its traces in the model.
        raise
    names = " or ".join(model.name for model in models)
    require.that(any(tried), f"no site of {names} can have it; check roles, ranks and max_rank")


def _check_on(method: Method, model: TinyModel, require: Requirement) -> bool:
    """Check it at sites of one model; return whether there are any."""
    backbone = backbone_of(model)
    plan = plan_of(model.topology, method.name, seed=len(method.name) + len(model.name))
    if plan is None:
        return False
    candidate, batch = candidate_of(plan), batch_for(backbone, length=LENGTH)
    before = state_of(backbone)
    with attach(backbone, candidate_of(AdapterPlan()), seed=3) as attached:
        base = logits_of(attached.model, batch)
    with tempfile.TemporaryDirectory(prefix="autopeft-") as folder:
        with _attached(backbone, candidate, model, require) as attached:
            _check_start(method, attached, base, batch, require)
            _check_costs(candidate, attached, model, batch, require)
            with torch.autocast("cpu", torch.bfloat16), require.no_error("a step in bfloat16"):
                loss = attached.model(**batch).loss
            require.that(bool(torch.isfinite(loss)), "the loss in bfloat16 is not finite")
            attached.model.eval()
            after = logits_of(attached.model, batch)
            is_changed = not torch.allclose(after, base, atol=1e-5)
            require.that(is_changed, "changing its parameters does not change the outputs")
            if method.mergeable:
                with require.no_error("merging (mergeable=True)"), merged(attached):
                    alone = logits_of(attached.model, batch)
                text = "the merged model computes something else; set mergeable=False"
                require.that(torch.allclose(alone, after, rtol=1e-3, atol=1e-4), text)
            with require.no_error("saving"):
                save_adapter(attached, Path(folder), base_model="base")
        what = changed(before, state_of(backbone))
        text = f"detaching leaves the base model changed ({what}); set changes_base=True"
        require.that(what is None, text)
        with require.no_error("loading what was saved"):
            again = logits_of(load_attached(model.build("cpu").model, Path(folder)).model, batch)
    if method.changes_base:  # The rest of the weight is computed anew from the base.
        is_same = torch.allclose(again, after, rtol=1e-4, atol=1e-5)
    else:
        is_same = torch.equal(again, after)
    require.that(is_same, "a loaded adapter computes something else than the saved one")
    return True


def _attached(
    backbone: Any, candidate: Candidate, model: TinyModel, require: Requirement
) -> Attached:
    try:
        return attach(backbone, candidate, seed=3)
    except Exception as error:
        reason = one_line(error).removeprefix("RuntimeError: ")
        raise AssertionError(f"{require.part}: on {model.name}: {reason}") from error


def _check_start(
    method: Method,
    attached: Attached,
    base: torch.Tensor,
    batch: dict[str, torch.Tensor],
    require: Requirement,
) -> None:
    """Check what a fresh adapter does to the outputs."""
    first = logits_of(attached.model, batch)
    require.that(
        torch.equal(first, logits_of(attached.model, batch)), "two passes in evaluation mode differ"
    )
    if not method.starts_at_identity:
        return
    gap = float((first - base).abs().max())
    says = f"a fresh adapter changes the outputs by {gap:.2g}"
    if method.exact_start and torch.allclose(first, base, rtol=1e-3, atol=1e-4):
        require.that(torch.equal(first, base), f"{says}; set exact_start=False")
    is_same = torch.allclose(first, base, rtol=1e-3, atol=1e-4)
    require.that(is_same, f"{says}; set starts_at_identity=False")


def _check_costs(
    candidate: Candidate,
    attached: Attached,
    model: TinyModel,
    batch: dict[str, torch.Tensor],
    require: Requirement,
) -> None:
    """Check parameters, FLOPs and kept bytes of a real step against the formulas."""
    table = prices_of(model, prompt_sizes_of(candidate.plan))
    price = table.price(candidate)
    attached.model.train()
    live = {n: p for n, p in attached.model.named_parameters() if p.requires_grad}
    n_live = sum(p.numel() for p in live.values())
    text = f"{n_live} parameters are trained, but {price.trainable_params} were priced"
    require.that(price.trainable_params == n_live, f"{text}; correct n_params")
    disturb(attached)
    with FlopCounterMode(display=False) as counter:
        attached.model(**batch).loss.backward()
    without = [name for name, p in live.items() if p.grad is None]
    require.that(not without, f"no gradient reaches {', '.join(without[:2])}")
    broken = [n for n, p in live.items() if p.grad is not None and not p.grad.isfinite().all()]
    require.that(not broken, f"the gradient of {', '.join(broken[:2])} is not finite")
    for name, priced, real, tolerance in (
        ("FLOPs of a step", price.train_flops, float(counter.get_total_flops()), 0.02),
        (
            "bytes kept for the backward pass",
            table.saved_bytes(candidate),
            run_and_count(
                lambda: attached.model(**batch).loss, not_kept=attached.model
            ).saved_bytes,
            0.10,
        ),
    ):
        which = "flops" if "FLOPs" in name else "memory"
        text = f"{name} are {real:.6g} on {model.name}, but {priced:.6g} were priced"
        require.that(abs(priced - real) <= tolerance * real, f"{text}; correct {which}()")
