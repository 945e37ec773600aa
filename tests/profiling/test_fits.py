from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import transformers as hf
from tiny_models import build

from autopeft.costs.memory import CONTEXT_BYTES, usable_bytes
from autopeft.models.quantization import NONE
from autopeft.plan import AdapterPlan
from autopeft.profiling.fits import Fitting, Load, lora_everywhere


def _memory(usable: float) -> float:
    """Return the memory of a device of which so much is usable."""
    return (usable + CONTEXT_BYTES) / 0.95


@lru_cache
def _fitting() -> Fitting:
    load = Load(16, 64, longest=512, target_share=1.0)
    return Fitting(build("llama", device="meta"), load, device="cpu", dtype="bfloat16")


def test_the_largest_fits_and_twice_as_much_does_not() -> None:
    fitting = _fitting()
    usable = 1.5 * fitting.peak_bytes()
    assert usable_bytes(_memory(usable)) == pytest.approx(usable)
    for fit in fitting.fits(_memory(usable)):
        way = {
            "quantization": fit.quantization,
            "gradient_checkpointing": fit.gradient_checkpointing,
        }
        assert fit.needed == round(fitting.peak_bytes(**way))  # type: ignore[arg-type]
        for name in ("rank", "batch_size", "length"):
            largest = getattr(fit, name)
            assert largest > 0
            assert fitting.peak_bytes(**way, **{name: largest}) <= usable  # type: ignore[arg-type]
            if name != "length" or largest < 512:
                more = fitting.peak_bytes(**way, **{name: 2 * largest})  # type: ignore[arg-type]
                assert more > usable
    assert all(fit.rank == 0 for fit in fitting.fits(CONTEXT_BYTES))


def test_each_way_saves_memory() -> None:
    plain, again, quantized, both = _fitting().fits(1e12)
    assert both.needed < again.needed < plain.needed
    assert quantized.needed < plain.needed
    assert (plain.quantization, quantized.quantization) == (NONE, "bnb-4bit")


def test_the_remedy_is_the_least_change_that_fits() -> None:
    fitting = _fitting()
    plan = lora_everywhere(fitting.meta.topology, 2)
    least = {"plan": plan, "quantization": "bnb-4bit", "gradient_checkpointing": True}
    again = fitting.peak_bytes(plan=plan, gradient_checkpointing=True)
    assert fitting.remedy(again, plan).startswith("use gradient_checkpointing=true, which needs ")
    short = fitting.peak_bytes(**least, batch_size=1, length=32)  # type: ignore[arg-type]
    assert "batch_size=1, max_length=32, which needs" in fitting.remedy(short, plan)
    assert "larger device" in fitting.remedy(1e3, plan)


def test_lora_everywhere_is_at_every_linear_module() -> None:
    topology = build("llama", device="meta").topology
    plan = lora_everywhere(topology, 4)
    assert {spec.role for spec in plan.specs} >= {"attn.q", "attn.o", "mlp.gate", "mlp.down"}
    assert {spec.layer for spec in plan.specs} == set(range(topology.n_layers))
    assert lora_everywhere(topology, 10**6) == AdapterPlan()


def test_a_configuration_is_enough(tmp_path: Path) -> None:
    from autopeft import price

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlamaConfig(vocab_size=60, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    found = price(model=str(tmp_path), fits="2GB", max_length=128)
    assert len(found.fits) == 4
    assert "16 rows of 128 tokens (max_length) a step" in found.lines[0]
    assert found.fits[0].rank > 0
