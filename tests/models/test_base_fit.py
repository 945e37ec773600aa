from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build, candidate_of, disturb, random_plan, save

from autopeft.models.attach import attach
from autopeft.models.backbone import load_backbone
from autopeft.models.base_fit import fit_of
from autopeft.models.lora_conversion import export_lora
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.serving.adapter_folder import AdapterFolder
from autopeft.serving.base_fit import BaseFit

# peft asks transformers for an attribute by its old name, and for a config that is only in memory.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    # With lora_bias, peft takes the vectors of biases for damaged matrices.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

_LAYERS = "base_model.model.model.layers."
_Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Tiny base models in folders, each written once."""
    folder, known = tmp_path_factory.mktemp("bases"), dict[str, str]()

    def base(kind: str) -> str:
        if kind not in known:
            known[kind] = save(kind, folder / kind, with_head=True)
        return known[kind]

    return base


def _plain(base: str, kind: str, folder: Path, config: Any = None, **settings: Any) -> Path:
    """A folder that peft alone writes, with the name of its base model."""
    given = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, **settings}
    model: Any = get_peft_model(build(kind).model, config or LoraConfig(**given))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def plain(bases: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on queries and values of a tiny Llama."""
    return _plain(bases("llama"), "llama", tmp_path_factory.mktemp("plain"))


def _fit(folder: Path) -> BaseFit:
    return fit_of(AdapterFolder.read(folder))


def _changed(
    plain: Path, folder: Path, *, tensors: Callable[[_Tensors], _Tensors] = dict, **settings: Any
) -> BaseFit:
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    save_file(tensors(load_file(weights)), weights)
    return _fit(folder)


def _without(part: str) -> Callable[[_Tensors], _Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


def _renamed(old: str, new: str) -> Callable[[_Tensors], _Tensors]:
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


@pytest.mark.parametrize("part", ["layers.1.", "v_proj", "1.self_attn.v_proj.lora_B"])
def test_tensors_of_targeted_modules_are_missed(part: str, plain: Path, tmp_path: Path) -> None:
    found = _changed(plain, tmp_path, tensors=_without(part))
    assert found.missing
    assert all(part in name for name in found.missing)
    assert found == BaseFit(missing=found.missing)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.1.", "layers.9."),
        ("v_proj", "w_proj"),
        ("base_model.model.", "base_model.model.base_model.model."),
    ],
)
def test_tensors_of_no_module_are_told_with_those_that_lack(
    old: str, new: str, plain: Path, tmp_path: Path
) -> None:
    found = _changed(plain, tmp_path, tensors=_renamed(old, new))
    assert found.unknown
    assert all(new in name for name in found.unknown)
    assert len(found.missing) == len(found.unknown)
    assert not found.untargeted


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"layers_to_transform": [0]}, "layers.1."),
        ({"exclude_modules": ["v_proj"]}, "v_proj"),
        ({"target_modules": r".*\.q_proj"}, "v_proj"),
        ({"target_modules": []}, _LAYERS),
        ({"target_modules": ["none"]}, _LAYERS),
    ],
)
def test_tensors_that_the_configuration_leaves_out_have_a_place_all_the_same(
    settings: dict[str, Any], place: str, plain: Path, tmp_path: Path
) -> None:
    found = _changed(plain, tmp_path, **settings)
    assert found.untargeted
    assert all(place in name for name in found.untargeted)
    assert found == BaseFit(untargeted=found.untargeted)


@pytest.mark.parametrize(("side", "shape"), [("A", (4, 7)), ("B", (7, 4))])
def test_widths_of_another_model_are_told(
    side: str, shape: tuple[int, int], plain: Path, tmp_path: Path
) -> None:
    name = f"{_LAYERS}0.self_attn.q_proj.lora_{side}.weight"
    found = _changed(plain, tmp_path, tensors=lambda held: held | {name: torch.zeros(shape)})
    (line,) = found.misshapen
    assert line.startswith(f"{name} is {list(shape)}, not ")
    assert found == BaseFit(misshapen=(line,))


def test_a_rank_of_another_size_is_no_question_of_the_base(plain: Path, tmp_path: Path) -> None:
    assert _changed(plain, tmp_path, r=2) == BaseFit()


def test_what_is_trained_as_a_whole_must_be_there_in_any_width(
    bases: Callable[[str], str], tmp_path: Path
) -> None:
    folder = _plain(
        bases("bert"), "bert", tmp_path / "whole", task_type="SEQ_CLS", target_modules=["query"]
    )
    assert _fit(folder) == BaseFit()
    head = "base_model.model.classifier.weight"
    wider = _changed(
        folder, tmp_path / "wider", tensors=lambda held: held | {head: torch.zeros(7, 32)}
    )
    assert wider == BaseFit()
    lacking = _changed(folder, tmp_path / "lacking", tensors=_without("classifier"))
    assert head in lacking.missing


@pytest.mark.parametrize("kind", ["FOO", "lora", None, 5, []])
def test_types_that_peft_does_not_know_are_told(kind: Any, plain: Path, tmp_path: Path) -> None:
    assert _changed(plain, tmp_path, peft_type=kind).unknown_type == f"peft_type is {kind!r}"


@pytest.mark.parametrize("base", ["user/none", "/none", None, 5])
def test_a_base_that_is_elsewhere_leaves_all_open(base: Any, plain: Path, tmp_path: Path) -> None:
    found = _changed(plain, tmp_path, tensors=_without("v_proj"), base_model_name_or_path=base)
    assert found == BaseFit(not_compared=found.not_compared)
    assert found.not_compared


def test_a_base_that_transformers_cannot_build_leaves_all_open(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for content in ("{", '{"model_type": "none"}', '{"model_type": "llama", "hidden_size": "x"}'):
        (tmp_path / "base" / "config.json").write_text(content)
        found = _changed(plain, tmp_path / "to", base_model_name_or_path=str(tmp_path / "base"))
        assert found.not_compared
        assert len(found.not_compared.splitlines()) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.\d+\.self_attn\.(q_proj|k_proj)"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 1}},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"task_type": "CAUSAL_LM"},
    ],
)
def test_what_peft_writes_fits(
    settings: dict[str, Any], bases: Callable[[str], str], tmp_path: Path
) -> None:
    assert _fit(_plain(bases("llama"), "llama", tmp_path, **settings)) == BaseFit()


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("gpt2", ["c_attn", "c_proj"]), ("t5", "all-linear"), ("roberta", ["query"])],
)
def test_transposed_weights_and_other_classes_fit(
    kind: str, targets: Any, bases: Callable[[str], str], tmp_path: Path
) -> None:
    settings = {"target_modules": targets, "fan_in_fan_out": kind == "gpt2"}
    assert _fit(_plain(bases(kind), kind, tmp_path, **settings)) == BaseFit()


def test_experts_and_modules_of_one_adapter_fit(
    bases: Callable[[str], str], tmp_path: Path
) -> None:
    backbone = load_backbone(bases("mixtral"), auto_class=build("mixtral").auto_class)
    plan = AdapterPlan(
        [
            LayerSpec(0, "experts.gate_up", "lora", 2),
            LayerSpec(0, "experts.down", "lora", 3),
            LayerSpec(1, "attn.q", "lora", 4),
        ]
    )
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        export_lora(attached, tmp_path / "to")
    assert _fit(tmp_path / "to") == BaseFit()
    assert _changed(tmp_path / "to", tmp_path / "less", tensors=_without("experts")).missing


@pytest.mark.parametrize("config", ["ia3", "prefix"])
def test_other_methods_fit(config: str, bases: Callable[[str], str], tmp_path: Path) -> None:
    given: Any = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    if config == "prefix":
        given = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert _fit(_plain(bases("llama"), "llama", tmp_path, given)) == BaseFit()


def test_embeddings_that_peft_writes_by_two_names_fit(
    bases: Callable[[str], str], tmp_path: Path
) -> None:
    """Tokens were added, and embeddings and head trained as a whole."""
    model: Any = build("llama").model
    model.resize_token_embeddings(67)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = bases("llama")
    model.save_pretrained(str(tmp_path))
    assert any(
        ".modules_to_save." in name for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    assert _fit(tmp_path) == BaseFit()


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "vit", "gpt2"])
def test_a_mixed_plan_as_one_lora_fits(
    kind: str, bases: Callable[[str], str], tmp_path: Path
) -> None:
    backbone = load_backbone(bases(kind), auto_class=build(kind).auto_class)
    plan = random_plan(backbone.topology, 0)
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        for head_apart in (False, True):
            export_lora(
                attached, tmp_path / f"{head_apart}", allow_lossy=True, head_apart=head_apart
            )
    assert _fit(tmp_path / "False") == _fit(tmp_path / "True") == BaseFit()
