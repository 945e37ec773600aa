from __future__ import annotations

from typing import Any

import pytest
import torch

from autopeft.models.lora_conversion import factorize
from autopeft.models.low_rank import Directions


def _change(out: int, in_: int, rank: int, *, noise: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    given: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    product = torch.randn(out, rank, **given) @ torch.randn(rank, in_, **given)
    return product + noise * torch.randn(out, in_, **given)


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all matrices that are decomposed."""
    shapes: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def counted(matrix: torch.Tensor, **options: Any) -> Any:
        shapes.append(tuple(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    return shapes


@pytest.mark.parametrize("rank", [1, 16, 60])
def test_no_matrix_of_the_full_size_is_decomposed(
    rank: int, decomposed: list[tuple[int, ...]]
) -> None:
    change = _change(700, 400, rank, noise=1e-9)
    found = factorize(change, max_rank=128)
    assert found.rank == rank
    assert found.error == 0.0
    assert max(max(shape) for shape in decomposed) <= 136
    torch.testing.assert_close((found.b @ found.a).double(), change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_it_equals_the_whole_decomposition_within_rounding(
    shape: tuple[int, int], noise: float
) -> None:
    change = _change(*shape, 20, noise=noise)
    rounding = 2.0 * noise * (shape[0] * shape[1]) ** 0.5
    found = Directions.of_change(change, max_rank=128, no_more=max(rounding, 1e-9))
    values = torch.linalg.svdvals(change)
    torch.testing.assert_close(found.values[:20], values[:20], rtol=1e-9, atol=0.0)
    assert found.left_out <= max(rounding, 1e-5)
    kept = found.left[:, :20] * found.values[:20] @ found.right[:20]
    assert float((kept - change).norm()) <= float(values[20:].norm()) * 1.1 + 1e-9


def test_a_change_of_full_rank_is_decomposed_whole_and_cut_to_the_best(
    decomposed: list[tuple[int, ...]],
) -> None:
    change = _change(120, 90, 90)
    found = factorize(change, max_rank=8)
    assert (120, 90) in decomposed
    left_out = torch.linalg.svdvals(change)[8:].norm()
    assert float((change - found.b @ found.a).norm()) == pytest.approx(float(left_out), rel=1e-5)
    assert found.error == pytest.approx(float(left_out / change.norm()), rel=1e-5)
