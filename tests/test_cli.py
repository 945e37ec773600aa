"""The command line: flags mirror the settings, mistakes end with status 2 and one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from autopeft import cli
from autopeft.settings import RESUMABLE, SearchSettings


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from autopeft.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def test_every_setting_is_a_flag_of_search() -> None:
    flags = {option.name for option in cli.search.params if option.name != "settings"}
    assert flags == {field.name for field in fields(SearchSettings)}


def test_every_flag_shows_its_fields_note() -> None:
    text = " ".join(CliRunner().invoke(cli.app, ["search", "--help"]).output.split())
    for field in fields(SearchSettings):
        assert "--" + field.name.replace("_", "-") in text
        assert " ".join(field.metadata["help"].split()[:4]) in text


def test_resume_offers_only_what_may_change() -> None:
    flags = {option.name for option in cli.resume.params if option.name != "folder"}
    assert flags == RESUMABLE


def test_the_readme_names_every_command() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for name in cli.app.commands:
        assert f"autopeft {name}" in readme, name


def test_help_needs_neither_torch_nor_ray(fresh_python: Callable[[str], str]) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from autopeft import cli;"
        "CliRunner().invoke(cli.app, ['search', '--help']);"
        "print([m for m in ('torch', 'ray', 'transformers', 'optuna') if m in sys.modules])"
    )
    assert fresh_python(code) == "[]"


@pytest.mark.parametrize("flags", [[], ["--model=m", "--data=d", "--budget=5"]])
def test_a_mistake_in_the_flags_of_a_search_is_told_before_slow_imports(
    flags: list[str], fresh_python: Callable[[str], str], tmp_path: Path
) -> None:
    arguments = ["search", f"--output={tmp_path / 'run'}", *flags]
    code = (
        "import sys; from click.testing import CliRunner; from autopeft import cli;"
        f"done = CliRunner().invoke(cli.app, {arguments!r}); assert done.exception;"
        "print([m for m in ('torch', 'ray', 'transformers', 'optuna') if m in sys.modules])"
    )
    assert fresh_python(code) == "[]"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["search", "nowhere.yaml", "--output", "x"], "nowhere.yaml"),
        (["search", "--output", "x"], "--model"),
        (["search", "--model", "m", "--data", "d"], "--output"),
        (["search", "--steps", "many"], "many"),
        (["search", "--stepz", "1"], "--stepz"),
        (["search", "--model", "m", "--data", "d", "--budget", "5", "--output", "x"], "budget"),
        (["resume", "."], "holds no search"),
        (["export", ".", "--to", "y"], "holds no search"),
        (["export", ".", "--for", "vlm", "--to", "y"], "did you mean 'vllm'"),
        (["check-export", ".", "--for", "vlm"], "did you mean 'vllm'"),
        (["check-export", "none", "--for", "vllm"], "no such folder"),
        (["report", "."], "holds no search"),
        (["dashboard", "."], "holds no search"),
        (["fly"], "fly"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str],
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["autopeft", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    shown = capsys.readouterr().err
    assert caught.value.code == 2, shown
    assert hint in shown
    assert len(shown.strip().splitlines()) == 1
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_the_process_with_status_2() -> None:
    done = run("fly")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_check_export_prints_each_broken_rule_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "use_dora": true}')
    done = CliRunner().invoke(cli.app, ["check-export", str(tmp_path), "--for", "vllm"])
    lines = done.output.splitlines()
    assert any("is no DoRA" in line and "vllm/lora/peft_helper.py" in line for line in lines)
    assert all(line.startswith("vllm: must hold: ") for line in lines)
    assert (
        CliRunner().invoke(cli.app, ["check-export", ".", "--for", "mlx"]).output.count("\n") == 1
    )
    code = "from autopeft.cli import main; main()"
    status = subprocess.run(
        [sys.executable, "-c", code, "check-export", str(tmp_path), "--for", "vllm"],
        capture_output=True,
        check=False,
    ).returncode
    assert status == 1


def test_the_end_of_a_file_is_no_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*args: object, **kwargs: object) -> None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr("autopeft.api.search", read)
    monkeypatch.setattr("sys.argv", ["autopeft", "search", "--model", "m"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    shown = capsys.readouterr().err
    assert "everything is saved" not in shown
    assert "unexpected EOFError" in shown
