"""Tiny models built from their configurations, for the tests of `autopeft.models`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as hf

from autopeft import methods
from autopeft.costs import Topology, is_legal
from autopeft.models.backbone import Backbone
from autopeft.models.loading import prepare_config
from autopeft.plan import MODEL, AdapterPlan, LayerSpec
from autopeft.testing.tiny_models import (
    TinyModel,
    batch_for,
    candidate_of,
    changed,
    disturb,
    logits_of,
    plan_of,
    prompt_sizes_of,
    state_of,
)
from autopeft.utils.quiet import quiet_transformers

__all__ = [
    "batch_for",
    "candidate_of",
    "disturb",
    "logits_of",
    "plan_of",
    "prompt_sizes_of",
    "state_of",
]

torch.set_num_threads(1)

_BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_GQA = {"num_key_value_heads": 2, **_IDS}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
_SEQ2SEQ = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 0,
    **_IDS,
}


@dataclass(frozen=True)
class Kind:
    """How to build one kind of model."""

    config: Callable[[], Any]
    auto_class: str
    head: tuple[str, ...] = ()


_LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
"""Latent attention; the second block has experts."""

_CLS, _LM = "AutoModelForSequenceClassification", "AutoModelForCausalLM"

KINDS: dict[str, Kind] = {
    "bert": Kind(lambda: hf.BertConfig(**_BERT, num_labels=3), _CLS, ("classifier",)),
    "roberta": Kind(
        lambda: hf.RobertaConfig(**_BERT, **_IDS), _CLS, ("classifier.dense", "classifier.out_proj")
    ),
    "distilbert": Kind(
        lambda: hf.DistilBertConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        _CLS,
        ("classifier", "pre_classifier"),
    ),
    "deberta-v2": Kind(lambda: hf.DebertaV2Config(**_BERT), _CLS, ("classifier", "pooler.dense")),
    "albert": Kind(
        lambda: hf.AlbertConfig(**_BERT, embedding_size=16, **_IDS), _CLS, ("classifier",)
    ),
    "modernbert": Kind(
        lambda: hf.ModernBertConfig(**_BERT, **_IDS, cls_token_id=0, sep_token_id=1),
        _CLS,
        ("classifier", "head.dense"),
    ),
    "gpt2": Kind(
        lambda: hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_inner=48, **_IDS),
        _LM,
    ),
    "gpt_neox": Kind(lambda: hf.GPTNeoXConfig(**_BERT, **_IDS), _LM),
    "falcon": Kind(
        lambda: hf.FalconConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **_IDS
        ),
        _LM,
    ),
    "llama": Kind(lambda: hf.LlamaConfig(**_BERT, **_GQA), _LM),
    "llama-cls": Kind(lambda: hf.LlamaConfig(**_BERT, **_GQA), _CLS, ("score",)),
    "qwen3": Kind(lambda: hf.Qwen3Config(**_BERT, **_GQA, head_dim=8), _LM),
    "gemma3": Kind(lambda: hf.Gemma3TextConfig(**_BERT, **_GQA, head_dim=8), _LM),
    "mistral": Kind(lambda: hf.MistralConfig(**_BERT, **_GQA), _LM),
    "mixtral": Kind(lambda: hf.MixtralConfig(**_BERT, **_GQA, num_local_experts=2), _LM),
    # A hybrid: its first block has a state space instead of attention, its second one experts.
    "jamba": Kind(
        lambda: hf.JambaConfig(
            **{**_BERT, **_GQA},
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
            mamba_dt_rank=4,
        ),
        _LM,
    ),
    "phi3": Kind(lambda: hf.Phi3Config(**_BERT, **_GQA), _LM),
    "opt": Kind(
        lambda: hf.OPTConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            word_embed_proj_dim=32,
            **_IDS,
        ),
        _LM,
    ),
    "t5": Kind(
        lambda: hf.T5Config(
            vocab_size=60,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        "AutoModelForSeq2SeqLM",
    ),
    "bart": Kind(lambda: hf.BartConfig(**_SEQ2SEQ), "AutoModelForSeq2SeqLM"),
    "whisper": Kind(
        lambda: hf.WhisperConfig(**_SEQ2SEQ, max_source_positions=20), "AutoModelForSpeechSeq2Seq"
    ),
    "vit": Kind(
        lambda: hf.ViTConfig(**_VISION), "AutoModelForImageClassification", ("classifier",)
    ),
}

FURTHER_KINDS: dict[str, Kind] = {
    "qwen3_moe": Kind(
        lambda: hf.Qwen3MoeConfig(
            **_BERT, **_GQA, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2
        ),
        _LM,
    ),
    "gpt_oss": Kind(
        lambda: hf.GptOssConfig(
            **_BERT, **_GQA, num_local_experts=4, num_experts_per_tok=2, head_dim=8
        ),
        _LM,
    ),
    "deepseek_v3": Kind(
        lambda: hf.DeepseekV3Config(
            **{**_BERT, "num_key_value_heads": 4}, **_LATENT, q_lora_rank=8, n_group=1, topk_group=1
        ),
        _LM,
    ),
    # Queries are not compressed.
    "deepseek_v2": Kind(
        lambda: hf.DeepseekV2Config(
            **{**_BERT, "num_key_value_heads": 4}, **_LATENT, q_lora_rank=None
        ),
        _LM,
    ),
    "falcon-40b": Kind(
        lambda: hf.FalconConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            **_IDS,
        ),
        _LM,
    ),
    "mpt": Kind(
        lambda: hf.MptConfig(vocab_size=60, d_model=32, n_heads=4, n_layers=2, **_IDS), _LM
    ),
    "bloom": Kind(
        lambda: hf.BloomConfig(vocab_size=60, hidden_size=32, n_head=4, n_layer=2, **_IDS), _LM
    ),
}
"""Kinds for `test_topologies.py`, which are not in every test that goes through `KINDS`."""


def build(name: str, *, device: str = "cpu", seed: int = 0) -> Backbone:
    """A tiny backbone with random weights."""
    kind = KINDS.get(name) or FURTHER_KINDS[name]
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        config = kind.config()
        before = prepare_config(config)
        model = getattr(hf, kind.auto_class).from_config(config).eval()
    return Backbone(model, head=kind.head, auto_class=kind.auto_class, config_before=before)


def _build_on(name: str, device: str) -> Backbone:
    return build(name, device=device)


TINY_MODELS = {name: TinyModel(name, partial(_build_on, name)) for name in KINDS | FURTHER_KINDS}
"""For `autopeft.testing`."""


def save(name: str, folder: Any, *, with_head: bool = False) -> str:
    """Writes a tiny pretrained model, without its task's head unless told so."""
    kind = KINDS[name]
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        loader = getattr(hf, kind.auto_class) if with_head else hf.AutoModel
        loader.from_config(kind.config()).save_pretrained(folder)
    return str(folder)


def all_specs(topology: Topology, ranks: tuple[int, ...] = (1, 2, 4, 8)) -> list[LayerSpec]:
    """Every legal adapter of every method at every site."""
    return [
        spec
        for layer in range(topology.n_layers)
        for role in topology.roles(layer)
        for method in methods.all_methods()
        for rank in (ranks if method.takes_rank else (0,))
        if is_legal(topology, spec := LayerSpec(layer, role, method.name, rank))
    ]


def random_plan(topology: Topology, seed: int, share: float | None = None) -> AdapterPlan:
    """A random mixed plan; methods are drawn before ranks, so that none is rare."""
    rng = random.Random(seed)
    share = share if share is not None else rng.choice((0.1, 0.3, 0.7))
    sites: dict[tuple[int, str], dict[str, list[LayerSpec]]] = {}
    # The model as a whole last: blocks' sites are drawn alike with it and without.
    for spec in sorted(all_specs(topology), key=lambda spec: spec.role == MODEL):
        sites.setdefault((spec.layer, spec.role), {}).setdefault(spec.method, []).append(spec)
    chosen = [
        rng.choice(by_method[rng.choice(sorted(by_method))])
        for by_method in sites.values()
        if rng.random() < share
    ]
    return AdapterPlan(chosen)


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Fails unless two states are equal, bit for bit."""
    assert changed(before, after) is None
