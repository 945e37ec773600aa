"""What a candidate costs before training: plain numbers, no torch.

`autopeft.models.price` measures a `PriceTable` once per model; `search` prices with it. A table can
also be made from shapes alone, so that a search can be driven where there is no model at all.
"""

from autopeft.pricing.rules import check_plan, count_trainable, is_legal
from autopeft.pricing.table import BlockPrice, PriceTable, Usage
from autopeft.pricing.values import Price, Shape, Topology

__all__ = [
    "BlockPrice",
    "Price",
    "PriceTable",
    "Shape",
    "Topology",
    "Usage",
    "check_plan",
    "count_trainable",
    "is_legal",
]
