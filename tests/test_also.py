"""`also`: what is trained is scored on further tasks, as an objective and as a limit."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from searches import SHORT

import autopeft
from autopeft.costs.constraints import parse_constraints
from autopeft.costs.objectives import Objective, objective
from autopeft.errors import UserError
from autopeft.inputs import Inputs
from autopeft.preparing.paths import expand
from autopeft.preparing.prepare import prepare
from autopeft.preparing.task_data import load_task
from autopeft.settings import SearchSettings
from autopeft.tasks.data import EncodedSplit, SecondTask, TaskData
from autopeft.tasks.second_tasks import checked_beside, read_also
from autopeft.utils.quiet import quiet_peft, quiet_transformers

LEARNED = ("good", "fine", "great", "the", "film", "was", "a")
FACTS = ("bad", "poor", "awful", "scene", "actor", "very", "so")
"""Words of the tiny tokenizer: of the rows, and of those of the further task."""

pytestmark = pytest.mark.filterwarnings("default")  # of peft, on loading an adapter


def _write(path: Path, words: tuple[str, ...], n_rows: int, first: int = 0) -> Path:
    chooser = random.Random(len(words) + n_rows)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        for number in range(first, first + n_rows):
            chosen = [chooser.choice(words) for _ in range(6)]
            writer.writerow([f"{number} {chosen[0]}", " ".join(chosen[1:])])
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("rows") / "rows.csv", LEARNED, 60)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A settings file of a further task with 24 rows."""
    folder = tmp_path_factory.mktemp("facts")
    data = _write(folder / "facts.csv", FACTS, 24, first=100)
    path = folder / "facts.yaml"
    path.write_text(f"data: {data}\ntask: sft\nmetric: token_accuracy\n")
    return path


def _asked(model: Path, rows: Path, output: Path, **settings: Any) -> dict[str, Any]:
    return {**SHORT, "model": str(model), "data": str(rows), "output": str(output), **settings}


def _loaded(model: Path, data: Path, tmp_path: Path, *also: Any, **settings: Any) -> TaskData:
    asked = _asked(model, data, tmp_path, also=also, **settings)
    return load_task(expand(SearchSettings.from_mapping(asked)))[0]


@pytest.fixture(scope="module")
def result(
    tiny_llama: Path, rows: Path, facts: Path, tmp_path_factory: pytest.TempPathFactory
) -> autopeft.SearchResult:
    output = tmp_path_factory.mktemp("out") / "run"
    notes = {"name": "notes", "data": str(facts.with_name("facts.csv")), "metric": "loss"}
    return autopeft.search(
        _asked(tiny_llama, rows, output, also=[str(facts), notes]),
        objectives=["trainable_params", "facts.token_accuracy"],
        constraints=["facts.token_accuracy>=0.0", "notes.loss<=99"],
    )


def test_a_finalist_has_the_quality_that_plain_transformers_and_peft_find_on_the_test_rows(
    result: autopeft.SearchResult, tiny_llama: Path
) -> None:
    front = json.loads((result.folder / "front.json").read_text())
    members = [member for member in front["front"] if member["adapter"]]
    assert members
    settings = SearchSettings.from_mapping(front["settings"])
    splits = json.loads((result.folder / "state" / "splits.json").read_text())
    second = load_task(settings)[0].second[0]
    rows = second.data.test
    assert splits["facts.test"]["rows"] == rows.source_rows.tolist()
    assert not set(splits["facts.test"]["rows"]) & set(splits["facts.validation"]["rows"])

    def accuracy(model: torch.nn.Module) -> float:
        right = count = 0
        for begin, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
            ids = torch.tensor(rows.tokens[begin:end], dtype=torch.long)[None]
            labels = torch.tensor(rows.token_arrays["labels"][begin:end])[1:]
            found = model(input_ids=ids).logits[0, :-1].argmax(dim=-1)
            right += int(((found == labels) & (labels >= 0)).sum())
            count += int((labels >= 0).sum())
        return right / count

    with quiet_transformers(), quiet_peft(), torch.inference_mode():
        for member in members:
            fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
            adapted = PeftModel.from_pretrained(fresh, result.folder / member["adapter"]).eval()
            told = member["objectives"]["facts.token_accuracy"]
            assert accuracy(adapted) == pytest.approx(told, abs=1e-6)


def test_it_is_in_every_file_with_the_direction_of_its_metric(
    result: autopeft.SearchResult,
) -> None:
    front = json.loads((result.folder / "front.json").read_text())
    directions = {o["name"]: o["direction"] for o in front["objectives"]}
    assert list(directions) == ["loss", "trainable_params", "facts.token_accuracy"]
    assert directions["facts.token_accuracy"] == "maximize"
    assert front["front"][0]["further"]["notes.loss"] > 0
    said = "also facts: sft, 12 rows of facts.csv score trials and 12 rows of facts.csv finalists"
    assert any(said in note for note in front["data"]["notes"])
    with (result.folder / "trials.csv").open() as file:
        complete = [row for row in csv.DictReader(file) if row["state"] == "complete"]
    assert complete
    for row in complete:
        assert 0 <= float(row["objective.facts.token_accuracy"]) <= 1
        assert math.isfinite(float(row["measured.notes.loss"]))
        assert float(row["measured.also_seconds"]) > 0
        assert not row["broken"]
    assert "facts.token_accuracy" in (result.folder / "report.html").read_text()
    assert (result.folder / "plots" / "front_facts.token_accuracy.png").exists()
    again = autopeft.report(result.folder).view
    assert again.objectives[2].direction == "maximize"


def test_a_rung_reports_it_to_the_pruner(result: autopeft.SearchResult) -> None:
    import optuna

    study = optuna.load_study(study_name=None, storage=f"sqlite:///{result.folder / 'study.db'}")
    told = [trial.user_attrs.get("further", {}) for trial in study.get_trials()]
    assert any(0 <= at["facts.token_accuracy"] <= 1 for steps in told for at in steps.values()), (
        told
    )


def test_a_changed_further_task_is_refused_on_resume(
    result: autopeft.SearchResult, facts: Path, tmp_path: Path
) -> None:
    data = facts.with_name("facts.csv")
    kept = data.read_text()
    try:
        data.write_text(kept.replace("bad", "fine"))
        with pytest.raises(UserError, match=r"also='facts.token_accuracy': changed since"):
            autopeft.resume(result.folder, budget="5trials")
    finally:
        data.write_text(kept)


def test_a_digest_of_an_earlier_version_lacks_it_and_is_not_compared() -> None:
    now = Inputs(data="1", second={"squad.f1": "2"})
    Inputs(data="1").check_same(now, model="m", data="d")
    with pytest.raises(UserError, match="retain='forgetting'"):
        Inputs(second={"forgetting": "1"}).check_same(now, model="m", data="d")


@pytest.mark.parametrize(
    ("also", "problem"),
    [
        ("missing.yaml", r"also='missing.yaml': cannot be read .No such file"),
        ({"name": "a.b", "data": "x"}, r"also.name='a.b': a further task needs a name"),
        ({"data": "x"}, r"also.name=None: a further task needs a name"),
        ({"name": "a"}, r"also.a.data='': is missing"),
        ({"name": "a", "data": "x", "also": ["b.yaml"]}, r"also.a.also=.*has none of its own"),
        (
            {"name": "a", "data": "x", "metrics": "f1"},
            r"also.a.metrics='f1': unknown key; .*'metric'",
        ),
        (
            {"name": "a", "data": "x", "budget": "2h"},
            r"also.a.budget='2h': is no setting of a further",
        ),
    ],
)
def test_what_says_no_further_task_is_refused_in_one_line(also: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as raised:
        read_also([also])
    assert "\n" not in str(raised.value)


def test_data_in_place_of_a_settings_file_are_refused_with_what_to_write(tmp_path: Path) -> None:
    path = tmp_path / "squad.csv"
    path.write_text('text,label\n"a: b",\'c\n- d')
    for given in (str(path), str(tmp_path / "user" / "squad.jsonl")):
        with pytest.raises(UserError) as raised:
            read_also([given])
        assert str(raised.value).endswith(f"such as squad.yaml, with the line data: {given}")
    broken = tmp_path / "squad.yaml"
    broken.write_text("data: [")
    with pytest.raises(UserError, match=r"is not YAML.*fix the syntax"):
        read_also([str(broken)])


def test_two_further_tasks_have_two_names() -> None:
    one = {"name": "a", "data": "x"}
    with pytest.raises(UserError, match="two further tasks have this name"):
        read_also([one, one])


def test_flags_and_files_name_further_tasks(facts: Path) -> None:
    for given in (str(facts), facts, [str(facts)], [facts]):
        assert SearchSettings.from_mapping({"also": given}).also == (str(facts),)
    row = SearchSettings.from_mapping({"also": {"name": "a", "data": "b"}}).also
    assert row == ({"name": "a", "data": "b"},)


def test_the_training_data_are_no_further_task(
    tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"also.own.data='rows.csv': all 60 rows are also in"):
        _loaded(tiny_llama, rows, tmp_path, {"name": "own", "data": str(rows)})


def test_shared_rows_are_left_out_and_the_others_keep_their_numbers(
    tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    path = _write(tmp_path / "more.csv", FACTS, 8, first=200)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *rows.read_text().splitlines()[1:4], *lines[1:]]) + "\n")
    data = _loaded(tiny_llama, rows, tmp_path, {"name": "more", "data": str(path)})
    assert "3 rows left out that the search's data have too" in data.notes[-1]
    splits = data.second[0].data.splits
    assert sorted(n for s in splits.values() for n in s.source_rows) == list(range(3, 11))


def test_rows_of_its_own_for_finalists(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    trials, finalists = (_write(tmp_path / f"{n}.csv", FACTS, n, first=9 * n) for n in (20, 30))
    row = {"name": "a", "data": str(trials), "test": str(finalists)}
    splits = _loaded(tiny_llama, rows, tmp_path, row).second[0].data.splits
    assert {name: len(split) for name, split in splits.items()} == {"validation": 20, "test": 30}


def test_the_same_head_is_scored_on_other_data_of_its_labels(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "others.csv"
    labeled = [("good", "bad")[number % 2] for number in range(20)]
    lines = [f"a {label} {number},{label}\n" for number, label in enumerate(labeled, start=500)]
    path.write_text("".join(["text,label\n", *lines]))
    second = _loaded(tiny_model, tiny_data, tmp_path, {"name": "others", "data": str(path)}).second
    assert second[0].name == "others.accuracy"
    assert second[0].data.labels == ("bad", "good")
    path.write_text(path.read_text() + "a film,neutral\na plot,neutral\n" * 4)
    with pytest.raises(
        UserError, match=r"also.others.data=.*the label 'neutral', which the search"
    ):
        _loaded(tiny_model, tiny_data, tmp_path, {"name": "others", "data": str(path)})


def test_another_head_is_refused(
    tiny_llama: Path, rows: Path, tiny_data: Path, tmp_path: Path
) -> None:
    row = {"name": "mood", "data": str(tiny_data), "task": "text-classification"}
    with pytest.raises(UserError) as raised:
        _loaded(tiny_llama, rows, tmp_path, row)
    assert str(raised.value) == (
        "also.mood.task='text-classification': reads the head of "
        "AutoModelForSequenceClassification, but the search trains that of AutoModelForCausalLM "
        "for sft; name rows of preference or sft, or search on it instead"
    )


def test_other_outputs_of_a_head_are_refused(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "stars.csv"
    path.write_text("text,label\n" + "".join(f"a film {n},{n / 7}\n" for n in range(20)))
    row = {"name": "stars", "data": str(path), "task": "regression"}
    with pytest.raises(UserError, match="reads other outputs of the head than text-classification"):
        _loaded(tiny_model, tiny_data, tmp_path, row)


def _second(name: str, direction: Any) -> SecondTask:
    rows = EncodedSplit(
        np.zeros(2, np.int32), np.array([0, 2]), np.zeros(1, dtype=np.int64), "facts.csv"
    )
    data = TaskData("sft", {"test": rows}, labels=(), pad_id=0)
    return SecondTask(Objective(name, direction), "f1", SearchSettings(task="sft"), data)


@pytest.mark.parametrize(
    ("objectives", "constraints", "problem"),
    [
        (["b.loss"], [], r"also=\['facts'\]: measures facts.f1, not b.loss; .* or give .*b.yaml"),
        (["facts.loss"], [], r"not facts.loss; use facts.f1, or write `metric: loss` in facts"),
        ([], ["b.loss<=1"], r"also=\['facts'\]: measures facts.f1, not b.loss"),
        ([], ["facts.f1<=1"], r"constraint='facts.f1<=1': facts.f1 is maximized, .*facts.f1>=1"),
        (["forgetting"], [], r"retain='': is missing, so forgetting cannot be measured"),
    ],
)
def test_a_quality_that_nothing_measures_is_refused(
    objectives: list[str], constraints: list[str], problem: str
) -> None:
    named = [objective(name) for name in ("loss", "trainable_params", *objectives)]
    with pytest.raises(UserError, match=problem):
        checked_beside(named, parse_constraints(constraints), [_second("facts.f1", "maximize")])


def test_who_measures_a_quality_tells_its_direction() -> None:
    named = [objective(name) for name in ("loss", "trainable_params", "facts.odd")]
    assert named[2].direction == "maximize"
    found = checked_beside(
        named, parse_constraints(["facts.odd<=3"]), [_second("facts.odd", "minimize")]
    )
    assert found[2].direction == "minimize"


def test_without_a_further_task_its_quality_is_refused() -> None:
    named = [objective(name) for name in ("loss", "trainable_params", "facts.f1")]
    with pytest.raises(UserError, match=r"also='': is missing, so facts.f1 .* give .* facts.yaml"):
        checked_beside(named, (), ())


def test_a_function_that_trains_scores_by_itself(tiny_llama: Path, facts: Path) -> None:
    settings = {"model": str(tiny_llama), "evaluate": "json:loads", "also": str(facts)}
    with pytest.raises(UserError, match=r"also=.*has no effect beside evaluate"):
        prepare(SearchSettings.from_mapping({**settings, "metric": "accuracy"}))


@pytest.mark.nightly
@pytest.mark.timeout(240)
def test_a_worker_of_ray_finds_what_this_process_does(
    result: autopeft.SearchResult, tiny_llama: Path, rows: Path, facts: Path, tmp_path: Path
) -> None:
    notes = {"name": "notes", "data": str(facts.with_name("facts.csv")), "metric": "loss"}
    on_ray = autopeft.search(
        _asked(tiny_llama, rows, tmp_path / "run", also=[str(facts), notes]),
        objectives=["trainable_params", "facts.token_accuracy"],
        constraints=["facts.token_accuracy>=0.0", "notes.loss<=99"],
        backend="ray",
        workers=1,
    )
    of_ray, here = (
        json.loads((each.folder / "front.json").read_text())["front"] for each in (on_ray, result)
    )
    for member, other in zip(of_ray, here, strict=True):
        for key in ("digest", "objectives", "further"):
            assert member[key] == other[key]
