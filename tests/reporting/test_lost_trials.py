from pathlib import Path

import pytest

from autopeft.errors import StorageError
from autopeft.reporting.lost_trials import check_none_lost

TABLE = "number,state,reason\n0,complete,\n1,pruned,far\n2,failed,NaN\n"
STATES = {0: "complete", 1: "pruned", 2: "failed", 3: "running"}


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ({}, "lost 3 of the 3 trials in trials.csv: trial 0 was complete and is no trial"),
        ({**STATES, 1: "running"}, "lost 1 of the 3 .* trial 1 was pruned and is running"),
    ],
)
def test_trials_that_a_study_has_no_more_are_refused(
    states: dict[int, str], told: str, tmp_path: Path
) -> None:
    table = tmp_path / "trials.csv"
    table.write_text(TABLE)
    with pytest.raises(StorageError, match=f"storage='a.db': study 's' has {told}"):
        check_none_lost(table, states, place="a.db", study="s")
    check_none_lost(table, STATES, place="a.db", study="s")


@pytest.mark.parametrize("text", [None, "", "a,b\n1,2\n", "number,state\nx,complete\n"])
def test_a_table_that_tells_nothing_refuses_nothing(text: str | None, tmp_path: Path) -> None:
    table = tmp_path / "trials.csv"
    if text is not None:
        table.write_text(text)
    check_none_lost(table, {}, place="a.db", study="s")
