"""What all rooms' tests share: a tiny trained-from-nothing model folder and a small data file."""

from __future__ import annotations

import atexit
import csv
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from autopeft.methods.registry import METHODS
from autopeft.utils.hardware import n_cores

# Before torch is imported, here and in the workers that tests start: one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# trackio reads its folder when it is imported, whoever does that first: not the user's.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")
atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)

# No deadline: test machines are shared, so an example's duration says nothing about the code.
# CI draws the same examples every time, so that a failure comes from the change.
settings.register_profile("autopeft", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("autopeft")

GOOD = ("good", "fine", "great", "lovely", "warm")
BAD = ("bad", "poor", "awful", "cold", "dull")
PLAIN = ("the", "film", "was", "a", "plot", "and", "scene", "actor", "very", "so")


@pytest.fixture
def hangup_heeded() -> Iterator[None]:
    """SIGHUP as a terminal sends it, also where the tests run under nohup, which searches heed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def pytest_xdist_auto_num_workers() -> int:
    """Processes of `pytest -n auto`: each of them holds torch, so four at most."""
    return min(4, n_cores())


_TINY: dict[str, int] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
"""Sizes of the tiny models."""

_LEFT_OUT = ("nightly", "benchmark")
"""Markers whose tests run only when -m names the marker."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = str(config.option.markexpr)
    markers = [marker for marker in _LEFT_OUT if marker not in wanted]
    left_out = [item for item in items if any(map(item.get_closest_marker, markers))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # The longest first.


@pytest.fixture(autouse=True)
def nothing_given_is_left() -> Iterator[None]:
    """Forget a test's methods, and its `evaluate` and `backend`.

    Another test would find the former in its widest space, and could not send the latter to a
    worker.
    """
    before = set(METHODS._items)
    yield
    for name in METHODS._items.keys() - before:
        del METHODS._items[name]
    for module, registry in (("evaluate", "EVALUATORS"), ("backend", "BACKENDS")):
        if (home := sys.modules.get(f"autopeft.engine.{module}")) is not None:
            given = getattr(home, registry)
            for name in given._given | ({*given._items} if module == "evaluate" else set()):
                given._items.pop(name, None)
            given._given.clear()


_PRICES: dict[object, Any] = {}
"""Price tables that searches of this process have measured."""


@pytest.fixture(autouse=True)
def a_model_is_priced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of searches of the same tiny model need its price table; measuring takes a second.

    The tests of `autopeft.profiling` measure their own.
    """
    pricing: Any = sys.modules.get("autopeft.preparing.pricing")
    if pricing is None:
        return
    measured, measure = pricing.price_table, sys.modules["autopeft.profiling.measure"]

    def once(meta: Any, **given: Any) -> Any:
        config = meta.model.config
        key = (
            measure.is_here(given["device"]),  # Some tests pretend a device.
            *(str(meta.model), config.to_json_string(), config._attn_implementation),
            *(repr(meta.layout), meta.head, meta.quantization, repr(sorted(given.items()))),
        )
        if key not in _PRICES:
            _PRICES[key] = measured(meta, **given)
        return _PRICES[key]

    monkeypatch.setattr(pricing, "price_table", once)


@pytest.fixture(scope="session", autouse=True)
def sqlite_does_not_wait_for_the_disk() -> None:
    """Some 200 commits a search wait 10 ms each; without it a killed process loses nothing either.

    Only a machine that loses its power would, and no test takes that away.
    """
    from sqlalchemy import Engine, event

    @event.listens_for(Engine, "connect")
    def at_once(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(scope="session")
def fresh_python() -> Callable[[str], str]:
    """What a Python that has imported nothing yet prints when it runs some code."""

    def printed(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
        )
        return done.stdout.strip()

    return printed


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two small blocks with a word-level tokenizer, as a model folder."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    config = BertConfig(vocab_size=len(words), **_TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A Llama of two small blocks with the tiny tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=len(tokenizer), **_TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 short sentences whose label shows in one of their words; three have no text."""
    path = tmp_path_factory.mktemp("data") / "sentences.csv"
    chooser = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(400):
            is_good = number % 2 == 0
            words = [chooser.choice(PLAIN) for _ in range(chooser.randint(3, 8))]
            words.insert(chooser.randrange(len(words)), chooser.choice(GOOD if is_good else BAD))
            words.append(str(number))  # no two rows are the same text
            writer.writerow([" ".join(words), "good" if is_good else "bad"])
        for _ in range(3):
            writer.writerow(["", "good"])
    return path
