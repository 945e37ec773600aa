from pathlib import Path

import pytest
from report_samples import hostile, interrupted, make_record

from autopeft.errors import StorageError
from autopeft.reporting.front_json import read_front
from autopeft.reporting.front_view import view
from autopeft.reporting.record import SearchRecord
from autopeft.reporting.trials_csv import read_trials
from autopeft.reporting.write import write_pages, write_report


@pytest.mark.parametrize("record", [interrupted(make_record(20)), hostile()])
def test_every_file_is_written_and_the_pages_can_be_written_anew(
    record: SearchRecord, tmp_path: Path
) -> None:
    shown = view(record)
    write_report(shown, record.trials, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert {"front.json", "trials.csv", "report.html", "plots/front.png"} <= names
    assert not any(name.startswith(".") for name in names)
    first = {name: (tmp_path / "out" / name).read_bytes() for name in names}
    (tmp_path / "out" / "report.html").unlink()
    write_pages(
        read_front(tmp_path / "out" / "front.json"),
        read_trials(tmp_path / "out" / "trials.csv"),
        tmp_path / "out",
    )
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == first


def test_a_linked_folder_of_plots_is_not_written_to(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "plots").symlink_to(outside)
    record = make_record(6)
    with pytest.raises(StorageError, match="leads out of"):
        write_pages(view(record), record.trials, folder)
    assert not list(outside.iterdir())
