from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

import autopeft.models.tuners  # noqa: F401 (makes peft know autopeft's own)
from autopeft import methods
from autopeft.errors import SpaceError
from autopeft.methods import HEAD, HEAD_RATES, Method
from autopeft.methods.base import Shape
from autopeft.models.method_hooks import SvdCache, hooks_for
from autopeft.plan import ROLES, TrainSettings
from autopeft.utils.quiet import quiet_peft

_NAMES = [method.name for method in methods.all_methods()]
_LINEAR = [method.name for method in methods.all_methods() if "attn.q" in method.roles]
_TRAIN = TrainSettings(1e-3, alpha_ratio=2.0, dropout=0.1)


def test_a_method_that_peft_cannot_find_is_refused_when_it_is_made() -> None:
    beft = type(methods.get("beft"))
    nameless = type("Nameless", (beft,), {"peft_type": ""})
    with pytest.raises(TypeError, match="Nameless must set peft_type or define peft_config"):
        nameless(name="nameless", learning_rate=(1e-4, 1e-2))
    configured = type("Configured", (nameless,), {"peft_config": lambda self, rank, train: {}})
    assert configured(name="configured", learning_rate=(1e-4, 1e-2)).name == "configured"


def _adapt(method: Method, rank: int, shape: Shape, role: str = "attn.q") -> nn.Module:
    """peft's own layer around one linear module."""
    holder = nn.Module()
    holder.add_module("m", nn.Linear(shape[1], shape[0]).requires_grad_(False))
    arguments = method.peft_config(rank, _TRAIN) | method.pool_config(method.pool(shape))
    kind = arguments.pop("peft_type")
    if method.input_side_argument:
        arguments[method.input_side_argument] = ["m"] if role in method.input_side_roles else []
    hooks = hooks_for(method.name)
    with quiet_peft(), hooks.around_injection(holder):
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=["m"], **arguments)
        PEFT_TYPE_TO_TUNER_MAPPING[kind](holder, {"default": config}, "default")
    layer = holder.get_submodule("m")
    hooks.after_injection({"m": layer}, SvdCache())
    return layer


def test_the_seven_methods_of_the_first_issue_are_there() -> None:
    assert {"lora", "dora", "rslora", "ia3", "oft", "ln_tuning", "miss"} <= set(_NAMES)
    assert len(set(_NAMES)) == len(_NAMES)
    assert all(methods.get(name).name == name for name in _NAMES)


@pytest.mark.parametrize(
    ("wrong", "near"), [("loar", "lora"), ("DORA", "dora"), ("ln-tuning", "ln_tuning")]
)
def test_an_unknown_method_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(SpaceError, match=f"did you mean '{near}'"):
        methods.get(wrong)


@pytest.mark.parametrize("name", sorted(methods.LEFT_OUT))
def test_a_method_that_was_left_out_says_why(name: str) -> None:
    assert name not in _NAMES
    with pytest.raises(SpaceError, match=re.escape(methods.LEFT_OUT[name])):
        methods.get(name)


def test_a_name_like_no_other_gets_the_whole_list() -> None:
    with pytest.raises(SpaceError, match="use one of lora, dora"):
        methods.get("zzzz")


@pytest.mark.parametrize("name", _NAMES)
def test_what_a_method_says_of_itself_is_sound(name: str) -> None:
    method = methods.get(name)
    low, high = method.learning_rate
    assert 0 < low < high < 10
    assert methods.learning_rate_range(name) == (low, high)
    assert method.roles
    assert set(method.roles) <= set(ROLES)
    assert set(method.input_side_roles) <= set(method.roles)
    assert list(method.default_ranks) == sorted(set(method.default_ranks))
    assert json.loads(json.dumps(method.peft_config(4, _TRAIN)))["peft_type"]
    assert "target_modules" not in method.peft_config(4, _TRAIN)


def test_a_head_has_a_range_of_rates_too() -> None:
    assert methods.learning_rate_range(HEAD) == HEAD_RATES
    assert HEAD_RATES[0] < HEAD_RATES[1]


@pytest.mark.parametrize("name", _LINEAR)
@pytest.mark.parametrize("role", ["attn.q", "mlp.down"])
@given(out=st.integers(2, 40), in_=st.integers(2, 40), pick=st.integers(0, 100))
def test_the_count_of_parameters_is_exact(
    name: str, role: str, out: int, in_: int, pick: int
) -> None:
    method = methods.get(name)
    ranks = [r for r in range(41) if method.is_legal_rank(r, (out, in_))]
    if not ranks:
        return
    rank = ranks[pick % len(ranks)]
    layer = _adapt(method, rank, (out, in_), role)
    live = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    shared = method.shared_params(rank, method.pool((out, in_)))
    assert method.n_params(rank, (out, in_), role) + shared == live


@pytest.mark.parametrize("name", _LINEAR)
@given(out=st.integers(2, 24), in_=st.integers(2, 24), rank=st.integers(0, 30))
def test_a_legal_rank_can_be_attached_and_run(name: str, out: int, in_: int, rank: int) -> None:
    method = methods.get(name)
    if not method.is_legal_rank(rank, (out, in_)):
        assert method.rank_rule((out, in_))
        return
    layer = _adapt(method, rank, (out, in_))
    assert layer(torch.ones(2, in_)).shape == (2, out)


def test_legal_ranks_respect_the_module() -> None:
    def legal(name: str, shape: tuple[int, int]) -> list[int]:
        return [rank for rank in range(33) if methods.get(name).is_legal_rank(rank, shape)]

    assert legal("lora", (4, 100)) == [1, 2, 3, 4]
    assert legal("ia3", (4, 4)) == [0]
    assert not methods.get("oft").is_legal_rank(1, (8, 8))
    assert not methods.get("oft").is_legal_rank(3, (8, 8))
    assert not methods.get("lora").is_legal_rank(0, (8, 8))
    assert not methods.get("ia3").is_legal_rank(2, (8, 8))


def test_costs_grow_with_rank() -> None:
    for name in ("lora", "dora", "rslora", "miss", "oft"):
        method = methods.get(name)
        small, large = ((method.n_params(r, (64, 64)), method.flops(r, (64, 64))) for r in (2, 8))
        assert small[0] < large[0]
        assert small[1].forward_per_token < large[1].forward_per_token


def test_lora_is_scaled_by_alpha_over_rank_whatever_the_rank() -> None:
    scalings = {_adapt(methods.get("lora"), r, (32, 32)).scaling["default"] for r in (1, 4, 16)}
    assert scalings == {2.0}
    rslora = _adapt(methods.get("rslora"), 16, (32, 32))
    assert rslora.scaling["default"] == 2.0 * 16**0.5


def test_a_constant_alpha_is_divided_by_the_rank_and_needs_no_pattern() -> None:
    train = replace(_TRAIN, alpha=16.0)
    for name in ("lora", "loha", "gralora", "adalora"):
        ranks = [2, 8]
        configs = [methods.get(name).peft_config(rank, train) for rank in ranks]
        argument = "alpha" if "alpha" in configs[0] else "lora_alpha"
        assert [config[argument] for config in configs] == [16, 16], name
    config = methods.get("lora").peft_config_for({"a": 4, "b": 2, "c": 4}, train)
    assert (config["lora_alpha"], config["rank_pattern"]) == (16, {"b": 2})
    assert "alpha_pattern" not in config


def test_several_ranks_are_one_configuration_where_peft_can() -> None:
    lora = methods.get("lora")
    config = lora.peft_config_for({"a": 4, "b": 2, "c": 4}, _TRAIN)
    assert config["r"] == 4
    assert config["rank_pattern"] == {"b": 2}
    assert config["alpha_pattern"] == {"b": 4}
    assert "rank_pattern" not in lora.peft_config_for({"a": 4, "b": 4}, _TRAIN)
    with pytest.raises(ValueError, match="unpack"):
        methods.get("oft").peft_config_for({"a": 2, "b": 4}, _TRAIN)


@pytest.mark.parametrize("name", [n for n in _LINEAR if methods.get(n).converts_to_lora])
def test_what_converts_to_lora_changes_a_weight_by_a_low_rank(name: str) -> None:
    method = methods.get(name)
    out, in_ = 96, 64
    rank = next(r for r in range(1, 65) if method.is_legal_rank(r, (out, in_)))
    torch.manual_seed(0)
    layer = _adapt(method, rank, (out, in_))
    base = layer.get_base_layer().weight
    before = base.detach().clone()
    with torch.no_grad():
        if method.changes_base:  # The weight was rewritten; what it was can be told from the start.
            before = layer.get_delta_weight("default") + base
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    layer.eval()
    layer.merge(safe_merge=True)
    values = torch.linalg.svdvals((layer.get_base_layer().weight - before).detach().double())
    n_directions = int((values > 1e-4 * values[0]).sum())
    assert n_directions <= min(16, method.lora_rank(rank, (out, in_)))


def test_methods_and_pricing_need_no_torch(fresh_python: Callable[[str], str]) -> None:
    code = "import autopeft.methods, autopeft.costs, sys; print('torch' in sys.modules)"
    assert fresh_python(code) == "False"
