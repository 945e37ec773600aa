"""Arguments of the public functions: a wrong one is one line that names it, before any work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autopeft as package
from autopeft import api as functions
from autopeft import cli
from autopeft.comparing.prior_file import add_to_prior
from autopeft.errors import UserError

autopeft: Any = package  # Types are wrong on purpose.
api: Any = functions

NO_PATHS = (5, b"a", [1], "a\x00b", "\ud800", "a" * 300, "{loop}", object())

CALLS: dict[str, Callable[..., Any]] = {
    "search(output)": lambda value: autopeft.search(model="m", data="d", output=value),
    "search(settings)": lambda value: autopeft.search(value, model="m", data="d", output="o"),
    "resume(folder)": autopeft.resume,
    "report(folder)": autopeft.report,
    "dashboard(folder)": api.dashboard,
    "export(folder)": lambda value: autopeft.export(value, to="e"),
    "export(to)": lambda value: autopeft.export("run", to=value),
    "check_export(folder)": lambda value: autopeft.check_export(value, "vllm"),
    "load_adapter(folder)": lambda value: autopeft.load_adapter("m", value),
    "init(to)": lambda value: autopeft.init("m", "d", to=value),
    "compare(adapters)": lambda value: autopeft.compare([value], model="m", data="d"),
    "compare(output)": lambda value: autopeft.compare("a", model="m", data="d", output=value),
    "prior(to)": lambda value: add_to_prior(["a.json"], value),
    "prior(results)": lambda value: add_to_prior([value], "p.json"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_path_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    argument = name.partition("(")[2].removesuffix(")")
    for value in NO_PATHS:
        given = value.format(loop=tmp_path / "loop" / "x") if isinstance(value, str) else value
        with pytest.raises(UserError, match=rf"^{argument}=") as caught:
            CALLS[name](given)
        assert len(str(caught.value)) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: autopeft.price([1]), "settings='list': must be settings, a file"),
        (lambda: autopeft.preview(float("nan")), "settings='float': must be settings"),
        (lambda: autopeft.price(model="m", data="d", fits=24), "fits=24: must be text"),
        (lambda: autopeft.preview(model="m", data="d", n_rows=2.5), "n_rows=2.5: must be a whole"),
        (lambda: autopeft.preview(model="m", data="d", n_rows="x"), "n_rows='x': must be a whole"),
        (lambda: autopeft.export("r", to="e", pick=5), "pick=5: must be text"),
        (lambda: autopeft.export("r", to="e", server=[]), r"server=\[\]: must be text"),
        (lambda: autopeft.export("r", to="e", format=5), "format=5: must be text"),
        (lambda: autopeft.export("r", to="e", device=5), "device=5: must be text"),
        (lambda: autopeft.export("r", to="e", max_rank="8"), "max_rank='8': must be a whole"),
        (lambda: autopeft.check_export(".", server=5), "for='int': must be text"),
        (lambda: autopeft.compare(None, model="m", data="d"), "adapters='NoneType': must be a"),
        (lambda: autopeft.compare("a", model="m", data="d", pick=5), "pick=5: must be text"),
        (lambda: autopeft.load_adapter(5, "a"), "base='int': is neither a name nor a model"),
        (lambda: autopeft.load_adapter("m", "a", device="x"), "device='x': torch knows no"),
        (lambda: autopeft.load_adapter("m", "a", device=[]), "device=.*: torch knows no"),
        (lambda: autopeft.load_adapter("m", "a", dtype=0), "dtype=0: no such type"),
        (lambda: autopeft.load_adapter("m", "a", dtype=""), "dtype='': no such type"),
        (lambda: api.dashboard("r", port="x"), "port='x': must be a whole number"),
        (lambda: api.dashboard("r", port=70000), "port=70000: `port <= 65535` must hold"),
        (
            lambda: autopeft.search(model="m", data="d", output="o", storage="sqlite:///:memory:"),
            "storage='sqlite:///:memory:': is a database in memory.*; leave it out, or name a file",
        ),
    ],
)
def test_a_wrong_argument_is_refused_by_name(
    call: Callable[[], Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{told}"):
        call()
    assert not list(tmp_path.iterdir())


def test_the_dashboards_address_is_told_once_its_study_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["autopeft", "dashboard", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr()
    assert told.out == ""
    assert re.search("holds no search", told.err)
