"""Tokenizers made in memory: words, and nothing from a hub."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["good", "bad", "film", "the", "a", "was", "very", "not", "plot", "review", "sentiment"]
WORDS += ["positive", "negative", ":", ".", *(f"w{i}" for i in range(200))]


def word_tokenizer(
    special: list[str], single: str | None = None, pair: str | None = None, **options: object
) -> PreTrainedTokenizerFast:
    """One token a word; the first special token stands for unknown words."""
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if single is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(name, vocabulary[name]) for name in special]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=special[0], **options)


@pytest.fixture
def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """[CLS] text [SEP], like BERT's."""
    return word_tokenizer(
        ["[UNK]", "[PAD]", "[CLS]", "[SEP]"],
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    )


@pytest.fixture
def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """No padding token and nothing around a text, like GPT-2's."""
    return word_tokenizer(["<unk>", "<end>"], eos_token="<end>")


@pytest.fixture
def starting_tokenizer() -> PreTrainedTokenizerFast:
    """<s> before every text, like Llama's."""
    return word_tokenizer(
        ["<unk>", "<s>", "</s>"], "<s> $A", "<s> $A $B", bos_token="<s>", eos_token="</s>"
    )
