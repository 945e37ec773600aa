from __future__ import annotations

import pickle
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft import methods
from autopeft.costs import PriceTable, Topology, check_plan, count_trainable, is_legal
from autopeft.costs.usage import HIDDEN, independent, independent_sets
from autopeft.errors import SpaceError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.utils.serialize import to_plain

_SHAPES = {
    "attn.q": (64, 64),
    "attn.k": (32, 64),
    "attn.v": (32, 64),
    "attn.o": (64, 64),
    "mlp.up": (128, 64),
    "mlp.gate": (128, 64),
    "mlp.down": (64, 128),
    "norm": (64, 2),
}
_TOPOLOGY = Topology(4, _SHAPES, overrides={(3, "attn.q"): (48, 64), (0, "norm"): None})
_TABLE = PriceTable.from_topology(_TOPOLOGY, tokens_per_step=256, batch_size=8)
_SPECS = [
    spec
    for layer in range(4)
    for role in _TOPOLOGY.roles(layer)
    for method in methods.all_methods()
    for rank in method.default_ranks or (0,)
    if is_legal(_TOPOLOGY, spec := LayerSpec(layer, role, method.name, rank))
]


def _candidate(
    *specs: LayerSpec, dropout: float = 0.0, steps: int = 1, batch_size: int = 8
) -> Candidate:
    return Candidate(
        AdapterPlan(specs), TrainSettings(1e-3, dropout=dropout, steps=steps, batch_size=batch_size)
    )


@st.composite
def _plans(draw: st.DrawFn) -> AdapterPlan:
    chosen = draw(st.lists(st.sampled_from(_SPECS), max_size=12))
    return AdapterPlan({(spec.layer, spec.role): spec for spec in chosen}.values())


def test_a_topology_knows_its_sites() -> None:
    assert _TOPOLOGY.shape(0, "attn.q") == (64, 64)
    assert _TOPOLOGY.shape(3, "attn.q") == (48, 64)
    assert _TOPOLOGY.shape(0, "norm") is None
    assert _TOPOLOGY.shape(4, "attn.q") is None
    assert _TOPOLOGY.shape(-1, "attn.q") is None
    assert "norm" not in _TOPOLOGY.roles(0)
    assert set(_TOPOLOGY.roles(1)) == set(_SHAPES)
    fewer = _TOPOLOGY.without({"attn.q"})
    assert all(fewer.shape(layer, "attn.q") is None for layer in range(4))
    assert set(fewer.roles(1)) == set(_SHAPES) - {"attn.q"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LayerSpec(4, "attn.q", "lora", 2), "the model has 4 blocks"),
        (LayerSpec(0, "attn.qkv", "lora", 2), "no such role"),
        (LayerSpec(0, "norm", "ln_tuning"), "no such role"),
        (LayerSpec(1, "norm", "lora", 2), "cannot be placed at layer 1"),
        (
            LayerSpec(0, "attn.k", "lora", 33),
            r"`1 <= rank <= 32` must hold .* whose module is 32 x 64",
        ),
        (LayerSpec(0, "attn.k", "lora", 0), "must hold"),
        (LayerSpec(0, "attn.k", "ia3", 3), "`rank == 0` must hold"),
        (LayerSpec(0, "attn.k", "oft", 7), "divides the input width 64"),
        (LayerSpec(0, "attn.k", "lorra", 7), "did you mean 'lora'"),
    ],
)
def test_a_plan_that_does_not_fit_is_told_why(spec: LayerSpec, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        check_plan(_TOPOLOGY, AdapterPlan([spec]))
    if spec.method != "lorra":
        assert not is_legal(_TOPOLOGY, spec)


@given(_plans())
def test_parameters_add_up_over_sites(plan: AdapterPlan) -> None:
    check_plan(_TOPOLOGY, plan)
    shared, total, frozen = {}, 0, 0
    for spec in plan.specs:
        method, shape = methods.get(spec.method), _TOPOLOGY.shape(spec.layer, spec.role)
        assert shape is not None
        pool = method.pool(shape)
        common = method.shared_params(spec.rank, pool)
        shared[spec.method, spec.rank, pool] = common
        total += count_trainable(_TOPOLOGY, AdapterPlan([spec])) - common
        frozen += method.frozen_floats(spec.rank, shape, spec.role)
    total += sum(shared.values())
    assert count_trainable(_TOPOLOGY, plan) == total
    price = _TABLE.price(Candidate(plan, TrainSettings(1e-3)))
    assert price.trainable_params == total
    assert price.adapter_bytes == 4 * (total + frozen)


@given(_plans(), st.sampled_from(_SPECS))
def test_another_adapter_never_makes_a_plan_cheaper(plan: AdapterPlan, more: LayerSpec) -> None:
    kept = [s for s in plan.specs if (s.layer, s.role) != (more.layer, more.role)]
    small, large = (_TABLE.price(_candidate(*specs)) for specs in (kept, [*kept, more]))
    shape = _TOPOLOGY.shape(more.layer, more.role)
    assert shape is not None
    # An adapter may consist of a vector that others share: the second one adds no parameters.
    has_own = methods.get(more.method).n_params(more.rank, shape, more.role) > 0
    assert small.trainable_params + has_own <= large.trainable_params
    assert small.train_flops <= large.train_flops
    assert small.peak_memory_bytes <= large.peak_memory_bytes
    assert small.inference_flops <= large.inference_flops


def test_another_site_of_a_shared_vector_adds_no_parameters() -> None:
    first, second = (LayerSpec(layer, "attn.q", "unilora", 64) for layer in (2, 3))
    one, both = (_TABLE.price(_candidate(*specs)) for specs in ([first], [first, second]))
    assert one.trainable_params == both.trainable_params == 64
    assert one.train_flops < both.train_flops


def test_a_pack_holds_one_base_and_each_adapter() -> None:
    low, high = (_candidate(LayerSpec(layer, "attn.q", "lora", 4)) for layer in (1, 3))
    each = [_TABLE.pack_bytes([one]) for one in (low, high)]
    both = _TABLE.pack_bytes([low, high])
    assert each == [_TABLE.price(one).peak_memory_bytes for one in (low, high)]
    assert max(each) < both
    # The gradient of both goes down to the lower one.
    assert both > sum(each) - _TABLE.weight_bytes
    assert _TABLE.pack_bytes([high, low]) == both
    more = [_TABLE.pack_bytes([low] * n) for n in range(1, 6)]
    assert more == sorted(more)
    assert more[1] < 2 * more[0]


def test_a_lower_adapter_costs_a_longer_backward_pass() -> None:
    prices = [_TABLE.price(_candidate(LayerSpec(layer, "attn.v", "lora", 4))) for layer in range(4)]
    flops = [price.train_flops for price in prices]
    memory = [price.peak_memory_bytes for price in prices]
    assert flops == sorted(flops, reverse=True)
    assert memory == sorted(memory, reverse=True)
    assert flops[0] > 1.5 * flops[3]
    assert len({price.trainable_params for price in prices}) == 1


def test_two_adapters_that_read_one_tensor_keep_it_once() -> None:
    q, k = (LayerSpec(2, role, "lora", 1) for role in ("attn.q", "attn.k"))
    alone = _TABLE.saved_bytes(_candidate(q)), _TABLE.saved_bytes(_candidate(k))
    both = _TABLE.saved_bytes(_candidate(q, k))
    # Their shared input is 256 tokens x 64 floats; attention's own tensors are kept once as well.
    assert both < sum(alone) - 256 * 64 * 4
    dropped = _candidate(q, k, dropout=0.1)
    assert _TABLE.saved_bytes(dropped) == both + 256 * 64 * 4


def test_steps_and_rows_scale() -> None:
    spec = LayerSpec(1, "attn.q", "lora", 2)
    one = _TABLE.price(_candidate(spec))
    assert _TABLE.price(_candidate(spec, steps=10)).train_flops == 10 * one.train_flops
    assert _TABLE.price(_candidate(spec, batch_size=16)).train_flops == 2 * one.train_flops
    assert _TABLE.price(_candidate(spec, batch_size=16)).inference_flops == 2 * one.inference_flops


def test_the_untouched_base_costs_no_training() -> None:
    price = _TABLE.price(_candidate())
    assert price.trainable_params == 0
    assert price.train_flops == 0
    assert price.peak_memory_bytes == _TABLE.weight_bytes


def test_a_head_is_trained_with_every_plan() -> None:
    table = PriceTable.from_topology(Topology(2, _SHAPES, head_params=130))
    assert table.price(_candidate()).trainable_params == 130
    assert table.price(_candidate()).train_flops > 0
    lora = LayerSpec(0, "attn.q", "lora", 1)
    assert table.price(_candidate(lora)).trainable_params == 130 + 128


def test_a_decoder_above_an_encoder_is_crossed_by_the_backward_pass() -> None:
    shapes = {**_SHAPES, "cross.q": (64, 64), "cross.k": (64, 64), "cross.v": (64, 64)}
    shapes["cross.o"] = (64, 64)
    none = {(layer, role): None for layer in (0, 1) for role in shapes if role.startswith("cross")}
    table = PriceTable.from_topology(Topology(4, shapes, overrides=none, n_encoder_layers=2))
    top, bottom, encoder = (
        table.price(_candidate(LayerSpec(layer, "mlp.down", "lora", 1))).train_flops
        for layer in (3, 2, 1)
    )
    assert top < bottom < encoder


def test_a_plan_beyond_the_model_is_refused() -> None:
    fine = LayerSpec(2, "attn.q", "lora", 1)
    for spec in (
        LayerSpec(7, "attn.q", "lora", 1),
        LayerSpec(0, "cross.q", "lora", 1),
        LayerSpec(0, "norm", "ln_tuning"),
        LayerSpec(0, "attn.q", "lora", 65),
    ):
        with pytest.raises(SpaceError):
            _TABLE.price(_candidate(spec))
        with pytest.raises(SpaceError):
            _TABLE.price(_candidate(fine, spec))


_CHAIN = {HIDDEN: frozenset("abc"), "a": frozenset("c"), "b": frozenset("c"), "c": frozenset()}


def test_sources_downstream_of_others_change_nothing() -> None:
    assert independent({"a", "c"}, _CHAIN) == {"a"}
    assert independent({"a", "b", "c"}, _CHAIN) == {"a", "b"}
    assert independent({HIDDEN, "b"}, _CHAIN) == {HIDDEN}
    assert set(independent_sets(_CHAIN)) == {
        frozenset(),
        frozenset({"a"}),
        frozenset({"b"}),
        frozenset({"a", "b"}),
        frozenset({"c"}),
        frozenset({HIDDEN}),
    }


@pytest.mark.benchmark
def test_pricing_a_large_plan_takes_about_a_millisecond() -> None:
    topology = Topology(80, _SHAPES)
    table = PriceTable.from_topology(topology)
    roles = [role for role in _SHAPES if role != "norm"]
    plans = [
        AdapterPlan(
            LayerSpec(layer, role, ("lora", "dora", "miss")[(layer + i) % 3], 1 + (layer * i) % 4)
            for layer in range(80)
            for role in roles
        )
        for i in range(6)
    ]
    seconds = []
    for plan in plans:
        started = time.perf_counter()
        table.price(Candidate(plan, TrainSettings(1e-3)))
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 2e-3


def test_a_table_is_a_value() -> None:
    again = pickle.loads(pickle.dumps(_TABLE))
    assert again == _TABLE
    candidate = _candidate(LayerSpec(1, "norm", "ln_tuning"))
    assert again.price(candidate) == _TABLE.price(candidate)
    assert set(to_plain(_TABLE.price(candidate))) == {
        "trainable_params",
        "adapter_bytes",
        "train_flops",
        "peak_memory_bytes",
        "inference_flops",
        "others",
    }


def test_a_prompt_makes_every_block_longer() -> None:
    topology = Topology(4, {**_SHAPES, "model": (50, 64)})
    options: dict[str, Any] = {"tokens_per_step": 256, "batch_size": 8}
    table = PriceTable.from_topology(topology, prompt_sizes=(4, 16), **options)
    longer = PriceTable.from_topology(topology, tokens_per_step=256 + 8 * 16, batch_size=8)
    lowest = LayerSpec(0, "attn.q", "ia3")
    prompt = LayerSpec(0, "model", "prompt_tuning", 16)
    price = table.price(_candidate(prompt))
    assert price.trainable_params == 16 * 64
    # The backward pass goes through the first block, too.
    assert price.train_flops > longer.price(_candidate(lowest)).train_flops
    assert price.inference_flops == longer.forward_flops - table.forward_flops > 0
    assert table.saved_bytes(_candidate(prompt)) > longer.saved_bytes(_candidate(lowest))
    # Whatever has no prompt costs what it does without the method.
    plain = PriceTable.from_topology(topology, **options)
    assert table.price(_candidate(lowest)) == plain.price(_candidate(lowest))
    both, one = table.price(_candidate(lowest, prompt)), table.price(_candidate(lowest))
    assert both.trainable_params == price.trainable_params + one.trainable_params
    with pytest.raises(SpaceError, match="priced: 4, 16"):
        table.price(_candidate(LayerSpec(0, "model", "prompt_tuning", 8)))
    assert pickle.loads(pickle.dumps(table)) == table
