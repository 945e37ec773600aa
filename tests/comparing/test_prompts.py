"""Prompts and prefixes of plain peft are scored as plain peft does, row by row, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from task_rows import DATA

import autopeft
from autopeft.errors import AdapterError
from autopeft.models.adapter_files import TENSOR_FILE
from autopeft.tasks.registry import TASKS
from autopeft.testing.tiny_models import save_model
from autopeft.utils.quiet import quiet_peft, quiet_transformers

pytestmark = pytest.mark.filterwarnings("default")

_TYPES = {
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "sft": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}
_TAGS = ["B-PER", "O"]


def _prompt(**given: Any) -> peft.PeftConfig:
    return peft.PromptTuningConfig(num_virtual_tokens=3, **given)


def _p_tuning(**given: Any) -> peft.PeftConfig:
    return peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **given)


def _prefix(**given: Any) -> peft.PeftConfig:
    return peft.PrefixTuningConfig(num_virtual_tokens=3, **given)


def _cpt(**given: Any) -> peft.PeftConfig:
    places: dict[str, Any] = {"cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]}
    return peft.CPTConfig(cpt_token_ids=[4, 5, 6], **places, **given)


class Planted:
    """A base model, rows of a task, and folders of prompts."""

    def __init__(self, task: str, folder: Path) -> None:
        rows, self.settings = DATA[task]
        self.task, self.rows, self.folder = task, rows, folder
        self.auto_class = TASKS.resolve("task", task).auto_class
        cells = [[row[name] for row in rows] for name in rows[0]]
        self.model = save_model(self.auto_class, cells, folder / "model")
        self.data = folder / "rows.jsonl"
        self.data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def bare(self) -> Any:
        torch.manual_seed(1)
        more = {"num_labels": 2} if "CLS" in _TYPES[self.task] else {}
        with quiet_transformers():
            return getattr(hf, self.auto_class).from_pretrained(self.model, **more).eval()

    def save(self, name: str, made: Callable[..., peft.PeftConfig], **more: Any) -> Path:
        with quiet_peft():
            model = peft.get_peft_model(self.bare(), made(task_type=_TYPES[self.task], **more))
        for path, parameter in model.named_parameters():
            if "prompt_encoder" in path or "modules_to_save" in path:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(self.folder / name)
        return self.folder / name

    def compared(self, *folders: Path, **more: Any) -> autopeft.AdapterComparison:
        given = {"task": self.task, "held_out": True, **self.settings, **more}
        return autopeft.compare(list(folders), model=str(self.model), data=str(self.data), **given)

    def outside(self, folder: Path) -> float:
        """Return the loss a token, or a row, each row alone and with the labels that peft moves."""
        model = peft.PeftModel.from_pretrained(self.bare(), folder).eval()
        has_own_loss = model.active_peft_config.peft_type == "CPT"
        total, n = 0.0, 0
        for row in self.rows:
            inputs, count = self._encoded(row)
            labels = inputs.pop("labels")
            with torch.inference_mode():
                if has_own_loss:
                    logits = model(**inputs).logits[0, 3:-1]
                    loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:])
                elif self.task == "token-classification":  # peft leaves these labels unmoved.
                    logits = model(**inputs).logits[0, 3:]
                    loss = torch.nn.functional.cross_entropy(logits, labels[0])
                else:
                    loss = model(**inputs, labels=labels).loss
            total += float(loss) * count
            n += count
        return total / n

    def _encoded(self, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
        tokenizer = hf.AutoTokenizer.from_pretrained(self.model)

        def ids(text: str, *, special: bool = True) -> list[int]:
            found: list[int] = tokenizer(text, add_special_tokens=special).input_ids
            return found

        if self.task == "sft":
            prompt = ids(row["prompt"], special=False)
            answer = ids(f"{row['completion']} [SEP]", special=False)
            given, labels = [*prompt, *answer], [*[-100] * len(prompt), *answer]
        elif self.task == "seq2seq":
            given, labels = ids(row["source"]), ids(row["target"])
            answer = labels
        elif self.task == "token-classification":
            given = ids(" ".join(row["tokens"]))
            answer = [_TAGS.index(tag) for tag in row["ner_tags"]]
            labels = [-100, *answer, -100]
        else:
            given, labels = ids(row["text"]), [["bad", "good"].index(row["label"])]
            answer = labels
        tensors = {"input_ids": [given], "attention_mask": [[1] * len(given)], "labels": [labels]}
        if self.task == "text-classification":
            tensors["labels"] = labels  # type: ignore[assignment]
        return {name: torch.tensor(value) for name, value in tensors.items()}, len(answer)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Planted]:
    made: dict[str, Planted] = {}

    def of(task: str) -> Planted:
        if task not in made:
            made[task] = Planted(task, tmp_path_factory.mktemp(task))
        return made[task]

    return of


@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        ("sft", (_prompt, _p_tuning, _prefix, _cpt)),
        ("text-classification", (_prompt, _p_tuning)),
        ("token-classification", (_prompt, _p_tuning)),
        ("seq2seq", (_prompt, _prefix)),
    ],
)
def test_each_kind_scores_as_plain_peft_does(
    task: str, kinds: tuple[Any, ...], planted: Callable[[str], Planted]
) -> None:
    there = planted(task)
    folders = [there.save(kind.__name__.strip("_"), kind) for kind in kinds]
    found = there.compared(*folders)
    losses = {"no adapter": found.entry("no adapter").metrics["loss"]}
    for folder in folders:
        losses[folder.name] = found.entry(folder.name).metrics["loss"]
        assert losses[folder.name] == pytest.approx(there.outside(folder), abs=1e-5), folder.name
        saved = sum(tensor.numel() for tensor in load_file(folder / TENSOR_FILE).values())
        assert found.entry(folder.name).trainable_params == saved, folder.name
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses)  # Each does something.


def _changed(folder: Path, **config: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("task", "made", "changes", "told"),
    [
        # peft would leave the prompt out.
        ("sft", _prompt, {"task_type": None}, "PROMPT_TUNING for task_type None, not CAUSAL_LM"),
        ("sft", _prefix, {"task_type": "SEQ_CLS"}, "task_type SEQ_CLS, not CAUSAL_LM"),
        ("sft", _prompt, {"peft_type": "MULTITASK_PROMPT_TUNING"}, "the number of its task"),
        ("text-classification", _prefix, {}, "cannot be scored .*past key values"),
    ],
)
def test_what_peft_would_not_use_is_refused(
    task: str,
    made: Callable[..., peft.PeftConfig],
    changes: dict[str, Any],
    told: str,
    planted: Callable[[str], Planted],
    tmp_path: Path,
) -> None:
    there = planted(task)
    folder = shutil.copytree(there.save("refused", made), tmp_path / "refused")
    with pytest.raises(AdapterError, match=told):
        there.compared(_changed(folder, **changes))


def test_a_classifier_that_reads_backwards_only_is_refused_behind_a_prompt(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with quiet_transformers(), quiet_peft():
        bare = hf.AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2)
        peft.get_peft_model(bare, _prompt(task_type="SEQ_CLS")).save_pretrained(tmp_path / "p")
    with pytest.raises(AdapterError, match="does not find a row's last token"):
        autopeft.compare(tmp_path / "p", model=str(tiny_llama), data=str(tiny_data))


def test_rows_that_leave_a_prompt_no_room_are_refused_with_the_length_that_does(
    planted: Callable[[str], Planted], tmp_path: Path
) -> None:
    there = planted("text-classification")
    folder = there.save("wide", peft.PromptTuningConfig, num_virtual_tokens=62)
    told = "62 virtual tokens before rows of up to 6, and the model has 64 positions; use --max-l"
    with pytest.raises(AdapterError, match=told):
        there.compared(folder)
    found = there.compared(folder, max_length=2).entry("wide")
    assert found.metrics["loss"] > 0
