from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batch_for, build, candidate_of, disturb, logits_of

from autopeft.models.saving import load_attached, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec

_PSOFT = AdapterPlan(
    LayerSpec(i, role, "psoft", 8) for i in range(2) for role in ("attn.q", "mlp.up")
)


def _turned(matrix: torch.Tensor, **kwargs: Any) -> Any:
    """A decomposition as right as torch's, with the other sign for every second direction."""
    left, values, right = torch.svd(matrix)
    turn = torch.ones(len(values))
    turn[::2] = -1
    return left * turn, values, (right * turn).T


def test_a_rotation_is_loaded_where_singular_vectors_point_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build("bert")
    batch = batch_for(backbone)
    with backbone.attach(candidate_of(_PSOFT), seed=0) as attached:
        base = logits_of(attached.model, batch)
        disturb(attached)
        logits = logits_of(attached.model, batch)
        save_adapter(attached, tmp_path)
    assert not torch.allclose(logits, base, atol=1e-4)
    monkeypatch.setattr(torch.linalg, "svd", _turned)
    reloaded = load_attached(build("bert").model, tmp_path)
    torch.testing.assert_close(logits_of(reloaded.model, batch), logits, rtol=1e-4, atol=1e-5)
