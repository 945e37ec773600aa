"""Whether a plan fits a model, and how many parameters it trains, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from autopeft import methods
from autopeft.costs.topology import Topology
from autopeft.errors import SpaceError
from autopeft.plan import MODEL, AdapterPlan, LayerSpec

_WHY_NOT: Mapping[str, str] = {
    "attn": " (its attention is not computed by a function from transformers' table)",
    MODEL: " (it is not a single stack of blocks over text embeddings)",
}
"""Role -> why a model whose block has attention may lack it."""


def is_legal(topology: Topology, spec: LayerSpec) -> bool:
    """Return whether the model has that site and the method can be placed there at that rank.

    Raises:
        SpaceError: if there is no such method.
    """
    return _misfit(topology, spec) is None


def check_plan(topology: Topology, plan: AdapterPlan) -> None:
    """Raise an error if a plan does not fit a model.

    Raises:
        SpaceError: about the first site that does not fit.
    """
    for spec in plan.specs:
        error = _misfit(topology, spec)
        if error is not None:
            raise error


def _misfit(topology: Topology, spec: LayerSpec) -> SpaceError | None:
    """Return the error for a site that does not fit a model, None if it does."""
    method = methods.get(spec.method)
    where = f"layer {spec.layer} ({spec.role})"
    if spec.layer >= topology.n_layers:
        return SpaceError(
            "layer",
            spec.layer,
            f"the model has {topology.n_layers} blocks",
            f"use 0 to {topology.n_layers - 1}",
        )
    if spec.role == MODEL and spec.layer:
        return SpaceError(
            "layer", spec.layer, "the model as a whole counts as layer 0", "use layer 0"
        )
    shape = topology.shape(spec.layer, spec.role)
    if shape is None:
        return SpaceError(
            "role",
            spec.role,
            f"block {spec.layer} of the model has no such role" + _WHY_NOT.get(spec.role, ""),
            f"use one of {', '.join(topology.roles(spec.layer))}",
        )
    if spec.role not in method.roles:
        return SpaceError(
            "role",
            spec.role,
            f"method {spec.method!r} cannot be placed at {where}",
            f"use one of {', '.join(method.roles)}",
        )
    if topology.is_quantized and not method.quantized_base:
        return SpaceError(
            "method",
            spec.method,
            f"cannot be placed at {where}: it needs weights that are not quantized",
            "use a method that works over quantized weights, or no quantization",
        )
    if not method.is_legal_rank(spec.rank, shape):
        return SpaceError(
            "rank",
            spec.rank,
            f"{method.rank_rule(shape)} for method {spec.method!r} at {where}, "
            f"whose module is {shape[0]} x {shape[1]}",
            "choose another rank",
        )
    return None


def count_trainable(topology: Topology, plan: AdapterPlan) -> int:
    """Return the number of trained parameters: the adapters' and the head's.

    Raises:
        SpaceError: if the plan does not fit the model.
    """
    total = topology.head_params
    for spec in plan.specs:
        shape = topology.shape(spec.layer, spec.role)
        if shape is None:
            check_plan(topology, plan)
        else:
            total += methods.get(spec.method).n_params(spec.rank, shape, spec.role)
    return total + count_shared(topology, plan)


def count_shared(topology: Topology, plan: AdapterPlan) -> int:
    """Return the parameters that sites share: once for each method, rank and pool in the plan."""
    groups = {
        (spec.method, spec.rank, methods.get(spec.method).pool(shape))
        for spec in plan.specs
        if methods.get(spec.method).shared_state
        and (shape := topology.shape(spec.layer, spec.role)) is not None
    }
    return sum(methods.get(name).shared_params(rank, pool) for name, rank, pool in groups)
