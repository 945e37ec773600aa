"""What a candidate costs, known before training: plain numbers, no torch.

`autopeft.profiling.measure` measures a `PriceTable` once per model. `PriceTable.from_topology`
computes one from shapes alone, for a search without a model at hand.
"""

from autopeft.costs.plan_rules import check_plan, count_trainable, is_legal
from autopeft.costs.price import Price
from autopeft.costs.table import PriceTable
from autopeft.costs.topology import Shape, Topology
from autopeft.costs.usage import BlockCosts, Usage

__all__ = [
    "BlockCosts",
    "Price",
    "PriceTable",
    "Shape",
    "Topology",
    "Usage",
    "check_plan",
    "count_trainable",
    "is_legal",
]
