"""converted.json: one row for each form of a member; damage is told in one line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from autopeft.costs.objectives import Objective
from autopeft.errors import StorageError
from autopeft.reporting.converted import FILE, Converted, add_converted, read_converted

ACCURACY = Objective("accuracy", "maximize")


def test_a_form_is_kept_once_and_reads_back(tmp_path: Path) -> None:
    assert read_converted(tmp_path) == ()
    lora = Converted("ab12", "lora", rank=8, metrics={"accuracy": 0.5}, n_rows=9)
    merged = Converted("ab12", "merged", quantization="bnb-4bit", lossy=True, n_rows=9)
    add_converted(tmp_path, lora)
    add_converted(tmp_path, merged)
    newer = Converted("ab12", "lora", rank=8, metrics={"accuracy": 0.6, "loss": math.nan}, n_rows=9)
    add_converted(tmp_path, newer)
    read = read_converted(tmp_path)
    assert [each.format for each in read] == ["merged", "lora"]
    assert read[0] == merged
    assert read[1].value(ACCURACY) == 0.6
    assert math.isnan(read[1].metrics["loss"])


def test_a_line_names_form_rows_and_what_the_member_itself_scores() -> None:
    form = Converted("ab12", "merged", "vllm", "bnb-4bit", 0, "bfloat16", True, {}, {}, 40)
    assert form.line(ACCURACY).startswith("accuracy nan on 40 test rows (merged for vllm, bnb-4bit")
    exact = Converted(
        "ab12", "lora", rank=4, metrics={"accuracy": 0.75}, member={"accuracy": 0.8}, n_rows=4
    )
    assert exact.line(ACCURACY) == (
        "accuracy 0.7500 on 4 test rows; the member itself 0.8000 "
        "(lora, rank 4, float32; exact up to rounding)"
    )


@pytest.mark.parametrize("text", ["{", "{}", '[{"digest": 3}]', "[3]"])
def test_a_damaged_file_is_one_clear_line(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(StorageError) as caught:
        read_converted(tmp_path)
    assert "\n" not in str(caught.value)
