from __future__ import annotations

from autopeft.serving.joined import Joined, absent

_QKV = Joined(("q", "k", "v"), needed=("q", "v"))
_GATE_UP = Joined(("gate", "up"), needed=("gate",))


def test_each_parent_is_looked_at_by_itself() -> None:
    held = ["0.attn.q", "1.attn.k", "1.mlp.up", "2.attn.q", "2.attn.v", "2.mlp.gate", "2.mlp.down"]
    found = absent(held, (_QKV, _GATE_UP))
    assert found == ("0.attn.v", "1.attn.q", "1.attn.v", "1.mlp.gate")
    assert absent([*held, *found], (_QKV, _GATE_UP)) == ()


def test_without_groups_nothing_is_absent() -> None:
    assert absent(["0.attn.q"], ()) == ()
