import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from report_samples import OBJECTIVES, hostile, make_record, records

from autopeft.errors import StorageError
from autopeft.plan import ROLES, AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.reporting.record import SearchRecord
from autopeft.reporting.trials_csv import read_trials, trials_csv
from autopeft.utils.files import write_text


def test_one_row_a_trial_with_its_numbers() -> None:
    record = make_record()
    rows = list(csv.DictReader(io.StringIO(trials_csv(record.trials, record.objectives))))
    assert len(rows) == len(record.trials)
    for row, trial in zip(rows, record.trials, strict=True):
        assert int(row["number"]) == trial.number
        assert row["state"] == trial.state
        assert row["digest"] == trial.candidate.digest
        assert float(row["learning_rate"]) == trial.candidate.train.learning_rate
        assert int(row["total_rank"]) == sum(s.rank for s in trial.candidate.plan.specs)
        assert int(row["price.trainable_params"]) == trial.costs.trainable_params
        quality = row["objective.accuracy"]
        assert (float(quality) if quality else None) == trial.values.get("accuracy")
        assert [bool(row[f"rung.{step}"]) for step in (11, 33, 100)].count(True) == len(trial.rungs)
    failed = next(row for row in rows if row["state"] == "failed")
    assert failed["reason"] == "loss is NaN at step 12"


@settings(max_examples=30, deadline=None)
@given(records())
def test_trials_read_back(tmp_path_factory: pytest.TempPathFactory, record: SearchRecord) -> None:
    path = tmp_path_factory.mktemp("trials") / "trials.csv"
    write_text(path, trials_csv(record.trials, record.objectives))
    for found, made in zip(read_trials(path), record.trials, strict=True):
        finite = {name: value for name, value in made.values.items() if math.isfinite(value)}
        assert found == replace(made, values=finite, reason=" ".join(made.reason.split()))


def test_settings_and_methods_of_every_kind_read_back(tmp_path: Path) -> None:
    record = make_record()
    train = TrainSettings(1e-3, (("ia3", 0.1), ("lora", 3e-4)), dropout=0.1, steps=7, alpha=16.0)
    plan = AdapterPlan(LayerSpec(n, role, "oft", n) for n in range(3) for role in ROLES[1:])
    candidate = Candidate(plan, train)
    made = replace(record.trials[7], candidate=candidate, audited_at=11, reason="")
    write_text(tmp_path / "trials.csv", trials_csv([made], record.objectives))
    assert read_trials(tmp_path / "trials.csv") == (made,)


def test_hostile_reasons_stay_in_their_row() -> None:
    assert trials_csv(hostile().trials, ()).count("\n") == 1 + len(hostile().trials)


def test_no_trials_is_a_header_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "trials.csv", trials_csv((), make_record(8).objectives))
    assert read_trials(tmp_path / "trials.csv") == ()


def test_a_damaged_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read_trials(tmp_path / "trials.csv")
    (tmp_path / "trials.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StorageError, match="not a table of trials"):
        read_trials(tmp_path / "trials.csv")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", "'=", "''+"])
def test_a_cell_is_no_formula_of_a_spreadsheet(tmp_path: Path, start: str) -> None:
    reason = f"{start}HYPERLINK(1)"
    failed = replace(make_record(6).trials[0], state="failed", reason=reason, values={}, rungs=())
    path = tmp_path / "trials.csv"
    path.write_text(trials_csv([failed], OBJECTIVES))
    (row,) = csv.DictReader(path.read_text().splitlines())
    assert row["reason"][0] == "'"
    assert row["learning_rate"][0] != "'", "numbers stay numbers"
    assert read_trials(path)[0].reason == reason.strip()


@pytest.mark.parametrize("damage", ["a,b\n1\n", "number\n1,2\n", '"\n', "\x00", ""])
def test_a_damaged_table_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "trials.csv"
    path.write_text(trials_csv(make_record(6).trials, OBJECTIVES) + damage)
    if damage:
        with pytest.raises(StorageError) as caught:
            read_trials(path)
        assert len(str(caught.value).splitlines()) == 1


def test_an_emptied_table_is_not_a_table_of_no_trials(tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    path.touch()
    with pytest.raises(StorageError, match="has no header"):
        read_trials(path)
