"""Passing files of a search, also of one that was killed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from autopeft.utils.scratch import ensure_copy, remove_copy, scratch_folder

_HOLD = """
import sys
from autopeft.utils.scratch import remove_copy, scratch_folder
with scratch_folder() as folder:
    (folder / "states").write_bytes(b"1")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


_COPY = """
import sys
from pathlib import Path
from autopeft.utils.scratch import ensure_copy
ensure_copy(Path(sys.argv[1]))
print(sys.argv[1], flush=True)
sys.stdin.read()
"""


def _holder(code: str = _HOLD, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_there_and_then_it_is_gone(temporary: Path) -> None:
    with scratch_folder() as folder:
        assert folder.parent == temporary
        (folder / "states").write_bytes(b"1")
    assert list(temporary.iterdir()) == []


def test_it_goes_when_its_search_fails(temporary: Path) -> None:
    with pytest.raises(RuntimeError, match="no more"), scratch_folder():
        raise RuntimeError("no more")
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_live_one_holds_is_not(
    temporary: Path,
) -> None:
    killed, left = _holder()
    alive, held = _holder()
    try:
        killed.kill()
        killed.wait()
        assert (left / "states").exists()
        with scratch_folder():
            assert not left.exists()
            assert (held / "states").exists()
    finally:
        alive.communicate(timeout=10)
        killed.communicate()
    assert alive.returncode == 0
    assert list(temporary.iterdir()) == []


def test_what_a_worker_writes_while_it_is_removed_goes_with_the_next(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of Ray live on for seconds after their driver."""
    killed, left = _holder()
    killed.kill()
    killed.communicate()
    with monkeypatch.context() as patched:

        def remove(folder: Path, ignore_errors: bool) -> None:
            assert ignore_errors
            (folder / "states").write_bytes(b"2")

        patched.setattr("shutil.rmtree", remove)
        with scratch_folder() as folder:
            assert left.exists()
    assert folder.exists()
    with scratch_folder():
        assert not left.exists()
        assert not folder.exists()
    assert list(temporary.iterdir()) == []


def test_what_a_worker_writes_after_its_search_was_removed_goes_when_it_is_dead(
    temporary: Path,
) -> None:
    place = temporary / "autopeft-removed"
    worker, _ = _holder(_COPY, str(place))
    with scratch_folder():
        assert place.is_dir()
    worker.kill()
    worker.communicate()
    assert place.is_dir()
    with scratch_folder():
        assert not place.exists()
    assert list(temporary.iterdir()) == []


def test_a_copy_of_two_workers_goes_with_the_first_that_made_it(temporary: Path) -> None:
    place = temporary / "autopeft-elsewhere"
    worker, _ = _holder(_COPY, str(place))
    try:
        ensure_copy(place)
        remove_copy(str(place))
        assert place.is_dir()
    finally:
        worker.communicate()
    ensure_copy(place)
    remove_copy(str(place))
    assert list(temporary.iterdir()) == []


def test_what_others_keep_there_is_left_alone(temporary: Path) -> None:
    (temporary / "autopeft-notes").mkdir()
    (temporary / "another.lock").touch()
    with scratch_folder():
        pass
    assert {path.name for path in temporary.iterdir()} == {"autopeft-notes", "another.lock"}


def test_what_workers_wrote_on_another_machine_goes(tmp_path: Path) -> None:
    with scratch_folder() as folder:
        remove_copy(str(folder))
        assert folder.is_dir()
    copy = tmp_path / "autopeft-elsewhere"
    copy.mkdir()
    (copy / "some.states").touch()
    remove_copy(str(copy))
    assert not copy.exists()
    remove_copy(None)
