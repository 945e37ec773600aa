"""Tiny models built from their configurations, and what a check does with them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from autopeft import methods
from autopeft.costs import PriceTable, Topology, is_legal
from autopeft.errors import ModelError
from autopeft.models.backbone import Backbone
from autopeft.models.loading import prepare_config
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.profiling.measure import price_table
from autopeft.utils.device import drawn_on_host
from autopeft.utils.quiet import quiet_transformers

ROWS, LENGTH = 3, 14
"""The batch that models are priced and run with."""

_CLS = "AutoModelForSequenceClassification"
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@dataclass(frozen=True)
class TinyModel:
    """A model for checks.

    Attributes:
        name: For messages.
        build: Returns it with random weights, the same at each call, on a device.
    """

    name: str
    build: Callable[[str], Backbone]

    @property
    def topology(self) -> Topology:
        """Its shapes."""
        return backbone_of(self).topology


def _built(config: Any, auto_class: str, head: tuple[str, ...], device: str) -> Backbone:
    with quiet_transformers(), drawn_on_host(0), torch.device(device):
        before = prepare_config(config)
        model = getattr(hf, auto_class).from_config(config).eval()
    return Backbone(model, head=head, auto_class=auto_class, config_before=before)


def _bert(device: str) -> Backbone:
    config = hf.BertConfig(vocab_size=60, **_SIZES, num_labels=3)
    return _built(config, _CLS, ("classifier",), device)


def _llama(device: str) -> Backbone:
    config = hf.LlamaConfig(vocab_size=60, **_SIZES, num_key_value_heads=2, pad_token_id=2)
    return _built(config, "AutoModelForCausalLM", (), device)


ENCODER, DECODER = TinyModel("a tiny BERT", _bert), TinyModel("a tiny Llama", _llama)


@lru_cache(maxsize=32)
def backbone_of(model: TinyModel) -> Backbone:
    """Return the model, built once."""
    return model.build("cpu")


def prices_of(model: TinyModel, prompt_sizes: tuple[int, ...]) -> PriceTable:
    """Return its price table, measured once."""
    table = _measured(model, prompt_sizes)
    # A table remembers the prices of methods by name, and a name's method may change.
    return replace(table, longer={size: replace(one) for size, one in table.longer.items()})


@lru_cache(maxsize=128)
def _measured(model: TinyModel, prompt_sizes: tuple[int, ...]) -> PriceTable:
    return price_table(
        model.build("meta"),
        batch_size=ROWS,
        mean_length=LENGTH,
        longest_length=LENGTH,
        prompt_sizes=prompt_sizes,
    )


def batch_for(backbone: Backbone, *, rows: int = ROWS, length: int = 9) -> dict[str, torch.Tensor]:
    """Return random rows, one of them padded, with labels where the model takes them."""
    generator = torch.Generator().manual_seed(5)
    config: Any = backbone.model.config
    if backbone.model.main_input_name == "pixel_values":
        pixels = torch.randn(rows, 3, config.image_size, config.image_size, generator=generator)
        return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    is_cls = backbone.auto_class == _CLS
    labels = torch.zeros(rows, dtype=torch.long) if is_cls else ids.clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the model's logits, without a graph."""
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits


def disturb(attached: Any, seed: int = 0) -> None:
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in attached.parameter_groups():
            for parameter in group.parameters:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def state_of(backbone: Backbone) -> dict[str, Any]:
    """Return all that detaching must restore: tensors, trainability, classes, modes."""
    model = backbone.model
    return {
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": {name: id(p) for name, p in model.named_parameters()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "gradients": {name for name, p in model.named_parameters() if p.grad is not None},
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Return what of two states differs; None if they are equal, bit for bit."""
    first, second = before["tensors"], after["tensors"]
    if first.keys() == second.keys():
        for name, tensor in first.items():
            if not torch.equal(tensor, second[name]):
                return str(name)
    kinds = [key for key in before if key != "tensors" and before[key] != after[key]]
    return kinds[0] if kinds else None if first.keys() == second.keys() else "names of tensors"


def plan_of(topology: Topology, method: str, seed: int) -> AdapterPlan | None:
    """Return the method at half of the sites it can have, at random legal sizes; None if none."""
    rng = random.Random(seed)
    found = methods.get(method)
    sizes = (1, 2, 3, 4, 8, *found.default_ranks) if found.takes_rank else (0,)
    sites = []
    for layer in range(topology.n_layers):
        for role in topology.roles(layer):
            legal = [s for s in sizes if is_legal(topology, LayerSpec(layer, role, method, s))]
            if legal:
                sites.append(LayerSpec(layer, role, method, rng.choice(legal)))
    if not sites:
        return None
    return AdapterPlan(rng.sample(sites, max(1, len(sites) // 2)))


def prompt_sizes_of(plan: AdapterPlan) -> tuple[int, ...]:
    """Return the virtual tokens of a plan's prompt, () without one."""
    return tuple(spec.rank for spec in plan.specs if spec.role == MODEL)


def candidate_of(plan: AdapterPlan, *, dropout: float = 0.0, batch_size: int = ROWS) -> Candidate:
    """Return the plan with plain train settings."""
    return Candidate(plan, TrainSettings(1e-3, dropout=dropout, steps=1, batch_size=batch_size))


# A pretrained model as a folder, for a task

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_model(auto_class: str, cells: Any, folder: Path) -> Path:
    """Write a tiny text model that a task can load, with a tokenizer of the words in its data.

    Args:
        auto_class: Name of the class of transformers that the task loads with.
        cells: The task's data; every text in them is split into words.
        folder: Where to write.

    Raises:
        ModelError: if no tiny text model is of that class.
    """
    words = [*_SPECIAL, *sorted(set(_words(cells)))]
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if auto_class == "AutoModelForCausalLM":
        config: Any = hf.LlamaConfig(vocab_size=len(words), **_SIZES, **ids)
        loader: Any = hf.AutoModelForCausalLM
    elif auto_class == "AutoModelForSeq2SeqLM":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        config = hf.T5Config(
            vocab_size=len(words), **sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3
        )
        loader = hf.AutoModelForSeq2SeqLM
    elif auto_class in (_CLS, "AutoModelForTokenClassification", "AutoModel"):
        config = hf.BertConfig(vocab_size=len(words), **_SIZES, max_position_embeddings=64)
        loader = hf.AutoModel
    else:
        problem = f"no tiny model of autopeft.testing is an {auto_class}"
        raise ModelError("model", auto_class, problem, "give check_task the folder of one as model")
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if loader is hf.AutoModel:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    elif loader is hf.AutoModelForSeq2SeqLM:
        inner.post_processor = processors.TemplateProcessing(
            single="$A [SEP]", special_tokens=[("[SEP]", 3)]
        )
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=64,
    )
    with quiet_transformers(), drawn_on_host(0):
        loader.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def _words(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield from re.findall(r"\w+|[^\w\s]+", value)
    elif isinstance(value, dict):
        yield from _words(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _words(each)
