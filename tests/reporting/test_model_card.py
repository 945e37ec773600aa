import re
from dataclasses import replace

import pytest
import yaml
from report_samples import hostile, interrupted, make_record

from autopeft.errors import SettingsError
from autopeft.reporting.front_view import view
from autopeft.reporting.model_card import model_card, report_markdown


def head(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_tells_the_measured_numbers():
    record = make_record()
    card = model_card(record, record.best)
    entry = view(record).find(record.best)
    low, high = entry.objectives_ci["accuracy"]
    assert f"{entry.objectives['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f})" in card
    assert f"exact: {entry.price.trainable_params:,}" in card
    assert f"accuracy {entry.adapter_score.metrics['accuracy']:.4f}" in card
    assert card.count("| `attn.") + card.count("| `mlp.") == len(entry.candidate.plan.specs)
    assert set(entry.candidate.plan.methods) <= set(head(card)["tags"])
    assert card == model_card(view(record), record.best)


def test_base_model_is_named_where_it_is_a_hub_id(tmp_path):
    record = make_record()
    for model, named in (("org/tiny-bert", True), (str(tmp_path), False), ("./here", False)):
        made = replace(record, settings={**record.settings, "model": model})
        assert ("base_model" in head(model_card(made, record.best))) == named


def test_unknown_digest_is_one_clear_line():
    with pytest.raises(SettingsError, match="no such candidate"):
        model_card(make_record(), "0000")


def test_unconfirmed_numbers_are_called_validation():
    record = interrupted(make_record())
    assert "accuracy (validation)" in model_card(record, record.best)
    assert "on the validation split" in report_markdown(view(record))


@pytest.mark.parametrize("record", [make_record(), hostile()])
def test_tables_keep_their_shape(record):
    for text in (report_markdown(view(record)), model_card(record, record.best)):
        width = 0
        for line in text.splitlines():
            cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
            assert not (cells and width) or cells == width
            width = cells
        assert "<script>" not in re.sub(r"`[^`\n]*`", "", text.replace("\\<", "").split("```")[0])


def test_report_lists_the_front():
    record = make_record()
    text = report_markdown(view(record))
    for entry in view(record).front:
        assert entry.digest in text


@pytest.mark.parametrize(
    ("format", "line"),
    [
        ("peft", "autopeft.load_adapter("),
        ("lora", "PeftModel.from_pretrained(base"),
        ("merged", 'AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")'),
    ],
)
def test_a_card_tells_how_to_load_what_the_folder_holds(format: str, line: str):
    shown = view(make_record())
    card = model_card(shown, shown.front[0].digest, format=format, notes=["all is well"])
    assert line in card
    assert "- all is well" in card
