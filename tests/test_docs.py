"""The documentation: its Python runs, its commands and files exist, its examples are tested."""

from __future__ import annotations

import doctest
import inspect
import re
import shlex
import shutil
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from documented import SMALL, make_home, shorten_searches

import autopeft
from autopeft import cli
from autopeft.settings import SearchSettings
from autopeft.tasks.registry import TASKS
from autopeft.workspace import read_settings

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *GUIDES]

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> Path:
    return make_home(tmp_path_factory.mktemp("home"), tiny_model, tiny_data)


@pytest.fixture(scope="session")
def searched(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of six trials."""
    folder = tmp_path_factory.mktemp("searched") / "first"
    cache = home / ".cache" / "autopeft"
    autopeft.search(
        SMALL,
        model=str(cache / "all-MiniLM-L6-v2"),
        data=str(cache / "movie_snippets.csv"),
        output=str(folder),
    )
    return folder


@pytest.fixture
def place(home: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run documented code in; its `runs/first` is a finished search."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    shorten_searches(monkeypatch, searched)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_python_of_a_page_runs(page: Path, place: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        # A page has no `from __future__ import annotations`, which this file has.
        exec(compile(block, f"{page.name}, block {number}", "exec", dont_inherit=True), names)


def commands() -> list[tuple[str, str]]:
    """Each `autopeft ...` line of a page's shell blocks, and each in its text."""
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
        lines += re.findall(r"`(autopeft [^`]*)`", page.read_text(encoding="utf-8"))
        for line in lines:
            for part in re.split(r"\s&&\s", line.partition(" #")[0]):
                if part.startswith("autopeft "):
                    found.append((page.name, part.replace("<=", "{le}")))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_documented_command_can_be_parsed(page: str, line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    command = cli.app.commands[name]
    if arguments:  # else only the command is named
        command.make_context(name, arguments)


def test_every_documented_flag_exists() -> None:
    known = {flag for command in cli.app.commands.values() for flag in _flags(command)}
    other = re.compile(r"(pip|pytest|pdoc|fetch_assets|benchmarks|\w+\.py|ruff|git|mypy)\b")
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            if code.startswith("--") and not other.search(code):
                flag = re.split(r"[ =]", code)[0]
                assert flag in known | _BENCHMARK_FLAGS, (page.name, flag)


_BENCHMARK_FLAGS = {
    "--output",
    "--samplers",
    "--first-seed",
    "--model",
    "--smollm2",
    "--help",
    "--fields",
    "--methods",
    "--ranks",
    "--points",
    "--powers",
    "--reach",
    "--steps",
    "--max-validation-rows",
    "--shapes",
    "--device",
    "--plans",
    "--ways",
    "--data",
    "--check",
    "--trials",
    "--seeds",
    "--true-seeds",
}


def _flags(command: click.Command) -> set[str]:
    return {
        flag
        for option in command.params
        if isinstance(option, click.Option)
        for flag in (*option.opts, *option.secondary_opts)
    }


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.name)
def test_the_settings_and_spaces_of_a_page_are_valid(page: Path, tmp_path: Path) -> None:
    names = {field.name for field in fields(SearchSettings)}
    linear = {"attn.q": (64, 64), "attn.v": (64, 64), "mlp.up": (96, 64)}
    topology = autopeft.Topology(6, {**linear, "experts.down": (64, 96, 4)})
    for block in blocks(page, "yaml"):
        path = tmp_path / "block.yaml"
        path.write_text(block, encoding="utf-8")
        content = read_settings(path)
        if "methods" in content:
            assert autopeft.SearchSpace.from_source(path, topology).methods
        else:
            assert set(content) <= names
            SearchSettings.from_mapping(content)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    # The last section of the architecture guide names files of the design that do not exist.
    text = page.read_text(encoding="utf-8").partition("## Departures from the second design")[0]
    for name in re.findall(r"`([\w/.]+\.py)`", text):
        roots = (ROOT, ROOT / "autopeft", ROOT / "examples", ROOT / "examples" / "benchmarks")
        assert any((root / name).exists() for root in roots), name


def test_the_architecture_guide_names_every_module_and_layer() -> None:
    text = (ROOT / "examples" / "guides" / "architecture.md").read_text(encoding="utf-8")
    rooms = text.partition("<!-- rooms -->")[2].partition("<!-- /rooms -->")[0]
    layers = text.partition("<!-- layers -->")[2].partition("<!-- /layers -->")[0]
    modules = {path.stem for path in (ROOT / "autopeft").rglob("*.py")} - {"__init__"}
    assert modules - set(re.findall(r"\w+", rooms)) == set()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (
        one for one in contracts["tool"]["importlinter"]["contracts"] if one["type"] == "layers"
    )
    assert layers.strip().strip("`").split("\n")[1:-1] == contract["layers"]


def test_the_readme_is_short_and_shows_every_guide() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for guide in GUIDES:
        assert f"examples/guides/{guide.name}" in text


def test_every_task_has_a_page_that_the_data_guide_links() -> None:
    text = (ROOT / "examples" / "guides" / "your_data.md").read_text(encoding="utf-8")
    for name in (name for name in TASKS if type(TASKS[name]).__module__.startswith("autopeft.")):
        pages = re.findall(rf"^\| \[`{name}`\]\((\w+\.md)\) \|", text, re.MULTILINE)
        (page,) = [ROOT / "examples" / "guides" / page for page in pages]
        assert f"`{name}`" in page.read_text(encoding="utf-8")
        assert blocks(page, "python")


def examples(name: str) -> list[doctest.Example]:
    """The examples in the docstring of a public name, under `Example:`."""
    text = getattr(autopeft, name).__doc__ or ""
    _, heading, rest = text.partition("Example:\n")
    return doctest.DocTestParser().get_examples(rest) if heading else []


PUBLIC = [name for name in autopeft.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_name_runs(name: str, place: Path, searched: Path) -> None:
    shutil.copytree(searched, place / "runs" / "first")
    found = examples(name)
    assert found, f"autopeft.{name} has no Example: with >>> lines"
    home_module = inspect.getmodule(getattr(autopeft, name))
    names = {**vars(home_module), "autopeft": autopeft}
    test = doctest.DocTest(found, names, name, None, 0, None)
    printed: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=printed.append)
    assert not result.failed, "".join(printed)
