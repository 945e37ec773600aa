"""What the nodes of a Ray cluster have, as they join and leave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import ray

from autopeft.engine.devices import per_device

_TYPE = "accelerator_type:"
"""How Ray names a resource that says which accelerators a node has."""

Node = Mapping[str, float]
"""Resources of one node, by Ray's name."""


def alive() -> tuple[Node, ...]:
    """Return the resources of each node that is there now."""
    return tuple(node["Resources"] for node in ray.nodes() if node["Alive"])


def gpus_of(nodes: Iterable[Node]) -> tuple[int, ...]:
    """Return how many GPUs each node has that has any."""
    return tuple(int(node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1)


def accelerator_types(nodes: Iterable[Node]) -> tuple[str, ...]:
    """Return the resources that stand for types of accelerators, sorted."""
    found = {name for node in nodes for name in node if name.startswith(_TYPE)}
    return tuple(sorted(found))


def n_workers(nodes: Iterable[Node], share: float) -> int:
    """Return how many workers have room, with a core and a share of GPUs of one node each.

    Example:
        >>> from autopeft.engine.ray_nodes import n_workers
        >>> nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 4.0}, {"CPU": 16.0}]
        >>> n_workers(nodes, 0.5), n_workers(nodes, 2), n_workers(nodes, 0)
        (5, 2, 25)
    """
    return sum(min(int(node.get("CPU", 0)), _by_gpus(node, share)) for node in nodes)


def _by_gpus(node: Node, share: float) -> int:
    if not share:
        return int(node.get("CPU", 0))
    count = int(node.get("GPU", 0))
    return math.floor(count / share) if share >= 1.0 else count * per_device(share)
