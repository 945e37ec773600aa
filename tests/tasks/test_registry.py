from __future__ import annotations

from typing import Any

import pytest
from transformers import BertConfig, GPT2Config, T5Config

from autopeft.api import merge_settings
from autopeft.errors import DataError, SettingsError
from autopeft.settings import SearchSettings
from autopeft.tasks.reading import read
from autopeft.tasks.registry import TASKS, make_task


@pytest.mark.parametrize("name", TASKS.registered)
def test_a_task_has_the_name_that_it_is_listed_by(name: str) -> None:
    assert TASKS[name].name == name


@pytest.mark.parametrize("model", [BertConfig(), GPT2Config(), T5Config()])
@pytest.mark.parametrize(
    ("names", "task"),
    [
        (("sentence1", "sentence2", "score"), "regression"),
        (("sentence_A", "sentence_B", "relatedness_score"), "regression"),
        (("sentence1", "sentence2", "label"), "text-classification"),
        (("premise", "hypothesis", "gold_label"), "text-classification"),
        (("question1", "question2", "is_duplicate"), "text-classification"),
        (("text_a", "text_b", "label"), "text-classification"),
        (("sentence", "question", "label"), "text-classification"),
    ],
)
def test_pairs_with_a_class_or_a_number_are_recognized(
    names: tuple[str, str, str], task: str, model: Any
) -> None:
    number = 7 if task == "regression" else 1
    rows = [(f"good w{i}", f"bad w{i}", i % 3 / number) for i in range(20)]
    table = read("data", [dict(zip(("idx", *names), (0, *row), strict=True)) for row in rows])
    found = make_task(SearchSettings(), table["train"], model)
    assert found.name == task
    roles = found.find_columns({}, table["train"])
    assert roles == dict(zip(("text", "text_pair", "label"), names, strict=True))


def test_an_unknown_task_is_reported_before_anything_is_read() -> None:
    with pytest.raises(SettingsError, match="task='astrology': no such task; use "):
        merge_settings({"task": "astrology", "data": "nowhere.csv"}, {})


def test_a_label_that_is_not_recognized_is_asked_for_by_name() -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": "yes"} for i in range(9)]
    table = read("data", rows)["train"]
    with pytest.raises(DataError, match=r"\(sentence1, sentence2, score\) is recognized .*--label"):
        make_task(SearchSettings(), table, BertConfig())
    found = make_task(SearchSettings(label="score"), table, BertConfig())
    assert found.name == "text-classification"
