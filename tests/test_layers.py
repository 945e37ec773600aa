"""pyproject.toml and the tree agree: every module is in a layer, every package is shipped."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "autopeft"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS: list[dict[str, Any]] = PROJECT["tool"]["importlinter"]["contracts"]
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "__pycache__")


def _name(path: Path) -> str:
    """A source file's dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_is_in_a_layer_and_every_layer_is_in_the_tree() -> None:
    (contract,) = (one for one in CONTRACTS if one["type"] == "layers")
    assert contract["containers"] == ["autopeft"]
    assert contract["exhaustive"] is True
    assert contract["exhaustive_ignores"] == ["search_spaces"]  # It holds data.
    layers = [name.strip(" ()") for layer in contract["layers"] for name in layer.split(":")]
    rooms = {_name(path).split(".")[1] for path in SOURCES if _name(path) != "autopeft"}
    assert len(layers) == len(set(layers))
    assert set(layers) == rooms


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract["name"])
def test_a_contract_names_modules_that_exist(contract: dict[str, Any]) -> None:
    named = [*contract.get("source_modules", ()), *contract.get("forbidden_modules", ())]
    own = {name.removesuffix(".*").removesuffix(".**") for name in named if "autopeft" in name}
    assert own <= {_name(path) for path in SOURCES}


def test_every_package_is_shipped_with_its_files() -> None:
    settings = PROJECT["tool"]["setuptools"]
    packages = {_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert set(settings["packages"]) == packages | {"autopeft.search_spaces"}
    assert {path.parent for path in SOURCES} == {
        PACKAGE.parent / name.replace(".", "/") for name in packages
    }
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = next(p for p in path.parents if (p / "__init__.py").exists())
            patterns = settings["package-data"].get(_name(package / "__init__.py"), [])
            place = str(path.relative_to(package))
            assert any(fnmatch(place, pattern) for pattern in patterns), path


def test_tests_mirror_the_rooms() -> None:
    tests = Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        room = path.parent.relative_to(tests)
        assert (PACKAGE / room).is_dir() or room.parts[0] in ("examples", "fuzz"), path
