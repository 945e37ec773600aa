"""The price is the truth: measured again on live models, under `FlopCounterMode` and hooks."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, batch_for, build, candidate_of, prompt_sizes_of, random_plan, save
from torch.utils.flop_counter import FlopCounterMode

from autopeft import methods
from autopeft.costs import PriceTable, Topology
from autopeft.errors import ModelError
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone, build_meta
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec
from autopeft.profiling import block
from autopeft.profiling.counters import run_and_count, storage_id
from autopeft.profiling.measure import price_table

_ROWS, _LENGTH = 3, 14
_SIZE = 4
"""Virtual tokens of the prompts in random plans: a table measures each size by itself."""
_KNOWN: dict[str, tuple[Backbone, PriceTable]] = {}


def _known(name: str) -> tuple[Backbone, PriceTable]:
    if name not in _KNOWN:
        table = price_table(
            build(name, device="meta"),
            batch_size=_ROWS,
            mean_length=_LENGTH,
            longest_length=_LENGTH,
            prompt_sizes=(_SIZE,),
        )
        _KNOWN[name] = (build(name), table)
    return _KNOWN[name]


def _plan(topology: Topology, seed: int) -> AdapterPlan:
    """A random plan; a prompt in it has the one size that is measured."""
    specs = random_plan(topology, seed).specs
    return AdapterPlan(
        dataclasses.replace(spec, rank=_SIZE) if spec.role == MODEL else spec for spec in specs
    )


def _check(name: str, candidate: Candidate) -> None:
    backbone, table = _known(name)
    batch = batch_for(backbone, rows=_ROWS, length=_LENGTH)
    if "input_ids" in batch:
        batch["input_ids"][:, -1] = 1  # The end token.
    price = table.price(candidate)
    with attach(backbone, candidate, seed=0) as attached:
        attached.model.train()
        live = sum(p.numel() for p in attached.model.parameters() if p.requires_grad)
        assert price.trainable_params == live
        if not live:
            assert price.train_flops == 0
            return
        with FlopCounterMode(display=False) as counter:
            attached.model(**batch).loss.backward()
        assert price.train_flops == pytest.approx(counter.get_total_flops(), rel=0.02)
        run = run_and_count(lambda: attached.model(**batch).loss, not_kept=attached.model)
        assert table.saved_bytes(candidate) == pytest.approx(run.saved_bytes, rel=0.10)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit"])
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), dropout=st.sampled_from([0.0, 0.1]))
def test_price_is_what_the_live_model_costs(name: str, seed: int, dropout: float) -> None:
    topology = _known(name)[0].topology
    _check(name, candidate_of(_plan(topology, seed), dropout=dropout, batch_size=_ROWS))


@pytest.mark.parametrize(
    "name",
    [
        "albert",
        "bart",
        "falcon",
        "gemma3",
        "gpt_neox",
        "llama-cls",
        "modernbert",
        "opt",
        "phi3",
        "qwen3",
    ],
)
def test_price_is_right_for_further_families(name: str) -> None:
    topology = _known(name)[0].topology
    for seed in range(2):
        _check(name, candidate_of(_plan(topology, seed), batch_size=_ROWS))


def test_price_is_right_for_a_hybrid(monkeypatch: pytest.MonkeyPatch) -> None:
    def config() -> Any:
        found = KINDS["jamba"].config()
        found.num_experts = 1  # FlopCounterMode does not count the kernel of several.
        return found

    monkeypatch.setitem(KINDS, "hybrid", dataclasses.replace(KINDS["jamba"], config=config))
    topology = _known("hybrid")[0].topology
    for seed in range(5):
        _check("hybrid", candidate_of(_plan(topology, seed), batch_size=_ROWS))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_classifier_that_reads_the_end_token_is_priced(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = dataclasses.replace(
        KINDS[family],
        auto_class="AutoModelForSequenceClassification",
        head=("classification_head.dense", "classification_head.out_proj"),
    )
    monkeypatch.setitem(KINDS, f"{family}-cls", classifier)
    topology = _known(f"{family}-cls")[0].topology
    assert topology.head_params > 32 * 32
    for seed in range(4):
        candidate = candidate_of(_plan(topology, seed), batch_size=_ROWS)
        _check(f"{family}-cls", candidate)


@pytest.mark.parametrize("name", ["llama", "gemma3", "modernbert"])
@pytest.mark.parametrize("layer", [0, 1])
def test_masks_and_rotary_tables_count_once_for_all_blocks(name: str, layer: int) -> None:
    backbone, table = _known(name)
    role = "attn.qkv" if name == "modernbert" else "attn.q"
    candidate = candidate_of(AdapterPlan([LayerSpec(layer, role, "lora", 2)]), batch_size=_ROWS)
    batch = batch_for(backbone, rows=_ROWS, length=_LENGTH)
    with attach(backbone, candidate, seed=0) as attached:
        attached.model.train()
        run = run_and_count(lambda: attached.model(**batch).loss, not_kept=attached.model)
    assert table.saved_bytes(candidate) == run.saved_bytes
    shared = {
        number: size
        for block in table.blocks
        for usage in block.usages.values()
        for number, size in usage.context.items()
    }
    assert sum(shared.values()) > 0
    without = dataclasses.replace(
        table,
        blocks=tuple(
            dataclasses.replace(
                block,
                usages={s: dataclasses.replace(u, context={}) for s, u in block.usages.items()},
            )
            for block in table.blocks
        ),
    )
    missing = table.price(candidate).peak_memory_bytes - without.price(candidate).peak_memory_bytes
    assert 0 < missing <= sum(shared.values())


def test_only_the_part_above_the_lowest_adapter_has_a_backward_pass() -> None:
    table = _known("bert")[1]

    def flops(layer: int, role: str) -> float:
        plan = AdapterPlan([LayerSpec(layer, role, "ia3")])
        return table.price(candidate_of(plan, batch_size=_ROWS)).train_flops

    ordered = [flops(1, "mlp.down"), flops(1, "mlp.up"), flops(1, "attn.o"), flops(1, "attn.q")]
    ordered += [flops(0, "mlp.up"), flops(0, "attn.q")]
    assert ordered == sorted(ordered)
    assert len(set(ordered)) > 4


def test_a_new_head_is_trained_and_priced_alone_or_with_adapters() -> None:
    backbone, table = _known("bert")
    price = table.price(candidate_of(AdapterPlan(), batch_size=_ROWS))
    assert price.trainable_params == backbone.topology.head_params == 32 * 3 + 3
    assert price.adapter_bytes == 4 * price.trainable_params
    _check("bert", candidate_of(AdapterPlan(), batch_size=_ROWS))


def test_steps_and_rows_scale_the_price() -> None:
    table = _known("llama")[1]
    plan = AdapterPlan([LayerSpec(1, "attn.v", "lora", 2)])
    one = candidate_of(plan, batch_size=_ROWS)
    many = Candidate(plan, dataclasses.replace(one.train, steps=7, batch_size=2 * _ROWS))
    assert table.price(many).train_flops == pytest.approx(14 * table.price(one).train_flops)
    assert table.saved_bytes(many) == pytest.approx(2 * table.saved_bytes(one))
    assert table.price(many).peak_memory_bytes > table.price(one).peak_memory_bytes


def test_flops_are_for_the_mean_row_and_memory_for_the_longest() -> None:
    backbone = build("bert", device="meta")
    plan = random_plan(backbone.topology, 3, share=0.5)
    rows: dict[str, Any] = {"batch_size": 2, "prompt_sizes": prompt_sizes_of(plan)}
    short = price_table(backbone, mean_length=8, longest_length=8, **rows)
    mixed = price_table(backbone, mean_length=8.4, longest_length=24, **rows)
    long = price_table(backbone, mean_length=24, longest_length=24, **rows)
    candidate = candidate_of(plan, batch_size=2)
    assert mixed.price(candidate).train_flops == short.price(candidate).train_flops
    assert mixed.saved_bytes(candidate) == long.saved_bytes(candidate)


def test_the_table_is_plain_data() -> None:
    table = _known("t5")[1]
    again: PriceTable = pickle.loads(pickle.dumps(table))
    assert again == table
    candidate = candidate_of(random_plan(table.topology, 0, share=0.5))
    assert again.price(candidate) == table.price(candidate)
    assert b"torch" not in pickle.dumps(table)


def test_weights_are_counted_once_and_never_made() -> None:
    backbone, table = _known("gpt2")  # Its head is tied to its embeddings.
    n = sum(p.numel() for p in backbone.model.parameters())
    assert table.base_params == n
    assert table.weight_bytes == 4 * n
    assert all(p.is_meta for p in build("gpt2", device="meta").model.parameters())


def test_a_saved_model_is_priced_as_it_will_be_loaded(tmp_path: object) -> None:
    folder = save("bert", tmp_path)
    backbone = build_meta(
        folder, auto_class="AutoModelForSequenceClassification", model_kwargs={"num_labels": 3}
    )
    table = price_table(
        backbone,
        batch_size=_ROWS,
        mean_length=_LENGTH,
        longest_length=_LENGTH,
        prompt_sizes=(_SIZE,),
    )
    assert table.topology == _known("bert")[1].topology
    candidate = candidate_of(_plan(table.topology, 5), batch_size=_ROWS)
    assert table.price(candidate) == _known("bert")[1].price(candidate)


def test_what_a_cache_serves_costs_no_step_anything() -> None:
    backbone, table = _known("bert")
    cached = dataclasses.replace(table, has_activation_cache=True)
    batch = batch_for(backbone, rows=_ROWS, length=_LENGTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.model(**batch)
    counts = counter.get_flop_counts()
    block = sum(counts[f"{type(backbone.model).__name__}.bert.encoder.layer.0"].values())
    assert block > 0

    def saved(*specs: LayerSpec) -> float:
        candidate = candidate_of(AdapterPlan(specs), batch_size=_ROWS)
        return table.price(candidate).train_flops - cached.price(candidate).train_flops

    assert saved(LayerSpec(0, "mlp.down", "lora", 2)) == 0
    upper = LayerSpec(1, "attn.q", "lora", 2)
    assert saved(upper) == pytest.approx(block)
    assert saved(upper, LayerSpec(0, "mlp.down", "lora", 2)) == 0
    assert saved() == pytest.approx(2 * block)
    # Encoder-decoders and blocks that are run several times have no such cache.
    for name in ("t5", "albert"):
        backbone, table = _known(name)
        cached = dataclasses.replace(table, has_activation_cache=True)
        candidate = candidate_of(random_plan(backbone.topology, 3, share=0.1), batch_size=_ROWS)
        assert cached.price(candidate) == table.price(candidate)


@pytest.mark.parametrize(
    ("sites", "backward"),
    [
        ([(0, "attn.q")], {"gate_up": 2, "down": 2}),
        # In the lowest block no gradient goes further down, but the weights get theirs.
        ([(1, "experts.gate_up")], {"gate_up": 1, "down": 1}),
        ([(1, "experts.down")], {"down": 1}),
        ([(0, "experts.gate_up"), (1, "experts.down")], {"gate_up": 2, "down": 3}),
    ],
)
def test_experts_are_priced_by_the_tokens_they_see(
    sites: list[tuple[int, str]], backward: dict[str, int]
) -> None:
    backbone, table = _known("mixtral")
    plan = AdapterPlan(LayerSpec(layer, role, "lora", 2) for layer, role in sites)
    candidate = candidate_of(plan, batch_size=_ROWS)
    batch = batch_for(backbone, rows=_ROWS, length=_LENGTH)
    with attach(backbone, candidate, seed=0) as attached:
        attached.model.train()
        with FlopCounterMode(display=False) as counter:
            attached.model(**batch).loss.backward()
        run = run_and_count(lambda: attached.model(**batch).loss, not_kept=attached.model)
    assert table.saved_bytes(candidate) == pytest.approx(run.saved_bytes, rel=0.10)
    # The counter leaves the experts' fused kernel out, for each of two experts a token: forward in
    # both blocks, and backward for each gradient of an input or of weights.
    sizes = {"gate_up": 96 * 32, "down": 32 * 48}
    products = sum(size * (2 + backward.get(name, 0)) for name, size in sizes.items())
    experts = 2 * 2 * products * _ROWS * _LENGTH
    assert table.price(candidate).train_flops == pytest.approx(
        counter.get_total_flops() + experts, rel=0.02
    )


def test_experts_that_are_multiplied_in_an_unknown_way_are_not_priced_at_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block, "_PRODUCTS", ("einsum",))
    with pytest.raises(ModelError, match=r"experts\.gate_up, experts\.down is not known"):
        price_table(
            build("mixtral", device="meta"),
            batch_size=_ROWS,
            mean_length=_LENGTH,
            longest_length=_LENGTH,
        )


def test_a_model_of_70_billion_is_priced_without_its_weights() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    backbone = Backbone(model, auto_class="AutoModelForCausalLM")
    table = price_table(backbone, batch_size=2, mean_length=128, longest_length=128)
    plan = AdapterPlan(LayerSpec(layer, "attn.q", "lora", 8) for layer in range(80))
    price = table.price(candidate_of(plan, batch_size=2))
    assert table.base_params > 68e9
    assert price.trainable_params == 80 * 8 * 2 * 8192
    # Forward, and back to the lowest adapter, through every weight but the embeddings.
    assert price.train_flops == pytest.approx(4 * table.base_params * 2 * 128, rel=0.05)


def test_what_depends_on_the_data_cannot_be_priced() -> None:
    backbone = build("bert", device="meta")
    query = backbone.model.get_submodule("bert.encoder.layer.0.attention.self.query")

    def look(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        bool(args[0].sum() > 0)

    query.register_forward_pre_hook(look)
    with pytest.raises(ModelError, match="depends on the data"):
        price_table(backbone, batch_size=2, mean_length=4, longest_length=4)


@pytest.mark.parametrize(
    "method", ["lora", "lora_fa", "boft", "psoft", "road", "osf", "shira", "supertuning"]
)
@pytest.mark.parametrize("role", ["attn.q", "mlp.up", "mlp.down"])
def test_what_a_site_holds_besides_is_counted(method: str, role: str) -> None:
    backbone = _known("bert")[0]
    shape = backbone.topology.shape(0, role)
    assert shape is not None
    described = methods.get(method)
    ranks = [rank for rank in described.default_ranks if described.is_legal_rank(rank, shape)]
    spec = LayerSpec(0, role, method, ranks[-1])
    base = {storage_id(t) for t in (*backbone.model.parameters(), *backbone.model.buffers())}
    with attach(backbone, candidate_of(AdapterPlan([spec])), seed=0) as attached:
        (layer,) = attached.parts[0].layers.values()
        others = getattr(layer, "shira_indices", {}).values()
        held = {
            storage_id(t): t.untyped_storage().nbytes()
            for t in (*layer.parameters(), *layer.buffers(), *others)
            if not t.requires_grad and storage_id(t) not in base
        }
    assert 4 * described.held_floats(spec.rank, shape, role) == sum(held.values())
