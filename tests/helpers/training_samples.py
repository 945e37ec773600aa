"""Tiny models and data made in memory: a task that LoRA learns in a few dozen steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from autopeft.tasks.data import IGNORED, EncodedSplit, SplitName, TaskData

VOCABULARY = 40
GOOD, BAD, END = 5, 6, 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Group:
    method: str
    learning_rate: float
    parameters: tuple[torch.nn.Parameter, ...]


@dataclass(frozen=True)
class Attached:
    """The smallest thing that a training takes."""

    model: Any
    learning_rate: float = 1e-2

    def parameter_groups(self) -> tuple[Group, ...]:
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        lora = tuple(p for n, p in named if "lora_" in n)
        head = tuple(p for n, p in named if "lora_" not in n)
        return (Group("lora", self.learning_rate, lora), Group("head", self.learning_rate, head))

    def penalty(self) -> None:
        return None

    def after_update(self, step: int) -> None:
        pass


def split_of(
    rows: list[list[int]], *, labels: list[int] | None = None, prompts: list[int] | None = None
) -> EncodedSplit:
    """Rows with a label each, or with prompts of these lengths and completions to learn."""
    learned = [row[: max(1, n)] for row, n in zip(rows, prompts or [], strict=bool(prompts))]
    flat = [
        [*[IGNORED] * len(given), *row[len(given) :]]
        for given, row in zip(learned, rows, strict=bool(prompts))
    ]
    return EncodedSplit(
        tokens=np.concatenate(rows).astype(np.int32),
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        source_rows=np.arange(len(rows), dtype=np.int64),
        source="memory",
        token_arrays={"labels": np.concatenate(flat).astype(np.int32)} if flat else {},
        row_arrays={} if labels is None else {"labels": np.asarray(labels, dtype=np.int64)},
    )


def _rows(n: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Random words with GOOD or BAD among them."""
    generator = np.random.default_rng(seed)
    labels = [i % 2 for i in range(n)]
    rows = []
    for label in labels:
        row = generator.integers(7, VOCABULARY, size=int(generator.integers(3, 14)))
        row[generator.integers(len(row))] = GOOD if label else BAD
        rows.append(row.tolist())
    return rows, labels


@pytest.fixture
def classification_data() -> TaskData:
    sizes: dict[SplitName, int] = {"train": 160, "validation": 60, "test": 40}
    splits: dict[SplitName, EncodedSplit] = {}
    for seed, (name, size) in enumerate(sizes.items()):
        rows, labels = _rows(size, seed)
        splits[name] = split_of(rows, labels=labels)
    return TaskData("text-classification", splits, ("bad", "good"), pad_id=0)


@pytest.fixture
def causal_data() -> TaskData:
    """Prompts of random words; the completion repeats GOOD or BAD, then ends."""
    splits: dict[SplitName, EncodedSplit] = {}
    for seed, name in enumerate(("train", "validation", "test")):
        rows, labels = _rows(60, seed)
        ends = [[GOOD if label else BAD, END] for label in labels]
        splits[name] = split_of(
            [row + end for row, end in zip(rows, ends, strict=True)],
            prompts=[len(row) for row in rows],
        )
    return TaskData("sft", splits, (), pad_id=0)


def tiny_bert(layers: int = 3, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=2,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config)


def tiny_llama(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def with_lora(
    model: Any, targets: list[str], layers: list[int] | None = None, dropout: float = 0.0
) -> Any:
    """The model with LoRA in it, and its classifier trained where it has one."""
    torch.manual_seed(1)
    model.requires_grad_(False)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, layers_to_transform=layers
    )
    inject_adapter_in_model(config, model)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    return model


@pytest.fixture
def bert_with_lora() -> Callable[..., Attached]:
    def build(
        layers: list[int] | None = None,
        dropout: float = 0.0,
        learning_rate: float = 1e-2,
        depth: int = 3,
    ) -> Attached:
        model = with_lora(tiny_bert(depth), ["query", "value"], layers, dropout)
        return Attached(model, learning_rate)

    return build


@pytest.fixture
def llama_with_lora() -> Callable[..., Attached]:
    def build(layers: list[int] | None = None, depth: int = 2) -> Attached:
        return Attached(with_lora(tiny_llama(depth), ["q_proj", "v_proj"], layers))

    return build


@pytest.fixture
def plain_bert() -> Callable[..., BertForSequenceClassification]:
    return tiny_bert
