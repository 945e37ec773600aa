from __future__ import annotations

import errno
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretended_device import pretended

from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.tasks.batch import Batch, collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.tasks.text_classification import TextClassification
from autopeft.training import activation_cache
from autopeft.training.acceleration import NO_ACCELERATION
from autopeft.training.activation_cache import ActivationCache, ActivationStore, room_on_disk
from autopeft.training.precision import Precision, autocast
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer

Build = Callable[..., Any]


def bert_cache(model: Any, data: TaskData, **options: Any) -> ActivationCache:
    paths = [f"bert.encoder.layer.{i}" for i in range(len(model.bert.encoder.layer))]
    return ActivationCache(model, paths, data, **options)


def train(
    attached: Any, task: Any, data: TaskData, cache: Any, precision: Precision = "fp32"
) -> Any:
    training = Trainer(
        attached,
        TrainingSetup(task, data, precision=precision, cache=cache),
        TrainSettings(1e-2, steps=30),
        seed=0,
    )
    return training, [training.advance(step) for step in (5, 30)]


def calls_of(model: Any, layer: int) -> list[int]:
    """Counts the tokens that a block's attention really computes."""
    seen: list[int] = []
    attention = model.bert.encoder.layer[layer].attention
    attention.register_forward_hook(lambda _m, _i, out: seen.append(out[0].shape[:2].numel()))
    return seen


@pytest.mark.parametrize("layers", [[1, 2], [2]])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_learns_the_same(
    classification_data: TaskData, bert_with_lora: Build, layers: list[int], dropout: float
) -> None:
    task = TextClassification(classification_data.labels, 0)
    plain = bert_with_lora(layers, dropout)
    _, expected = train(plain, task, classification_data, NO_ACCELERATION)
    cached = bert_with_lora(layers, dropout)
    cache = bert_cache(cached.model, classification_data)
    training, found = train(cached, task, classification_data, cache.below(layers[0]))
    for one, other in zip(expected, found, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=5e-3)
    assert not cache.is_off
    assert training.cache_seconds > 0
    assert all("forward" not in vars(block) for block in cache.blocks())


def test_a_decoder_learns_the_same(causal_data: TaskData, llama_with_lora: Build) -> None:
    _, expected = train(
        llama_with_lora([2], depth=3), SupervisedFineTuning(), causal_data, NO_ACCELERATION
    )
    cached = llama_with_lora([2], depth=3)
    paths = [f"model.layers.{i}" for i in range(3)]
    cache = ActivationCache(cached.model, paths, causal_data)
    _, found = train(cached, SupervisedFineTuning(), causal_data, cache.below(2))
    assert found[-1].loss == pytest.approx(expected[-1].loss, rel=5e-3)
    assert not cache.is_off


def test_bf16_stays_close(classification_data: TaskData, bert_with_lora: Build) -> None:
    task = TextClassification(classification_data.labels, 0)
    _, expected = train(bert_with_lora([2]), task, classification_data, NO_ACCELERATION, "bf16")
    cached = bert_with_lora([2])
    cache = bert_cache(cached.model, classification_data, precision="bf16")
    _, found = train(cached, task, classification_data, cache.below(2), "bf16")
    assert found[-1].loss == pytest.approx(expected[-1].loss, rel=0.05)


def test_each_row_is_computed_once_for_all_trials(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    task = TextClassification(classification_data.labels, 0)
    attached = bert_with_lora([2])
    cache = bert_cache(attached.model, classification_data)
    train(attached, task, classification_data, cache.below(2))
    computed = calls_of(attached.model, 0)
    training, _ = train(attached, task, classification_data, cache.below(2))
    assert computed == []
    assert training.cache_seconds == 0


def test_a_head_alone_skips_every_block(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    task = TextClassification(classification_data.labels, 0)

    def head_only() -> Any:
        attached = bert_with_lora()
        attached.model.requires_grad_(False)
        attached.model.classifier.requires_grad_(True)
        return attached

    _, expected = train(head_only(), task, classification_data, NO_ACCELERATION)
    attached = head_only()
    cache = bert_cache(attached.model, classification_data)
    _, found = train(attached, task, classification_data, cache.below(None))
    assert found[-1].loss == pytest.approx(expected[-1].loss, rel=1e-4)
    top = calls_of(attached.model, 2)
    train(attached, task, classification_data, cache.below(None))
    assert top == []


def test_a_higher_cut_is_filled_from_a_lower_one(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    attached = bert_with_lora([2])
    attached.model.eval()
    cache = bert_cache(attached.model, classification_data)
    batch = collate(classification_data, "train", np.arange(8))
    with cache.below(1).serving(batch):
        pass
    plain = attached.model(**batch.model_inputs()).logits
    first, second = calls_of(attached.model, 0), calls_of(attached.model, 1)
    other = cache.below(2)
    with other.serving(batch):
        served = attached.model(**batch.model_inputs()).logits
    torch.testing.assert_close(served, plain, rtol=1e-4, atol=1e-5)
    # Block 0 ran to learn the outputs' form and for the check, never to fill; block 1 also filled.
    assert sum(second) > sum(first)


def test_cuts_start_nowhere(classification_data: TaskData, bert_with_lora: Build) -> None:
    cache = bert_cache(bert_with_lora().model, classification_data)
    assert cache.below(0) is NO_ACCELERATION


def test_a_model_whose_lower_blocks_vary_turns_it_off(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    task = TextClassification(classification_data.labels, 0)
    attached = bert_with_lora([2])
    block = attached.model.bert.encoder.layer[0]
    # Lower layers that do not depend on the row alone, like a router that looks at the batch.
    block.register_forward_hook(
        lambda _m, _i, out: (out[0] if isinstance(out, tuple) else out) + torch.randn(())
    )
    cache = bert_cache(attached.model, classification_data)
    with pytest.warns(
        UserWarning,
        match="activation cache of BertForSequenceClassification is off: results differ",
    ):
        _, reports = train(attached, task, classification_data, cache.below(2))
    assert cache.is_off
    assert reports[-1].step == 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert cache.below(2) is NO_ACCELERATION


def test_blocks_of_two_lists_are_not_skipped(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    model = bert_with_lora().model
    cache = ActivationCache(model, ["encoder.block.0", "decoder.block.0"], classification_data)
    assert cache.below(1) is NO_ACCELERATION


def test_the_size_limit_holds(classification_data: TaskData, bert_with_lora: Build) -> None:
    task = TextClassification(classification_data.labels, 0)
    attached = bert_with_lora([2])
    attached.model.eval()
    one_split = len(classification_data.train.tokens) * 32 * 4
    cache = bert_cache(attached.model, classification_data, max_bytes=int(1.2 * one_split))
    batch = collate(classification_data, "train", np.arange(4))
    for cut in (1, 2, 1):
        with cache.below(cut).serving(batch):
            pass
        assert list(cache._stores) == [(cut, "fp32", "train")]
    none = bert_cache(attached.model, classification_data, max_bytes=10)
    with pytest.warns(UserWarning, match=r"is off: activation_cache_gb is 9.3e-09, too little"):
        _, found = train(attached, task, classification_data, none.below(2))
    assert found[-1].step == 30
    assert not none._stores


def _fill(cache: ActivationCache, cut: int, batch: Batch) -> torch.Tensor:
    with torch.no_grad(), cache.below(cut).serving(batch):
        logits: torch.Tensor = cache.model(**batch.model_inputs()).logits
    return logits


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*.states"))


def test_the_size_limit_holds_on_disk_for_all_workers(
    tmp_path: Path,
    classification_data: TaskData,
    bert_with_lora: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = collate(classification_data, "train", np.arange(16))
    size = ActivationStore.size_of(classification_data.train, 32, torch.float32)
    monkeypatch.setattr(activation_cache, "IN_USE_SECONDS", 0.0)
    workers = [
        bert_cache(
            bert_with_lora([2]).model.eval(),
            classification_data,
            max_bytes=int(1.5 * size),
            folder=tmp_path,
        )
        for _ in range(2)
    ]
    expected = _fill(workers[0], 2, batch)
    for worker, cut in ((0, 1), (1, 2), (0, 1), (1, 1), (0, 2)):
        torch.testing.assert_close(_fill(workers[worker], cut, batch), expected)
        assert size <= _bytes_in(tmp_path) <= 1.5 * size
    assert not any(worker.is_off for worker in workers)
    # What another worker has just used stays; the others compute everything.
    monkeypatch.setattr(activation_cache, "IN_USE_SECONDS", 60.0)
    left = sorted(tmp_path.glob("*.states"))
    with pytest.warns(UserWarning, match="too little"):
        torch.testing.assert_close(_fill(workers[0], 1, batch), expected)
    assert sorted(tmp_path.glob("*.states")) == left


def test_workers_of_unlike_precision_or_model_do_not_read_each_other(
    tmp_path: Path, classification_data: TaskData, bert_with_lora: Build
) -> None:
    batch = collate(classification_data, "train", np.arange(16))
    model = bert_with_lora([2]).model.eval()
    seen: set[Path] = set()
    for way, identity in (("fp32", ""), ("bf16", ""), ("fp32", "another model")):
        precision: Precision = way  # type: ignore[assignment]
        cache = bert_cache(
            model, classification_data, precision=precision, folder=tmp_path, identity=identity
        )
        with autocast(precision, "cpu"):
            expected = model(**batch.model_inputs()).logits
            found = _fill(cache, 2, batch)
        tolerance = 1e-4 if precision == "fp32" else 0.05
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        files = set(tmp_path.glob("*.states"))
        assert len(files - seen) == 1
        seen |= files


@pytest.mark.parametrize("has_memory", [True, False])
def test_a_full_disk_is_no_dead_worker(
    has_memory: bool,
    tmp_path: Path,
    classification_data: TaskData,
    bert_with_lora: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    batch = collate(classification_data, "train", np.arange(16))
    model = bert_with_lora([2]).model.eval()
    share = 0.25 if has_memory else 0.0
    cache = bert_cache(model, classification_data, folder=tmp_path, memory_share=share)
    told = nullcontext() if has_memory else pytest.warns(UserWarning, match="is off: No space left")
    with told:
        found = _fill(cache, 2, batch)
    torch.testing.assert_close(found, model(**batch.model_inputs()).logits)
    assert not list(tmp_path.glob("*.states*"))
    assert f"is {'in memory' if has_memory else 'off'}: " in cache.problem
    held = [store for store in cache._stores.values() if store.is_on("cpu")]
    assert len(held) == has_memory


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(
    tiny_disk: Path, classification_data: TaskData, bert_with_lora: Build
) -> None:
    size = ActivationStore.size_of(classification_data.train, 32, torch.float32)
    assert size > 64 * 2**10
    batch = collate(classification_data, "train", np.arange(16))
    model = bert_with_lora([2]).model.eval()
    cache = bert_cache(model, classification_data, folder=tiny_disk / "cache", memory_share=0.0)
    with pytest.warns(UserWarning, match="is off: No space left on device"):
        found = _fill(cache, 2, batch)
    torch.testing.assert_close(found, model(**batch.model_inputs()).logits)
    assert room_on_disk(tiny_disk) > 50 * 2**10, "an attempt leaves nothing behind"


def test_a_file_that_was_not_made_to_its_end_is_not_mapped(
    tmp_path: Path, classification_data: TaskData, bert_with_lora: Build
) -> None:
    """Its maker may have been killed; writing beyond its end would kill this process."""
    batch = collate(classification_data, "train", np.arange(16))
    model = bert_with_lora([2]).model.eval()
    expected = _fill(bert_cache(model, classification_data, folder=tmp_path), 2, batch)
    (path,) = tmp_path.glob("*.states")
    os.truncate(path, 4096)
    cache = bert_cache(model, classification_data, folder=tmp_path)
    with pytest.warns(UserWarning, match="has 4096 bytes, not"):
        torch.testing.assert_close(_fill(cache, 2, batch), expected)


@pytest.mark.parametrize("is_roomy", [True, False])
def test_states_are_on_the_accelerator_where_they_fit(
    tmp_path: Path,
    classification_data: TaskData,
    bert_with_lora: Build,
    monkeypatch: pytest.MonkeyPatch,
    is_roomy: bool,
) -> None:
    batch = collate(classification_data, "train", np.arange(16))
    model = bert_with_lora([2]).model.eval()
    expected = model(**batch.model_inputs()).logits.detach()
    with pretended() as world:
        if not is_roomy:
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device=None: (1000, 1 << 30))
        model.to("cuda")
        there = collate(classification_data, "train", np.arange(16), "cuda")
        cache = bert_cache(model, classification_data, device="cuda", folder=tmp_path)
        _fill(cache, 2, there)
        world.clear()
        found = _fill(cache, 2, there).cpu()
        assert not [key for key in world.waits if "activation_cache" in key[1]]
        torch.testing.assert_close(found, expected)
        assert bool(list(tmp_path.glob("*.states"))) is not is_roomy
        cache.leave_device()
        torch.testing.assert_close(_fill(cache, 2, there).cpu(), expected)
    assert list(tmp_path.glob("*.states"))


def test_states_take_only_what_a_training_leaves_of_the_accelerator(
    tmp_path: Path, classification_data: TaskData, bert_with_lora: Build
) -> None:
    model = bert_with_lora([2]).model.eval()
    size = ActivationStore.size_of(classification_data.train, 32, torch.float32)

    def n_files() -> int:
        return len(list(tmp_path.glob("*.states")))

    with pretended():
        model.to("cuda")
        there = collate(classification_data, "train", np.arange(16), "cuda")
        cache = bert_cache(model, classification_data, device="cuda", folder=tmp_path)
        for left, expected in ((size, 0), (size - 1, 1)):
            cache.limit_on_device(left)
            _fill(cache, 2, there)
            assert n_files() == expected
        cache.limit_on_device(2 * size)
        _fill(cache, 1, there)
        assert n_files() == 1
        # What the next training needs is given back at once.
        cache.limit_on_device(0)
        _fill(cache, 1, there)
    assert n_files() == 2


def test_rows_scored_in_fp32_have_states_of_their_own(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    task = TextClassification(classification_data.labels, 0)
    attached = bert_with_lora([2])
    cache = bert_cache(attached.model, classification_data, precision="bf16")
    setup = TrainingSetup(task, classification_data, precision="bf16", cache=cache.below(2))
    train_settings = TrainSettings(1e-2, steps=3)
    plain = Trainer(attached, setup, train_settings, seed=0)
    plain.train_to(3)
    expected = plain.evaluate("test", precision="fp32")
    setup = replace(setup, fp32_cache=cache.below(2, "fp32"))
    training = Trainer(attached, setup, train_settings, seed=0)
    training.evaluate("test")  # Its states in bf16 must not be taken for those in fp32.
    assert training.evaluate("test", precision="fp32").loss == pytest.approx(
        expected.loss, rel=1e-5
    )
    computed = calls_of(attached.model, 0)
    assert training.evaluate("test", precision="fp32").loss == pytest.approx(
        expected.loss, rel=1e-5
    )
    assert not computed


def test_workers_share_a_folder(
    tmp_path: Path, classification_data: TaskData, bert_with_lora: Build
) -> None:
    batch = collate(classification_data, "train", np.arange(16))
    first = bert_with_lora([2]).model.eval()
    with bert_cache(first, classification_data, folder=tmp_path).below(2).serving(batch):
        expected = first(**batch.model_inputs()).logits
    second = bert_with_lora([2]).model.eval()
    cache = bert_cache(second, classification_data, folder=tmp_path)
    below = cache.below(2)
    with below.serving(batch):
        found = second(**batch.model_inputs()).logits
    assert below.setup_seconds == 0
    torch.testing.assert_close(found, expected)


def test_evaluation_may_fill_what_training_uses(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    task = TextClassification(classification_data.labels, 0)
    attached = bert_with_lora([2])
    cache = bert_cache(attached.model, classification_data)
    training = Trainer(
        attached,
        TrainingSetup(task, classification_data, cache=cache.below(2)),
        TrainSettings(1e-2, steps=10),
        seed=0,
    )
    training.evaluate("train")  # under inference mode
    filled = training.cache_seconds
    assert filled > 0
    training.train_to(10)
    assert training.cache_seconds == filled


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("role", "method"),
    [("attn", "prefix"), ("mlp.down", "bottleneck"), ("mlp.up", "parallel_bottleneck")],
)
def test_adapters_of_our_own_learn_the_same(
    classification_data: TaskData, plain_bert: Build, role: str, method: str, precision: Precision
) -> None:
    task = TextClassification(classification_data.labels, 0)
    plan = AdapterPlan([LayerSpec(2, role, method, 4)])
    losses = []
    for is_cached in (False, True):
        backbone = Backbone(plain_bert().eval(), head=["classifier"])
        cache = bert_cache(backbone.model, classification_data, precision=precision)
        below = cache.below(2) if is_cached else NO_ACCELERATION
        with attach(backbone, Candidate(plan, TrainSettings(1e-2)), seed=0) as attached:
            _, reports = train(attached, task, classification_data, below, precision)
        losses.append(reports[-1].loss)
        assert not cache.is_off
    assert losses[1] == pytest.approx(losses[0], rel=5e-3 if precision == "fp32" else 0.1)


def test_a_short_training_loses_nothing_by_filling(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    """Rows are computed when a step needs them, never ahead."""
    task = TextClassification(classification_data.labels, 0)
    computed = []
    for is_cached in (False, True):
        attached = bert_with_lora([2])
        cache = bert_cache(attached.model, classification_data)
        calls = calls_of(attached.model, 0)
        setup = TrainingSetup(task, classification_data)
        setup = replace(setup, cache=cache.below(2)) if is_cached else setup
        Trainer(attached, setup, TrainSettings(1e-2, steps=4), seed=0).train_to(4)
        computed.append(calls)
    plain, cached = computed
    # The first batch is also computed to learn what a block returns, and to compare.
    assert sum(cached) <= sum(plain) + 2 * max(plain)
