"""Byte-level tokenizers with chat templates, and tiny decoders that have them, made in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ENDS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|head|>", "<|eot|>"]
ENDS += ["<turn>", "<end_turn>", "[INST]", "[/INST]", "<think>", "</think>"]
TEXT = "user assistant system model what color is the sky and the sun ? it is blue in the sky ."

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(
    template: str | None,
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    starts: bool = False,
    also: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a template; `starts`: it puts `bos` before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[*ENDS, *also],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if starts and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>"
    )
    found.chat_template = template
    return found


def chat_model(
    folder: Path, kind: str = "llama", *, template: str | None = CHATML, **options: Any
) -> Path:
    """A tiny decoder of random weights with `chat_tokenizer(template, **options)`, as a folder."""
    tokenizer = chat_tokenizer(template, **({"eos": "<|im_end|>"} | options))
    tokenizer.save_pretrained(folder)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder_of(kind, len(tokenizer), ids).save_pretrained(folder)
    return folder


def decoder_of(kind: str, n_tokens: int, ids: dict[str, Any]) -> Any:
    """A tiny Llama, or a GPT-2, which has absolute positions."""
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=n_tokens,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=256,
                initializer_range=0.2,
                **ids,
            )
        ).eval()
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=n_tokens,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.1,  # So that tokens differ in their likelihood.
            **ids,
        )
    ).eval()
