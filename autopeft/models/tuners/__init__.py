"""Adapters that peft lacks, as peft tuners of their own: importing this makes peft know them.

`import autopeft.models.tuners`, and `peft.PeftModel.from_pretrained` loads what they saved.
"""

from autopeft.models.tuners.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel
from autopeft.models.tuners.common import OwnLayer
from autopeft.models.tuners.prefix import GatedPrefixConfig, GatedPrefixLayer, GatedPrefixModel
from autopeft.models.tuners.prompt import PromptConfig, PromptLayer, PromptModel

__all__ = [
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "GatedPrefixConfig",
    "GatedPrefixLayer",
    "GatedPrefixModel",
    "OwnLayer",
    "PromptConfig",
    "PromptLayer",
    "PromptModel",
]
