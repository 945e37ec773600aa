"""Made-up answers to "how good would this adapter be?", unlike one another, cheap to ask.

A response turns a candidate into a quality. All have the shape that trained adapters show (effects
of sites add up and saturate, a wrong learning rate spoils them), and each stresses one thing that
makes searching hard. None of them needs a model: shapes are enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopeft import methods
from autopeft.costs import Topology
from autopeft.plan import Candidate
from autopeft.searcher.space.space import SearchSpace

Array = NDArray[np.float64]

TOPOLOGY = Topology(
    12,
    {
        "attn.q": (768, 768),
        "attn.k": (768, 768),
        "attn.v": (768, 768),
        "attn.o": (768, 768),
        "mlp.up": (3072, 768),
        "mlp.down": (768, 3072),
        "norm": (768, 4),
    },
)
"""A BERT-base."""

BASE_QUALITY = 0.5
"""Without adapters."""

DIVERGED = 0.0
"""The quality of a training that diverges."""

BASE_MS = 5.0
"""The latency without adapters."""

_HEADROOM = 0.42
_ROLES = tuple(TOPOLOGY.shapes)


def make_space() -> SearchSpace:
    """12 layers, each with a method, rank and placement of its own, and the learning rate."""
    return SearchSpace.from_source("default", TOPOLOGY)


@dataclass(frozen=True)
class Traits:
    """What a kind of landscape is like.

    Attributes:
        summary: For people.
        layer_spread: Standard deviation of the steps of the layers' log weights.
        n_key_layers: If above 0, these many layers hold four fifths of the effect.
        fit_spread: Standard deviation of the log of how a method suits a layer, and a role.
        pair_strength: How much layers enhance or hinder one another.
        rate_width: Width of the good learning rates, in positions.
        rate_shift: How far the best position moves from the smallest to the largest plans.
        cliff: Whether a rate far off makes the adapter worse than none.
        overfit: Quality lost at the most expensive plan for its size alone.
        noise: Standard deviation of what one training says.
        limits: Range of the positions above which a method's trainings diverge; None for never.
        crash: Share of the trainings that fail for no reason of theirs.
        conjunction: Whether the key layers help only together, and a cheap decoy hides that.
        crossing: Spread of the pace of learning: the larger, the more often curves cross.
        is_measured: Whether the cost is a latency that only a training tells.
    """

    summary: str
    layer_spread: float = 0.5
    n_key_layers: int = 0
    fit_spread: float = 0.0
    pair_strength: float = 0.0
    rate_width: float = 0.3
    rate_shift: float = 0.0
    cliff: bool = False
    overfit: float = 0.0
    noise: float = 0.003
    limits: tuple[float, float] | None = None
    crash: float = 0.0
    conjunction: bool = False
    crossing: float = 0.0
    is_measured: bool = False


KINDS: Mapping[str, Traits] = {
    "additive": Traits("effects of layers add up, smoothly over depth"),
    "interactions": Traits(
        "methods suit some layers and roles, layers enhance or hinder one another",
        fit_spread=0.5,
        pair_strength=0.6,
    ),
    "noisy": Traits("as additive, one training in three misleads", noise=0.04),
    "rate": Traits(
        "learning-rate dominated: a narrow good range, ruin beyond it",
        rate_width=0.12,
        rate_shift=-0.15,
        cliff=True,
    ),
    "sparse": Traits("three of the layers hold nearly all", layer_spread=0.0, n_key_layers=3),
    "overfit": Traits(
        "large plans lose again what they gain; rates shift with size",
        overfit=0.15,
        rate_shift=-0.3,
        fit_spread=0.25,
        noise=0.01,
    ),
    "roles": Traits(
        "additive, but methods suit some roles and the best rate falls with size",
        fit_spread=0.6,
        rate_width=0.2,
        rate_shift=-0.4,
        noise=0.006,
    ),
    "diverging": Traits(
        "two in three rates diverge, a fifth of the rest crash",
        rate_width=0.2,
        noise=0.006,
        limits=(0.3, 0.5),
        crash=0.2,
    ),
    "crossing": Traits(
        "what learns fast is often not what ends well",
        fit_spread=0.3,
        rate_width=0.25,
        noise=0.006,
        crossing=2.8,
    ),
    "deceptive": Traits(
        "a cheap decoy; six layers hold the rest, and only together",
        n_key_layers=6,
        conjunction=True,
        noise=0.006,
    ),
    "measured": Traits(
        "the cost is a latency that only a training tells",
        fit_spread=0.4,
        noise=0.006,
        is_measured=True,
    ),
}
"""Every landscape, by name: six that the searcher was tuned on, five of other kinds."""


@dataclass(frozen=True, eq=False)
class Response:
    """The quality of every candidate, in one landscape drawn with one seed.

    Attributes:
        traits: What it is like.
        seed: Also seeds the noise.
        methods: Names, in the order of the arrays below.
        weights: Share of each layer, shape (n_layers,).
        strength: Effect of each method at full size, at each layer and role, shape
            (n_methods, n_layers, n_roles).
        half_size: Parameters at which a site's effect is well on its way, shape (n_methods,).
        best_rate: Best learning-rate position, shape (n_methods,).
        pairs: How layers enhance one another, shape (n_layers, n_layers).
        log_range: Natural logarithms of fewest and most trainable parameters.
        limits: Position above which a method's trainings diverge, shape (n_methods,).
        keys: The key layers.
        site_ms: Latency of one adapter of each method, shape (n_methods,).
    """

    traits: Traits
    seed: int
    methods: tuple[str, ...]
    weights: Array
    strength: Array
    half_size: Array
    best_rate: Array
    pairs: Array
    log_range: tuple[float, float]
    limits: Array
    keys: NDArray[np.int64]
    site_ms: Array

    @classmethod
    def draw(cls, kind: str, seed: int, space: SearchSpace) -> Response:
        """A landscape of that kind."""
        traits, names = KINDS[kind], space.methods
        rng = np.random.default_rng(seed)
        n_layers, n_methods = TOPOLOGY.n_layers, len(names)
        logs = np.cumsum(rng.normal(0.0, 1.0, n_layers)) * traits.layer_spread
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        keys = np.zeros(0, dtype=np.int64)
        if traits.n_key_layers:
            keys = rng.choice(n_layers, traits.n_key_layers, replace=False)
            weights = 0.2 * weights
            weights[keys] += 0.8 / traits.n_key_layers
        role = np.exp(rng.normal(0.0, 0.6, len(_ROLES)))
        role /= role[:-1].sum()
        general = np.exp(rng.normal(0.0, 0.35, n_methods))
        fit = rng.normal(0.0, traits.fit_spread, (n_methods, n_layers, 1))
        fit = fit + 0.7 * rng.normal(0.0, traits.fit_spread, (n_methods, 1, len(_ROLES)))
        low, high = space.cost_range()
        half_size = np.exp(rng.uniform(math.log(2e3), math.log(2e4), n_methods))
        best_rate = rng.uniform(0.25, 0.75, n_methods)
        pairs = rng.normal(0.0, 1.0, (n_layers, n_layers))
        site_ms = np.exp(rng.uniform(math.log(0.02), math.log(0.2), n_methods))
        limits = np.ones(n_methods)
        if traits.limits:
            # The best rates are a little below those that diverge, as in practice.
            limits = rng.uniform(*traits.limits, n_methods)
            best_rate = limits - rng.uniform(0.03, 0.15, n_methods)
        return cls(
            traits,
            seed,
            names,
            weights,
            general[:, None, None] * role[None, None, :] * np.exp(fit),
            half_size,
            best_rate,
            pairs,
            (math.log(low), math.log(high)),
            limits,
            keys,
            site_ms,
        )

    def truth(self, candidate: Candidate) -> float:
        """The quality without noise."""
        n_params = 0
        effects = np.zeros((1, TOPOLOGY.n_layers))
        for spec in candidate.plan.specs:
            effect, n = self.site(spec.method, spec.rank, spec.layer, spec.role)
            effects[0, spec.layer] += effect
            n_params += n
        used = np.array([[name in candidate.plan.methods for name in self.methods]])
        positions = np.array([[_position(candidate, name) for name in self.methods]])
        return float(self.quality(effects, used, positions, np.array([float(n_params)]))[0])

    def __call__(self, candidate: Candidate) -> float:
        """What a training says: the truth and noise, the same whenever it is asked again."""
        draw = np.random.default_rng([int(candidate.digest[:12], 16), self.seed])
        return self.truth(candidate) + float(draw.normal(0.0, self.traits.noise))

    def fails(self, candidate: Candidate) -> bool:
        """Whether a training diverges or crashes."""
        draw = np.random.default_rng([int(candidate.digest[:12], 16), self.seed, 1])
        return draw.random() < self.traits.crash or self.truth(candidate) == DIVERGED

    def score_at(self, candidate: Candidate, share: float) -> float:
        """What a training says after a share of its steps."""
        draw = np.random.default_rng([int(candidate.digest[:12], 16), self.seed, 2])
        pace = 3.0 * math.exp(draw.normal(0.0, self.traits.crossing))
        grown = math.expm1(-pace * share) / math.expm1(-pace)
        return BASE_QUALITY + (self(candidate) - BASE_QUALITY) * grown

    def cost(self, candidate: Candidate) -> float:
        """What a candidate costs: trainable parameters, or the latency in ms."""
        rows = [self.site(s.method, s.rank, s.layer, s.role) for s in candidate.plan.specs]
        if not self.traits.is_measured:
            return float(sum(n for _, n in rows))
        return BASE_MS + sum(
            self.latency(spec.method, n)
            for spec, (_, n) in zip(candidate.plan.specs, rows, strict=True)
        )

    def latency(self, method: str, n_params: int) -> float:
        """What one adapter adds to the latency, in ms."""
        return float(self.site_ms[self.methods.index(method)]) + 1e-6 * n_params

    def site(self, method: str, rank: int, layer: int, role: str) -> tuple[float, int]:
        """(effect of one adapter on its layer, its parameters)."""
        m = self.methods.index(method)
        shape = TOPOLOGY.shapes[role]
        n = methods.get(method).n_params(rank, shape, role)
        reached = 1.0 - math.exp(-((n / self.half_size[m]) ** 0.5))
        return float(self.strength[m, layer, _ROLES.index(role)]) * reached, n

    def quality(
        self, effects: Array, used: NDArray[np.bool_], positions: Array, n_params: Array
    ) -> Array:
        """The quality of many candidates without noise.

        Args:
            effects: Sum of the effects of each layer's adapters, shape (n, n_layers).
            used: Which methods are used, shape (n, n_methods).
            positions: Each method's learning rate in its range, shape (n, n_methods).
            n_params: Trainable parameters, shape (n,).

        Returns:
            Shape (n,).
        """
        traits = self.traits
        total = 2.0 * effects @ self.weights
        if traits.pair_strength:
            held = np.minimum(2.0 * effects, 1.0)
            mutual = np.einsum("ni,ij,nj->n", held, self.pairs, held) / TOPOLOGY.n_layers
            total = total * (1.0 + traits.pair_strength * np.tanh(mutual))
        if traits.conjunction:
            held = -np.expm1(-3.0 * effects)
            decoys = np.setdiff1d(np.arange(TOPOLOGY.n_layers), self.keys)[:2]
            decoy = -np.expm1(-20.0 * effects[:, decoys].sum(axis=1))
            total = 0.25 * decoy + 1.5 * held[:, self.keys].prod(axis=1)
        low, high = self.log_range
        size = (np.log(np.maximum(n_params, 1.0)) - low) / (high - low)
        best = self.best_rate + traits.rate_shift * (size[:, None] - 0.5)
        off = ((positions - best) / traits.rate_width) ** 2
        share = np.exp(-0.5 * (off * used).sum(axis=1) / np.maximum(used.sum(axis=1), 1))
        if traits.cliff:
            share = np.where(share > 0.05, share, -0.3)
        gain = total * share
        lost = traits.overfit * np.maximum(size - 0.5, 0.0) * 2.0 * (n_params > 0)
        grown = _HEADROOM * -np.expm1(-1.6 * np.maximum(gain, 0.0))
        quality: Array = BASE_QUALITY + np.where(gain >= 0, grown, 0.3 * gain) - lost
        diverged = (used & (positions > self.limits)).any(axis=1)
        return np.where(diverged, DIVERGED, quality)


def _position(candidate: Candidate, method: str) -> float:
    low, high = methods.learning_rate_range(method)
    return math.log(candidate.train.rate_for(method) / low) / math.log(high / low)
