"""Fixtures: tiny models and data made in memory."""

from training_samples import (  # noqa: F401
    _one_thread,
    bert_with_lora,
    causal_data,
    classification_data,
    llama_with_lora,
    plain_bert,
)
