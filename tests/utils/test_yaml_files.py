"""YAML files hold mappings, and 1e-3 is a number in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autopeft.errors import SpaceError
from autopeft.utils.yaml_files import read_yaml, to_yaml


def read(path: Path) -> dict[str, Any]:
    return read_yaml(path, field="space", remedy="name methods", error=SpaceError)


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("a: 1e-3\nb: 2E5\nc: 0.5\nd: 1e3x\n")
    assert read(path) == {"a": 1e-3, "b": 2e5, "c": 0.5, "d": "1e3x"}


def test_numbers_that_read_in_two_ways_are_text(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("a: 012\nb: 1:30\nc: 10:30.5\nd: 0xC\ne: -1_2\nf: .5\ng: -.inf\nh: 0\n")
    assert read(path) == {
        "a": "012", "b": "1:30", "c": "10:30.5",
        "d": 12, "e": -12, "f": 0.5, "g": -float("inf"), "h": 0,
    }  # fmt: skip


def test_what_is_written_is_read_as_the_same(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    texts = [
        "1e3",
        "-1e-3",
        ".5e3",
        "12e03",
        "1.5e3",
        "012",
        "08",
        "1:30",
        "1_0",
        "yes",
        "~",
        "0x1F",
    ]
    values = {"texts": texts, "numbers": [1e-5, 1e22, 0.5, 3, 10**12], "none": None, "ok": True}
    path.write_text(to_yaml(values))
    assert read(path) == values


def test_what_a_mapping_takes_over_may_be_named_anew(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\ne: *a\n")
    assert read(path) == {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}, "e": {"b": 1, "c": 2}}


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
