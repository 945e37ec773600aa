"""Adapters that peft lacks, as peft tuners; importing this registers them with peft.

After `import autopeft.models.tuners`, `peft.PeftModel.from_pretrained` loads their folders.
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
