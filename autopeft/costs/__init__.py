"""What a candidate costs before training: plain numbers, no torch.

`autopeft.profiling.measure` measures a `PriceTable` once per model. A table can also be made from
shapes alone (`autopeft.costs.analytic`), to drive a search where there is no model at all.
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
