"""Tones as sounds, and tiny models of sounds, made in memory."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers as hf
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from autopeft.utils.quiet import quiet_transformers

WAV2VEC2: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (5, 64),
    "conv_kernel": (10, 64),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
}
WHISPER: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 50,
    "max_target_positions": 40,
}


def whisper_extractor() -> Any:
    return hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)


def masked_extractor() -> Any:
    return hf.Wav2Vec2FeatureExtractor(return_attention_mask=True)


STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
MODELS: dict[str, Any] = {
    "wav2vec2": (lambda: hf.Wav2Vec2Config(**WAV2VEC2), hf.Wav2Vec2FeatureExtractor),
    "wav2vec2-masked": (lambda: hf.Wav2Vec2Config(**WAV2VEC2, **STABLE), masked_extractor),
    "hubert": (lambda: hf.HubertConfig(**WAV2VEC2), hf.Wav2Vec2FeatureExtractor),
    "whisper": (
        lambda: hf.WhisperConfig(**WHISPER, vocab_size=60, pad_token_id=0),
        whisper_extractor,
    ),
    "ast": (
        lambda: hf.ASTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_length=60,
            num_mel_bins=16,
        ),
        lambda: hf.ASTFeatureExtractor(num_mel_bins=16, max_length=60),
    ),
}


def save(name: str, folder: Path) -> Path:
    config, extractor = MODELS[name]
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.AutoModel.from_config(config()).save_pretrained(folder)
        extractor().save_pretrained(folder)
    return folder


def tone(i: int, rate: int = 16_000) -> NDArray[np.float32]:
    """High if i is odd, low if even; each of another length and with other noise."""
    times = np.arange(int(rate * (0.35 + 0.02 * (i % 7)))) / rate
    noise = np.random.default_rng(i).standard_normal(len(times))
    pitch = 880 if i % 2 else 220
    return (0.3 * np.sin(2 * np.pi * pitch * times) + 0.02 * noise).astype(np.float32)


def name_of(i: int) -> str:
    return "high" if i % 2 else "low"


def as_bytes(samples: NDArray[np.float32], rate: int = 16_000, kind: str = "WAV") -> bytes:
    buffer = BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


def as_array(i: int, rate: int = 16_000) -> dict[str, Any]:
    return {"array": tone(i, rate), "sampling_rate": rate}


def write_folder(folder: Path, n: int = 60) -> Path:
    """Write tones as WAV files into one folder for each label."""
    for i in range(n):
        (folder / name_of(i)).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name_of(i) / f"{i:02}.wav", tone(i), 16_000)
    return folder


def transcriber(folder: Path, **generation: Any) -> Path:
    """Save a tiny Whisper with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["endoftext", "startoftranscript", "en", "transcribe", "translate", "notimestamps"]
    special = [f"<|{name}|>" for name in names]
    vocabulary = {word: i for i, word in enumerate([*alphabet, *special])}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = hf.WhisperTokenizer(vocab=vocabulary, merges=[], extra_special_tokens=special)
        end, start = (vocabulary[name] for name in special[:2])
        config = hf.WhisperConfig(
            **WHISPER,
            vocab_size=len(tokenizer),
            pad_token_id=end,
            bos_token_id=end,
            eos_token_id=end,
            decoder_start_token_id=start,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
        model = hf.WhisperForConditionalGeneration(config)
        model.generation_config._from_model_config = False  # or loading forgets what is unknown
        for name, value in generation.items():
            setattr(model.generation_config, name, value)
        model.save_pretrained(folder)
        hf.WhisperProcessor(whisper_extractor(), tokenizer).save_pretrained(folder)
    return folder
