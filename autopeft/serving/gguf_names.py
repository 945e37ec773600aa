"""The types of models whose LoRAs can be named in GGUF, and how llama.cpp treats their modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's `convert_hf_to_gguf.py` treats the linear modules of a type of model.

    Attributes:
        name: Its name in GGUF.
        permutes: Whether the rows of queries and keys are reordered, for rotary embeddings that
            rotate neighboring dimensions instead of the two halves of a head.
        prefix: Start of the modules' names that GGUF leaves out.
    """

    name: str
    permutes: bool = False
    prefix: str = ""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", permutes=True),
    "mistral": Architecture("llama", permutes=True),
    "granite": Architecture("granite", permutes=True),
    "smollm3": Architecture("smollm3", permutes=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "phi3": Architecture("phi3"),
    "olmo2": Architecture("olmo2"),
    "starcoder2": Architecture("starcoder2"),
    "gpt2": Architecture("gpt2"),
    "bert": Architecture("bert", prefix="bert."),
}
"""Type of model in transformers -> architecture; those whose modules llama.cpp neither joins nor
splits (read in its `conversion/`)."""
