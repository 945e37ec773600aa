from pathlib import Path

import pytest
from report_samples import hostile, interrupted, make_record

from autopeft.errors import StorageError
from autopeft.reporting.converted import Converted, add_converted, weights_of
from autopeft.reporting.front_json import read_front
from autopeft.reporting.front_view import view
from autopeft.reporting.record import SearchRecord
from autopeft.reporting.trials_csv import read_trials
from autopeft.reporting.write import with_converted, write_pages, write_report


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


def test_a_score_of_other_weights_than_those_saved_now_is_not_shown(tmp_path: Path) -> None:
    """Regression: after a resume that saved another seed, the earlier seed's score stayed."""
    record = make_record(20)
    (digest, *_) = record.adapter_scores
    place = tmp_path / "adapters" / digest
    place.mkdir(parents=True)
    (place / "adapter_model.safetensors").write_bytes(b"first seed")
    quality = record.objectives[0].name
    for rank in (4, 8):
        weights = weights_of(place) if rank == 8 else ""
        form = Converted(digest, "lora", rank=rank, metrics={quality: 0.5}, weights=weights)
        add_converted(tmp_path, form)
    noted = f"{digest[:8]}: lora, rank 4, float32: scored with weights not noted then"
    first = write_report(view(record), record.trials, tmp_path)
    assert [form.rank for form in first.converted] == [8]
    assert noted in (tmp_path / "report.html").read_text()
    (place / "adapter_model.safetensors").write_bytes(b"other seed")
    then = write_report(view(record), record.trials, tmp_path)
    assert then.converted == ()
    assert [form.rank for form in then.outdated] == [4, 8]
    page = (tmp_path / "report.html").read_text()
    assert "lora, rank 8, float32: scored with other weights than those saved now" in page
    assert f"converted-0-{digest}" not in page
    assert read_front(tmp_path / "front.json").outdated == then.outdated
    again = Converted(digest, "lora", rank=8, metrics={quality: 0.6}, weights=weights_of(place))
    add_converted(tmp_path, again)
    assert with_converted(then, tmp_path).converted == (again,)


def test_a_linked_folder_of_plots_is_not_written_to(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "plots").symlink_to(outside)
    record = make_record(6)
    with pytest.raises(StorageError, match="leads out of"):
        write_pages(view(record), record.trials, folder)
    assert not list(outside.iterdir())
