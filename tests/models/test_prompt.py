"""Prompts: what a model with virtual tokens computes, what it costs, where there can be none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import (
    KINDS,
    assert_same_state,
    batch_for,
    build,
    candidate_of,
    disturb,
    logits_of,
    random_plan,
    state_of,
)

from autopeft import methods
from autopeft.costs import check_plan
from autopeft.errors import AdapterError, SpaceError
from autopeft.models.attach import Attached, attach
from autopeft.models.backbone import Backbone
from autopeft.models.export import export_merged
from autopeft.models.saving import load_adapter, save_adapter
from autopeft.models.sites import max_positions
from autopeft.models.tuners import PromptConfig, PromptLayer
from autopeft.plan import MODEL, AdapterPlan, LayerSpec
from autopeft.profiling.measure import price_table

_SIZE = 3
_PROMPT = LayerSpec(0, MODEL, "prompt_tuning", _SIZE)
_PROMPTED = sorted(set(KINDS) - {"t5", "bart", "whisper", "vit"})
_DECODERS = ("llama", "gpt2", "opt", "gemma3", "falcon")


def _attach(name: str, *specs: LayerSpec, seed: int = 0) -> tuple[Attached, Any]:
    backbone = build(name)
    plan = AdapterPlan([_PROMPT, *specs])
    return attach(backbone, candidate_of(plan), seed=seed), batch_for(backbone)


def _layer(attached: Attached) -> PromptLayer:
    (part,) = (p for p in attached.parts if p.group.method.name == "prompt_tuning")
    (layer,) = part.layers.values()
    assert isinstance(layer, PromptLayer)
    return layer


def _tokens(attached: Attached) -> torch.Tensor:
    tokens: torch.Tensor = _layer(attached).prompt_tuning_tokens["default"]
    return tokens


def _by_hand(attached: Attached, batch: Any, at: int) -> torch.Tensor:
    """Last states of the base on rows with the prompt in them, the prompt's own left out."""
    layer = _layer(attached)
    base: Any = layer.base_layer
    embedded, mask = base.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]
    prompt = _tokens(attached).expand(len(embedded), -1, -1)
    with torch.no_grad():
        states = base(
            inputs_embeds=torch.cat([embedded[:, :at], prompt, embedded[:, at:]], 1),
            attention_mask=torch.cat(
                [mask[:, :at], mask.new_ones(len(mask), _SIZE), mask[:, at:]], 1
            ),
        ).last_hidden_state
    return torch.cat([states[:, :at], states[:, at + _SIZE :]], 1)


@pytest.mark.parametrize("name", _PROMPTED)
def test_a_prompt_is_tokens_among_the_others(name: str) -> None:
    attached, batch = _attach(name)
    del batch["labels"]
    own = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        states = _layer(attached)(**own).last_hidden_state
    others = ("gpt_neox", "qwen3", "mistral", "mixtral", "phi3", "jamba", "llama-cls")
    is_causal = name in (*_DECODERS, *others)
    at = 0 if is_causal else 1
    is_token = batch["attention_mask"].bool()
    torch.testing.assert_close(states[is_token], _by_hand(attached, batch, at)[is_token])
    assert states.shape[1] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("name", _PROMPTED)
def test_loss_and_logits_are_those_of_the_given_tokens(name: str) -> None:
    attached, batch = _attach(name)
    base = logits_of(build(name).model, batch)
    output = attached.model(**batch)
    assert output.logits.shape == base.shape
    assert not torch.equal(output.logits, base)
    output.loss.backward()
    gradient = _tokens(attached).grad
    assert gradient is not None
    assert float(gradient.abs().min(dim=1).values.max()) > 0


def test_an_encoder_pools_its_first_token_still() -> None:
    attached, batch = _attach("bert")
    layer: Any = _layer(attached)
    with torch.no_grad():
        output = layer(batch["input_ids"], batch["attention_mask"])
        pooled = layer.base_layer.pooler(output.last_hidden_state)
    torch.testing.assert_close(output.pooler_output, pooled)


def test_a_decoder_classifies_by_its_last_token_still() -> None:
    attached, batch = _attach("llama-cls")
    ids = batch["input_ids"].clone()
    ids[batch["attention_mask"] == 0] = attached.model.config.pad_token_id
    logits = logits_of(
        attached.model, {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    )
    short = {"input_ids": ids[:1, :4], "attention_mask": batch["attention_mask"][:1, :4]}
    torch.testing.assert_close(logits_of(attached.model, short), logits[:1])


def test_token_types_and_given_positions_grow_too() -> None:
    attached, batch = _attach("bert")
    plain = logits_of(attached.model, batch)
    zeros = torch.zeros_like(batch["input_ids"])
    positions = torch.arange(zeros.shape[1])[None]
    more = {**batch, "token_type_ids": zeros, "position_ids": positions}
    torch.testing.assert_close(logits_of(attached.model, more), plain)
    kinds = zeros.clone()
    kinds[:, -2:] = 1
    assert not torch.allclose(logits_of(attached.model, {**batch, "token_type_ids": kinds}), plain)


@pytest.mark.parametrize("name", _DECODERS)
def test_generating_with_a_cache_of_keys_gives_the_same_tokens(name: str) -> None:
    attached, _ = _attach(name)
    disturb(attached)
    model: Any = attached.model
    ids = torch.tensor([[2, 2, 5, 6, 7], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    kept = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "attention_mask": mask}
    kept["eos_token_id"] = 59
    with_cache = model.generate(ids, use_cache=True, **kept)
    without = model.generate(ids, use_cache=False, **kept)
    assert torch.equal(with_cache, without)
    assert with_cache.shape[1] > 5


def test_states_of_all_blocks_and_tuples_are_cut_too() -> None:
    attached, batch = _attach("bert")
    layer = _layer(attached)
    with torch.no_grad():
        full = layer(batch["input_ids"], output_hidden_states=True)
        pair = layer(batch["input_ids"], return_dict=False)
    assert {len(states[0]) for states in full.hidden_states} == {batch["input_ids"].shape[1]}
    assert torch.equal(pair[0], full.last_hidden_state)


def test_it_starts_as_words_of_the_vocabulary() -> None:
    attached, _ = _attach("gemma3")  # Its embeddings are scaled.
    table: Any = attached.model.get_input_embeddings()
    words = table(torch.arange(table.num_embeddings))
    gaps = (_tokens(attached)[:, None] - words).abs().amax(dim=2)
    assert torch.equal(gaps.amin(dim=1), torch.zeros(_SIZE))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "albert"])
def test_a_prompt_goes_with_any_other_adapter_and_leaves_no_trace(
    name: str, tmp_path: Path
) -> None:
    backbone = build(name)
    before = state_of(backbone)
    batch = batch_for(backbone)
    others = [s for s in random_plan(backbone.topology, 3, share=1.0).specs if s.role != MODEL]
    others = [s for s in others if (s.layer, s.role) != (0, "attn.o")]
    specs = [_PROMPT, LayerSpec(0, "attn.o", "lora_fa", 2), *others]
    with attach(backbone, candidate_of(AdapterPlan(specs)), seed=0) as attached:
        assert len(attached.parts) > 2
        rates = [id(p) for group in attached.parameter_groups() for p in group.parameters]
        assert len(rates) == len(set(rates))
        disturb(attached)
        logits = logits_of(attached.model, batch)
        save_adapter(attached, tmp_path / "adapter", base_model="tiny")
        with pytest.raises(AdapterError, match="cannot be merged"):
            export_merged(attached, tmp_path / "merged")
    assert_same_state(before, state_of(backbone))
    assert torch.equal(
        logits_of(load_adapter(build(name).model, tmp_path / "adapter"), batch), logits
    )
    (part,) = (tmp_path / "adapter").glob("part-*-prompt_tuning")
    (tensor,) = peft.utils.load_peft_weights(str(part), device="cpu").values()
    assert tensor.shape == (_SIZE, backbone.topology.shapes[MODEL][1])


def test_a_head_inside_the_prompted_model_is_trained_and_restored() -> None:
    usual = build("bert")
    head = ("bert.pooler.dense", "classifier")
    backbone = Backbone(usual.model, head=head, auto_class=usual.auto_class)
    before = state_of(backbone)
    with attach(backbone, candidate_of(AdapterPlan([_PROMPT])), seed=0) as attached:
        assert [len(g.parameters) for g in attached.parameter_groups()] == [1, 4]
        attached.model(**batch_for(backbone)).loss.backward()
        assert all(p.grad is not None for p in attached.head_parameters())
    assert_same_state(before, state_of(backbone))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_switches_it_off_and_takes_it_out() -> None:
    base = build("llama").model
    batch = batch_for(build("llama"))
    plain = logits_of(base, batch)
    model = peft.PeftModel(base, PromptConfig(r=2, target_modules=["model"], init_weights=False))
    assert not torch.allclose(logits_of(model, batch), plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), plain)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.model.prompt_tuning_tokens.default"
    }
    model.add_adapter("other", PromptConfig(r=4, target_modules=["model"]))
    model.set_adapter("other")
    assert not torch.equal(logits_of(model, batch), plain)
    assert torch.equal(logits_of(model.unload(), batch), plain)


# --- where there can be none ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "vit"])
def test_what_is_no_single_stack_over_text_has_none(name: str) -> None:
    topology = build(name, device="meta").topology
    with pytest.raises(SpaceError, match="not a single stack of blocks over text embeddings"):
        check_plan(topology, AdapterPlan([_PROMPT]))


def test_a_prompt_is_layer_0s() -> None:
    topology = build("bert", device="meta").topology
    assert topology.shape(0, MODEL) == (512, 32)
    assert topology.shape(1, MODEL) is None
    with pytest.raises(SpaceError, match="use layer 0"):
        check_plan(topology, AdapterPlan([LayerSpec(1, MODEL, "prompt_tuning", 4)]))
    with pytest.raises(SpaceError, match="a site holds at most one adapter"):
        AdapterPlan([_PROMPT, LayerSpec(0, MODEL, "prompt_tuning", 8)])
    with pytest.raises(SpaceError, match="cannot be placed at"):
        check_plan(topology, AdapterPlan([LayerSpec(0, MODEL, "lora", 4)]))


@pytest.mark.parametrize(
    ("name", "room"),
    [("bert", 512), ("roberta", 509), ("opt", 2048), ("gpt2", 1024), ("llama", None)],
)
def test_positions_are_those_a_model_has(name: str, room: int | None) -> None:
    backbone = build(name, device="meta")
    (path,) = backbone.layout.modules[0, MODEL]
    assert max_positions(backbone.model.get_submodule(path)) == room
    assert backbone.topology.shape(0, MODEL) == (min(room or 1024, 1024), 32)


@pytest.mark.parametrize("name", ["bert", "roberta", "opt", "gpt2"])
def test_rows_as_long_as_there_is_room_for_work_and_longer_ones_are_refused(name: str) -> None:
    attached, _ = _attach(name)
    room = _layer(attached)._max_positions
    assert room is not None
    ids = torch.full((1, room - _SIZE), 5)
    logits_of(attached.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    longer = torch.full((1, room - _SIZE + 1), 5)
    with pytest.raises(ValueError, match="use shorter rows"):
        logits_of(attached.model, {"input_ids": longer})


def test_room_is_what_the_longest_row_leaves() -> None:
    backbone = build("bert", device="meta")
    table = price_table(
        backbone, batch_size=2, mean_length=8, longest_length=506, prompt_sizes=(4, 6, 8)
    )
    assert table.topology.shape(0, MODEL) == (6, 32)
    assert set(table.longer) == {4, 6}
    with pytest.raises(SpaceError, match="smaller max_length"):
        table.price(candidate_of(AdapterPlan([LayerSpec(0, MODEL, "prompt_tuning", 8)])))
    with pytest.raises(SpaceError, match="prompts of that size were not priced"):
        table.price(candidate_of(AdapterPlan([LayerSpec(0, MODEL, "prompt_tuning", 5)])))
    free = price_table(build("llama", device="meta"), batch_size=1, mean_length=8, longest_length=9)
    assert free.topology.shape(0, MODEL) == (1024, 32)


def test_a_longer_prompt_costs_more_and_all_of_it_at_inference() -> None:
    backbone = build("gpt2", device="meta")
    sizes = methods.get("prompt_tuning").default_ranks
    table = price_table(
        backbone, batch_size=3, mean_length=14, longest_length=20, prompt_sizes=sizes
    )
    prices = [
        table.price(candidate_of(AdapterPlan([LayerSpec(0, MODEL, "prompt_tuning", size)])))
        for size in sizes
    ]
    for field in ("trainable_params", "train_flops", "peak_memory_bytes", "inference_flops"):
        values = [getattr(price, field) for price in prices]
        assert values == sorted(values)
        assert len(set(values)) == len(values)
    assert prices[0].inference_flops == table.longer[4].forward_flops - table.forward_flops > 0
