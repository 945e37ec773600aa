from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.text_classification import TextClassification
from autopeft.training import attention
from autopeft.training.precision import autocast


def gradients(model: Any, data: TaskData, kernel: str, monkeypatch: Any) -> Any:
    monkeypatch.setattr(attention, "fastest_kernel", lambda *_: kernel)
    batch = collate(data, "train", data.train.source_rows[:8])
    model.zero_grad()
    with attention.training_attention("bf16", "cpu"), autocast("bf16", "cpu"):
        loss = TextClassification(data.labels, data.pad_id).loss(model, batch)
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kernel", ["fused fp32", "plain"])
def test_it_changes_rounding_only_and_is_undone(
    kernel: str,
    classification_data: TaskData,
    bert_with_lora: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = bert_with_lora().model.eval()
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    native = gradients(model, classification_data, "fused", monkeypatch)
    other_way = gradients(model, classification_data, kernel, monkeypatch)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
    for one, other in zip(native, other_way, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=2e-3)
    assert any(not torch.equal(a, b) for a, b in zip(native, other_way, strict=True))


@pytest.mark.parametrize("kernel", ["fused fp32", "plain"])
def test_position_biases_are_added_in_the_precision_of_the_scores(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # T5's self-attention has a learned bias in fp32, its cross-attention one of zeros in bf16.
    monkeypatch.setattr(attention, "_IS_VERIFIED", {})
    monkeypatch.setattr(attention, "fastest_kernel", lambda *_: kernel)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    ).eval()
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "decoder_input_ids": ids}
    with torch.no_grad(), autocast("bf16", "cpu"):
        expected = model(**inputs).logits
        with attention.training_attention("bf16", "cpu"):
            found = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert all(attention._IS_VERIFIED.values())
    assert attention._IS_VERIFIED


@pytest.mark.parametrize("build", ["bert_with_lora", "llama_with_lora"])
@pytest.mark.parametrize("is_padded", [True, False])
def test_transformers_need_not_ask_the_device_for_padding(
    build: str, is_padded: bool, classification_data: TaskData, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(build)().model.eval()
    lengths = classification_data.train.lengths
    rows = np.flatnonzero(lengths == lengths[0])[:4]
    if is_padded:
        rows = np.append(rows, lengths.argmin())
    batch = collate(classification_data, "train", rows)
    assert bool(batch.attention_mask.all()) is not is_padded
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    usual = masking_utils._ignore_causal_mask_sdpa
    with torch.no_grad():
        expected = model(**inputs).logits
        with attention.known_padding(batch, "cuda"):
            assert masking_utils._ignore_causal_mask_sdpa is not usual
            torch.testing.assert_close(model(**inputs).logits, expected)
            # Another batch within is looked at by itself.
            one = {name: tensor[:1, :2] for name, tensor in inputs.items()}
            assert model(**one).logits.isfinite().all()
    assert masking_utils._ignore_causal_mask_sdpa is usual


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "by head", "additive", "row"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_plain_formula_is_attention(mask: str, key_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    b, heads, t, width = 3, 4, 7, 8
    query = torch.randn(b, heads, t, width, generator=generator)
    key, value = (torch.randn(b, key_heads, t, width, generator=generator) for _ in range(2))
    masks = {
        "boolean": torch.rand(b, 1, t, t, generator=generator) < 0.7,
        "by head": torch.rand(b, heads, t, t, generator=generator) < 0.7,
        "row": torch.rand(b, 1, 1, t, generator=generator) < 0.7,
        "additive": torch.randn(1, 1, t, t, generator=generator),
    }
    if mask in ("boolean", "by head", "row"):
        masks[mask][..., 0] = True
    given = masks.get(mask)
    module = torch.nn.Module()
    found, _ = attention.plain_attention(
        module, query, key, value, given, scaling=0.3, is_causal=mask == "causal"
    )
    expected = functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(4 // key_heads, 1),
        value.repeat_interleave(4 // key_heads, 1),
        attn_mask=given,
        is_causal=mask == "causal",
        scale=0.3,
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_row_that_attends_to_nothing_stays_finite() -> None:
    query = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    for nothing in (
        torch.zeros(1, 1, 3, 3, dtype=torch.bool),
        torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min),
    ):
        found, _ = attention.plain_attention(torch.nn.Module(), query, query, query, nothing)
        assert torch.isfinite(found).all()


def test_a_kernel_that_differs_from_the_usual_one_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_IS_VERIFIED", {})
    monkeypatch.setattr(attention, "fastest_kernel", lambda *_: "plain")
    plain = attention.plain_attention
    monkeypatch.setattr(
        attention,
        "plain_attention",
        lambda *args, **options: (plain(*args, **options)[0] + 1, None),
    )
    query = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    module = torch.nn.Module()
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, query, query, None)[0]
    with attention.training_attention("bf16", "cpu"):
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with pytest.warns(UserWarning, match="plain attention in Module is off: results differ"):
            attend(module, query, query, query, None)
        assert torch.equal(attend(module, query, query, query, None)[0], usual)  # Told once.


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_queries_that_attend_to_nothing_are_not_compared(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_IS_VERIFIED", {})
    monkeypatch.setattr(attention, "fastest_kernel", lambda *_: "plain")
    query = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, :, 2] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(
            ~mask, torch.finfo(torch.bfloat16).min
        )
    module = torch.nn.Module()
    with attention.training_attention("bf16", "cpu"):
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, query, query, mask)
    assert attention._IS_VERIFIED == {("plain", torch.nn.Module): True}


def test_the_measurement_is_kept() -> None:
    attention.fastest_kernel.cache_clear()
    first = attention.fastest_kernel("cpu", 16, 8)
    assert attention.fastest_kernel("cpu", 16, 8) == first
    assert attention.fastest_kernel.cache_info().misses == 1
    with torch.inference_mode():
        assert attention.fastest_kernel("cpu", 8, 8) in ("fused", "fused fp32", "plain")
    assert attention.fastest_kernel("cpu", 2 * attention.PLAIN_LENGTH, 8) != "plain"


def test_fp32_training_is_left_alone() -> None:
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attention.training_attention("fp32", "cpu"):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual


def test_it_may_be_nested() -> None:
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls: list[str] = []

    def noting(name: str) -> Any:
        def around(inner: Any) -> Any:
            def noted(*args: Any, **options: Any) -> Any:
                calls.append(name)
                return inner(*args, **options)

            return noted

        return around

    query = torch.randn(1, 1, 3, 4)
    with attention.attention_through(noting("outer")):
        with attention.attention_through(noting("inner")):
            ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Module(), query, query, query, None)
        ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Module(), query, query, query, None)
    assert calls == ["inner", "outer", "outer"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
