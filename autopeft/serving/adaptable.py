"""Which models and modules a server can adapt, as its sources say."""

from __future__ import annotations

from collections.abc import Collection

VLLM_WITHOUT_LORA = frozenset(
    """
    AriaForConditionalGeneration BertForMaskedLM BertForSequenceClassification
    BertForTokenClassification BloomForCausalLM CLIPModel Cohere2MoeForCausalLM
    Cohere2VisionForConditionalGeneration CohereAsrForConditionalGeneration
    ColModernVBertForRetrieval DbrxForCausalLM DiffusionGemmaForBlockDiffusion
    EmbeddingGemma2Model FalconForCausalLM FalconMambaForCausalLM GPT2ForSequenceClassification
    GPT2LMHeadModel GPTJForCausalLM Gemma3TextModel Gemma3nForCausalLM
    Gemma3nForConditionalGeneration GteModel HrmTextForCausalLM
    LlavaOnevisionForConditionalGeneration Mamba2ForCausalLM MambaForCausalLM
    MiMoV2FlashForCausalLM ModernBertForSequenceClassification ModernBertForTokenClassification
    NomicBertModel OpenAIPrivacyFilterForTokenClassification
    PaddleOCRVLForConditionalGeneration Qwen2AudioForConditionalGeneration
    RobertaForTokenClassification SiglipModel StableLmForCausalLM XLMRobertaForTokenClassification
    Zamba2ForCausalLM
    """.split()
)
"""Architectures of transformers that vLLM 0.32.0 serves by a class that is no `SupportsLoRA`
(`vllm/model_executor/models/registry.py`). What it does not register runs with the layers of
transformers, which are adapted."""

SGLANG_MODULES = frozenset(
    """
    q_proj k_proj v_proj qkv_proj o_proj out_proj gate_proj up_proj gate_up_proj down_proj
    q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj fused_qkv_a_proj_with_mqa in_proj in_proj_qkvz
    wq_b wk weights_proj qkvr wo_ud fc1_latent_proj fc2_latent_proj
    embed_tokens vocab_emb embeddings word_embeddings lm_head output unembed_tokens
    """.split()
)
"""Names of modules that SGLang 0.5.23 has a shape of factors for, in some model
(`sglang/srt/lora/utils.py`: `_KNOWN_LORA_TARGET_MODULES`, and what is mapped to them)."""

_OTHER_ROLES = ("self_attn.out_proj",)
"""Ends of paths where a known name is another module: `out_proj` is one of state spaces."""


def unlike(paths: Collection[str], names: Collection[str]) -> list[str]:
    """Return the paths whose module has another name than one of `names`.

    Example:
        >>> unlike(["h.0.attn.c_attn", "layers.0.self_attn.q_proj"], SGLANG_MODULES)
        ['h.0.attn.c_attn']
    """
    return [
        path
        for path in paths
        if path.rpartition(".")[2] not in names or path.endswith(_OTHER_ROLES)
    ]
