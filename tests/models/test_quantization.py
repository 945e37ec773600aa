"""Quantized base models: loading, price, every method that says it bears them, files, refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from covering import covering
from tiny_models import (
    KINDS,
    assert_same_state,
    batch_for,
    candidate_of,
    disturb,
    logits_of,
    plan_of,
    save,
)
from torch import nn

from autopeft import methods
from autopeft.costs import check_plan, is_legal
from autopeft.errors import AdapterError, SettingsError, SpaceError
from autopeft.models import quantization
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone, build_meta, load_backbone
from autopeft.models.export import export_adapter, export_merged
from autopeft.models.quantization import SCHEMES, check_backend, quantized_modules
from autopeft.models.saving import load_adapter, load_attached, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.profiling.measure import price_table
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import SearchSettings
from autopeft.utils.quiet import quiet_transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

_BEARING = [m.name for m in methods.all_methods() if m.quantized_base]
_LM = "AutoModelForCausalLM"


def _package(scheme: str) -> Any:
    package = SCHEMES[scheme].package
    missing = importlib.util.find_spec(package) is None
    return pytest.param(
        scheme, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed")
    )


_INSTALLED = [_package(scheme) for scheme in SCHEMES]
_FOUR_BIT = _package("bnb-4bit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> folder of a tiny pretrained model."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: save(name, root / name, with_head=name != "bert")
        for name in ("llama", "bert", "gpt2", "t5")
    }


_KNOWN: dict[tuple[str, str], Backbone] = {}


def _load(folders: dict[str, str], name: str, scheme: str) -> Backbone:
    if (name, scheme) not in _KNOWN:
        _KNOWN[name, scheme] = _fresh(folders, name, scheme)
    return _KNOWN[name, scheme]


def _fresh(folders: dict[str, str], name: str, scheme: str) -> Backbone:
    return load_backbone(folders[name], auto_class=KINDS[name].auto_class, quantization=scheme)


def _live_bytes(model: nn.Module) -> int:
    """What a model's tensors take, those inside quantized ones included."""
    seen: dict[int, int] = {}

    def see(tensor: Any) -> None:
        if hasattr(tensor, "tensor_data_names"):  # torchao's
            for name in tensor.tensor_data_names:
                see(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = tensor.numel() * tensor.element_size()
        state = getattr(tensor, "quant_state", None)
        for part in () if state is None else (state.absmax, state.code):
            see(part)

    for tensor in (*model.parameters(), *model.buffers()):
        see(tensor)
    for module in model.modules():
        state = getattr(module, "state", None)
        if state is not None:  # bitsandbytes' 8-bit layer, once it has run
            see(state.SCB)
    return sum(seen.values())


def test_the_settings_offer_every_scheme() -> None:
    choices = SearchSettings.__dataclass_fields__["quantization"].metadata["limits"]["choices"]
    assert choices == ("none", *SCHEMES)
    with pytest.raises(SettingsError, match="use one of none, bnb-4bit"):
        check_backend("3-bit", "cpu")
    check_backend("none", "cpu")


@pytest.mark.parametrize(
    ("scheme", "name"), covering(_INSTALLED, ["llama", "bert", "gpt2", "t5"], each=2)
)
def test_a_quantized_model_differs_in_little_but_its_size(
    folders: dict[str, str], scheme: str, name: str
) -> None:
    if name == "gpt2" and not SCHEMES[scheme].takes_conv1d:
        with pytest.raises(SettingsError, match="has no module that it can quantize"):
            _load(folders, name, scheme)
        return
    plain = load_backbone(folders[name], auto_class=KINDS[name].auto_class)
    backbone = _load(folders, name, scheme)
    topology = backbone.topology
    assert topology.is_quantized
    assert not plain.topology.is_quantized
    assert (topology.shapes, topology.transposed_roles, backbone.head) == (
        plain.topology.shapes,
        plain.topology.transposed_roles,
        plain.head,
    )
    inside = quantized_modules(plain.model, plain.layout.blocks, scheme)
    for path, module in plain.model.named_modules():
        if isinstance(module, nn.Linear) and path not in inside:
            theirs: Any = backbone.model.get_submodule(path)
            assert torch.equal(theirs.weight, module.weight)
    batch = batch_for(plain)
    if not plain.head:  # A new one starts at random.
        own, quantized = logits_of(plain.model, batch), logits_of(backbone.model, batch)
        assert not torch.equal(own, quantized)
        limit = 0.5 if SCHEMES[scheme].bits == 4 else 0.1
        assert float((own - quantized).norm() / own.norm()) < limit

    logits_of(backbone.model, batch)
    prices = {
        how: price_table(
            build_meta(folders[name], auto_class=KINDS[name].auto_class, quantization=how),
            batch_size=3,
            mean_length=9,
            longest_length=9,
        )
        for how in ("none", scheme)
    }
    assert prices[scheme].topology.is_quantized
    room = 4 * max(out * in_ for out, in_ in inside.values())
    saved = prices["none"].weight_bytes - (prices[scheme].weight_bytes - room)
    assert saved == _live_bytes(plain.model) - _live_bytes(backbone.model)
    assert prices[scheme].forward_flops == prices["none"].forward_flops


@pytest.mark.parametrize("scheme", _INSTALLED)
def test_a_head_that_is_replaced_is_told_from_packed_weights(
    folders: dict[str, str], scheme: str
) -> None:
    loaded = load_backbone(
        folders["bert"],
        auto_class=KINDS["bert"].auto_class,
        quantization=scheme,
        replaces_head=True,
    )
    assert loaded.head == ("classifier",)


@pytest.mark.parametrize(("method", "scheme"), covering(_BEARING, _INSTALLED, each=1))
def test_what_bears_a_quantized_base_trains_and_comes_back(
    folders: dict[str, str], method: str, scheme: str, tmp_path: Path
) -> None:
    backbone = _load(folders, "llama", scheme)
    described = methods.get(method)
    plan = plan_of(backbone.topology, method, seed=1)
    if plan is None:
        pytest.skip(f"the model has no site for {method}")
    batch = batch_for(backbone)
    base = logits_of(backbone.model, batch)
    with attach(backbone, candidate_of(plan), seed=1) as attached:
        first = logits_of(attached.model, batch)
        if described.starts_at_identity and described.exact_start:
            assert torch.equal(first, base)
        elif described.starts_at_identity:
            torch.testing.assert_close(first, base, rtol=1e-2, atol=1e-2)
        attached.model.train()
        disturb(attached)
        for precision in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
                loss = attached.model(**batch).loss
            loss.backward()
            for group in attached.parameter_groups():
                for parameter in group.parameters:
                    assert parameter.dtype == torch.float32
                    assert parameter.grad is not None
                    assert torch.isfinite(parameter.grad).all()
                    parameter.grad = None
        attached.model.eval()
        after = logits_of(attached.model, batch)
        assert not torch.allclose(after, base, atol=1e-5)
        save_adapter(attached, tmp_path)
    assert torch.equal(logits_of(backbone.model, batch), base)
    assert json.loads((tmp_path / "plan.json").read_text())["quantization"] == scheme
    with load_attached(_fresh(folders, "llama", scheme).model, tmp_path) as again:
        assert torch.equal(logits_of(again.model, batch), after)


@pytest.mark.parametrize("scheme", _INSTALLED)
def test_a_saved_adapter_brings_its_quantized_base_along(
    folders: dict[str, str], scheme: str, tmp_path: Path
) -> None:
    backbone = _load(folders, "bert", scheme)
    plan = AdapterPlan(
        [
            LayerSpec(0, "attn.q", "lora", 4),
            LayerSpec(1, "mlp.down", "ia3"),
            LayerSpec(1, "norm", "ln_tuning"),
            LayerSpec(1, "attn.v", "vera", 16),
        ]
    )
    batch = batch_for(backbone)
    with attach(backbone, candidate_of(plan), seed=1) as attached:
        disturb(attached)
        logits = logits_of(attached.model, batch)
        save_adapter(attached, tmp_path)
    loaded = load_attached(folders["bert"], tmp_path)
    assert loaded.backbone.quantization == scheme
    assert torch.equal(logits_of(loaded.model, batch), logits)
    whole = load_attached(folders["bert"], tmp_path, quantization="none")
    assert not whole.backbone.topology.is_quantized
    difference = (logits_of(whole.model, batch) - logits).abs().max()
    assert 0.0 < float(difference) < 0.1


@pytest.mark.parametrize("scheme", _INSTALLED)
def test_exports_go_by_whole_weights(folders: dict[str, str], scheme: str, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
    (Path(folders["bert"]) / "vocab.txt").write_text("\n".join(words))
    backbone = _load(folders, "bert", scheme)
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 4), LayerSpec(1, "attn.v", "vera", 8)])
    batch = {name: t for name, t in batch_for(backbone).items() if name != "labels"}
    with attach(backbone, candidate_of(plan), seed=1) as attached:
        disturb(attached)
        own = logits_of(attached.model, batch)
        save_adapter(attached, tmp_path / "adapter")
        with pytest.raises(AdapterError, match="the weights are quantized"):
            export_merged(attached, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    whole = load_attached(folders["bert"], tmp_path / "adapter", quantization="none")
    expected = logits_of(whole.model, batch)
    for format in ("merged", "lora"):
        exported = export_adapter(
            folders["bert"], tmp_path / "adapter", tmp_path / format, format=format, rows=batch
        )
        assert exported.largest_difference is not None
        # What serves a LoRA loads whole weights too.
        told = float((own - expected).abs().max())
        assert exported.largest_difference == pytest.approx(told, rel=0.05, abs=1e-5)
        assert (exported.is_lossy, exported.trained_over) == (True, scheme)
        assert any(f"lossy: it was trained over {scheme}" in line for line in exported.notes())
    with quiet_transformers():
        plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits_of(plain, batch), expected, rtol=1e-4, atol=1e-5)
    lora = load_adapter(folders["bert"], tmp_path / "lora")
    torch.testing.assert_close(logits_of(lora, batch), expected, rtol=1e-4, atol=1e-5)
    assert float((own - expected).abs().max()) < 0.1


@pytest.mark.parametrize("scheme", [_FOUR_BIT])
@pytest.mark.parametrize(
    ("server", "loads"),
    [("vllm", "vllm loads"), ("ollama", "ollama loads"), (None, "the code in its card loads")],
)
def test_a_lora_is_measured_over_the_weights_that_are_served(
    folders: dict[str, str], scheme: str, server: str | None, loads: str, tmp_path: Path
) -> None:
    """Regression: it was measured over the quantized weights, and called exact."""
    backbone = _load(folders, "llama", scheme)
    batch = {name: t for name, t in batch_for(backbone).items() if name != "labels"}
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 4)])
    with attach(backbone, candidate_of(plan), seed=0) as made:
        disturb(made)
        own = logits_of(made.model, batch)
        save_adapter(made, tmp_path / "adapter")
    scored: list[Any] = []

    class Scorer:
        def see_base(self, model: Any) -> None:
            pass

        def score(self, model: Any) -> None:
            scored.append(logits_of(model, batch))

    options: dict[str, Any] = {"server": server} if server else {"format": "lora"}
    exported = export_adapter(
        folders["llama"],
        tmp_path / "adapter",
        tmp_path / "to",
        rows=batch,
        scorer=Scorer(),
        **options,
    )
    # PEFT alone, over the base model as it is saved.
    lora = tmp_path / "to"
    if server == "ollama":
        lora = export_adapter(
            folders["llama"], tmp_path / "adapter", tmp_path / "lora", format="lora"
        ).folder
    with quiet_transformers():
        plain = hf.AutoModelForCausalLM.from_pretrained(folders["llama"])
    served = logits_of(load_adapter(plain, lora), batch)
    difference = float((served - own).abs().max())
    assert exported.largest_difference == pytest.approx(difference, rel=0.01)
    assert difference > 1e-4
    torch.testing.assert_close(scored[0], served, rtol=1e-4, atol=1e-5)
    assert exported.is_lossy
    (line,) = [line for line in exported.notes() if line.startswith("lossy")]
    assert line == f"lossy: it was trained over {scheme} weights, and {loads} whole ones"


@pytest.mark.parametrize("scheme", [_FOUR_BIT])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("all"), MemoryError()])
def test_whole_weights_that_find_no_memory_are_told(
    folders: dict[str, str],
    scheme: str,
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = _load(folders, "llama", scheme)
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 4)])
    with attach(backbone, candidate_of(plan), seed=0) as made:
        save_adapter(made, tmp_path / "adapter")

    def load(*given: Any, quantization: str | None = None, **where: Any) -> Any:
        if quantization == "none":
            raise error
        return load_attached(*given, **where)

    monkeypatch.setattr("autopeft.models.export.load_attached", load)
    with pytest.raises(SettingsError, match="its whole weights beside those in bnb-4bit; use a"):
        export_adapter(folders["llama"], tmp_path / "adapter", tmp_path / "to", format="lora")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("scheme", [_FOUR_BIT])
def test_detaching_leaves_the_quantized_model_as_it_was(
    folders: dict[str, str], scheme: str
) -> None:
    backbone = _load(folders, "llama", scheme)

    def state() -> dict[str, Any]:
        model = backbone.model
        return {
            "tensors": {n: t.clone() for n, t in model.state_dict().items()},
            "classes": {n: type(m) for n, m in model.named_modules()},
            "identity": {n: id(p) for n, p in model.named_parameters()},
        }

    before = state()
    plan = AdapterPlan([LayerSpec(0, "attn.q", "dora", 4), LayerSpec(1, "mlp.up", "lora", 2)])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
    assert_same_state(before, state())


@pytest.mark.parametrize("scheme", [_FOUR_BIT])
def test_what_does_not_bear_it_is_refused_and_never_drawn(
    folders: dict[str, str], scheme: str
) -> None:
    topology = _load(folders, "llama", scheme).topology
    bad = AdapterPlan([LayerSpec(0, "attn.q", "pissa", 4)])
    with pytest.raises(SpaceError, match="needs weights that are not quantized") as caught:
        check_plan(topology, bad)
    assert "\n" not in str(caught.value)
    names = [method.name for method in methods.all_methods()]
    borne = {
        spec.method
        for layer in range(2)
        for role in topology.roles(layer)
        for name in names
        for rank in ((4, 8, 16, 64) if methods.get(name).takes_rank else (0,))
        if is_legal(topology, spec := LayerSpec(layer, role, name, rank))
    }
    assert "pissa" not in borne
    assert {"lora", "dora", "vera", "ia3", "ln_tuning"} <= borne
    assert all(methods.get(name).quantized_base for name in borne)
    with pytest.raises(SpaceError, match="pissa"):
        SearchSpace.from_source({"methods": ["lora", "pissa"]}, topology, steps=5)


def test_a_missing_or_failing_backend_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(scheme: object, module: nn.Module) -> nn.Module:
        raise RuntimeError("no kernel image\nfor this device")

    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SettingsError, match=r"bitsandbytes is not installed.*\[quant\]"):
            check_backend("bnb-4bit", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(quantization.Scheme, "quantized", fail)
    with pytest.raises(SettingsError, match="torchao does not run on cpu") as caught:
        check_backend("torchao-int8", "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", [_FOUR_BIT])
def test_a_plan_that_asks_for_an_unknown_scheme_is_refused(
    folders: dict[str, str], scheme: str, tmp_path: Path
) -> None:
    backbone = _load(folders, "llama", scheme)
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 4)])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        save_adapter(attached, tmp_path)
    row = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**row, "quantization": "1-bit"}))
    with pytest.raises(AdapterError, match="no such scheme"):
        load_adapter(folders["llama"], tmp_path)
    del row["quantization"]  # As written before there were schemes.
    (tmp_path / "plan.json").write_text(json.dumps(row))
    assert not load_attached(folders["llama"], tmp_path).backbone.topology.is_quantized
