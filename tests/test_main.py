"""The entry of the command: a signal in its imports ends it with one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SIGNALLED = """
import signal, sys
class Slow:
    def find_spec(self, name, *_):
        if name == "autopeft.cli":
            signal.raise_signal(signal.{name})
sys.meta_path.insert(0, Slow())
from autopeft.__main__ import main
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_in_the_imports_is_one_line(name: str) -> None:
    """Regression: a traceback, or no word at all (issue 18)."""
    command = [sys.executable, "-c", _SIGNALLED.format(name=name)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_what_comes_first_imports_nothing_heavy() -> None:
    code = (
        "import sys, autopeft.__main__; print([n for n in sys.modules if n.startswith('autopeft')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert shown.strip() == "['autopeft', 'autopeft.__main__']"


def test_the_module_runs_as_the_command_does() -> None:
    command = [sys.executable, "-m", "autopeft", "spaces", "--nonsense"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "No such option" in ended.stderr


@pytest.mark.parametrize("output", ["> /dev/full", ">&-", ">&- 2>&-"])
def test_a_broken_output_does_not_change_the_status(output: str) -> None:
    """Regression: `unexpected OSError` or `AttributeError` of a whole search (issue 18)."""
    command = f"{sys.executable} -m autopeft spaces {output}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert ended.returncode == 0
    lines = ended.stderr.splitlines()
    if "full" in output:
        assert len(lines) == 1
        assert "standard output cannot be written (No space left on device)" in lines[0]
    else:
        assert not lines
