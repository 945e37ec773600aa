from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_models import build

from autopeft.errors import AdapterError, SettingsError
from autopeft.serving.adaptable import WITHOUT_BACKEND, WITHOUT_INTERFACE
from autopeft.serving.older_names import with_older_names
from autopeft.serving.servers import SERVERS, check_export, check_servable, chosen_format

# peft asks transformers for an attribute by its old name, and for a config that is only in memory.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


def _plain_peft(folder: Path, config: Any = None, **settings: Any) -> Path:
    """A folder that peft alone writes."""
    given = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, **settings}
    model = get_peft_model(build("llama").model, config or LoraConfig(**given))
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("server", ["peft", "vllm", "sglang"])
def test_a_plain_lora_of_one_rank_keeps_all_rules(server: str, tmp_path: Path) -> None:
    assert check_export(_plain_peft(tmp_path), server) == []


_RANKS = {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 16}}


@pytest.mark.parametrize(
    ("settings", "broken"),
    [
        (_RANKS, {"vllm": "rank above r", "sglang": "has rank r", "llamacpp": "its own rank"}),
        # Alpha is the same everywhere: llama.cpp divides it by the tensor's own rank, as peft does.
        ({"rank_pattern": {"v_proj": 2}}, {"vllm": "one scaling", "sglang": "has rank r"}),
        ({"use_rslora": True}, {"sglang": "lora_alpha / r", "llamacpp": "its own rank"}),
        ({"use_dora": True}, {"vllm": "no DoRA", "sglang": "no DoRA", "llamacpp": "no DoRA"}),
        (
            {"modules_to_save": ["lm_head"]},
            {"vllm": "modules_to_save", "sglang": "only lora_A", "llamacpp": "only lora_A"},
        ),
        ({"bias": "all"}, {"vllm": "trains no bias"}),
        # PEFT subtracts these factors' start from the base model's weights on load.
        ({"init_lora_weights": "pissa"}, dict.fromkeys(("vllm", "sglang", "llamacpp"), "leaves")),
        ({"init_lora_weights": "gaussian"}, {}),
        ({"r": 600}, {"vllm": "r is at most 512"}),
    ],
)
def test_each_server_names_what_it_would_refuse_or_scale_wrongly(
    settings: dict[str, Any], broken: dict[str, str], tmp_path: Path
) -> None:
    folder = _plain_peft(tmp_path, **settings)
    assert check_export(folder, "peft") == []
    for server in ("vllm", "sglang", "llamacpp"):
        found = [line for line in check_export(folder, server) if "is a GGUF file" not in line]
        assert bool(found) == (server in broken)
        assert not found or any(broken[server] in line for line in found)
        assert all(line.startswith(f"{server}: must hold: ") for line in found)


@pytest.mark.parametrize(
    ("name", "servers"),
    [
        ("lora_bias", ("vllm",)),
        ("alora_invocation_tokens", ("vllm", "sglang")),
        ("layer_replication", ("vllm", "sglang", "llamacpp", "ollama")),
        ("use_bdlora", ("vllm", "sglang", "llamacpp", "ollama")),
        ("use_qalora", ("vllm", "sglang", "llamacpp", "ollama")),
    ],
)
def test_settings_of_a_lora_that_a_server_does_not_read_are_named(
    name: str, servers: tuple[str, ...], tmp_path: Path
) -> None:
    path = _plain_peft(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: [[0, 1]]}))
    for server in ("vllm", "sglang", "llamacpp", "ollama"):
        found = [line for line in check_export(tmp_path, server) if f"has no {name}" in line]
        assert len(found) == (server in servers)


@pytest.mark.parametrize("module", ["c_attn", "mlp.c_proj"])
def test_the_converter_transposes_what_peft_did_not(module: str, tmp_path: Path) -> None:
    """Where a module is square, llama.cpp would load the transposed update and say nothing."""
    base = build("gpt2").model
    base.config.architectures = ["GPT2LMHeadModel"]
    base.config.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=[module], r=2, fan_in_fan_out=True))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "lora"))
    for server in ("llamacpp", "ollama"):
        found = [line for line in check_export(tmp_path / "lora", server) if "Conv1D" in line]
        assert len(found) == 1
    assert check_export(tmp_path / "lora", "peft") == []


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
def test_experts_that_all_linear_takes_have_ranks_of_their_own(tmp_path: Path) -> None:
    model = get_peft_model(build("mixtral").model, LoraConfig(target_modules="all-linear", r=2))
    model.save_pretrained(str(tmp_path))
    assert check_export(tmp_path, "peft") == []


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["q_proj", "v_proj"], ""),
        (["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj"], ""),
        (["gate_proj"], ""),
        (["q_proj"], "layers.0.self_attn.v_proj and 1 more"),
        (["k_proj", "v_proj"], "layers.0.self_attn.q_proj and 1 more"),
        (["layers.1.mlp.up_proj"], "layers.1.mlp.gate_proj"),
    ],
)
def test_what_sglang_computes_as_one_must_have_factors_together(
    modules: list[str], absent: str, tmp_path: Path
) -> None:
    found = check_export(_plain_peft(tmp_path, target_modules=modules), "sglang")
    assert bool(found) == bool(absent)
    assert not absent or f"without base_model.model.model.{absent} (sglang 0.5.23: " in found[0]


def test_sglang_takes_no_expression_for_modules(tmp_path: Path) -> None:
    folder = _plain_peft(tmp_path, target_modules=r".*\.[qv]_proj")
    (line,) = check_export(folder, "sglang")
    assert r"target_modules is a list of names; target_modules is '.*\\.[qv]_proj'" in line
    assert check_export(folder, "vllm") == []


def test_another_method_is_for_peft_alone(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    folder = _plain_peft(tmp_path, config)
    assert check_export(folder, "peft") == []
    assert any("peft_type is IA3" in line for line in check_export(folder, "vllm"))


def test_a_tensor_of_another_rank_than_the_configuration_says_is_found(tmp_path: Path) -> None:
    folder = _plain_peft(tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2}))
    (line,) = check_export(folder, "peft")
    assert "has 4, not 2" in line


def test_a_folder_of_something_else_breaks_every_servers_rules(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "adapter_model.bin")
    for name in SERVERS:
        assert check_export(tmp_path, name)


def test_settings_that_mlx_would_not_find_are_named(tmp_path: Path) -> None:
    model: Any = build("llama").model
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    plain = json.loads(path.read_text())
    (line,) = check_export(tmp_path, "mlx")
    assert "rope_theta is None, not 10000.0" in line
    assert check_export(tmp_path, "transformers") == []
    path.write_text(json.dumps({**plain, "rope_theta": 500.0}))
    assert "rope_theta is 500.0, not 10000.0" in check_export(tmp_path, "mlx")[0]
    path.write_text(
        json.dumps(
            {
                **plain,
                "rope_theta": 10000.0,
                "quantization_config": {"quant_method": "bitsandbytes"},
            }
        )
    )
    (line,) = check_export(tmp_path, "mlx")
    assert "quant_method is bitsandbytes" in line


def test_older_names_are_missed_where_a_text_model_has_its_settings(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (line,) = check_export(tmp_path, "mlx")
    assert "text_config.rope_theta is None, not 5.0" in line
    (tmp_path / "config.json").write_text(json.dumps(with_older_names(config)))
    assert check_export(tmp_path, "mlx") == []


@pytest.mark.parametrize(
    ("kind", "head", "refusing"),
    [
        ("llama", "LlamaForCausalLM", set()),
        ("llama", "LlamaForSequenceClassification", {"mlx"}),
        ("bert", "BertModel", {"mlx"}),
        ("falcon", "FalconForCausalLM", {"vllm", "sglang", "llamacpp", "ollama", "mlx"}),
        # mlx-lm has a GPT-2, which looks for weights by other names than transformers saves.
        ("gpt2", "GPT2LMHeadModel", {"vllm", "mlx"}),
        ("opt", "OPTForCausalLM", {"llamacpp", "ollama", "mlx"}),
        ("mistral", "MistralForCausalLM", set()),
        ("roberta", "RobertaForTokenClassification", {"vllm", "llamacpp", "ollama", "mlx"}),
        ("gpt_neox", "GPTNeoXForCausalLM", {"llamacpp", "ollama"}),
        ("vit", "ViTForImageClassification", {"llamacpp", "ollama", "mlx"}),
    ],
)
def test_a_model_that_no_export_could_serve_is_refused_at_once(
    kind: str, head: str, refusing: set[str]
) -> None:
    config = {"model_type": kind, "architectures": [head]}
    assert {name for name, server in SERVERS.items() if server.refused(config)} == refusing
    for name in SERVERS:
        with pytest.raises(SettingsError) if name in refusing else nullcontext() as caught:
            check_servable(name, config)
        if caught is not None:
            (line,) = str(caught.value).splitlines()
            assert line.startswith(f"servable='{name}': must hold: ")
            offered = line.split("use one of ")[1].removesuffix(", or leave it out").split(", ")
            assert offered == [name for name in SERVERS if name not in refusing]


@pytest.mark.parametrize(
    ("modules", "is_refused"),
    [
        ((), False),
        (("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc"), True),
        (("layers.0.self_attn.q_proj", "layers.0.fc1"), False),
        (("layers.0.self_attn.out_proj", "layers.0.fc1"), True),
    ],
)
def test_sglang_is_refused_where_it_could_adapt_no_module(
    modules: tuple[str, ...], is_refused: bool
) -> None:
    config = {"architectures": ["SomeForCausalLM"]}
    assert bool(SERVERS["sglang"].refused(config, modules=modules)) == is_refused


def test_roles_are_unserved_by_their_names_or_by_what_they_are_computed_with() -> None:
    places = {
        (0, "attn.q"): ("0.self_attn.q_proj",),
        (0, "attn.v"): ("0.self_attn.v_proj",),
        (0, "attn.o"): ("0.self_attn.dense",),
        (0, "mlp.up"): ("0.mlp.up_proj",),
        (0, "norm"): ("0.norm",),
    }
    assert SERVERS["sglang"].unserved_roles(places) == ("attn.o", "mlp.up")
    gated = {**places, (0, "mlp.gate"): ("0.mlp.gate_proj",)}
    assert SERVERS["sglang"].unserved_roles(gated) == ("attn.o",)
    assert SERVERS["vllm"].unserved_roles(places) == ()


def test_modules_that_sglang_has_no_shapes_for_are_named(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["c_attn", "c_fc"], r=4, fan_in_fan_out=True)
    get_peft_model(build("gpt2").model, config).save_pretrained(str(tmp_path))
    (line,) = check_export(tmp_path, "sglang")
    assert "base_model.model.transformer.h.0.attn.c_attn and 3 more" in line


def test_what_is_served_is_the_base_model_and_not_the_class_that_was_trained() -> None:
    trained = {"architectures": ["BertForSequenceClassification"]}
    assert SERVERS["vllm"].refused(trained)
    assert not SERVERS["vllm"].refused(trained, base={"architectures": ["BertModel"]})
    assert not SERVERS["vllm"].refused(trained, base={"architectures": None})


def test_the_base_model_of_a_folder_is_read_where_it_is_on_this_machine(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    folder = _plain_peft(tmp_path / "adapter")
    path = folder / "adapter_config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, "base_model_name_or_path": str(base)}))
    assert check_export(folder, "vllm") == []
    for content, n_broken in (("{", 0), ('{"architectures": ["BloomForCausalLM"]}', 1)):
        (base / "config.json").write_text(content)
        assert len(check_export(folder, "vllm")) == n_broken
    for name in ("user/none", "a/b/c", 5, None):
        path.write_text(json.dumps({**plain, "base_model_name_or_path": name}))
        assert check_export(folder, "vllm") == []


def test_what_cannot_be_checked_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such server; use one of peft, vllm"):
        check_export(tmp_path, "triton")
    with pytest.raises(AdapterError, match="no such folder"):
        check_export(tmp_path / "none", "vllm")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        check_export(tmp_path, "vllm")
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"config\.json"):
        check_export(tmp_path, "mlx")
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(AdapterError, match="not a safetensors file"):
        check_export(tmp_path, "vllm")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter.gguf").write_bytes(b"none")
    with pytest.raises(AdapterError, match="not a GGUF file"):
        check_export(tmp_path, "ollama")


def test_the_format_is_the_servers_or_one_that_exists() -> None:
    assert [chosen_format(*asked) for asked in ((None, None), ("lora", None), (None, "mlx"))] == [
        "peft",
        "lora",
        "merged",
    ]
    with pytest.raises(SettingsError, match=r"use one of peft, lora, merged, gguf, table$"):
        chosen_format("onnx", None, others=("table",))
    with pytest.raises(SettingsError, match=r"--for vllm writes lora; drop --format$"):
        chosen_format("merged", "vllm")


@pytest.mark.parametrize(
    ("kind", "head", "is_encoder_decoder", "refusing"),
    [
        ("t5", "T5ForConditionalGeneration", True, {"vllm", "sglang", "mlx"}),
        ("bart", "BartForConditionalGeneration", True, {"vllm", "sglang", "mlx"}),
        ("deberta-v2", "DebertaV2Model", False, {"vllm", "sglang", "mlx"}),
        ("whisper", "WhisperForConditionalGeneration", True, {"mlx"}),
        ("llama", "LlamaForCausalLM", False, set()),
    ],
)
def test_a_model_that_a_server_has_no_class_for_is_refused(
    kind: str, head: str, is_encoder_decoder: bool, refusing: set[str], tmp_path: Path
) -> None:
    config = {"model_type": kind, "architectures": [head], "is_encoder_decoder": is_encoder_decoder}
    servers = ("vllm", "sglang", "mlx")
    assert {name for name in servers if SERVERS[name].refused(config)} == refusing
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    folder = _plain_peft(tmp_path / "adapter")
    path = folder / "adapter_config.json"
    named = {**json.loads(path.read_text()), "base_model_name_or_path": str(base)}
    path.write_text(json.dumps(named))
    for name in ("vllm", "sglang"):
        found = [line for line in check_export(folder, name) if "has a class for" in line]
        found += [line for line in check_export(folder, name) if "encoder-decoder" in line]
        assert bool(found) == (name in refusing)


_KNOWN = ("bart", "bloom", "deberta", "deberta-v2", "falcon", "mpnet", "t5", "xlnet")


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(_KNOWN, id="known"),
        pytest.param(tuple(sorted(WITHOUT_BACKEND)), id="all", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_says_the_same_of_the_models_that_cannot_be_served(
    kinds: tuple[str, ...],
) -> None:
    for kind in kinds:
        model = hf.models.auto.modeling_auto.MODEL_MAPPING[hf.CONFIG_MAPPING[kind]]
        for each in model if isinstance(model, tuple) else (model,):
            assert not each.is_backend_compatible(), kind
            if kind in WITHOUT_INTERFACE:
                assert not each._can_set_attn_implementation(), kind
    assert hf.BertModel.is_backend_compatible()
