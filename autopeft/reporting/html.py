"""report.html: one file that opens without a network; verdict first, details on demand."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence

from autopeft.confirm.intervals import METHOD
from autopeft.reporting.chart import front_chart, site_map
from autopeft.reporting.front_view import Entry, FrontView
from autopeft.reporting.markup import Html, el
from autopeft.reporting.page_assets import SCRIPT, STYLE
from autopeft.reporting.tables import heading, levels_by_digest, quality_text, rows_of, versus
from autopeft.reporting.trials_csv import TrialLine
from autopeft.utils.formatting import human_count, human_seconds, human_value

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_CAPTIONS = {
    "curves.png": "Scores at the rungs. Pruned trials end in a cross.",
    "budget.png": "Where the time went.",
    "where.png": "Which site of which layer each member of the front adapts.",
}


def _split(is_confirmed: bool) -> str:
    return "test" if is_confirmed else "validation"


def _tile(name: str, value: str, small: str) -> Html:
    return el(
        "div",
        el("span", name, class_="name"),
        el("b", value),
        el("span", small, class_="small"),
        class_="tile",
    )


def _entry_tile(shown: FrontView, name: str, entry: Entry) -> Html:
    costs = [
        f"{human_value(entry.objectives[c.name], c.unit)} {heading(c.name)}" for c in shown.costs
    ]
    return _tile(
        name,
        f"{quality_text(shown, entry)}",
        f"{', '.join(costs)}: {entry.summary}",
    )


def _header(shown: FrontView) -> list[Html]:
    counts = ", ".join(f"{n} {state}" for state, n in shown.trials.items())
    kicker = (
        f"autopeft search · {shown.model} · {shown.task} · {shown.started[:16].replace('T', ' ')}"
    )
    parts = [el("div", kicker, class_="kicker"), el("h1", shown.verdict.text)]
    if not shown.is_complete:
        text = "This search was interrupted; `autopeft resume` on this folder continues it."
        parts.append(el("div", text, class_="banner"))
    if not shown.is_confirmed:
        text = "Nothing was confirmed: every number here is of the validation split, one seed."
        parts.append(el("div", text, class_="banner"))
    tiles = []
    best = shown.find(shown.best) if shown.best else None
    for name, entry in (("the pick", best), ("tuned LoRA", shown.baseline)):
        if entry is not None:
            tiles.append(_entry_tile(shown, f"{name}: {shown.quality.name}", entry))
    tiles.append(_tile("trials", str(sum(shown.trials.values())), counts))
    spent = f"budget {shown.budget.limit}, {human_count(shown.budget.spent_flops)} training FLOPs"
    tiles.append(_tile("time", human_seconds(shown.budget.spent_seconds), spent))
    return [el("header", *parts), el("div", *tiles, class_="tiles")]


def _key() -> Html:
    words = [
        ("var(--blue)", "the front, numbered from the cheapest; ringed: the pick"),
        ("var(--orange)", "tuned LoRA (faint: the other LoRA baselines)"),
        ("var(--gray)", "trials, validation (hollow: dominated finalists)"),
    ]
    items = [el("span", el("i", style=f"background:{color}"), text) for color, text in words]
    return el("div", *items, el("span", "- - no adapter"), class_="key")


def _badges(shown: FrontView, entry: Entry) -> list[Html]:
    badges = []
    if entry.digest == shown.best:
        badges.append(el("span", "the pick", class_="mark"))
    if shown.baseline is not None and entry.digest == shown.baseline.digest:
        badges.append(el("span", "tuned LoRA", class_="mark lora"))
    return badges


def _rows(shown: FrontView, entries: Iterable[Entry]) -> list[Html]:
    levels = levels_by_digest(shown)
    members = [entry.digest for entry in shown.front]
    rows = []
    for entry in entries:
        number = str(members.index(entry.digest) + 1) if entry.digest in members else ""
        cells = [el("td", number, data_value=number or "1e9")]
        for cost in shown.costs:
            value = entry.objectives[cost.name]
            text = human_value(value, cost.unit)
            cells.append(el("td", text, class_="number", data_value=value))
        quality = quality_text(shown, entry)
        value = entry.objectives[shown.quality.name]
        cells.append(el("td", quality, class_="tight", data_value=value))
        level = levels.get(entry.digest)
        gain = level.gain if level else ""
        cells.append(el("td", versus(shown, entry, levels), class_="tight", data_value=gain))
        rate = entry.candidate.train.learning_rate
        cells.append(el("td", f"{rate:.2g}", class_="number", data_value=rate))
        adapter = [entry.summary, *_badges(shown, entry)]
        cells.append(el("td", *adapter, class_="wide"))
        cells.append(el("td", el("code", entry.digest)))
        is_pick = "pick" if entry.digest == shown.best else None
        rows.append(el("tr", *cells, class_=is_pick, data_digest=entry.digest))
    return rows


def _front_table(shown: FrontView, entries: Iterable[Entry]) -> Html:
    names = [("#", ""), *((heading(c.name), "number") for c in shown.costs)]
    names += [(shown.quality.name, ""), ("vs LoRA", ""), ("rate", "number")]
    names += [("adapter", ""), ("digest", "")]
    heads = [el("th", el("button", name), class_=kind or None) for name, kind in names]
    body = el("tbody", *_rows(shown, entries))
    table = el("table", el("thead", el("tr", *heads)), body, class_="sortable")
    return el("div", table, class_="scroll")


def _python(text: object) -> str:
    """A string literal that is both Python and on one line."""
    return json.dumps(str(text), ensure_ascii=False)


def _loading(shown: FrontView, entry: Entry) -> list[Html]:
    if entry.adapter is None:
        return [el("p", "No adapter was saved: this candidate was not confirmed.")]
    load = (
        "import autopeft\n\n"
        f"model = autopeft.load_adapter({_python(shown.model)}, {_python(entry.adapter)})"
    )
    export = (
        f"autopeft export . --pick {shlex.quote(entry.digest)} --format merged --to merged-model"
    )
    note = "Both run in the folder of this report."
    return [el("pre", load), el("pre", export), el("p", note, class_="note")]


def _simple_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    lines = [el("tr", *(el("td", cell) for cell in row)) for row in rows]
    head = el("thead", el("tr", *(el("th", name) for name in header)))
    return el("div", el("table", head, el("tbody", *lines)), class_="scroll")


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))


def _pairs(items: Iterable[tuple[str, object]]) -> Html:
    parts: list[Html] = []
    for name, value in items:
        parts += [el("dt", name), el("dd", str(value))]
    return el("dl", *parts)


def _facts(shown: FrontView, entry: Entry) -> Html:
    train = entry.candidate.train
    rates = ", ".join(f"{method} {rate:g}" for method, rate in train.method_rates)
    price = entry.price
    facts: list[tuple[str, object]] = [
        ("trainable parameters", f"{price.trainable_params:,}"),
        ("adapter size", human_value(price.adapter_bytes, "bytes")),
        ("training FLOPs", human_count(price.train_flops)),
        ("peak training memory", human_value(price.peak_memory_bytes, "bytes") + ", estimated"),
        ("learning rate", f"{train.learning_rate:g}" + (f" ({rates})" if rates else "")),
        ("steps, batch size", f"{train.steps}, {train.batch_size}"),
        ("alpha ratio, dropout", f"{train.alpha_ratio:g}, {train.dropout:g}"),
        ("trial, origin", f"{'-' if entry.trial is None else entry.trial}, {entry.origin}"),
    ]
    level = levels_by_digest(shown).get(entry.digest)
    if level is not None:
        low, high = level.gain_ci
        text = (
            f"{level.result}: {level.gain:+.4f}, corrected 95 % interval {low:+.4f} to {high:+.4f}"
        )
        facts.append(("against tuned LoRA", f"{text}, at {level.cost_ratio:.3g} times its cost"))
    if entry.adapter_score is not None:
        score = entry.adapter_score
        text = f"seed {score.seed}, {_metrics(score.metrics)} on {score.n_rows} {score.split} rows"
        facts.append(("saved weights", text))
    return _pairs(facts)


def _member(shown: FrontView, number: int, entry: Entry) -> Html:
    inside: list[Html] = [
        *_loading(shown, entry),
        el("h3", "Where it sits"),
        site_map(entry.candidate.plan, shown.n_layers),
        el("h3", "Facts"),
        _facts(shown, entry),
    ]
    if entry.seeds:
        rows = [(str(s.seed), _metrics(s.validation), _metrics(s.test)) for s in entry.seeds]
        inside += [el("h3", "Seeds"), _simple_table(["seed", "validation", "test"], rows)]
    costs = [human_value(entry.objectives[c.name], c.unit) for c in shown.costs]
    title = f"{number}. {quality_text(shown, entry)} at {', '.join(costs)}: "
    title += entry.summary
    return el(
        "details",
        el("summary", title, *_badges(shown, entry)),
        el("div", *inside, class_="inside"),
        id=f"member-{entry.digest}",
        data_digest=entry.digest,
    )


def _fidelity(shown: FrontView, trials: Sequence[TrialLine]) -> Html:
    steps = sorted({step for trial in trials for step, _ in trial.rungs})
    rows = ", ".join(f"{n:,} {split}" for split, n in shown.data.rows.items())
    facts: list[tuple[str, object]] = [
        ("data", f"{rows} rows; {shown.data.dropped_rows} dropped"),
        ("rungs", ", ".join(map(str, steps)) + " steps" if steps else "none reached"),
    ]
    if shown.fidelity is not None:
        facts.append(("pruning", shown.fidelity.text()))
    seeds = {len(entry.seeds) for entry in shown.front if entry.seeds}
    if seeds:
        facts.append(("confirmation", f"{'-'.join(map(str, sorted(seeds)))} seeds a finalist"))
    facts.append(("intervals", METHOD))
    return _pairs(facts)


def _plots(plots: Mapping[str, bytes]) -> list[Html]:
    figures = []
    for name, content in plots.items():
        if name == "front.png":  # the live chart above shows it
            continue
        source = "data:image/png;base64," + base64.b64encode(content).decode()
        caption = _CAPTIONS.get(name, "The front over another cost.")
        image = el("img", src=source, alt=caption)
        figures.append(el("figure", image, el("figcaption", caption), class_="card"))
    return [el("h2", "What happened"), el("div", *figures, class_="plots")]


def _fold(title: str, content: Html) -> Html:
    return el("details", el("summary", title), el("div", content, class_="inside"))


def _setting(value: object) -> str:
    """A setting's value for people: text as it is, the rest as JSON."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _appendix(shown: FrontView) -> list[Html]:
    parts = []
    for title, entries in (
        ("finalists that others dominate on the test split", shown.dominated_finalists),
        ("members of the search's front that were not confirmed (validation)", shown.unconfirmed),
    ):
        if entries:
            parts.append(_fold(f"{len(entries)} {title}", _front_table(shown, entries)))
    settings = ((name, _setting(value)) for name, value in shown.settings.items())
    parts.append(_fold("Settings", _pairs(settings)))
    data = [("labels", ", ".join(shown.data.labels)), ("fingerprint", shown.data.fingerprint)]
    parts.append(_fold("Versions and data", _pairs([*shown.versions.items(), *data])))
    return [el("h2", "For the record"), *parts]


def page(shown: FrontView, trials: Sequence[TrialLine], plots: Mapping[str, bytes]) -> str:
    """The text of report.html.

    Args:
        shown: The result.
        trials: Every trial, for the chart and the rungs.
        plots: PNG by file name, embedded.
    """
    split = _split(shown.is_confirmed)
    caption = f"{shown.quality.name} on the {split} split; bars are 95 % intervals."
    body = _header(shown)
    if shown.warnings:
        lines = [el("li", line) for line in shown.warnings]
        body += [el("div", el("b", "Warnings"), el("ul", *lines), class_="banner")]
    chart = [front_chart(shown, trials, cost) for cost in shown.costs[:1]]
    if any(chart):
        note = el(
            "p", caption + " Rest on a point for its numbers, click for the rest.", class_="note"
        )
        body += [el("h2", "The front"), el("div", *chart, _key(), class_="card"), note]
    body.append(_front_table(shown, rows_of(shown)))
    if shown.front:
        body.append(el("h2", "Using a member"))
        body += [_member(shown, n, entry) for n, entry in enumerate(shown.front, start=1)]
    body += _plots(plots)
    body += [el("h2", "How far to trust it"), el("div", _fidelity(shown, trials), class_="card")]
    body += _appendix(shown)
    head = [
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("title", f"autopeft: {shown.quality.name} for {shown.model}"),
        el("style", Html(STYLE)),
    ]
    tooltip = el("div", id="tip", hidden="hidden")
    parts = [el("head", *head), el("body", el("main", *body), tooltip, el("script", Html(SCRIPT)))]
    return "<!doctype html>\n" + el("html", *parts, lang="en") + "\n"
