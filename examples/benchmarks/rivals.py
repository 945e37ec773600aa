"""Multi-objective searches of other projects, on what a practitioner would search.

Each proposes one method, placement and rank in the last k layers, and the rate: five parameters.
Both know the objectives' range: the reference point of `qlognehvi` is the benchmark's own, `primo`
has a prior for each objective (a large LoRA in all layers, a small one in the last).

They need `pip install -e ".[benchmark]"`, in an environment of its own: NePS wants older versions
of BoTorch, GPyTorch and pandas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from autopeft.plan import Candidate
from autopeft.searcher.space.initial_design import single_method
from autopeft.searcher.space.space import SearchSpace

_NINTHS = 9
"""Units of a whole training; a rung is at each power of three of them."""
_PLAIN_RATE = 0.5
"""Position of the rate of a prior."""


@dataclass(frozen=True)
class Proposal:
    """What a rival would like to know.

    Attributes:
        candidate: What to train.
        share: How far, as a share of a whole training.
        work: What that adds to what the candidate was trained before.
    """

    candidate: Candidate
    share: float = 1.0
    work: float = 1.0


class Rival(Protocol):
    """A search by another project."""

    def ask(self) -> Proposal:
        """Return what to train next."""
        ...

    def tell(self, losses: Sequence[float] | None) -> None:
        """Take what it gave, each to be minimized; None: it failed."""
        ...


@dataclass(frozen=True)
class WholePlans:
    """Plans of one method, placement and rank in the last k layers.

    Attributes:
        space: Whose methods, placements and ranks they have.
    """

    space: SearchSpace

    @cached_property
    def choices(self) -> Mapping[str, tuple[Any, ...]]:
        """Return what each parameter may be, but for the rate, which is a position in [0, 1]."""
        options = [o for o in self.space.grid.options if o.method in self.space.grid.methods]
        return {
            "method": tuple(self.space.grid.methods),
            "placement": tuple(dict.fromkeys(option.placement for option in options)),
            "rank": tuple(sorted({option.rank for option in options if option.rank})),
            "last": tuple(range(1, len(self.space.grid.units) + 1)),
        }

    def candidate(self, values: Mapping[str, Any]) -> Candidate:
        """Return the plan of the values; at the method's nearest placement and rank."""
        method, place = values["method"], values["placement"]
        mine = {o.placement: None for o in self.space.grid.options if o.method == method}
        found = single_method(
            self.space.encoder,
            method,
            place if place in mine else next(iter(mine)),
            int(values["rank"]),
            float(values["rate"]),
            int(values["last"]),
        )
        assert found is not None, "every option is legal somewhere among the last layers"
        return self.space.encoder.to_candidate(found)


@dataclass
class QLogNEHVI:
    """BoTorch: its default Gaussian process for each objective, and qLogNEHVI.

    Method and placement are one-hot. `MixedSingleTaskGP` took some 1,500 evaluations to fit and
    the optimizer of mixed spaces up to minutes for a proposal; so the best of 1,024 Sobol points
    and of 256 that differ from one already tried in one parameter is taken.

    Source: Ament et al. 2023, "Unexpected Improvements to Expected Improvement for Bayesian
    Optimization"; `qLogNoisyExpectedHypervolumeImprovement` of BoTorch.

    Attributes:
        plans: What is searched.
        worst: The reference point: the largest loss of each objective that counts.
        seed: Of the first draws and of the optimizer.
        n_first: Sobol points before the first model.
    """

    plans: WholePlans
    worst: Sequence[float]
    seed: int
    n_first: int = 10
    _inputs: list[list[float]] = field(default_factory=list)
    _losses: list[list[float] | None] = field(default_factory=list)

    @cached_property
    def _first(self) -> Any:
        import torch

        draw = torch.quasirandom.SobolEngine(5, scramble=True, seed=self.seed)
        return draw.draw(self.n_first, dtype=torch.double)

    @property
    def _sizes(self) -> list[int]:
        return [len(choices) for choices in self.plans.choices.values()]

    def ask(self) -> Proposal:
        """Return the next Sobol point, or the best of the model."""
        row = len(self._inputs)
        if row < self.n_first:
            point = self._point(self._first[row].tolist())
        else:
            point = self._best()
        self._inputs.append(point)
        names, options = self.plans.choices.keys(), self.plans.choices.values()
        values = {
            name: choices[round(x)] for name, choices, x in zip(names, options, point, strict=False)
        }
        return Proposal(self.plans.candidate({**values, "rate": point[-1]}))

    def tell(self, losses: Sequence[float] | None) -> None:
        """Take what the last point gave."""
        self._losses.append(None if losses is None else [float(loss) for loss in losses])

    def _point(self, shares: Sequence[float]) -> list[float]:
        """Return the indices of four choices, and the rate, for five shares in [0, 1)."""
        pairs = zip(shares, self._sizes, strict=False)
        return [*(float(min(int(share * n), n - 1)) for share, n in pairs), shares[-1]]

    def _best(self) -> list[float]:
        import torch
        from botorch.acquisition.multi_objective.logei import (
            qLogNoisyExpectedHypervolumeImprovement,
        )
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP, SingleTaskGP
        from botorch.models.transforms import Standardize
        from botorch.optim import optimize_acqf_discrete
        from botorch.sampling import SobolQMCNormalSampler
        from gpytorch.mlls import SumMarginalLogLikelihood

        torch.manual_seed(self.seed * 10_000 + len(self._inputs))
        x = torch.tensor(self._inputs, dtype=torch.double)
        # BoTorch maximizes. What failed counts as the worst that may be.
        rows = [self.worst if losses is None else losses for losses in self._losses]
        y = -torch.tensor(rows, dtype=torch.double)
        models = [
            SingleTaskGP(self._encoded(x), y[:, i : i + 1], outcome_transform=Standardize(1))
            for i in range(y.shape[1])
        ]
        model = ModelListGP(*models)
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
        gain = qLogNoisyExpectedHypervolumeImprovement(
            model,
            ref_point=[-loss for loss in self.worst],
            X_baseline=self._encoded(x),
            sampler=SobolQMCNormalSampler(torch.Size([32]), seed=self.seed),
            prune_baseline=True,
        )
        draw = torch.quasirandom.SobolEngine(5, scramble=True, seed=self.seed + len(self._inputs))
        drawn = [self._point(shares) for shares in draw.draw(1024 + 256).tolist()]
        rng = np.random.default_rng([self.seed, len(self._inputs)])
        for point in drawn[1024:]:
            kept = rng.permutation(5)[:4]
            near = self._inputs[rng.integers(len(self._inputs))]
            for i in kept:
                point[i] = near[i]
        choices = torch.tensor(drawn, dtype=torch.double)
        encoded = self._encoded(choices)
        found, _ = optimize_acqf_discrete(gain, q=1, choices=encoded, max_batch_size=256)
        best = int((encoded == found[0]).all(dim=1).nonzero()[0])
        return drawn[best]

    def _encoded(self, points: Any) -> Any:
        """Return points, shape (n, 5), with one-hot method and placement and all else in [0, 1]."""
        import torch

        hot = [
            torch.nn.functional.one_hot(points[:, i].long(), self._sizes[i]).double()
            for i in (0, 1)
        ]
        ranks, last = (points[:, i : i + 1] / (self._sizes[i] - 1) for i in (2, 3))
        return torch.cat([*hot, ranks, last, points[:, 4:]], dim=1)


@dataclass
class PriMO:
    """NePS: multi-objective ASHA first, then Bayesian optimization with a prior per objective.

    Source: `neps.algorithms.primo` of neural-pipeline-search.

    Attributes:
        plans: What is searched.
        worst: The loss of each objective that a failed training is told with.
        seed: Of NumPy's, Python's and torch's global generators: NePS has none of its own.
    """

    plans: WholePlans
    worst: Sequence[float]
    seed: int
    _trained: dict[str, float] = field(default_factory=dict)
    _asked: Any = None

    @cached_property
    def _search(self) -> Any:
        import random

        import torch
        from neps.optimizers.algorithms import primo
        from neps.optimizers.ask_and_tell import AskAndTell
        from neps.space import HPOCategorical, HPOFloat, HPOInteger, SearchSpace

        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        choices = self.plans.choices
        space = SearchSpace(
            {
                "method": HPOCategorical(list(choices["method"])),
                "placement": HPOCategorical(list(choices["placement"])),
                "rank": HPOInteger(0, len(choices["rank"]) - 1),
                "last": HPOInteger(1, len(choices["last"])),
                "rate": HPOFloat(0.0, 1.0),
                "ninths": HPOInteger(1, _NINTHS, is_fidelity=True),
            }
        )
        plain = {"method": "lora", "placement": choices["placement"][0], "rate": _PLAIN_RATE}
        large = plain | {"rank": len(choices["rank"]) - 1, "last": len(choices["last"])}
        small = plain | {"rank": 0, "last": 1}
        centers = {"quality": large} | {f"cost{i}": small for i in range(1, len(self.worst))}
        sure = {name: dict.fromkeys(large, 0.5) for name in centers}
        return AskAndTell(primo(space, prior_centers=centers, prior_confidences=sure))

    def ask(self) -> Proposal:
        """Return what PriMO would train, from the start or on from an earlier rung."""
        self._asked = trial = self._search.ask()
        values = {**trial.config, "rank": self.plans.choices["rank"][trial.config["rank"]]}
        share = values["ninths"] / _NINTHS
        before = self._trained.get(str(trial.metadata.previous_trial_id), 0.0)
        self._trained[str(trial.metadata.id)] = share
        return Proposal(self.plans.candidate(values), share, share - before)

    def tell(self, losses: Sequence[float] | None) -> None:
        """Take what the last training gave."""
        told = [float(loss) for loss in (self.worst if losses is None else losses)]
        self._search.tell(self._asked, {"objective_to_minimize": told})


RIVALS: Mapping[str, Callable[[WholePlans, Sequence[float], int], Rival]] = {
    "whole-qlognehvi": QLogNEHVI,
    "whole-primo": PriMO,
}
"""By name: plans, reference point and seed -> search."""
