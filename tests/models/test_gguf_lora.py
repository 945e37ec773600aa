"""GGUF adapters: read back with the package gguf, and served by llama.cpp where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import build, candidate_of, disturb, logits_of, save

from autopeft.errors import AdapterError
from autopeft.models.attach import attach
from autopeft.models.backbone import load_backbone
from autopeft.models.check_export import check_export, examine
from autopeft.models.export import export_adapter
from autopeft.models.gguf_lora import write_gguf
from autopeft.models.lora_conversion import Factors, convert
from autopeft.models.saving import save_adapter
from autopeft.plan import AdapterPlan, LayerSpec

# peft asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

_LM = "AutoModelForCausalLM"
_PLAN = AdapterPlan(
    [
        LayerSpec(0, "attn.q", "lora", 2),
        LayerSpec(0, "attn.k", "rslora", 8),
        LayerSpec(0, "mlp.up", "lora", 3),
        LayerSpec(1, "attn.v", "rslora", 4),
        LayerSpec(1, "attn.o", "miss", 4),
        LayerSpec(1, "mlp.down", "loha", 2),
    ]
)


def _saved(folder: Path) -> tuple[str, Path, torch.Tensor, torch.Tensor]:
    """A tiny Llama, a trained adapter of it, the adapter's logits, and the tokens."""
    base = save("llama", folder / "base", with_head=True)
    backbone = load_backbone(base, auto_class=_LM)
    tokens = torch.arange(5, 17).reshape(1, -1)
    with attach(backbone, candidate_of(_PLAN), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, {"input_ids": tokens})
        save_adapter(attached, folder / "adapter")
    return base, folder / "adapter", logits, tokens


def _rotated(b: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of queries or keys in the order of transformers: the halves of a head, not pairs."""
    return b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


@pytest.mark.parametrize("server", ["llamacpp", "ollama"])
def test_the_file_holds_the_changes_of_the_weights_by_ggufs_names(
    server: str, tmp_path: Path
) -> None:
    base, adapter, logits, tokens = _saved(tmp_path)
    rows = {"input_ids": tokens}
    exported = export_adapter(base, adapter, tmp_path / "to", server=server, rows=rows)
    assert exported.largest_difference == pytest.approx(0.0, abs=1e-5)
    assert check_export(exported.folder, server) == []
    assert "Modelfile" in {path.name for path in exported.folder.iterdir()}
    assert f"FROM {base}\nADAPTER ./adapter.gguf" in (exported.folder / "Modelfile").read_text()

    reader = gguf.GGUFReader(exported.folder / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 8.0
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    backbone = load_backbone(base, auto_class=_LM)
    model: Any = backbone.model
    places = {
        "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
        "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
        "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    }
    assert set(tensors) == {f"{name}.weight.lora_{side}" for name in places for side in "ab"}
    for name, path in places.items():
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        heads = {"attn_q": 4, "attn_k": 2}.get(name.rpartition(".")[2])
        b = b if heads is None else _rotated(b, heads)
        with torch.no_grad():
            # llama.cpp scales by alpha / the rank of the tensor.
            model.get_submodule(path).weight += torch.from_numpy(b @ a) * 8.0 / b.shape[1]
    torch.testing.assert_close(logits_of(model, rows), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "blk.0.attn_qkv"), ("phi3", "blk.0.attn_qkv")])
def test_fused_modules_have_their_own_names(kind: str, name: str, tmp_path: Path) -> None:
    backbone = build(kind)
    plan = AdapterPlan([LayerSpec(0, "attn.qkv", "lora", 2)])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        factors = convert(attached).factors
    write_gguf(factors, backbone.model.config, tmp_path)
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert names == {f"{name}.weight.lora_a", f"{name}.weight.lora_b"}


def test_a_model_or_module_that_gguf_does_not_know_is_one_line(tmp_path: Path) -> None:
    one = Factors(torch.ones(1, 4), torch.ones(4, 1))
    with pytest.raises(AdapterError, match="models of type t5 have no known GGUF names"):
        write_gguf({"encoder.x": one}, build("t5").model.config, tmp_path)
    with pytest.raises(AdapterError, match=r"no place for model\.layers\.0\.extra"):
        write_gguf({"model.layers.0.extra": one}, build("llama").model.config, tmp_path)


def _write_base(base: str, path: Path) -> None:
    """Write a tiny Llama as GGUF, without a vocabulary of words."""
    model: Any = hf.AutoModelForCausalLM.from_pretrained(base)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads is not None:
            data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _served(base: Path, adapter: Path | None, tokens: list[int], n_tokens: int) -> torch.Tensor:
    """llama.cpp's logits of each position."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(base),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=64,
        n_threads=1,
        logits_all=True,
        verbose=False,
    )
    llama.eval(tokens)
    found = torch.tensor(np.array(llama.scores[: len(tokens), :n_tokens]))
    llama.close()
    return found


def test_llama_cpp_serves_the_adapters_logits(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    base, adapter, logits, tokens = _saved(tmp_path)
    exported = export_adapter(base, adapter, tmp_path / "to", server="llamacpp")
    _write_base(base, tmp_path / "base.gguf")
    ids = tokens[0].tolist()
    plain = _served(tmp_path / "base.gguf", None, ids, logits.shape[-1])
    served = _served(
        tmp_path / "base.gguf", exported.folder / "adapter.gguf", ids, logits.shape[-1]
    )
    effect = float((plain - logits[0]).abs().max())
    assert effect > 0.05
    # Keys and values are kept in half precision; unpermuted queries are off by 0.006 of the effect.
    assert float((served - logits[0]).abs().max()) < 0.002 * effect


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export for Ollama, over a base model that is here."""
    folder = tmp_path_factory.mktemp("exported")
    base, adapter, _, _ = _saved(folder)
    return export_adapter(base, adapter, folder / "to", server="ollama").folder


_WITHOUT = object()


def _rewritten(
    exported: Path,
    folder: Path,
    *,
    architecture: str = "llama",
    alpha: Any = 8.0,
    tensors: Any = lambda held: held,
    modelfile: Any = lambda text: text,
) -> Path:
    reader = gguf.GGUFReader(exported / "adapter.gguf")
    writer = gguf.GGUFWriter(folder / "adapter.gguf", architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    add: Any = {str: writer.add_string, int: writer.add_uint32}.get(type(alpha), writer.add_float32)
    if alpha is not _WITHOUT:
        add(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, data in tensors({t.name: np.array(t.data) for t in reader.tensors}).items():
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "Modelfile").write_text(modelfile((exported / "Modelfile").read_text()))
    return folder


def _named(old: str, new: str) -> Any:
    return lambda held: {name.replace(old, new): data for name, data in held.items()}


_WIDE = "blk.0.attn_q.weight.lora_a"


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, ""),
        ({"alpha": -4.0}, ""),  # llama.cpp multiplies by it.
        ({"alpha": 0.0}, "alpha is a finite float32 other than 0; it is 0.0"),
        ({"alpha": float("nan")}, "other than 0; it is nan"),
        ({"alpha": "4"}, "other than 0; it is '4'"),
        ({"alpha": 4}, "other than 0; it is 4"),
        ({"alpha": _WITHOUT}, "other than 0; there is none"),
        ({"tensors": lambda held: {}}, "holds factors of a tensor; it has none"),
        ({"tensors": _named(".weight.", ".")}, "weights that the base model has; blk.0"),
        ({"tensors": _named("blk.1.", "blk.99.")}, "lora_a, and it has 2 blocks"),
        ({"tensors": _named("attn_v", "attn_x")}, "weights that the base model has; blk.1.attn_x"),
        (
            {"tensors": lambda held: held | {_WIDE: np.zeros((8, 7), np.float32)}},
            f"the base model needs; {_WIDE} is [8, 7], not [8, 32]",
        ),
        ({"architecture": "qwen2"}, "it is 'qwen2', and "),
    ],
)
@pytest.mark.parametrize("server", ["llamacpp", "ollama"])
def test_the_rules_of_gguf_are_applied(
    server: str, change: dict[str, Any], broken: str, exported: Path, tmp_path: Path
) -> None:
    found = examine(_rewritten(exported, tmp_path, **change), server)
    assert bool(found.broken) == bool(broken)
    assert not broken or any(broken in line for line in found.broken)
    assert not found.notes or "architecture" in change


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("", "it has no FROM"),
        ("ADAPTER ./adapter.gguf", "it has no FROM"),
        ("FROM llama3", "it has no ADAPTER"),
        ("FROM llama3\nADAPTER ./other.gguf", "ADAPTER is ./other.gguf, not ./adapter.gguf"),
        ("FROM llama3\nADAPTER .", ""),
    ],
)
def test_ollamas_modelfile_must_name_base_and_adapter(
    text: str, broken: str, exported: Path, tmp_path: Path
) -> None:
    folder = _rewritten(exported, tmp_path, modelfile=lambda _: text)
    found = check_export(folder, "ollama")
    assert bool(found) == bool(broken)
    assert not broken or broken in found[0]
    assert check_export(folder, "llamacpp") == []
