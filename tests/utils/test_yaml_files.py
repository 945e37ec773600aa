"""YAML files hold mappings, and 1e-3 is a number in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autopeft.errors import SpaceError
from autopeft.utils.yaml_files import read_yaml


def read(path: Path) -> dict[str, Any]:
    return read_yaml(path, field="space", remedy="name methods", error=SpaceError)


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("a: 1e-3\nb: 2E5\nc: 0.5\nd: 1e3x\n")
    assert read(path) == {"a": 1e-3, "b": 2e5, "c": 0.5, "d": "1e3x"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a\n- b\n", "must hold `name: value` lines; name methods"),
        ("just text", "must hold"),
        ("1: 2\n", "must hold"),
        ("", "must hold"),
        ("a: [1,\n", "is not YAML at line 2"),
        ("a: !!python/object:os.system 1\n", "is not YAML at line 1"),
    ],
)
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError, match=problem) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("nowhere.yaml", "binary.yaml"):
        with pytest.raises(SpaceError, match=rf"{name}.*cannot be read"):
            read(tmp_path / name)
