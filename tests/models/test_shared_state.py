"""Methods whose sites share parameters or random matrices, beyond what every method must do."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tiny_models import batch_for, build, candidate_of, disturb, logits_of

from autopeft import methods
from autopeft.costs import PriceTable, count_trainable
from autopeft.models.attach import attach, groups_of
from autopeft.models.backbone import Backbone
from autopeft.models.saving import save_adapter
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.utils.quiet import quiet_peft, quiet_transformers

_SHARING = [method.name for method in methods.all_methods() if method.shared_state]
_BANKED = [n for n in _SHARING if methods.get(n).shared_params(4, 16)]
_RELOAD = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_models import batch_for, build, logits_of
from autopeft.models.saving import load_adapter
for folder in Path(sys.argv[2]).iterdir():
    backbone = build("llama")
    model = load_adapter(backbone.model, folder)
    torch.save(logits_of(model, batch_for(backbone)), folder / "logits.pt")
"""


def _wide() -> Backbone:
    """A Llama as wide as Vb-LoRA's vectors are long, with grouped queries."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=60,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=384,
            use_cache=False,
            pad_token_id=2,
        )
        model = hf.AutoModelForCausalLM.from_config(config).eval()
    return Backbone(model, auto_class="AutoModelForCausalLM")


def _everywhere(backbone: Backbone, method: str, rank: int = 4) -> AdapterPlan:
    topology = backbone.topology
    found = methods.get(method)
    return AdapterPlan(
        LayerSpec(layer, role, method, rank)
        for layer in range(topology.n_layers)
        for role in topology.roles(layer)
        if role in found.roles and found.is_legal_rank(rank, topology.shapes[role])
    )


def test_which_methods_share() -> None:
    assert set(_SHARING) == {
        "vera",
        "pvera",
        "vblora",
        "unilora",
        "tinylora",
        "tinylora_tied",
        "randlora",
    }
    assert set(_BANKED) == {"vblora", "unilora", "tinylora_tied"}


@pytest.mark.parametrize("method", _BANKED)
def test_what_is_shared_is_trained_and_counted_once_for_each_size(method: str) -> None:
    backbone = build("llama")
    sites = [(0, "attn.q"), (0, "attn.o"), (1, "attn.q"), (1, "attn.o")]
    shape = backbone.topology.shapes["attn.q"]
    found = methods.get(method)
    pool = found.pool(shape)
    plan = AdapterPlan(LayerSpec(*site, method, 2) for site in sites)
    mixed = AdapterPlan(LayerSpec(*site, method, 2 + i % 2) for i, site in enumerate(sites))
    own = found.n_params(2, shape)
    assert count_trainable(backbone.topology, plan) == 4 * own + found.shared_params(2, pool)
    assert count_trainable(backbone.topology, mixed) == (
        2 * own
        + found.shared_params(2, pool)
        + 2 * found.n_params(3, shape)
        + found.shared_params(3, pool)
    )
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        (group,) = attached.parameter_groups()
        assert len({id(p) for p in group.parameters}) == len(group.parameters)
        before = logits_of(attached.model, batch_for(backbone))
        (shared,) = [p for p in group.parameters if p.numel() == found.shared_params(2, pool)]
        with torch.no_grad():
            shared.add_(1.0)
        for site in sites:  # One number moved, and every site with it.
            layer = attached.model.get_submodule(backbone.layout.modules[site][0])
            assert any(p is shared for p in layer.parameters())
        assert not torch.equal(logits_of(attached.model, batch_for(backbone)), before)


@pytest.mark.parametrize("method", _SHARING)
@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_all_sites_at_once_come_back_in_plain_peft(name: str, method: str, tmp_path: Path) -> None:
    """What a site gets of the shared state depends on its place: peft must find the same."""
    make = _wide if name == "wide" else lambda: build("llama")
    backbone = make()
    batch = batch_for(backbone)
    plan = _everywhere(backbone, method)
    table = PriceTable.from_topology(backbone.topology)
    with attach(backbone, candidate_of(plan), seed=1) as attached:
        disturb(attached)
        logits = logits_of(attached.model, batch)
        save_adapter(attached, tmp_path, base_model="tiny")
    folders = [path.parent for path in sorted(tmp_path.rglob("adapter_config.json"))]
    assert len(folders) == len(groups_of(plan, backbone.layout))
    stored = sum(t.numel() for f in folders for t in load_file(next(f.glob("*.sa*"))).values())
    assert stored * 4 == table.price(candidate_of(plan)).adapter_bytes
    model = make().model
    with quiet_peft(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # Said of what the folder before has put in.
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        for folder in folders:
            theirs = peft.PeftModel.from_pretrained(model, str(folder)).eval()
            model = theirs.base_model.model
            del model.peft_config  # Another folder is another adapter of other modules.
    assert torch.equal(logits_of(model, batch), logits)


def test_another_process_finds_the_same_logits(tmp_path: Path) -> None:
    backbone = build("llama")
    logits = {}
    for method in _SHARING:
        specs = [s for s in _everywhere(backbone, method).specs if s.role != "mlp.up"]
        plan = AdapterPlan(
            [*specs, LayerSpec(0, "mlp.up", "lora", 2), LayerSpec(1, "norm", "ln_tuning")]
        )
        with attach(backbone, candidate_of(plan), seed=1) as attached:
            disturb(attached)
            logits[method] = logits_of(attached.model, batch_for(backbone))
            save_adapter(attached, tmp_path / method, base_model="tiny")
    helpers = str(Path(__file__).parents[1] / "helpers")
    subprocess.run([sys.executable, "-c", _RELOAD, helpers, str(tmp_path)], check=True, timeout=120)
    for method, expected in logits.items():
        assert torch.equal(torch.load(tmp_path / method / "logits.pt"), expected), method


def test_unlike_sites_of_randlora_are_configurations_of_their_own() -> None:
    backbone = build("llama")
    groups = groups_of(_everywhere(backbone, "randlora"), backbone.layout)
    assert [group.pool for group in groups] == [-32, 16, 32]
    assert {len(group.ranks) for group in groups} == {4, 6}


def test_vectors_are_as_long_as_the_modules_allow(tmp_path: Path) -> None:
    backbone = _wide()
    plan = _everywhere(backbone, "vblora")
    with attach(backbone, candidate_of(plan), seed=1) as attached:
        save_adapter(attached, tmp_path)
    configs = [json.loads(path.read_text()) for path in tmp_path.rglob("adapter_config.json")]
    assert {(c["vector_length"], c["num_vectors"]) for c in configs} == {(64, 64), (128, 90)}
    assert not methods.get("vblora").is_legal_rank(1, (12, 8))
    assert "multiples of 8" in methods.get("vblora").rank_rule((12, 8))
