from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build, candidate_of, random_plan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_samples import split_of, tiny_bert, tiny_llama

from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.models.sites import prompt_site
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.profiling.measure import price_table
from autopeft.profiling.output_positions import n_logit_weights, narrow_modules
from autopeft.tasks.batch import Batch, collate
from autopeft.tasks.data import IGNORED, TEXT_INPUTS, TaskData
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.tasks.text_classification import TextClassification
from autopeft.training.acceleration import NO_ACCELERATION
from autopeft.training.activation_cache import ActivationCache
from autopeft.training.attention import training_attention
from autopeft.training.last_block import LastBlock
from autopeft.training.multi_trainer import MultiTrainer
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer

_PAD = 2


def last_block_of(backbone: Backbone, task: Any, window: str) -> LastBlock:
    layout = backbone.layout
    modules = narrow_modules(backbone.model, layout)
    return LastBlock(backbone.model, layout.blocks[-1], modules, task, window)


def task_of(backbone: Backbone) -> tuple[Any, str]:
    """A task for a tiny model, and the window that its head reads."""
    if backbone.auto_class.endswith("ForCausalLM"):
        return SupervisedFineTuning(), "completion"
    is_decoder = "Llama" in type(backbone.model).__name__
    return TextClassification(("a", "b", "c"), _PAD), "last" if is_decoder else "first"


def batch_of(backbone: Backbone, *, equal: bool = False) -> Batch:
    """Rows of unequal lengths (or all of one); prompts of 2 tokens for a language model."""
    generator = torch.Generator().manual_seed(0)
    rows, length = 4, 11
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    lengths = torch.tensor([length, length, length, length] if equal else [length, 6, 9, 4])
    mask = (torch.arange(length) < lengths[:, None]).long()
    is_lm = backbone.auto_class.endswith("ForCausalLM")
    ids = torch.where(mask.bool(), ids, _PAD)
    labels = torch.tensor([0, 1, 0, 1])
    if is_lm:
        prompts = torch.tensor([8, 3, 7, 2])[:, None]
        is_learned = (torch.arange(length) >= prompts) & mask.bool()
        labels = torch.where(is_learned, ids, IGNORED)
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    every = np.arange(rows)
    return Batch("train", every, every, tensors, TEXT_INPUTS)


def gradients(attached: Any, task: Any, batch: Batch, last_block: Any) -> dict[str, torch.Tensor]:
    attached.model.zero_grad(set_to_none=True)
    with last_block.serving(batch):
        loss = task.loss(attached.model, batch)
    loss.backward()
    found = {n: p.grad for n, p in attached.model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize(
    "name",
    [
        *("bert", "roberta", "distilbert", "deberta-v2", "modernbert", "llama-cls"),
        *("llama", "gpt2", "qwen3", "gemma3", "phi3", "gpt_neox", "falcon", "mixtral"),
    ],
)
@pytest.mark.parametrize("equal", [False, True])
def test_loss_and_gradients_are_what_they_are_of_a_whole_block(name: str, equal: bool) -> None:
    backbone = build(name)
    task, window = task_of(backbone)
    last_block = last_block_of(backbone, task, window)
    batch = batch_of(backbone, equal=equal)
    for seed in range(4):
        plan = random_plan(backbone.topology, seed, share=0.5)
        with attach(backbone, candidate_of(plan), seed=0) as attached:
            attached.model.eval()
            with torch.no_grad():
                for group in attached.parameter_groups():
                    for parameter in group.parameters:
                        parameter.add_(0.05 * torch.randn_like(parameter))
            whole = gradients(attached, task, batch, NO_ACCELERATION)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                narrow = gradients(attached, task, batch, last_block)
        assert narrow.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(narrow[key], value, rtol=1e-3, atol=2e-5, msg=key)
    assert not last_block.is_off


def tokens_seen(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[:-1].numel()))
    return seen


def test_modules_are_given_what_is_read_and_no_more() -> None:
    backbone = build("bert")
    task, window = task_of(backbone)
    last_block = last_block_of(backbone, task, window)
    batch = batch_of(backbone)
    block = backbone.model.bert.encoder.layer[1]
    seen_by = {
        "query": tokens_seen(block.attention.self.query),
        "key": tokens_seen(block.attention.self.key),
        "up": tokens_seen(block.intermediate.dense),
        "below": tokens_seen(backbone.model.bert.encoder.layer[0].intermediate.dense),
    }
    with last_block.serving(batch):  # The check has run the block twice.
        for seen in seen_by.values():
            seen.clear()
        task.loss(backbone.model, batch)
    assert seen_by == {"query": [4], "key": [44], "up": [4], "below": [44]}
    for seen in seen_by.values():
        seen.clear()
    task.loss(backbone.model, batch)
    assert set(map(tuple, seen_by.values())) == {(44,)}


def test_a_window_that_does_not_hold_what_is_read_switches_it_off(
    classification_data: TaskData,
) -> None:
    class Mixing(nn.Module):
        """Looks at its neighbors, which no narrowed module may."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(x) + x.mean(dim=1, keepdim=True).repeat(1, 1, 2)
            return out

    backbone = Backbone(tiny_bert().eval(), head=("classifier",), auto_class="")
    task = TextClassification(classification_data.labels, 0)
    last_block = last_block_of(backbone, task, "first")
    block = backbone.model.bert.encoder.layer[2]
    block.intermediate = Mixing(block.intermediate)
    batch = collate(classification_data, "train", np.arange(6))
    plain = task.loss(backbone.model, batch)
    with (
        pytest.warns(UserWarning, match="last block is off: results differ"),
        last_block.serving(batch),
    ):
        assert torch.equal(task.loss(backbone.model, batch), plain)
    assert last_block.is_off


def test_rows_with_a_prompt_are_computed_whole() -> None:
    backbone = build("llama")
    assert prompt_site(backbone.model, backbone.layout.blocks) is not None
    plan = AdapterPlan([LayerSpec(0, MODEL, "prompt_tuning", 4), LayerSpec(1, "mlp.up", "lora", 2)])
    task, window = task_of(backbone)
    last_block, batch = last_block_of(backbone, task, window), batch_of(backbone)
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        attached.model.eval()
        whole = gradients(attached, task, batch, NO_ACCELERATION)
        narrow = gradients(attached, task, batch, last_block)
    for key, value in whole.items():
        torch.testing.assert_close(narrow[key], value)
    assert not last_block.is_off


def test_what_passed_with_a_prompt_is_checked_again_without() -> None:
    backbone = build("llama")
    task, window = task_of(backbone)
    last_block, batch = last_block_of(backbone, task, window), batch_of(backbone)
    last = backbone.layout.blocks[-1]
    for spec in (LayerSpec(0, MODEL, "prompt_tuning", 4), LayerSpec(0, "attn.v", "lora", 2)):
        with attach(backbone, candidate_of(AdapterPlan([spec])), seed=0) as attached:
            calls = tokens_seen(backbone.model.get_submodule(f"{last}.mlp"))
            gradients(attached, task, batch, last_block)
        assert len(calls) == 3  # The loss, and twice for the check.


def _trainings(
    backbone: Backbone, data: TaskData, task: Any, window: str | None
) -> Iterator[tuple[Any, Trainer]]:
    last_block = NO_ACCELERATION if window is None else last_block_of(backbone, task, window)
    cache = ActivationCache(backbone.model, backbone.layout.blocks, data).below(1)
    plans = [
        AdapterPlan([LayerSpec(1, "attn.q", "lora", 2), LayerSpec(1, "mlp.up", "lora", 8)]),
        AdapterPlan([LayerSpec(1, "attn.v", "ia3", 0), LayerSpec(1, "mlp.down", "dora", 2)]),
    ]
    for plan in plans:
        train = TrainSettings(1e-2, steps=25, batch_size=8)
        attached = attach(backbone, Candidate(plan, train), seed=0)
        yield (
            attached,
            Trainer(
                attached,
                TrainingSetup(task, data, cache=cache, last_block=last_block),
                train,
                seed=0,
            ),
        )
        attached.park()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_whole_trainings_learn_the_same_alone_and_together(
    kind: str, classification_data: TaskData, causal_data: TaskData
) -> None:
    is_lm = kind == "llama"
    data = causal_data if is_lm else classification_data
    task: Any = SupervisedFineTuning() if is_lm else TextClassification(data.labels, 0)
    window = "completion" if is_lm else "first"

    def fresh() -> Backbone:
        model: Any = tiny_llama() if is_lm else tiny_bert(2)
        return Backbone(model.eval(), head=() if is_lm else ("classifier",), auto_class="")

    whole = []
    for _, training in _trainings(fresh(), data, task, None):
        whole.append([training.advance(step) for step in (5, 25)])
    alone = []
    for _, training in _trainings(fresh(), data, task, window):
        alone.append([training.advance(step) for step in (5, 25)])
    backbone = fresh()
    candidates = list(_trainings(backbone, data, task, window))
    together = MultiTrainer(
        {index: training for index, (_, training) in enumerate(candidates)},
        TrainingSetup(task, data, last_block=last_block_of(backbone, task, window)),
    )
    together.train_to(25)
    for index, (attached, training) in enumerate(candidates):
        attached.unpark()
        loss = training.evaluate("validation").loss
        attached.park()
        assert alone[index][-1].loss == pytest.approx(whole[index][-1].loss, rel=5e-3)
        assert loss == pytest.approx(whole[index][-1].loss, rel=5e-3)


@pytest.mark.parametrize("name", ["bert", "llama", "llama-cls", "gpt2", "qwen3"])
def test_it_costs_what_it_is_priced_at(name: str) -> None:
    backbone = build(name)
    task, window = task_of(backbone)
    batch = batch_of(backbone)
    rows, length = batch.input_ids.shape
    size = task.windows(batch)[window].size
    is_lm = window == "completion"
    n_targets = int((batch.labels != IGNORED).sum()) if is_lm else 0
    whole = price_table(
        build(name, device="meta"), batch_size=rows, mean_length=length, longest_length=length
    )
    table = whole.as_trained(
        has_activation_cache=False,
        read_share=size / length,
        logit_weights=n_logit_weights(backbone) if is_lm else 0,
        logit_tokens=n_targets,
    )
    last_block = last_block_of(backbone, task, window)
    for seed in range(6):
        plan = random_plan(backbone.topology, seed, share=0.3)
        specs = [s for s in plan.specs if s.role != MODEL and s.method != "prefix"]
        candidate = candidate_of(AdapterPlan(specs), batch_size=rows)
        with attach(backbone, candidate, seed=0) as attached:
            attached.model.eval()
            if not attached.parameter_groups():
                continue
            gradients(attached, task, batch, last_block)  # The check is made.
            with FlopCounterMode(display=False) as counter:
                gradients(attached, task, batch, last_block)
        priced = table.price(candidate).train_flops
        assert priced == pytest.approx(counter.get_total_flops(), rel=0.03), plan
        assert priced < whole.price(candidate).train_flops


def test_attention_of_narrowed_queries_goes_through_the_training_kernel(
    classification_data: TaskData,
) -> None:
    backbone = Backbone(tiny_bert().eval(), head=("classifier",), auto_class="")
    task = TextClassification(classification_data.labels, 0)
    last_block = last_block_of(backbone, task, "first")
    batch = collate(classification_data, "train", np.arange(6))
    with (
        training_attention("bf16", "cpu"),
        torch.autocast("cpu", dtype=torch.bfloat16),
        last_block.serving(batch),
    ):
        narrow = task.loss(backbone.model, batch)
    torch.testing.assert_close(narrow, task.loss(backbone.model, batch), rtol=2e-2, atol=2e-2)


def test_a_row_of_one_token_is_left_alone() -> None:
    backbone = build("bert")
    task, window = task_of(backbone)
    data = TaskData(
        "text-classification",
        {"train": split_of([[3], [4]], labels=[0, 1])},
        ("a", "b", "c"),
        pad_id=_PAD,
    )
    last_block = last_block_of(backbone, task, window)
    batch = collate(data, "train", np.arange(2))
    plain = task.loss(backbone.model, batch)
    with last_block.serving(batch):
        assert torch.equal(task.loss(backbone.model, batch), plain)
