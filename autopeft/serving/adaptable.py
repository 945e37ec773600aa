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
transformers, which are adapted, unless it is of `WITHOUT_INTERFACE` or an encoder-decoder."""

VLLM_ENCODER_DECODERS = frozenset(
    """
    CohereAsrForConditionalGeneration NemotronParseForConditionalGeneration
    WhisperForConditionalGeneration
    """.split()
)
"""Encoder-decoders that vLLM 0.32.0 has a class for. Others run with the layers of transformers,
which it gives the text of a decoder alone (`models/transformers/base.py`): T5, BART and T5Gemma
end in an error when they are loaded."""

MLX_MODELS = frozenset(
    """
    afm7 afmoe apertus baichuan_m1 bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3
    bitnet cohere cohere2 dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v41
    deepseek_v41_text dots1 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1
    falcon_mamba gear gemma gemma2 gemma3 gemma3_text gemma3n gemma4 gemma4_text gemma4_unified
    glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_bigcode gpt_neox gpt_oss gptj granite
    granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense internlm2 internlm3 iquestcoder
    iquestloopcoder jamba joyai_llm_flash kimi_k2 kimi_k25 kimi_k3 kimi_linear kimi_vl Klear
    laguna lfm2 lfm2_moe llama llama4 llama4_text llava longcat_flash longcat_flash_ngram mamba
    mamba2 mellum mimo mimo_v2_flash minicpm minicpm3 minimax minimax_m2 minimax_m3_vl
    ministral3 mistral mistral3 mistral4 mixtral muse_glimmer muse_spark nanbeige nanochat
    nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openelm phi phi-msft phi3 phi3small
    phimoe phixtral pixtral plamo plamo2 plamo3 prism_hadamard_qwen35 qwen qwen2 qwen2_5_vl
    qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe
    recurrent_gemma rwkv7 seed_oss smollm3 solar_open spark2_5 stablelm starcoder2 step3p5
    talkie telechat3 xverse youtu_llm
    """.split()
)
"""Types of models that mlx-lm 0.32.2 has a module for (`mlx_lm/models`, `MODEL_REMAPPING` in
`mlx_lm/utils.py`). Its GPT-2 is left out: it does not find the weights by the names that
transformers gives them, which start with `transformer`."""

WITHOUT_INTERFACE = frozenset(
    """
    big_bird bros canine convbert cpmant cvt data2vec-vision deberta deberta-v2 dinat donut-swin
    flaubert fsmt funnel gpt_neo gpt_neox_japanese hiera ibert imagegpt layoutlmv2 led levit lilt
    longformer luke lxmert megatron-bert mpnet mra mvp nystromformer openai-gpt perceiver prophetnet
    pvt pvt_v2 reformer rembert roformer rwkv sew-d speecht5 squeezebert swiftformer swinv2 tapas
    timesformer trocr vilt visual_bert wavlm xglm xlm xlnet yoso
    """.split()
)
"""Types of models whose attention transformers 5.19 to 5.24 cannot replace: no class of theirs has
`is_backend_compatible()` or `_can_set_attn_implementation()`. Neither vLLM 0.32.0 nor SGLang
0.5.23, which ask for that, has a class of its own for them. A test compares them with
transformers."""

WITHOUT_BACKEND = WITHOUT_INTERFACE | frozenset(
    """
    bart bigbird_pegasus biogpt blenderbot blenderbot-small bloom data2vec-audio falcon fnet git
    hubert layoutlm longt5 m2m_100 marian markuplm mbart moonshine mt5 nllb-moe pegasus pegasus_x
    plbart pop2piano seamless_m4t seamless_m4t_v2 speech_to_text splinter switch_transformers t5
    udop umt5 unispeech unispeech-sat wav2vec2 wav2vec2-bert wav2vec2-conformer
    """.split()
)
"""Types of models that have no `is_backend_compatible()` there, which is all that SGLang 0.5.23
asks of those it has no class for (`sglang/srt/model_loader/utils.py`)."""

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
