"""Files that may come from anyone: size, encoding, nesting and numbers are checked first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from autopeft.errors import SpaceError, StorageError, UserError
from autopeft.utils import text_files
from autopeft.utils.serialize import read_json
from autopeft.utils.yaml_files import parse_yaml


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "a.json", dict[str, Any]) == {}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        ("{}".encode("utf-16"), "it is UTF-16"),
        (b"\x00\x00", "it is a binary file"),
        (b'{"a": "\xff"}', "it is not UTF-8 at byte 7"),
        (b"[" * 20_000, "nested deeper than 64"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested deeper than 64"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"a": [{"b": 1, "b": 2}]}', "names 'b' twice"),
    ],
)
def test_a_hostile_json_file_is_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=problem) as caught:
        read_json(path, dict[str, Any])
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_is_not_read_beyond_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.utils.serialize.MAX_JSON_BYTES", 10)
    (tmp_path / "a.json").write_text('{"a": 12345}')
    with pytest.raises(StorageError, match="larger than 10 B, the most that is read"):
        read_json(tmp_path / "a.json", dict[str, Any])


def test_a_pipe_or_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(StorageError, match="not a regular file"):
            read_json(path, dict[str, Any])
    with pytest.raises(StorageError, match="no file has such a name"):
        read_json(Path("a\x00b"), dict[str, Any])


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: " + "[" * 20_000 + "]" * 20_000, "nested deeper than 64"),
        ("a: &a [*a]", "nested deeper than 64"),
        (_BOMB, "more than 100,000 values"),
        ("a: " + "9" * 400, "a number of 400 digits"),
        ("a: 2024-13-45", "does not allow"),
        ("a: !!timestamp soon", "does not allow"),
        ("a: !!bool perhaps", "does not allow"),
        ("a: !!int many", "does not allow"),
        ("a: 1\x00", "is not YAML"),
        ("a: 1\nb: 2\na: 3", r"names 'a' twice at lines 1 and 3; name it once"),
        ("a: {lora: [2], 'lora': [8]}", "names 'lora' twice"),
        ("a: {1: [2], 0x1: [8]}", "names '0x1' twice"),
        ("a: [{b: {c: 1, c: 1}}]", "names 'c' twice"),
        ("<<: {a: 1}\n<<: {a: 2}", "names '<<' twice"),
    ],
)
def test_hostile_yaml_is_one_line(text: str, problem: str) -> None:
    with pytest.raises(SpaceError, match=problem) as caught:
        parse_yaml(text, field="space", shown="s.yaml", remedy="fix it", error=SpaceError)
    assert len(str(caught.value).splitlines()) == 1


def test_nesting_up_to_the_limit_is_read() -> None:
    depth = text_files.MAX_DEPTH
    data = text_files.parse_json("[" * depth + "1" + "]" * depth)
    with pytest.raises(text_files.Unreadable):
        text_files.check_depth([data])


def test_control_characters_do_not_reach_whoever_reads_an_error() -> None:
    error = UserError("model", "m", "its config says \x1b[2J\r\x9b1m\u202e and\u2028more", "stop")
    assert str(error) == "model='m': its config says ?[2J ?1m? and more; stop"
