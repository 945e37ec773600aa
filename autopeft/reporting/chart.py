"""The page's own drawings: the front as a live SVG chart, a member's sites as a small map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from autopeft.costs.objectives import Objective
from autopeft.plan import ROLES, AdapterPlan
from autopeft.plan_text import role_word
from autopeft.reporting.figures import AXIS_WORDS
from autopeft.reporting.front_view import Entry, FrontView
from autopeft.reporting.markup import Html, el, join
from autopeft.reporting.tables import with_margin
from autopeft.reporting.trials_csv import TrialLine
from autopeft.utils.formatting import human_value

_WIDTH, _HEIGHT = 880, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 20, 16, 52

Scale = Callable[[float], float]


def _ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Round numbers within [low, high]: 1, 2, 5 times powers of ten, or evenly spaced."""
    if is_log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        leads = (1,) if high / low > 300 else (1, 2, 5)
        found = [lead * 10.0**e for e in exponents for lead in leads]
        return [tick for tick in found if low <= tick <= high]
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step) + 1)]


def _scale(
    values: Sequence[float], start: float, end: float, is_log: bool
) -> tuple[Scale, float, float]:
    """A map from data to pixels with a margin, and the data range it spans."""
    turn = math.log10 if is_log else float
    low, high = min(map(turn, values)), max(map(turn, values))
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return start + (turn(value) - low) / (high - low) * (end - start)

    return place, (10**low if is_log else low), (10**high if is_log else high)


def _axes(
    shown: FrontView, cost: Objective, x: tuple[Scale, float, float], y: tuple[Scale, float, float]
) -> list[Html]:
    is_log = x[1] > 0
    bottom, parts = _HEIGHT - _BOTTOM, []
    for tick in _ticks(x[1], x[2], is_log):
        at = f"{x[0](tick):.1f}"
        parts.append(el("line", x1=at, x2=at, y1=_TOP, y2=bottom, class_="grid"))
        label = human_value(tick, cost.unit)
        parts.append(el("text", label, x=at, y=bottom + 20, text_anchor="middle"))
    for tick in _ticks(y[1], y[2], is_log=False):
        at = f"{y[0](tick):.1f}"
        parts.append(el("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="grid"))
        label = f"{tick:.3g}"
        parts.append(el("text", label, x=_LEFT - 8, y=at, dy="0.35em", text_anchor="end"))
    middle, name = (_LEFT + _WIDTH - _RIGHT) / 2, AXIS_WORDS.get(cost.name, cost.name)
    parts.append(el("text", name, x=middle, y=_HEIGHT - 10, text_anchor="middle", class_="axis"))
    height = (_TOP + bottom) / 2
    turned = f"rotate(-90 14 {height})"
    quality = shown.quality.name
    parts.append(
        el("text", quality, x=14, y=height, transform=turned, text_anchor="middle", class_="axis")
    )
    return parts


def tip(shown: FrontView, entry: Entry) -> str:
    """What is told of a member where the pointer rests on it."""
    numbers = [f"{o.name}: {with_margin(entry, o)}" for o in shown.objectives]
    return "\n".join([entry.summary, *numbers, entry.digest])


def _member(
    shown: FrontView, entry: Entry, kind: str, number: str, x: Scale, y: Scale, cost: Objective
) -> Html:
    value = entry.objectives[shown.quality.name]
    cx, cy = x(entry.objectives[cost.name]), y(value)
    low, high = entry.objectives_ci.get(shown.quality.name) or (value, value)
    parts = [
        el("line", x1=f"{cx:.1f}", x2=f"{cx:.1f}", y1=f"{y(low):.1f}", y2=f"{y(high):.1f}"),
        el("circle", cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=10 if number else 5),
    ]
    if entry.digest == shown.best:
        parts.append(el("circle", cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=14, class_="ring"))
    if number:
        text = el("text", number, x=f"{cx:.1f}", y=f"{cy:.1f}", dy="0.35em", text_anchor="middle")
        parts.append(text)
    words = tip(shown, entry)
    return el("g", *parts, class_=f"dot {kind}", data_digest=entry.digest, data_tip=words)


def front_chart(shown: FrontView, trials: Sequence[TrialLine], cost: Objective) -> Html:
    """The front over one cost; every point tells its numbers where the pointer rests on it.

    Returns:
        An `svg` element; empty text if there is nothing to draw.
    """
    quality = shown.quality.name
    tuned = shown.baseline.digest if shown.baseline is not None else ""
    entries = {e.digest: e for e in (*shown.front, *shown.dominated_finalists)}
    if shown.baseline is not None:
        entries.setdefault(tuned, shown.baseline)
    entries = {d: e for d, e in entries.items() if e.candidate.plan.specs}
    finite = [
        t
        for t in trials
        if t.state == "complete"
        and t.n_sites
        and all(math.isfinite(t.values.get(name, math.nan)) for name in (quality, cost.name))
    ]
    points = [(t.values[cost.name], t.values[quality]) for t in finite]
    points += [(e.objectives[cost.name], e.objectives[quality]) for e in entries.values()]
    points = [point for point in points if all(map(math.isfinite, point))]
    if not points:
        return Html("")
    ends = [i for e in entries.values() for i in e.objectives_ci.get(quality) or ()]
    reference = shown.reference.objectives[quality] if shown.reference is not None else math.nan
    heights = [v for v in (*(q for _, q in points), *ends, reference) if math.isfinite(v)]
    costs = [c for c, _ in points]
    x = _scale(costs, _LEFT, _WIDTH - _RIGHT, is_log=min(costs) > 0)
    y = _scale(heights, _HEIGHT - _BOTTOM, _TOP, is_log=False)
    parts = _axes(shown, cost, x, y)
    if math.isfinite(reference):
        at = f"{y[0](reference):.1f}"
        parts.append(el("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="reference"))
    for trial in finite:
        cx, cy = x[0](trial.values[cost.name]), y[0](trial.values[quality])
        kind = "trial lora" if trial.origin == "baseline" else "trial"
        parts.append(el("circle", cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=3, class_=kind))
    line = " ".join(
        f"{x[0](e.objectives[cost.name]):.1f},{y[0](e.objectives[quality]):.1f}"
        for e in shown.front
    )
    parts.append(el("polyline", points=line, class_="front-line"))
    numbers = {entry.digest: str(i) for i, entry in enumerate(shown.front, start=1)}
    for digest, entry in sorted(entries.items(), key=lambda item: item[0] in numbers):
        kind = "lora" if digest == tuned else "member" if digest in numbers else "beaten"
        parts.append(_member(shown, entry, kind, numbers.get(digest, ""), x[0], y[0], cost))
    label = f"{quality} against {AXIS_WORDS.get(cost.name, cost.name)}"
    return el("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)


def site_map(plan: AdapterPlan, n_layers: int) -> Html:
    """Layers across, roles down; each adapted site tells its method and size."""
    roles = [role for role in ROLES if role in {spec.role for spec in plan.specs}]
    found = {(spec.layer, spec.role): spec for spec in plan.specs}
    largest = max((spec.rank for spec in plan.specs), default=0)
    head = [el("th", ""), *(el("th", str(layer)) for layer in range(n_layers))]
    rows = [el("tr", *head)]
    for role in roles:
        cells = [el("th", role_word(role))]
        for layer in range(n_layers):
            spec = found.get((layer, role))
            if spec is None:
                cells.append(el("td"))
                continue
            size = f" {spec.rank}" if spec.rank else ""
            depth = 0.0 if not spec.rank else 0.25 + 0.75 * spec.rank / largest
            look = f"--depth:{depth:.2f}"
            word = join([f"{spec.method}{size}"])
            cells.append(el("td", word, class_="site" if spec.rank else "site plain", style=look))
        rows.append(el("tr", *cells))
    return el("div", el("table", *rows, class_="map"), class_="scroll")
