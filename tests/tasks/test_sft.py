"""Searches on chats, instructions, completions and text; their adapters scored from outside."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from chat_samples import chat_model
from covering import usual_first
from searches import loads, logits_of, searched
from torch.nn import functional

import autopeft
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import collate
from autopeft.tasks.conversations import read_rows
from autopeft.tasks.data import IGNORED, SPLITS, TaskData
from autopeft.tasks.examples import Examples
from autopeft.tasks.reading import read
from autopeft.tasks.sft import SupervisedFineTuning

Row = dict[str, Any]

COLORS = ("blue", "red", "green", "grey", "white")
THINGS = ("sky", "sun", "sea", "moon", "leaf", "snow", "rose")


def question(number: int) -> tuple[str, str]:
    """A question of its own, and its answer."""
    thing = THINGS[number % len(THINGS)]
    return f"What color is the {thing} {number}?", f"It is {COLORS[number % len(COLORS)]}."


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(number: int) -> list[dict[str, str]]:
    """One or two questions and answers, some with a system prompt."""
    turns = [turn("system", "You are brief.")] if number % 3 == 0 else []
    for each in range(1 + number % 2):
        asked, answer = question(number + 50 * each)
        turns += [turn("user", asked), turn("assistant", answer)]
    return turns


def sharegpt(number: int) -> Row:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    talked = [{"from": names[t["role"]], "value": t["content"]} for t in talk(number)]
    return {"conversations": talked}


def alpaca(number: int) -> Row:
    asked, answer = question(number)
    more = f"Look at number {number}." if number % 2 else ""
    return {"instruction": asked, "input": more, "output": answer}


def completion(number: int) -> Row:
    asked, answer = question(number)
    return {"prompt": asked, "completion": f" {answer}"}


def chat_completion(number: int) -> Row:
    talked = talk(number)
    return {"prompt": talked[:-1], "completion": talked[-1:]}


Learned = tuple[list[int], list[tuple[int, int]]]
"""Tokens of a row, and where the learned ones start and stop."""


def of_messages(tokenizer: Any, messages: Sequence[dict[str, str]], first: int = 0) -> Learned:
    """As transformers renders a conversation; learned are the assistant's turns from `first`."""

    def tokens(n: int, *, is_asked: bool = False) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(
            list(messages[:n]), add_generation_prompt=is_asked, return_dict=False
        )
        return found

    spans = [
        (len(tokens(n, is_asked=True)), len(tokens(n + 1)))
        for n, message in enumerate(messages)
        if message["role"] == "assistant" and n >= first
    ]
    return tokens(len(messages)), spans


def of_text(tokenizer: Any, prompt: str, text: str) -> Learned:
    tokens = [*tokenizer(prompt + text)["input_ids"], tokenizer.eos_token_id]
    return tokens, [(len(tokenizer(prompt)["input_ids"]), len(tokens))]


def of_sharegpt(tokenizer: Any, row: Row) -> Learned:
    names = {"system": "system", "human": "user", "gpt": "assistant"}
    turns = [turn(names[t["from"]], t["value"]) for t in row["conversations"]]
    return of_messages(tokenizer, turns)


def of_alpaca(tokenizer: Any, row: Row) -> Learned:
    asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
    return of_messages(tokenizer, [turn("user", asked), turn("assistant", row["output"])])


def of_chat_completion(tokenizer: Any, row: Row) -> Learned:
    talked = [*row["prompt"], *row["completion"]]
    return of_messages(tokenizer, talked, len(row["prompt"]))


FORMATS: dict[str, tuple[Callable[[int], Row], Callable[[Any, Row], Learned]]] = {
    "messages": (
        lambda n: {"messages": talk(n)},
        lambda tok, row: of_messages(tok, row["messages"]),
    ),
    "sharegpt": (sharegpt, of_sharegpt),
    "alpaca": (alpaca, of_alpaca),
    "prompt and completion": (
        completion,
        lambda tok, row: of_text(tok, row["prompt"], row["completion"]),
    ),
    "conversational prompt": (chat_completion, of_chat_completion),
    "plain text": (
        lambda n: {"text": " ".join(question(n))},
        lambda tok, row: of_text(tok, "", row["text"]),
    ),
}


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("written", [json.dumps, repr])
@pytest.mark.parametrize("kind", ["messages", "sharegpt", "conversational prompt"])
def test_chats_may_be_in_csv_files(
    kind: str, written: Callable[[Any], str], tmp_path: Path
) -> None:
    rows = [FORMATS[kind][0](number) for number in range(6)]
    path = tmp_path / "chats.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([[written(cell) for cell in row.values()] for row in rows])
    found = []
    for source in (str(path), rows):
        table = read("data", source)["train"]
        names = SupervisedFineTuning.find_columns({}, table)
        SupervisedFineTuning.check_fit(table, names)
        found.append(read_rows({role: table.columns[name] for role, name in names.items()}).rows)
    assert found[0] == found[1]


def scored(model: Any, rows: Sequence[Learned]) -> tuple[float, float]:
    """Loss and accuracy over all learned tokens, each row by itself."""
    total = n_right = n = 0.0
    for tokens, spans in rows:
        logits = logits_of(model, input_ids=torch.tensor([tokens]))[0]
        for start, stop in spans:
            start = max(start, 1)  # Nothing predicts the first token.
            targets = torch.tensor(tokens[start:stop])
            predicted = logits[start - 1 : stop - 1].double()
            total += float(functional.cross_entropy(predicted, targets, reduction="sum"))
            n_right += int((predicted.argmax(dim=-1) == targets).sum())
            n += len(targets)
    return total / n, n_right / n


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["messages", "prompt and completion", "plain text"])
def test_the_loss_is_that_of_trl(name: str, llama: Path) -> None:
    trainers = pytest.importorskip("trl.trainer.sft_trainer")
    add_fused_lm_head = pytest.importorskip("trl.trainer.utils").add_fused_lm_head
    made, read = FORMATS[name]
    tokenizer = hf.AutoTokenizer.from_pretrained(llama)
    rows = [made(number) for number in range(8)]
    found = read_rows({column: [row[column] for row in rows] for column in rows[0]})
    examples = Examples({"row": found.rows}, found.source_rows, "memory")
    task = SupervisedFineTuning().configured(SearchSettings())
    split = task.encode(tokenizer, examples, (), 10_000)
    data = TaskData(task.name, dict.fromkeys(SPLITS, split), (), pad_id=tokenizer.pad_token_id)
    batch = collate(data, "train", np.arange(8))
    # Assistant-only and completion-only losses: TRL masks the other tokens.
    examples_of_trl = []
    for tokens, spans in (read(tokenizer, row) for row in rows):
        labels = [IGNORED] * len(tokens)
        for start, stop in spans:
            labels[start:stop] = tokens[start:stop]
        examples_of_trl.append({"input_ids": tokens, "labels": labels})
    collator = trainers.DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    inputs = collator(examples_of_trl)
    model = hf.AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        loss = float(task.loss(model, batch))
        parts = task.losses(model, batch, 4).tolist()
        for part in range(4):
            own = collate(data, "train", np.arange(2 * part, 2 * part + 2))
            assert parts[part] == pytest.approx(float(task.loss(model, own)), rel=1e-5)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        trainer = SimpleNamespace(
            model=model,
            args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
            accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, parallelism_config=None),
            aux_loss_enabled=False,
            compute_loss_func=None,
            label_smoother=None,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
        )
        theirs = float(trainers.SFTTrainer.compute_loss(trainer, model, inputs))
    assert loss == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", usual_first(list(FORMATS), "messages", "alpaca"))
def test_a_saved_adapter_scores_what_front_json_says(
    name: str, llama: Path, tmp_path: Path
) -> None:
    made, read = FORMATS[name]
    rows = [made(number) for number in range(60)]
    found = searched(llama, write(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    tokenizer = hf.AutoTokenizer.from_pretrained(llama)
    test = [read(tokenizer, rows[row]) for row in found.test_rows]
    for how, model in loads(found, "AutoModelForCausalLM", tmp_path / "merged").items():
        loss, accuracy = scored(model, test)
        assert found.score["loss"] == pytest.approx(loss, rel=1e-5), how
        assert found.score["token_accuracy"] == pytest.approx(accuracy), how


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_every_export_loads_as_its_card_says(llama: Path, tmp_path: Path) -> None:
    rows = [{"messages": talk(number)} for number in range(60)]
    found = searched(llama, write(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    tokenizer = hf.AutoTokenizer.from_pretrained(llama)
    test = [of_messages(tokenizer, rows[row]["messages"]) for row in found.test_rows]
    for format in ("peft", "lora", "merged"):
        target = tmp_path / format
        autopeft.export(tmp_path / "run", format=format, to=target)
        card = (target / "README.md").read_text(encoding="utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        names: dict[str, Any] = {}
        exec(code.replace("path/to/this/folder", str(target)), names)
        loss, _ = scored(names["model"].eval(), test)
        assert found.score["loss"] == pytest.approx(loss, rel=1e-5), format
        assert f"{loss:.3g}"[:4] in card, format
        assert "task sft" in card, format
    whole = hf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert whole.chat_template == tokenizer.chat_template
