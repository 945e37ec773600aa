"""The notebook runs from its first cell to its last, with live progress and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from documented import make_home
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"

SHORTER = {'budget="2m"': 'budget="6trials", backend="local"', "steps=60": "steps=6"}
"""What would take minutes -> what a test can wait for."""


def test_the_committed_notebook_holds_no_outputs() -> None:
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_the_notebook_runs(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(make_home(tmp_path / "home", tiny_model, tiny_data)))
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    search, table, frame, member, plot, own = (
        cell.outputs for cell in notebook.cells if cell.cell_type == "code"
    )
    # One output that is updated in place: the lines, and the front so far.
    live = [each.data["text/html"] for each in search if "data" in each]
    assert len(live) == 1
    assert "space default" in live[0]
    assert "trainable_params" in live[0]
    assert "<table>" in table[0].data["text/html"]
    assert "accuracy_low" in frame[0].data["text/html"]
    assert "Member" in member[-1].data["text/html"]
    assert "image/png" in plot[0].data
    assert "<table>" in own[-1].data["text/html"]
    # Ray runs this one: Tune's own reporter would clear the cell.
    assert "space default" in own[0].data["text/html"]
