"""`retain`: forgetting is measured as users would, and it is an objective and a limit."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from searches import SHORT

import autopeft
from autopeft.engine.executor import Executor
from autopeft.engine.messages import Job, RungMessage
from autopeft.errors import UserError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing.prepare import prepare
from autopeft.settings import SearchSettings
from autopeft.utils.quiet import quiet_peft, quiet_transformers

LENGTH = 12

LEARNED = ("good", "fine", "great", "the", "film", "was", "a")
RETAINED = ("bad", "poor", "awful", "scene", "actor", "very", "so")
"""Words of the tiny tokenizer: of the rows, and of the text to retain."""

pytestmark = pytest.mark.filterwarnings("default")  # of peft, on loading an adapter


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that hold half of the tokenizer's words."""
    path, chooser = tmp_path_factory.mktemp("rows") / "rows.csv", random.Random(1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        for number in range(60):
            chosen = [chooser.choice(LEARNED) for _ in range(8)]
            writer.writerow([f"{number} {chosen[0]}", " ".join(chosen[1:])])
    return path


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of the other half, with an empty line in it."""
    path, chooser = tmp_path_factory.mktemp("kept") / "kept.txt", random.Random(2)
    lines = [" ".join(chooser.choice(RETAINED) for _ in range(9)) for _ in range(12)]
    path.write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n")
    return path


def _asked(model: Path, rows: Path, output: Path, **settings: Any) -> dict[str, Any]:
    return {
        **SHORT,
        "model": str(model),
        "data": str(rows),
        "output": str(output),
        "max_length": LENGTH,
        **settings,
    }


@pytest.fixture(scope="module")
def result(
    tiny_llama: Path, rows: Path, kept: Path, tmp_path_factory: pytest.TempPathFactory
) -> autopeft.SearchResult:
    output = tmp_path_factory.mktemp("out") / "run"
    objectives = ["forgetting", "trainable_params"]
    asked = _asked(tiny_llama, rows, output, retain=str(kept), objectives=objectives)
    return autopeft.search(asked | {"budget": "6trials", "max_finalists": 3})


def _front(result: autopeft.SearchResult) -> Any:
    return json.loads((result.folder / "front.json").read_text())


def _trials(result: autopeft.SearchResult) -> list[dict[str, str]]:
    with (result.folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_forgetting_is_that_of_plain_transformers_and_peft(
    result: autopeft.SearchResult, tiny_llama: Path, kept: Path
) -> None:
    members = [m for m in _front(result)["front"] if m["adapter"]]
    assert members
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer(kept.read_text(), add_special_tokens=False)["input_ids"]

    def loss(model: torch.nn.Module) -> float:
        total, count = 0.0, 0
        for start in range(0, len(ids), LENGTH):
            window = torch.tensor([ids[start : start + LENGTH]])
            if window.shape[1] > 1:
                n = window.shape[1] - 1
                total += float(model(input_ids=window, labels=window).loss) * n
                count += n
        return total / count

    with quiet_transformers(), quiet_peft(), torch.inference_mode():
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        before = loss(base)
        for member in members:
            fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
            adapted = PeftModel.from_pretrained(fresh, result.folder / member["adapter"]).eval()
            told = member["objectives"]["forgetting"]
            assert loss(adapted) - before == pytest.approx(told, abs=1e-4)


def test_forgetting_is_in_every_file(result: autopeft.SearchResult) -> None:
    front = _front(result)
    assert [o["name"] for o in front["objectives"]] == ["loss", "trainable_params", "forgetting"]
    assert any("the first" in note and "kept.txt" in note for note in front["data"]["notes"])
    trials = _trials(result)
    complete = [row for row in trials if row["state"] == "complete"]
    assert all(math.isfinite(float(row["objective.forgetting"])) for row in complete)
    assert all(float(row["measured.retain_seconds"]) > 0 for row in complete)
    reference = next(row for row in complete if row["origin"] == "reference")
    assert float(reference["objective.forgetting"]) == pytest.approx(0.0, abs=1e-6)
    assert "forgetting" in (result.folder / "report.html").read_text()


def test_a_limit_keeps_trials_and_finalists_off_the_front(
    tiny_llama: Path, rows: Path, kept: Path, tmp_path: Path
) -> None:
    asked = _asked(tiny_llama, rows, tmp_path / "run", retain=str(kept))
    found = autopeft.search(asked | {"constraints": ["forgetting<=-9"]})
    front = _front(found)
    assert not front["front"]
    trials = _trials(found)
    complete = [row for row in trials if row["state"] == "complete"]
    assert complete
    assert all(row["broken"] == "forgetting<=-9" for row in complete)
    assert autopeft.report(found.folder).view.front == ()


def _measured(ready: Any, executor: Executor, candidate: Candidate) -> float:
    executor.begin([Job("search", candidate, ready.prices.price(candidate), seed=0)])
    while True:
        message = executor.advance()[0]
        assert isinstance(message, RungMessage), message
        if message.is_last:
            executor.clear()
            return message.measured["forgetting"]


def test_a_planted_candidate_forgets_more_than_a_small_one(
    tiny_llama: Path, rows: Path, kept: Path, tmp_path: Path
) -> None:
    asked = _asked(tiny_llama, rows, tmp_path / "run", retain=str(kept), steps=60)
    ready = prepare(SearchSettings.from_mapping(asked))
    executor = Executor(ready.context())
    roles = [r for r in ready.prices.topology.roles(0) if r.startswith(("attn.", "mlp."))]
    train = TrainSettings(learning_rate=0.05, steps=60, batch_size=8)
    everywhere = [LayerSpec(n, role, "lora", 4) for n in range(2) for role in roles]
    planted = Candidate(AdapterPlan(tuple(everywhere)), train)
    small = Candidate(
        AdapterPlan((LayerSpec(1, "attn.v", "lora", 2),)), replace(train, learning_rate=1e-4)
    )
    much, little = (_measured(ready, executor, each) for each in (planted, small))
    # The head of the tiny model is frozen and small: its losses lie within a tenth of each other.
    assert much > 0.02
    assert abs(little) < 0.002


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file"),
        ("", "empty"),
        ("  \n \n", "no rows"),
        (b"\x00\x01\x02\xff\xfe\x00", ""),
    ],
)
def test_bad_text_is_refused_in_one_line(
    tiny_llama: Path, rows: Path, tmp_path: Path, content: str | bytes | None, problem: str
) -> None:
    path = tmp_path / "retain.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        prepare(SearchSettings.from_mapping(_asked(tiny_llama, rows, tmp_path, retain=str(path))))
    text = str(raised.value)
    assert raised.value.field == "retain"
    assert problem in text
    assert "\n" not in text


def test_the_training_data_cannot_be_retained(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    settings = SearchSettings.from_mapping(_asked(tiny_llama, rows, tmp_path, retain=str(rows)))
    with pytest.raises(UserError, match=r"retain='rows.csv': all 60 rows are also in"):
        prepare(settings)


def test_shared_rows_are_left_out_and_counted(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.csv"
    lines = rows.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], "a good,film", "a bad,plot"]) + "\n")
    settings = _asked(tiny_llama, rows, tmp_path, retain=str(path))
    data = prepare(SearchSettings.from_mapping(settings)).data
    assert data is not None
    assert len(data.second[0].data.test) == 2
    assert any("4 rows left out that the search's data have too" in note for note in data.notes)


def test_rows_that_cannot_be_scored_are_counted_and_unknown_columns_refused(
    tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text('{"text": "so bad"}\n{"prompt": "so", "completion": "bad"}\n')
    settings = _asked(tiny_llama, rows, tmp_path, retain=str(path))
    data = prepare(SearchSettings.from_mapping(settings)).data
    assert data is not None
    assert any(", 1 row left out: no completion" in note for note in data.notes)
    path.write_text('{"a": "so", "b": "bad"}\n')
    with pytest.raises(UserError, match="'a', 'b'; name its columns text, or prompt and"):
        prepare(SearchSettings.from_mapping(settings))


def test_another_text_than_at_the_start_is_noticed(
    tiny_llama: Path, rows: Path, kept: Path, tmp_path: Path
) -> None:
    fingerprints = set()
    for n_rows in (4, 5):
        asked = _asked(tiny_llama, rows, tmp_path, retain=str(kept), retain_rows=n_rows)
        data = prepare(SearchSettings.from_mapping(asked)).data
        assert data is not None
        fingerprints.add(data.fingerprint)
    assert len(fingerprints) == 2


def test_a_new_head_has_no_loss_to_compare_with(
    tiny_model: Path, tiny_data: Path, kept: Path, tmp_path: Path
) -> None:
    settings = _asked(tiny_model, tiny_data, tmp_path, retain=str(kept))
    with pytest.raises(UserError, match="has no loss to compare with"):
        prepare(SearchSettings.from_mapping(settings))


@pytest.mark.parametrize(
    "asked",
    [{"objectives": ["trainable_params", "forgetting"]}, {"constraints": ["forgetting<=0"]}],
)
def test_forgetting_needs_something_to_retain(
    tiny_llama: Path, rows: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    settings = _asked(tiny_llama, rows, tmp_path, **asked)
    with pytest.raises(UserError, match="retain='': is missing, so forgetting cannot be measured"):
        prepare(SearchSettings.from_mapping(settings))


def test_forgetting_stands_beside_a_cost(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must name a cost beside the qualities"):
        SearchSettings.from_mapping(_asked(tiny_llama, rows, tmp_path, objectives=["forgetting"]))
    with pytest.raises(UserError, match=r"add one, e.g. trainable_params,squad.f1$"):
        SearchSettings.from_mapping({"objectives": "squad.f1"})
