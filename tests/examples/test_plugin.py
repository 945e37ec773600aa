"""The worked plug-in: installed as any package is, listed, checked, and used in a search."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "plugin"

SCRIPT = """
import sys
from autopeft import cli

sys.path.insert(0, sys.argv[1])  # its tests
import test_parts

cli.app(["methods"], standalone_mode=False)
cli.app(["tasks"], standalone_mode=False)
test_parts.test_the_parts_keep_their_contracts()
test_parts.test_the_backend_keeps_its_contract()
cli.app(["search", *sys.argv[2:]], standalone_mode=False)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_installed_plugin_is_listed_checked_and_used(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"  # Building writes beside the sources.
    shutil.copytree(PLUGIN, source)
    site = tmp_path / "site"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    flags = {
        "output": tmp_path / "run",
        "model": tiny_model,
        "budget": "12trials",
        "steps": "30",
        "batch-size": "8",
        "confirm-seeds": "1",
        "max-finalists": "2",
        "backend": "local",
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), "search.yaml", *given],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gaussian_lora" in done.stdout
    assert "the number of likes of each post" in done.stdout
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert front["task"] == "likes"
    assert [each["name"] for each in front["objectives"]] == ["within_one", "download_seconds"]
    assert "gaussian_lora" in (tmp_path / "run" / "trials.csv").read_text()
    assert all(member["objectives"]["download_seconds"] > 0 for member in front["front"])
    assert not (site / "test_parts.py").exists()
