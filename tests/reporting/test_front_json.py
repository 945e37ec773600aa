import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from report_samples import hostile, interrupted, make_record, records

from autopeft.errors import StorageError
from autopeft.plan import Candidate
from autopeft.reporting.front_json import front_from_json, front_to_json, read_front, write_front
from autopeft.reporting.front_view import view
from autopeft.reporting.record import SearchRecord
from autopeft.utils.serialize import strict_json


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@settings(max_examples=60, deadline=None)
@given(records())
def test_what_is_written_is_strict_json_and_reads_back(record: SearchRecord) -> None:
    text = strict_json(front_to_json(view(record)))
    content = json.loads(text, parse_constant=refuse)
    again = front_from_json(content)
    assert strict_json(front_to_json(again)) == text
    assert repr(again) == repr(view(record))  # repr: NaN is not equal to itself


@pytest.mark.parametrize("record", [make_record(), interrupted(make_record())])
def test_file_round_trip(record: SearchRecord, tmp_path: Path) -> None:
    write_front(view(record), tmp_path / "front.json")
    assert read_front(tmp_path / "front.json") == view(record)


def test_contract(tmp_path: Path) -> None:
    record = make_record()
    write_front(view(record), tmp_path / "front.json")
    content = json.loads((tmp_path / "front.json").read_text())
    assert content["schema"] == 1
    assert content["objectives"][0] == {"name": "accuracy", "direction": "maximize", "unit": ""}
    assert content["trials"] == {"complete": 31, "pruned": 12, "failed": 2}
    assert content["confirmed"] is True
    assert isinstance(content["verdict"]["beats_lora"], bool)
    assert content["budget"]["spent_seconds"] == 587.3
    for entry in [*content["front"], content["baseline"]]:
        assert Candidate.from_json(entry).digest == entry["digest"]
        assert set(entry["objectives"]) == {"accuracy", "trainable_params"}
        low, high = entry["objectives_ci"]["accuracy"]
        assert low <= entry["objectives"]["accuracy"] <= high
        assert entry["adapter"] == f"adapters/{entry['digest']}"
        assert entry["adapter_score"]["split"] == "test"
        seed = next(s for s in entry["seeds"] if s["seed"] == entry["adapter_score"]["seed"])
        assert seed["test"]["accuracy"] == entry["adapter_score"]["accuracy"]


WRONG = [
    (("schema",), "1", "schema='1': must be 1"),
    (("front",), "none", "front='none': must be a list"),
    (("front",), [3], "front[0]=3: must be a mapping"),
    (("front", 0, "plan"), None, "plan=None: must be a list"),
    (("front", 0, "train", "steps"), "many", "train.steps='many': must be a whole number"),
    (("front", 0, "price", "adapter_bytes"), 1.5, "must be a whole number"),
    (("front", 0, "objectives"), [], "front[0].objectives=[]: must be a mapping"),
    (("front", 0, "objectives", "accuracy"), "high", "front[0].objectives.accuracy='high'"),
    (("front", 0, "seeds"), None, "front[0].seeds=None: must be a list"),
    (("front", 0, "adapter_score"), "good", "front[0].adapter_score='good': must be a mapping"),
    (("verdict", "levels"), {}, "verdict.levels={}: must be a list"),
    (("budget",), None, "budget=None: must be a mapping"),
    (("confirmed",), 1, "is_confirmed=1: must be true or false"),
    (("objectives",), "accuracy", "objectives='accuracy': must be a list"),
    (("settings",), [], "settings=[]: must be a mapping"),
]


@pytest.mark.parametrize(("place", "value", "problem"), WRONG)
def test_a_wrong_type_is_one_clear_line(
    place: tuple[Any, ...], value: object, problem: str, tmp_path: Path
) -> None:
    content = front_to_json(view(make_record()))
    inner: Any = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path / "front.json"
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match=re.escape(problem)) as caught:
        read_front(path)
    assert "front.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["front", "verdict", "budget", "settings", "baseline", "data"])
def test_a_missing_or_unknown_key(key: str, tmp_path: Path) -> None:
    content = front_to_json(view(make_record()))
    del content[key]
    path = tmp_path / "front.json"
    path.write_text(json.dumps({**content, "added later": 1}))
    if key in ("front", "verdict", "budget"):
        with pytest.raises(StorageError, match=r"front\.json"):
            read_front(path)
    else:
        read_front(path)


def test_null_is_not_a_number(tmp_path: Path) -> None:
    content = front_to_json(view(make_record()))
    content["front"][0]["objectives"]["accuracy"] = None
    content["verdict"]["levels"][0]["cost_ratio"] = None
    path = tmp_path / "front.json"
    path.write_text(json.dumps(content))
    shown = read_front(path)
    assert math.isnan(shown.front[0].objectives["accuracy"])
    assert math.isnan(shown.verdict.levels[0].cost_ratio)
    assert front_to_json(shown) == content


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', "\u0000"])
def test_a_damaged_file_is_one_clear_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    path.write_text(text)
    with pytest.raises(StorageError, match=r"front\.json"):
        read_front(path)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read_front(tmp_path / "front.json")


def test_hostile_texts_survive(tmp_path: Path) -> None:
    write_front(view(hostile()), tmp_path / "front.json")
    shown = read_front(tmp_path / "front.json")
    assert shown.model.startswith("<script>")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("objectives", [], "must name a quality"),
        ("n_layers", 10**9, "n_layers <= "),
        ("front.0.adapter", "../outside", "must be a folder in adapters/"),
        ("front.0.adapter", "/etc", "must be a folder in adapters/"),
        ("front.0.objectives", {}, "lacks the value of 'accuracy'"),
        ("baseline.objectives", {}, "lacks the value of 'accuracy'"),
        ("objectives.1.name", "../../outside", "is no name of a metric"),
        ("verdict", 3, "must be a mapping"),
        ("warnings", "text", "must be a list"),
        ("front.0.plan.0.layer", 10**9, "layer < "),
        ("front.0.train.weight_decay", -1, "not below 0"),
    ],
)
def test_what_another_wrote_is_checked(
    tmp_path: Path, key: str, value: object, problem: str
) -> None:
    content = json.loads(strict_json(front_to_json(view(make_record(12)))))
    *steps, last = [int(step) if step.isdigit() else step for step in key.split(".")]
    holder = content
    for step in steps:
        holder = holder[step]
    holder[last] = value
    path = tmp_path / "front.json"
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match=problem) as caught:
        read_front(path)
    assert str(path) in str(caught.value)
