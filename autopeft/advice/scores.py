"""Zero-cost scores of a site: what its weight, inputs and gradient tell before any training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from autopeft.utils.device import drawn_on_host

_EXTRA = 8
"""Singular values looked for beyond those asked for; with them, the randomized method is close."""

_PEFT_VARIANCE = 1.0 / 3.0
"""Variance of an entry of a new LoRA's A, times its width: peft draws from U(-1/sqrt(in), ...)."""


@dataclass(frozen=True)
class SiteRows:
    """What a few rows tell of a site.

    Attributes:
        layer: Its block.
        weight: Shape (out, in), float32.
        inputs: Inputs at real tokens, shape (n, in), float32.
        gradient: Gradient of the mean loss by the weight, shape (out, in).
        row_energy: Squared Frobenius norm of the gradient of one row's loss, mean over rows.
        rank: Rank of the LoRA that is thought of.
    """

    layer: int
    weight: torch.Tensor
    inputs: torch.Tensor
    gradient: torch.Tensor
    row_energy: float
    rank: int


@dataclass(frozen=True)
class Score:
    """A score.

    Attributes:
        meaning: What it is, in a few words.
        source: Where it was published, "" for depth.
        of: Computes it.
    """

    meaning: str
    source: str
    of: Callable[[SiteRows], float]


def top_energy(matrix: torch.Tensor, rank: int) -> float:
    """Return the sum of the squares of the `rank` largest singular values."""
    n_found = rank + _EXTRA
    if min(matrix.shape) <= 2 * n_found:
        return float(torch.linalg.svdvals(matrix)[:rank].square().sum())
    with drawn_on_host(0):  # It starts from random directions.
        _, values, _ = torch.svd_lowrank(matrix, q=n_found, niter=4)
    return float(values[:rank].square().sum())


def depth(rows: SiteRows) -> float:
    """Return the block's index."""
    return float(rows.layer)


def gradient_norm(rows: SiteRows) -> float:
    """Return the Frobenius norm of the weight's gradient."""
    return float(rows.gradient.norm())


def top_gradient(rows: SiteRows) -> float:
    """Return the energy of the gradient's best approximation of the LoRA's rank.

    LoRA-GA (arXiv 2407.05000) starts a LoRA from these directions.
    """
    return top_energy(rows.gradient, rows.rank)


def page(rows: SiteRows) -> float:
    """Return the energy of the gradient that a new LoRA gets, mean over rows: PAGE.

    B starts at zero, so A has no gradient, and that of B is alpha / r times G A^T. Its expectation
    over peft's initial A needs no draw. alpha is taken as 2 r; the factor is the same at all sites.
    """
    return 4.0 * rows.rank * _PEFT_VARIANCE * rows.row_energy / rows.weight.shape[1]


def feature_norm(rows: SiteRows) -> float:
    """Return PLoP's NFN: the norm of W z over that of W u, mean over tokens z.

    u is a random vector as long as z. The root mean square of W u is |W| |z| / sqrt(in).
    """
    lengths = rows.inputs.norm(dim=1)
    outputs = (rows.inputs @ rows.weight.T).norm(dim=1)
    expected = rows.weight.norm() * lengths / rows.weight.shape[1] ** 0.5
    is_told = expected > 0
    return float((outputs[is_told] / expected[is_told]).mean())


def explained_variance(rows: SiteRows) -> float:
    """Return the share of the inputs' variance in as many directions as the LoRA has: EVA."""
    centered = rows.inputs - rows.inputs.mean(dim=0)
    return _ratio(top_energy(centered, rows.rank), float(centered.square().sum()))


def stable_rank(rows: SiteRows) -> float:
    """Return the weight's squared Frobenius norm over its squared spectral norm."""
    return _ratio(float(rows.weight.square().sum()), top_energy(rows.weight, 1))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


SCORES: Mapping[str, Score] = {
    "depth": Score("block, from the input", "", depth),
    "gradient": Score("norm of the weight's gradient", "", gradient_norm),
    "top gradient": Score("its energy in r directions", "arXiv 2407.05000", top_gradient),
    "PAGE": Score("energy of a new LoRA's gradient", "arXiv 2605.06183", page),
    "NFN": Score("output norm over a random input's", "arXiv 2506.20629", feature_norm),
    "EVA": Score("input variance in r directions", "arXiv 2410.07170", explained_variance),
    "stable rank": Score("|W|_F^2 / |W|_2^2", "Rudelson and Vershynin 2007", stable_rank),
}
"""Scores by name."""
