from __future__ import annotations

from pathlib import Path

import pytest

from autopeft.errors import AdapterError
from autopeft.serving.modelfile import Modelfile


@pytest.mark.parametrize(
    ("text", "base", "adapters"),
    [
        ("", "", ()),
        ("# FROM a\n  from  b \nADAPTER ./c.gguf\nadapter d.gguf\n", "b", ("./c.gguf", "d.gguf")),
        ('FROM "a b"\nADAPTER """c"""', "a b", ("c",)),
        ('FROM a\nSYSTEM """x\nADAPTER y\n"""\nADAPTER z', "a", ("z",)),
        ('FROM a\nMESSAGE user "x\nADAPTER y"\nADAPTER z', "a", ("z",)),
        ('FROM a\nTEMPLATE """x\nADAPTER y', "a", ()),
    ],
)
def test_commands_are_read_and_texts_are_not(
    text: str, base: str, adapters: tuple[str, ...]
) -> None:
    assert Modelfile.parse(text) == Modelfile(base, adapters)


def test_what_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AdapterError, match="Modelfile"):
        Modelfile.read(tmp_path / "Modelfile")
    assert Modelfile.read(tmp_path / "none") is None
