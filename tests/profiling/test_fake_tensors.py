from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, build
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autopeft.profiling.fake_tensors import make_fake, sample_batch, without


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_family_runs_on_its_sample_batch(name: str) -> None:
    backbone = build(name)
    batch = sample_batch(backbone.model, 2, 6, "cpu")
    assert "labels" in batch
    assert backbone.model(**batch).loss.dim() == 0


def test_a_fake_model_has_shapes_but_no_values_and_keeps_ties() -> None:
    model = build("gpt2", device="meta").model
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model, "cpu")
        batch = sample_batch(model, 2, 6, "cpu")
        logits = model(**batch).logits
    assert isinstance(logits, FakeTensor)
    assert logits.shape == (2, 6, 60)
    assert all(isinstance(p, FakeTensor) for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_labels_follow_the_problem() -> None:
    model = build("bert").model
    assert sample_batch(model, 2, 6, "cpu")["labels"].dtype == torch.long
    model.config.problem_type = "multi_label_classification"
    assert sample_batch(model, 2, 6, "cpu")["labels"].shape == (2, 3)
    model.config.problem_type, model.config.num_labels = None, 1
    assert sample_batch(model, 2, 6, "cpu")["labels"].dtype == torch.float32


def test_a_decoder_without_labels_gets_its_input() -> None:
    model = build("t5").model
    batch = sample_batch(model, 2, 6, "cpu")
    kept = without(batch, "labels", is_encoder_decoder=True)
    assert set(kept) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert model(**kept).logits.shape == (2, 6, 60)
    assert set(without(batch, "labels")) == {"input_ids", "attention_mask"}
