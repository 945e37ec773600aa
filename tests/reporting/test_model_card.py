import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_samples import hostile, interrupted, make_record

from autopeft.errors import SettingsError
from autopeft.reporting.columns import facts
from autopeft.reporting.converted import Converted
from autopeft.reporting.front_view import view
from autopeft.reporting.model_card import model_card
from autopeft.reporting.record import SearchRecord


def head(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


def test_the_card_has_the_measured_numbers() -> None:
    shown = view(make_record())
    assert shown.best is not None
    card = model_card(shown, shown.best)
    entry = shown.find(shown.best)
    assert entry is not None
    assert entry.adapter_score is not None
    interval = entry.objectives_ci["accuracy"]
    assert interval is not None
    low, high = interval
    assert f"{entry.objectives['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f})" in card
    assert f"({entry.price.trainable_params:,})" in card
    assert f"accuracy {entry.adapter_score.metrics['accuracy']:.4f}" in card
    sites = card.split("## Sites")[1].split("## Training")[0]
    assert sites.count("| attn.") + sites.count("| mlp.") == len(entry.candidate.plan.specs)
    assert set(entry.candidate.plan.methods) <= set(head(card)["tags"])


def test_base_model_is_named_where_it_is_a_hub_id(tmp_path: Path) -> None:
    record = make_record()
    for model, named in (("org/tiny-bert", True), (str(tmp_path), False), ("./here", False)):
        shown = view(replace(record, settings={**record.settings, "model": model}))
        assert ("base_model" in head(model_card(shown, shown.front[0].digest))) == named


def test_the_quality_is_an_evaluation_result_that_hubs_read() -> None:
    from huggingface_hub import ModelCard

    shown = view(make_record())
    assert shown.best is not None
    entry = shown.find(shown.best)
    assert entry is not None
    card: Any = ModelCard(model_card(shown, shown.best))
    (result,) = card.data.eval_results
    assert result.metric_type == "accuracy"
    assert result.metric_value == pytest.approx(entry.objectives["accuracy"])
    assert result.dataset_split == "test"
    assert result.task_type == "text-classification"


def test_the_card_says_how_it_is_served_and_where_its_head_is() -> None:
    shown = view(make_record())
    card = model_card(
        shown,
        shown.front[0].digest,
        format="lora",
        serve="vllm serve org/base --max-lora-rank 16",
        head_file="head.safetensors",
        servable="vllm",
    )
    assert "```bash\nvllm serve org/base --max-lora-rank 16\n```" in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'load_file("path/to/this/folder" + "/head.safetensors"), strict=False)' in code
    assert "only plans that `autopeft export --for vllm` can write" in card


def test_unknown_digest_is_one_clear_line() -> None:
    with pytest.raises(SettingsError, match="no such candidate"):
        model_card(view(make_record()), "0000")


def test_unconfirmed_numbers_are_called_validation() -> None:
    shown = view(interrupted(make_record()))
    assert "accuracy (validation)" in model_card(shown, shown.front[0].digest)


@pytest.mark.parametrize("record", [make_record(), hostile()])
def test_tables_keep_their_shape(record: SearchRecord) -> None:
    shown = view(record)
    text = model_card(shown, shown.front[0].digest)
    width = 0
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (cells and width) or cells == width
        width = cells
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", text.replace("\\<", "").split("```")[0])


@pytest.mark.parametrize(
    ("format", "line"),
    [
        ("peft", "autopeft.load_adapter("),
        ("lora", "PeftModel.from_pretrained(model,"),
        ("merged", "AutoModelForSequenceClassification.from_pretrained(checkpoint)"),
    ],
)
def test_the_card_says_how_to_load_what_the_folder_holds(format: str, line: str) -> None:
    shown = view(make_record())
    card = model_card(shown, shown.front[0].digest, format=format, notes=["all is well"])
    assert line in card
    assert "- all is well" in card


def test_an_adapter_over_quantized_weights_is_loaded_over_them() -> None:
    shown = view(make_record())
    lora = next(e for e in shown.front if e.candidate.plan.methods == ("lora",))
    plain, quantized = (
        model_card(shown, lora.digest, plan={"quantization": scheme})
        for scheme in ("none", "bnb-4bit")
    )
    assert "PeftModel.from_pretrained(model," in plain
    assert "autopeft.load_adapter(" in quantized


def test_the_card_tells_no_score_of_another_export() -> None:
    shown = view(make_record())
    entry = shown.front[0]
    other = Converted(entry.digest, "merged", lossy=True, n_rows=9)
    shown = replace(shown, converted=(other,), outdated=(other,))
    assert "as exported" in dict(facts(shown, entry))
    assert "as exported" not in model_card(shown, entry.digest, format="lora")


def test_the_card_says_what_was_dropped_cut_and_noticed() -> None:
    shown = view(make_record())
    assert shown.best is not None
    card = model_card(shown, shown.best).replace("\\", "")
    for line in shown.data.lines():
        assert f"- {line}" in card
    assert "task text-classification (text=review, label=stars)" in card
