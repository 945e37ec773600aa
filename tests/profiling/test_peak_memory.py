"""The priced peak is what an allocator would hold in two steps of the live model."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from covering import covering
from tiny_models import batch_for
from torch.utils.flop_counter import FlopCounterMode
from training_samples import split_of

from autopeft import methods
from autopeft.costs import PriceTable
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.models.loading import prepare_config
from autopeft.models.multi_adapter import MultiAdapter
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.profiling.counters import LiveBytes
from autopeft.profiling.fits import lora_everywhere
from autopeft.profiling.measure import price_table
from autopeft.tasks.batch import Batch
from autopeft.tasks.data import IGNORED, TaskData
from autopeft.tasks.packing import packed_batch, packed_shape, usual_bins
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.testing.tiny_models import plan_of
from autopeft.training.checkpointing import recomputed
from autopeft.training.optimizers import ADAMW, make_optimizer, moments_of
from autopeft.utils.device import accelerator

_ROWS, _LENGTH, _PROMPT = 4, 40, 8
_SIZES = {
    "vocab_size": 500,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}
_KINDS = {
    "bert": (hf.BertConfig, "AutoModelForSequenceClassification", ("classifier",)),
    "llama": (hf.LlamaConfig, "AutoModelForCausalLM", ()),
}
_ON_LLAMA = ("lora", "pissa", "ia3", "oft", "ln_tuning", "loha", "vera", "bottleneck", "prefix")
_ON_BERT = ("dora", "boft", "fourierft", "shira", "osf", "tinylora", "adalora", "prompt_tuning")
"""Of each kind: those that copy or decompose the weight, share state, rotate, hold a mask..."""


def _built(kind: str, device: str, **sizes: int) -> Backbone:
    config_class, auto_class, head = _KINDS[kind]
    config: Any = config_class(**{**_SIZES, **sizes}, pad_token_id=2)
    before = prepare_config(config)
    with torch.device(device):
        model = getattr(hf, auto_class).from_config(config).eval()
    return Backbone(model, head=head, auto_class=auto_class, config_before=before)


@lru_cache
def _known(kind: str, dtype: str = "float32") -> tuple[Backbone, PriceTable]:
    table = price_table(
        _built(kind, "meta"),
        batch_size=_ROWS,
        mean_length=_LENGTH,
        longest_length=_LENGTH,
        prompt_sizes=(_PROMPT,),
        dtype=dtype,
    )
    backbone = _built(kind, "cpu")
    backbone.model.to(getattr(torch, dtype))
    return backbone, table


def _bytes_of(model: torch.nn.Module) -> int:
    found = {t.untyped_storage()._cdata: t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def _held(
    backbone: Backbone,
    candidate: Candidate,
    loss: Callable[[Any], torch.Tensor],
    optimizer_name: str = ADAMW,
) -> int:
    """Return the most that two steps of training hold at once, weights included."""
    backbone.svds._known.clear()
    base = _bytes_of(backbone.model)
    with LiveBytes() as live, attach(backbone, candidate, seed=0) as attached:
        gc.collect()
        live.restart()  # What attaching needs for a moment comes before the first activation.
        optimizer = make_optimizer(optimizer_name, attached.parameter_groups(), 0.0)
        for _ in range(2):
            loss(attached.model).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        peak: int = live.peak
    on_host = sum(int(t.nbytes) for kept in backbone.svds._known.values() for t in kept)
    return base + peak - on_host


def _check(kind: str, method: str, dtype: str = "float32") -> None:
    backbone, table = _known(kind, dtype)
    plan = plan_of(backbone.topology, method, 0 if method == "prompt_tuning" else 3)
    assert plan is not None
    candidate = Candidate(plan, TrainSettings(1e-3, steps=2, batch_size=_ROWS))
    batch = batch_for(backbone, rows=_ROWS, length=_LENGTH)

    def loss(model: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            found: torch.Tensor = model(**batch).loss
        return found

    held = _held(backbone, candidate, loss)
    assert table.price(candidate).peak_memory_bytes == pytest.approx(held, rel=0.10)


@pytest.mark.parametrize("method", _ON_LLAMA)
def test_the_priced_peak_is_what_an_allocator_holds(method: str) -> None:
    _check("llama", method)


@pytest.mark.parametrize("method", _ON_BERT)
def test_the_priced_peak_is_right_below_a_new_head(method: str) -> None:
    _check("bert", method)


@pytest.mark.parametrize("method", ["c3a", "pvera"])
def test_the_priced_peak_is_right_over_a_bf16_base_below_a_new_head(method: str) -> None:
    _check("bert", method, "bfloat16")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", sorted(_KINDS))
@pytest.mark.parametrize("method", [method.name for method in methods.all_methods()])
def test_the_priced_peak_of_any_method_is_right_over_a_bf16_base(method: str, kind: str) -> None:
    _check(kind, method, "bfloat16")


@pytest.mark.parametrize("method", ["lora", "ia3", "oft", "road", "vera", "bottleneck", "pvera"])
def test_the_priced_peak_is_right_over_a_bf16_base(method: str) -> None:
    _check("llama", method, "bfloat16")
    assert 2 * _known("llama", "bfloat16")[1].weight_bytes == _known("llama")[1].weight_bytes


def test_logits_at_a_few_positions_are_priced_for_these() -> None:
    backbone, table = _known("llama")
    plan = plan_of(backbone.topology, "lora", 3)
    assert plan is not None
    candidate = Candidate(plan, TrainSettings(1e-3, steps=2, batch_size=_ROWS))
    task = SupervisedFineTuning()
    batch = batch_for(backbone, rows=_ROWS, length=_LENGTH)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[:, -6:] = batch["input_ids"][:, -6:]
    own = table.as_trained(
        has_activation_cache=False, logit_weights=1, most_logit_tokens=6.0 * _ROWS
    )
    places = np.arange(_ROWS)
    names = ("input_ids", "attention_mask")
    rows = Batch("train", places, places, {**batch, "labels": labels}, names)
    held = _held(backbone, candidate, lambda model: task.loss(model, rows))
    assert own.price(candidate).peak_memory_bytes == pytest.approx(held, rel=0.10)
    assert table.price(candidate).peak_memory_bytes > 1.1 * held


def test_scoring_is_priced_where_it_needs_more_than_training() -> None:
    backbone, table = _known("llama")
    batch = batch_for(backbone, rows=_ROWS, length=_LENGTH)
    many = {name: tensor.repeat(8, 1) for name, tensor in batch.items()}
    with torch.inference_mode(), LiveBytes() as live:
        backbone.model(**many)
    held = _bytes_of(backbone.model) + live.peak
    scored = table.as_trained(has_activation_cache=False, scoring_tokens=8.0 * _ROWS * _LENGTH)
    reference = Candidate(AdapterPlan(), TrainSettings(1e-3, batch_size=_ROWS))
    assert scored.price(reference).peak_memory_bytes == pytest.approx(held, rel=0.10)


_ATTENTION = ("attn.q", "attn.v")
_PACKS = {
    "equal": [[LayerSpec(2, "attn.q", "lora", 4), LayerSpec(3, "mlp.up", "lora", 4)]] * 4,
    "unlike ranks": [
        [
            LayerSpec(layer, role, "lora", rank)
            for layer in range(4)
            for role in ("attn.q", "attn.v")
        ]
        for rank in (1, 4, 32)
    ],
    "unlike layers": [
        [LayerSpec(layer, "attn.q", "lora", 8), LayerSpec(layer, "mlp.down", "rslora", 8)]
        for layer in (0, 1, 3)
    ],
    "unlike methods": [
        [LayerSpec(1, "attn.q", "lora", 4), LayerSpec(3, "mlp.up", "lora", 4)],
        [LayerSpec(1, "attn.q", "dora", 4), LayerSpec(3, "mlp.up", "ia3")],
        [LayerSpec(1, "attn.q", "ia3"), LayerSpec(3, "norm", "ln_tuning")],
    ],
}


@pytest.mark.parametrize(
    ("pack", "over"),
    covering(
        sorted(_PACKS),
        [(kind, dtype) for kind in sorted(_KINDS) for dtype in ("float32", "bfloat16")],
        each=2,
    ),
)
def test_candidates_that_are_trained_together_are_priced(pack: str, over: tuple[str, str]) -> None:
    kind, dtype = over
    backbone, table = _known(kind, dtype)
    train = TrainSettings(1e-3, steps=2, batch_size=_ROWS)
    candidates = [Candidate(AdapterPlan(specs), train) for specs in _PACKS[pack]]
    n = len(candidates)
    batch = {k: v.repeat(n, *[1] * (v.dim() - 1)) for k, v in _batch(backbone).items()}
    base = _bytes_of(backbone.model)
    with LiveBytes() as live:
        lanes = []
        for candidate in candidates:
            lanes.append(attach(backbone, candidate, seed=0))
            lanes[-1].park()
        groups = [{"params": list(g.parameters)} for lane in lanes for g in lane.parameter_groups()]
        optimizer = torch.optim.AdamW(groups, fused=True)
        together = MultiAdapter(dict(enumerate(lanes)))
        gc.collect()
        live.restart()
        for _ in range(2):
            with together.placed() as model:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                    loss = model(**batch).loss
                loss.backward()
                del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        held = base + live.peak
    for lane in lanes:
        lane.detach()
    assert table.pack_bytes(candidates) == pytest.approx(held, rel=0.10)
    assert table.pack_bytes(candidates) > max(map(table.pack_bytes, [[c] for c in candidates]))


def _batch(backbone: Backbone) -> dict[str, torch.Tensor]:
    return batch_for(backbone, rows=_ROWS, length=_LENGTH)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("rank", [4, 96])
def test_moments_in_8_bits_are_priced(rank: int) -> None:
    backbone, table = _known("llama")
    plan = lora_everywhere(backbone.topology, rank)
    candidate = Candidate(plan, TrainSettings(1e-3, steps=2, batch_size=_ROWS))
    batch = _batch(backbone)
    held = _held(backbone, candidate, lambda model: model(**batch).loss, "adamw_8bit")
    own = table.as_trained(has_activation_cache=False, moments=moments_of("adamw_8bit"))
    assert own.price(candidate).peak_memory_bytes == pytest.approx(held, rel=0.10)
    saved = table.price(candidate).peak_memory_bytes - own.price(candidate).peak_memory_bytes
    # Small tensors keep theirs in fp32.
    assert (saved > 0.1 * held) == (rank == 96)
    assert saved >= 0


def test_packed_rows_are_priced_as_they_are_packed() -> None:
    backbone, padded = _known("llama")
    lengths = np.array([_LENGTH, 9, 14, 11, 30, 8, 17, 10])
    split = split_of([list(range(3, 3 + n)) for n in lengths], prompts=[1] * len(lengths))
    data = TaskData("sft", {"train": split}, (), pad_id=0)
    n_bins = usual_bins(lengths)
    batch = packed_batch(data, "train", np.arange(len(lengths)), n_bins)
    shape = packed_shape(lengths, n_bins)
    assert tuple(batch.input_ids.shape) == shape
    table = price_table(
        _built("llama", "meta"),
        batch_size=len(lengths),
        mean_length=float(lengths.mean()),
        longest_length=_LENGTH,
        prompt_sizes=(_PROMPT,),
        packed=shape,
    )
    plan = plan_of(backbone.topology, "lora", 3)
    assert plan is not None
    candidate = Candidate(plan, TrainSettings(1e-3, steps=2, batch_size=len(lengths)))
    # What the task computes beside the model's own loss is priced by another test.
    labels = batch.labels
    held = _held(
        backbone, candidate, lambda model: model(**batch.model_inputs(), labels=labels).loss
    )
    assert table.price(candidate).peak_memory_bytes == pytest.approx(held, rel=0.10)
    assert padded.price(candidate).peak_memory_bytes > 1.3 * held
    # A prompt comes before each row, so these are padded.
    assert table.longer[_PROMPT].memory_tokens == len(lengths) * (_LENGTH + _PROMPT)


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_blocks_that_are_computed_again_are_priced(method: str) -> None:
    backbone, table = _known("llama")
    plan = plan_of(backbone.topology, method, 3)
    assert plan is not None
    assert plan.lowest_layer is not None
    candidate = Candidate(plan, TrainSettings(1e-3, steps=2, batch_size=_ROWS))
    batch = batch_for(backbone, rows=_ROWS, length=_LENGTH)
    blocks = backbone.layout.blocks[plan.lowest_layer :]

    def run(model: Any) -> torch.Tensor:
        with recomputed(model, blocks):
            loss: torch.Tensor = model(**batch).loss
            loss.backward()
        return torch.zeros((), requires_grad=True)

    again = table.as_trained(has_activation_cache=False, has_checkpointing=True)
    held = _held(backbone, candidate, run)
    assert again.price(candidate).peak_memory_bytes == pytest.approx(held, rel=0.10)
    assert again.price(candidate).peak_memory_bytes < table.price(candidate).peak_memory_bytes
    with attach(backbone, candidate, seed=0) as attached, FlopCounterMode(display=False) as counter:
        run(attached.model)
    # What a block computes after the last tensor that it keeps is not computed again.
    assert again.price(candidate).train_flops == pytest.approx(
        2 * counter.get_total_flops(), rel=0.06
    )


def test_accumulated_gradients_are_priced() -> None:
    backbone, table = _known("llama")
    plan = plan_of(backbone.topology, "lora", 3)
    assert plan is not None
    candidate = Candidate(plan, TrainSettings(1e-3, steps=2, batch_size=_ROWS))
    batch = batch_for(backbone, rows=_ROWS, length=_LENGTH)

    def run(model: Any) -> torch.Tensor:
        for rows in range(0, _ROWS, 2):
            model(**{name: x[rows : rows + 2] for name, x in batch.items()}).loss.backward()
        return torch.zeros((), requires_grad=True)

    parts = table.as_trained(has_activation_cache=False, pass_tokens=2 * _LENGTH)
    held = _held(backbone, candidate, run)
    own, whole = parts.price(candidate), table.price(candidate)
    assert own.peak_memory_bytes == pytest.approx(held, rel=0.10)
    assert own.peak_memory_bytes < whole.peak_memory_bytes
    assert own.train_flops == whole.train_flops
    # A row is never split, and what is not used limits nothing.
    one, all_rows = (
        table.as_trained(has_activation_cache=False, pass_tokens=n) for n in (1, 10_000)
    )
    assert one.price(candidate).peak_memory_bytes < own.peak_memory_bytes
    assert all_rows.price(candidate) == whole


@pytest.mark.skipif(accelerator() is None, reason="torch sees no accelerator on this machine")
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "oft", "vera", "bottleneck"])
def test_the_priced_peak_is_what_an_accelerators_allocator_holds(method: str) -> None:
    device = accelerator()
    assert device is not None
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 16000}
    rows, length = 8, 256
    table = price_table(
        _built("llama", "meta", **sizes),
        batch_size=rows,
        mean_length=length,
        longest_length=length,
        device=device,
        dtype="bfloat16",
    )
    backbone = _built("llama", device, **sizes)
    backbone.model.to(torch.bfloat16)
    plan = plan_of(backbone.topology, method, 3)
    assert plan is not None
    candidate = Candidate(plan, TrainSettings(1e-3, steps=2, batch_size=rows))
    batch = {k: v.to(device) for k, v in batch_for(backbone, rows=rows, length=length).items()}
    with attach(backbone, candidate, seed=0) as attached:
        torch.accelerator.reset_peak_memory_stats()
        groups = [{"params": list(g.parameters)} for g in attached.parameter_groups()]
        optimizer = torch.optim.AdamW(groups, fused=True)
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16):
                loss = attached.model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        held = torch.accelerator.max_memory_allocated()
    assert table.price(candidate).peak_memory_bytes == pytest.approx(held, rel=0.10)
