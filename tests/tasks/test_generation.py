"""Generated text: the same in a batch, with a cache and with any adapter as one token at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from chat_samples import CHATML, chat_model, chat_tokenizer, decoder_of
from covering import usual_first
from searches import loads, searched

import autopeft
from autopeft.errors import DataError, SettingsError
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.settings import SearchSettings
from autopeft.tasks.generation import Generator
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.training.trainer import Trainer

N_TOKENS, END = 60, 1
IDS = {"bos_token_id": 0, "eos_token_id": END, "pad_token_id": 2}
SITES = {
    "lora": [LayerSpec(0, "attn.o", "lora", 4), LayerSpec(1, "mlp.up", "lora", 4)],
    "prefix": [LayerSpec(0, "attn", "prefix", 4), LayerSpec(1, "attn", "prefix", 2)],
    "prompt_tuning": [LayerSpec(0, MODEL, "prompt_tuning", 5)],
    "bottleneck": [LayerSpec(1, "mlp.down", "bottleneck", 4)],
}


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, N_TOKENS, size=n).tolist() for n in lengths]


def one_by_one(model: Any, prompt: Sequence[int], n_new: int, ends: Sequence[int]) -> list[int]:
    """Greedy search without batch, padding or cache."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(n_new):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
            if tokens[-1] in ends:
                return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", sorted(SITES))
def test_a_batch_gets_the_text_of_each_row_alone(kind: str, method: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(decoder_of(kind, N_TOKENS, IDS))
    candidate = Candidate(AdapterPlan(SITES[method]), TrainSettings(1e-3))
    prompts = prompts_of([1, 3, 9, 4, 17, 2, 30])
    with attach(backbone, candidate, seed=0) as attached, warnings.catch_warnings():
        with torch.no_grad():
            for group in attached.parameter_groups():
                for parameter in group.parameters:
                    parameter.add_(torch.randn_like(parameter))
        attached.model.eval()
        plain = [one_by_one(attached.model, p, 12, [END, 7]) for p in prompts]
        warnings.simplefilter("error")  # Generating with a cache must hold.
        found = Generator(2, (END, 7), 12)(attached.model, prompts, "cpu")
    assert found == plain
    assert len({tuple(each) for each in plain}) > 1


def test_what_a_checkpoint_asks_for_beside_greedy_search_is_off() -> None:
    torch.manual_seed(0)
    model = decoder_of("gpt2", N_TOKENS, IDS)
    prompts = prompts_of([3, 5])
    plain = [one_by_one(model, prompt, 10, []) for prompt in prompts]
    settings: dict[str, Any] = {
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 9,
    }
    settings |= {"bad_words_ids": [[plain[0][0]]], "do_sample": True, "temperature": 5.0}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert Generator(2, (), 10)(model, prompts, "cpu") == plain


def test_a_long_prompt_shortens_no_other_generation() -> None:
    torch.manual_seed(0)
    model = decoder_of("gpt2", N_TOKENS, IDS)  # 256 positions
    prompts = prompts_of([250, 4, 6])
    found = Generator(2, (), 20, max_length=256)(model, prompts, "cpu")
    assert [len(each) for each in found] == [6, 20, 20]
    assert found == [one_by_one(model, p, n, []) for p, n in zip(prompts, (6, 20, 20), strict=True)]


class Broken(torch.nn.Module):
    """Ends at once if it has a cache, as a model that mistakes padding for text may."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def generate(self, *, input_ids: torch.Tensor, use_cache: bool, **options: Any) -> Any:
        if not use_cache:
            return self.model.generate(input_ids=input_ids, use_cache=False, **options)
        return torch.cat([input_ids, torch.full((len(input_ids), 1), END)], dim=1)


def test_a_wrong_cache_is_noticed_and_not_used() -> None:
    torch.manual_seed(0)
    model = decoder_of("llama", N_TOKENS, IDS)
    prompts = prompts_of([3, 5, 2])
    with pytest.warns(UserWarning, match="generation with a cache is off: Broken"):
        found = Generator(2, (END,), 8)(Broken(model), prompts, "cpu")
    assert found == [one_by_one(model, prompt, 8, [END]) for prompt in prompts]


def test_a_turn_ends_with_the_templates_own_token() -> None:
    tokenizer = chat_tokenizer(CHATML, eos="</s>")
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    reference = tokenizer("It is blue.<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert reference[-1] != end
    assert set(SupervisedFineTuning._end_ids(tokenizer, [reference])) == {end, eos}
    plain = chat_tokenizer(None)
    assert set(SupervisedFineTuning._end_ids(plain, [reference])) == {end, eos}
    assert set(SupervisedFineTuning._end_ids(plain, [reference, *[reference[:3]] * 2])) == {eos}


# Searches


def letters(prompt: str, reference: str, text: str) -> float:
    """The share of the reference's letters that the text has; the prompt must be the prompt."""
    assert "What is" in prompt
    assert reference.startswith('{"n":')
    return len(set(reference) & set(text)) / len(set(reference))


def talk(number: int) -> list[dict[str, str]]:
    asked = f"What is {number} and" + " more" * (number % 5) + "?"
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": json.dumps({"n": number % 3})},
    ]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", usual_first(["llama", "gpt2"], "llama"))
def test_a_metric_of_text_is_what_the_saved_adapter_writes(kind: str, tmp_path: Path) -> None:
    base = chat_model(tmp_path / "base", kind)
    rows = [{"messages": talk(number)} for number in range(80)]
    data = write(tmp_path / "rows.jsonl", rows)
    written: list[int] = []
    at_rungs: list[int] = []
    write_plain, advance = Generator.__call__, Trainer.advance

    def writing(self: Generator, model: Any, prompts: Any, device: Any) -> Any:
        written.append(len(prompts))
        return write_plain(self, model, prompts, device)

    def advancing(self: Trainer, to_step: int) -> Any:
        before = len(written)
        report = advance(self, to_step)
        if to_step < 90:
            at_rungs.append(len(written) - before)
        else:
            assert len(written) == before + 1
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "__call__", writing)
        patch.setattr(Trainer, "advance", advancing)
        found = searched(
            base, data, tmp_path / "run", metric=letters, steps=90, rungs=2, generation_rows=6
        )
    assert set(at_rungs) == {0}
    assert set(written) == {6}
    assert found.score["n_rows"] == 6
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert front["objectives"][0] == {"name": "letters", "direction": "maximize", "unit": ""}
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    splits = json.loads((tmp_path / "run" / "state" / "splits.json").read_text())
    sample = splits["test"]["generated"]
    assert len(sample) == 6
    assert set(sample) < set(found.test_rows)
    longest = max(
        len(tokenizer(f"{talk(row)[1]['content']}<|im_end|>\n")["input_ids"]) for row in sample
    )
    for how, model in loads(found, "AutoModelForCausalLM", tmp_path / "merged").items():
        values = []
        for row in sample:
            turns = talk(row)
            prompt = tokenizer.apply_chat_template(
                turns[:1], add_generation_prompt=True, return_dict=False
            )
            tokens = one_by_one(model, prompt, longest + 8, [tokenizer.eos_token_id])
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            values.append(letters(turns[0]["content"], turns[1]["content"], text))
        assert found.score["letters"] == pytest.approx(np.mean(values)), how


@pytest.mark.parametrize(
    "metric", ["exact_match", "token_f1", "rougeL", "json_valid", "number_match", r"regex=\d+"]
)
@pytest.mark.filterwarnings("default")
def test_every_metric_of_text_has_one_value_a_row(metric: str, tmp_path: Path) -> None:
    task = SupervisedFineTuning().configured(SearchSettings(metric=metric))
    assert task.needs_text()
    texts = ['{"n": 1}', "it is 2", "3"]
    scores = {"loss": np.ones(5), "weight": np.ones(5), "correct": np.ones(5)}
    rows: Any = SimpleNamespace()
    generated = (["a", "b", "c"], ['{"n": 1}', '{"n": 2}', '{"n": 3}'], texts)
    found = task.summarize(scores, rows, np.arange(5), generated=generated)
    assert found.rows.shape == (3,)
    assert found.metrics[task.quality.name] == pytest.approx(found.rows.mean())
    assert found.rows[0] == 1.0
    at_a_rung = task.summarize(scores, rows, np.arange(5))
    assert task.quality.name not in at_a_rung.metrics


def test_plain_text_has_no_metric_of_generated_text(tmp_path: Path) -> None:
    rows = [{"text": f"the sky is blue {number}"} for number in range(40)]
    data = write(tmp_path / "rows.jsonl", rows)
    base = chat_model(tmp_path / "base")
    with pytest.raises(DataError, match=r"^metric='rougeL': .*no prompt.*; use "):
        autopeft.search(
            model=str(base),
            data=str(data),
            metric="rougeL",
            output=str(tmp_path / "run"),
            budget="2trials",
            backend="local",
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingsError, match="not measured by text-classification"):
        autopeft.search(
            model=str(base),
            data=str(data),
            task="text-classification",
            metric="rougeL",
            output=str(tmp_path / "run"),
            budget="2trials",
            backend="local",
        )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_a_metric_of_text_that_is_no_mean_over_rows_says_how_many_rows_it_is_of(
    tmp_path: Path,
) -> None:
    base = chat_model(tmp_path / "base")
    data = write(tmp_path / "rows.jsonl", [{"messages": talk(number)} for number in range(80)])
    found = searched(base, data, tmp_path / "run", metric="wer", generation_rows=6)
    assert len(found.test_rows) > 6
    assert found.score["n_rows"] == 6
