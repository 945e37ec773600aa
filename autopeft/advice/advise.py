"""Placement advice: score the sites of a user's model, rank them, and name a plan to start with."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft import methods
from autopeft.advice.measure import SiteScores, linear_sites, measure_sites
from autopeft.advice.measured import DEPTH, Worth, best_score, read_measured, worths
from autopeft.costs import Price
from autopeft.costs.plan_rules import is_legal
from autopeft.engine.loaded_model import LoadedModel
from autopeft.errors import ModelError, SettingsError, SpaceError
from autopeft.methods import LINEAR_ROLES
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.plan_text import layer_ranges, plan_summary, role_word
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import SearchSettings
from autopeft.utils.formatting import counted, human_bytes, human_count
from autopeft.utils.quiet import quiet_transformers
from autopeft.utils.yaml_files import to_yaml

if TYPE_CHECKING:
    import pandas

_METHOD = "lora"
_RANK = 8
"""Rank of the plan, where the model and the space have it."""

_SHARE = 0.5
"""Share of the blocks that the plan adapts, and of the roles if the scores tell roles apart."""


@dataclass(frozen=True)
class RankedSite:
    """A site with its scores.

    Attributes:
        layer: Its block.
        role: Its role.
        scores: Score name -> value.
    """

    layer: int
    role: str
    scores: Mapping[str, float]


@dataclass(frozen=True, repr=False)
class Advice:
    """Where adapters may pay, before any training.

    Attributes:
        lines: What was read, and what was left out.
        sites: The sites of linear modules, most promising first.
        worths: Score name -> how well it told gains where that was measured.
        score: The score that the sites are ranked by.
        why: Why that one.
        plan: A LoRA to start with.
        learning_rates: The range of its learning rate.
        price: What the plan costs; `train_flops` are those of one step.
        space: A search space that is restricted to it, as `search` takes one.
        command: The command that searches there; "" if data or model were given as objects.

    Example:
        >>> advice = autopeft.advise(
        ...     "~/.cache/autopeft/all-MiniLM-L6-v2", "~/.cache/autopeft/movie_snippets.csv"
        ... )
        >>> advice.plan.methods
        ('lora',)
    """

    lines: tuple[str, ...]
    sites: tuple[RankedSite, ...]
    worths: Mapping[str, Worth]
    score: str
    why: str
    plan: AdapterPlan
    learning_rates: tuple[float, float]
    price: Price
    space: Mapping[str, Any]
    command: str

    def __repr__(self) -> str:
        return f"<Advice by {self.score}: start with {plan_summary(self.plan)}>"

    def _repr_html_(self) -> str:
        first = "".join(f"<p>{html.escape(line)}</p>" for line in (self.why, *self.plan_lines()))
        table = self.to_pandas().head(10).to_html(float_format=lambda value: f"{value:.3g}")
        return f"{first}<pre style='white-space: pre-wrap'>{html.escape(self.command)}</pre>{table}"

    def plan_lines(self) -> list[str]:
        """Return the plan and its price in words."""
        low, high = self.learning_rates
        price = self.price
        ((name, choices),) = (item for item in self.space.items() if item[0].startswith("alpha"))
        alpha = f"{name.replace('_', ' ')} {' or '.join(f'{value:g}' for value in choices)}"
        return [
            f"start with {plan_summary(self.plan)}, {alpha}, learning rate {low:g} to {high:g}",
            f"{human_count(price.trainable_params)} trainable parameters, "
            f"{human_bytes(price.adapter_bytes)} adapter, "
            f"{human_bytes(price.peak_memory_bytes)} peak memory, "
            f"{human_count(price.train_flops)} FLOPs a step",
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row for each site, most promising first.

        Returns:
            layer, role, every score, and whether the plan adapts the site (`in_plan`).
        """
        import pandas

        planned = {(spec.layer, spec.role) for spec in self.plan.specs}
        rows = [
            {"layer": site.layer, "role": site.role, **site.scores}
            | {"in_plan": (site.layer, site.role) in planned}
            for site in self.sites
        ]
        return pandas.DataFrame(rows)


def advise(settings: SearchSettings, *, n_rows: int, has_command: bool = True) -> Advice:
    """Score the sites of a model on some of its data.

    Args:
        settings: Model, data, task and perhaps a space; other settings play no part.
        n_rows: Training rows to read.
        has_command: Whether model and data have names that a command can use.

    Raises:
        UserError: for a mistake in the settings, or if no site can be judged.
    """
    if n_rows < 1:
        raise SettingsError("rows", n_rows, "`rows >= 1` must hold", "use e.g. 64")
    if settings.evaluate is not None:
        problem = "trains by itself, so autopeft knows no loss to take gradients of"
        raise SettingsError("evaluate", settings.evaluate, problem, "leave it out, and name data")
    if settings.quantization != "none":
        problem = "the scores need the weights in full precision"
        remedy = "leave it out: the quantized model has the same sites"
        raise SettingsError("quantization", settings.quantization, problem, remedy)
    lines: list[str] = []
    # Nothing is trained, so the machine is not measured.
    ready = prepare(replace(settings, workers=1), note=lines.append)
    sites = linear_sites(ready.space)
    rank = _rank(ready, sites)
    with quiet_transformers():
        base = LoadedModel(ready.context())
    scored = measure_sites(base, sites, rank=rank, n_rows=n_rows, seed=settings.seed)
    lines += _told(scored, n_rows, len(base.setup.data.train))
    if _METHOD not in ready.space.methods:
        lines.append(f"the space has no {_METHOD}: the plan is one, and the advised space adds it")
    if not scored.values:
        problem = "no gradient reaches any linear module of its blocks"
        raise ModelError("model", settings.model, problem, "check that the head reads the blocks")
    found = worths(read_measured())
    chosen = best_score(found)
    ordered = _ordered(scored, chosen, found[chosen].sign)
    layers, roles = _places(ordered, chosen)
    plan = AdapterPlan(
        LayerSpec(layer, role, _METHOD, rank)
        for layer in layers
        for role in roles
        if (layer, role) in scored.values
    )
    train = TrainSettings(1e-3, steps=1, batch_size=settings.rows_per_step)
    space = _space(ready, layers, roles)
    # The command must work.
    SearchSpace.from_source(space, ready.prices.topology)
    return Advice(
        lines=tuple(lines),
        sites=tuple(ordered),
        worths=found,
        score=chosen,
        why=_why(found, chosen),
        plan=plan,
        learning_rates=ready.space.encoder.rates(_METHOD),
        price=ready.prices.price(Candidate(plan, train)),
        space=space,
        command=_command(settings, space) if has_command else "",
    )


def _rank(ready: PreparedSearch, sites: Sequence[tuple[int, str]]) -> int:
    """Return the rank of the plan: the space's nearest to 8 that each site can have."""
    if not sites:
        remedy = "use a space with roles of linear modules, e.g. lora"
        raise SpaceError("space", ready.space.name, "adapts no linear module", remedy)
    override = ready.space.config.methods.get(_METHOD)
    ranks = (override and override.ranks) or methods.get(_METHOD).default_ranks
    topology = ready.prices.topology
    fitting = [
        rank
        for rank in ranks
        if all(is_legal(topology, LayerSpec(*site, _METHOD, rank)) for site in sites)
    ]
    if not fitting:
        problem = f"{_METHOD} has no rank that fits all sites"
        raise SpaceError("space", ready.space.name, problem, "add smaller ranks")
    return min(fitting, key=lambda rank: abs(math.log(rank / _RANK)))


def _told(scored: SiteScores, asked: int, available: int) -> list[str]:
    """Return what was read, and which sites are left out."""
    lines = [f"{scored.n_rows} of {available} training rows scored"]
    if scored.n_rows < asked:
        lines[0] += f"; {asked} were asked for, there are no more"
    for left, problem in (
        (scored.unreached, "the loss has no gradient there"),
        (scored.broken, "a score is infinite or no number"),
    ):
        if left:
            n = counted(len(left), "site")
            lines.append(f"{n} left out, {problem}: {_site_names(left)}")
    return lines


def _site_names(sites: Sequence[tuple[int, str]]) -> str:
    by_role = {role: [at for at, r in sites if r == role] for role in LINEAR_ROLES}
    return ", ".join(f"{r} in {layer_ranges(layers)}" for r, layers in by_role.items() if layers)


def _ordered(scored: SiteScores, chosen: str, sign: int) -> list[RankedSite]:
    ranked = [RankedSite(*site, values) for site, values in scored.values.items()]
    return sorted(ranked, key=lambda site: -sign * site.scores[chosen])


def _places(ordered: Sequence[RankedSite], chosen: str) -> tuple[list[int], list[str]]:
    """Return the blocks, and the roles, whose sites have the best mean place."""

    def best(of: Mapping[Any, list[int]]) -> list[Any]:
        by_place = sorted(of, key=lambda key: float(np.mean(of[key])))
        return by_place[: math.ceil(_SHARE * len(by_place))]

    by_layer: dict[int, list[int]] = {}
    by_role: dict[str, list[int]] = {}
    for place, site in enumerate(ordered):
        by_layer.setdefault(site.layer, []).append(place)
        by_role.setdefault(site.role, []).append(place)
    # Depth tells nothing of roles.
    roles = list(by_role) if chosen == DEPTH else best(by_role)
    return sorted(best(by_layer)), sorted(roles, key=LINEAR_ROLES.index)


def _why(found: Mapping[str, Worth], chosen: str) -> str:
    worth = found[chosen]
    figure = f"its rank correlation with measured gains is {worth.mean}, mean of settings"
    if chosen != DEPTH:
        what = "high" if worth.sign > 0 else "low"
        text = f"ranked by {chosen}, {what} first: {figure}"
        text += f"; {worth.beyond_depth} stronger than depth's"
    else:
        what = "last" if worth.sign > 0 else "first"
        text = (
            f"no score told more than depth for sure, so the advice is depth, {what} blocks first: "
        )
        text += figure
        if not worth.mean.is_certain:
            text += "; even depth may tell nothing"
    unsure = [name for name, figure in worth.settings.items() if not figure.is_certain]
    return text + (f"; its interval includes 0 in {', '.join(unsure)}" if unsure else "")


def _space(ready: PreparedSearch, layers: list[int], roles: list[str]) -> dict[str, Any]:
    """Return the search's space with these blocks and roles only."""
    config = ready.space.config
    own: dict[str, dict[str, Any]] = {}
    for name in ready.space.methods:
        where = set(methods.get(name).roles)
        if where & set(LINEAR_ROLES) and not where & set(roles):
            continue
        override = config.methods[name]
        own[name] = {
            key: list(value)
            for key in ("ranks", "learning_rate")
            if (value := getattr(override, key)) is not None
        }
    own.setdefault(_METHOD, {})
    places = {name: list(p) for name, p in config.placements.items() if set(p) < set(roles)}
    space: dict[str, Any] = {
        "methods": own if any(own.values()) else list(own),
        "granularity": config.granularity,
        "layers": layers,
        "placements": {"advised": roles, **places},
    }
    name, choices = config.alphas
    space[name] = list(choices)
    if config.dropout != (0.0,):
        space["dropout"] = list(config.dropout)
    return space


def _command(settings: SearchSettings, space: Mapping[str, Any]) -> str:
    """Return the command that searches the space with these settings."""
    words = ["autopeft", "search"]
    for each in fields(SearchSettings):
        value = getattr(settings, each.name)
        if value == each.default or each.name in ("space", "output"):
            continue
        flag = f"--{each.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        if isinstance(value, Mapping):
            value = ",".join(f"{left}={right}" for left, right in value.items())
        elif isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        words += [flag, str(value)]
    flow = to_yaml(dict(space), default_flow_style=True, width=10**6)
    words += ["--space", flow.strip(), "--output", "runs/advised"]
    return shlex.join(words)


def site_grid(advice: Advice) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of a table: each site's place in the ranking, by block and role.

    Sites with equal scores share a place.
    """
    roles = sorted({site.role for site in advice.sites}, key=LINEAR_ROLES.index)
    values = [site.scores[advice.score] for site in advice.sites]
    place = {
        (s.layer, s.role): values.index(v) + 1 for s, v in zip(advice.sites, values, strict=True)
    }
    layers = sorted({site.layer for site in advice.sites})
    rows = [[str(at), *(str(place.get((at, role), "-")) for role in roles)] for at in layers]
    return ["block", *map(role_word, roles)], rows
