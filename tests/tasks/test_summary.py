"""The summary of the data: no number is lost between reading and report."""

from __future__ import annotations

from autopeft.tasks.summary import DataSummary

READ = DataSummary(
    {"train": 100, "validation": 20, "test": 30},
    4,
    ("bad", "good"),
    task="text-classification",
    columns={"text": "review", "label": "stars"},
    dropped={"the text is missing": 3, "the label is missing": 1},
    n_duplicates=5,
    n_cut=6,
    max_length=64,
    available={"validation": 900},
    notes=("reviews.csv: separator ';'",),
)


def test_task_and_columns_are_one_line() -> None:
    assert READ.headline() == "task text-classification (text=review, label=stars)"


def test_every_number_and_note_is_told() -> None:
    assert READ.lines() == [
        "100 train, 20 validation, 30 test rows",
        "2 labels: bad, good",
        "3 rows dropped: the text is missing",
        "1 row dropped: the label is missing",
        "5 rows dropped: a later split has them too",
        "6 of 150 rows cut to 64 tokens",
        "20 of 900 rows for validation used, as max_validation_rows says",
        "reviews.csv: separator ';'",
    ]


def test_the_summary_of_an_earlier_version_still_tells_what_it_knows() -> None:
    assert DataSummary({"train": 8}, 3).lines() == ["8 train rows", "3 rows dropped"]


def test_each_line_is_one_line_whatever_the_data_holds() -> None:
    read = DataSummary({"train": 8}, labels=("a\nb", "c"), columns={"text": "x\ny"}, task="t")
    assert "2 labels: a b, c" in read.lines()
    assert read.headline() == "task t (text=x y)"
