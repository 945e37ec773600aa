"""Candidates in TRL's own trainers: SFT, DPO with the base model as reference, GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from training_samples import tiny_llama

from autopeft import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.engine.evaluate import TrialReport
from autopeft.integrations.trl import get_peft_model, train, training_arguments

trl = pytest.importorskip("trl", reason="trl is not installed: pip install autopeft[test]")
datasets = pytest.importorskip("datasets")

# TRL 1.16 uses names that transformers will remove.
pytestmark = pytest.mark.filterwarnings("ignore")

PLANS = {
    "mixed": [LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "attn.v", "ia3", 0)],
    "empty": [],
}
WORDS = ("the", "film", "was", "good", "bad", "a", "plot")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a word, within the tiny model's vocabulary."""
    words = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", *WORDS))}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def candidate_of(name: str) -> Candidate:
    return Candidate(AdapterPlan(PLANS[name]), TrainSettings(1e-2, steps=4, batch_size=2))


def report_in(folder: Path) -> TrialReport:
    folder.mkdir()
    return TrialReport(rungs=(2, 4), is_confirming=True, folder=folder)


def rows(**columns: str) -> Any:
    split = datasets.Dataset.from_dict({name: [text] * 4 for name, text in columns.items()})
    return {"train": split, "validation": split, "test": split}


@pytest.mark.parametrize("name", PLANS)
def test_sft(name: str, tokenizer: Any, tmp_path: Path) -> None:
    candidate, data = candidate_of(name), rows(prompt="the film was", completion=" good")
    model = get_peft_model(tiny_llama(), candidate, seed=0)
    arguments = training_arguments(candidate, output_dir=str(tmp_path / "out"), use_cpu=True)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**arguments, max_length=16),
        train_dataset=data["train"],
        eval_dataset={split: data[split] for split in ("validation", "test")},
        processing_class=tokenizer,
    )
    found: Any = train(trainer, report_in(tmp_path / "adapter"))
    assert found["loss"] == pytest.approx(found["test_loss"])
    assert (tmp_path / "adapter" / "plan.json").exists()


@pytest.mark.parametrize("name", PLANS)
def test_dpo_compares_with_the_base_model(name: str, tokenizer: Any, tmp_path: Path) -> None:
    candidate = candidate_of(name)
    data = rows(prompt="the film was", chosen=" good", rejected=" bad")
    base = tiny_llama()
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, candidate, seed=0)
    arguments = training_arguments(candidate, output_dir=str(tmp_path / "out"), use_cpu=True)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**arguments, max_length=16),
        train_dataset=data["train"],
        eval_dataset={split: data[split] for split in ("validation", "test")},
        processing_class=tokenizer,
    )
    before = trainer.evaluate(trainer.eval_dataset["validation"])
    assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    found: Any = train(trainer, report_in(tmp_path / "adapter"), metric="rewards/margins")
    if name == "empty":
        assert found["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    else:
        assert found["rewards/margins"] > 1e-4
    model.unload()
    assert all(torch.equal(base.state_dict()[key], value) for key, value in frozen.items())


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(beta: float, tokenizer: Any, tmp_path: Path) -> None:
    candidate = candidate_of("mixed")
    model = get_peft_model(tiny_llama(), candidate, seed=0)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float("good" in text) for text in completions]

    arguments = training_arguments(
        candidate, output_dir=str(tmp_path / "out"), use_cpu=True, per_device_eval_batch_size=2
    )
    data = rows(prompt="the film was")
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=trl.GRPOConfig(**arguments, num_generations=2, max_completion_length=4, beta=beta),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
    )
    found: Any = train(trainer, report_in(tmp_path / "adapter"), metric="reward")
    assert 0.0 <= found["reward"] <= 1.0
    assert (tmp_path / "adapter" / "plan.json").exists()
