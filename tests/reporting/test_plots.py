import math
import re
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.patches import Rectangle
from report_samples import hostile, interrupted, make_record

from autopeft.costs.objectives import objective
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.reporting.front_view import FrontView, view
from autopeft.reporting.plots import (
    Plot,
    _floor,
    budget_plot,
    curves_plot,
    draw_figure,
    draw_plots,
    front_plot,
)
from autopeft.reporting.record import SearchRecord
from autopeft.reporting.site_plot import method_letters, site_plot
from autopeft.reporting.style import STYLE, svg
from autopeft.trial import Trial


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def drawn(record: SearchRecord) -> dict[str, Plot]:
    return {plot.name: plot for plot in draw_plots(view(record), record.trials)}


def front_svg(record: SearchRecord, number: int = 0) -> str:
    """The front over the cost of that number, with ids that start with "front"."""
    shown = view(record)
    with mpl.rc_context(STYLE):
        return svg(front_plot(record.trials, shown, shown.costs[number]), "front")


def entry_ids(text: str) -> list[str]:
    return re.findall(r'id="front-entry-(\w+)"', text)


def n_markers(text: str, gid: str) -> int:
    """Number of markers in the group of that id."""
    start = text.index(f'<g id="{gid}">')
    return text[start : text.index("</g>\n   <g id=", start)].count("<use ")


def competitors(shown: FrontView) -> set[str]:
    return {e.digest for e in (*shown.front, *shown.dominated_finalists)}


def with_adapters(trials: tuple[Trial, ...]) -> list[Trial]:
    return [t for t in trials if t.state == "complete" and t.plan.specs]


def test_every_plot_is_drawn_and_settings_are_left_alone() -> None:
    before = dict(mpl.rcParams)
    plots = drawn(make_record(20))
    assert list(plots) == ["front", "curves", "where", "budget"]
    for plot in plots.values():
        width, height = size(plot.png)
        assert width == 1280
        assert height > 200
        assert bool(plot.svg) == (plot.name == "front")
    assert dict(mpl.rcParams) == before


def test_a_figure_shows_itself_in_a_notebook_as_in_the_files() -> None:
    record = make_record(12)
    shown = view(record)
    content, size_on_screen = draw_figure(shown, record.trials, "front")._repr_png_()
    assert content == drawn(record)["front"].png
    assert size_on_screen == {"width": 640}


def test_the_figure_of_the_front_is_the_same_on_every_run() -> None:
    assert front_svg(make_record(12)) == front_svg(make_record(12))


@pytest.mark.parametrize("record", [make_record(), interrupted(make_record(20)), hostile()])
def test_the_svg_has_a_marker_for_each_entry_and_trial(record: SearchRecord) -> None:
    shown = view(record)
    text = front_svg(record)
    wanted = competitors(shown) | ({shown.baseline.digest} if shown.baseline else set())
    assert sorted(entry_ids(text)) == sorted(wanted)
    trials = with_adapters(record.trials)
    baselines = [trial for trial in trials if trial.origin == "baseline"]
    assert n_markers(text, "front-baselines") == len(baselines)
    assert n_markers(text, "front-trials") == len(trials) - len(baselines)
    assert ('id="front-pick"' in text) == (shown.best is not None)
    assert ">trainable parameters</text>" in text
    assert ">accuracy</text>" in text
    for number in range(1, len(shown.front) + 1):
        assert f">{number}</text>" in text
    assert "#0072b2" not in text  # colors are the page's


def test_each_further_cost_has_its_own_front_with_its_own_ids() -> None:
    record = make_record(12)
    record = replace(record, objectives=(*record.objectives, objective("adapter_bytes")))
    plots = drawn(record)
    assert list(plots)[:2] == ["front", "front_adapter_bytes"]
    first, second = plots["front"].svg, plots["front_adapter_bytes"].svg
    assert ">adapter size</text>" in second
    for digest in entry_ids(first):
        assert f'id="front_adapter_bytes-entry-{digest}"' in second
    ids = [re.findall(r'\bid="([^"]+)"', text) for text in (first, second)]
    assert not set(ids[0]) & set(ids[1])


def test_an_empty_search_is_drawn_without_a_map() -> None:
    empty = replace(interrupted(make_record(8)), trials=(), front=(), baseline=None, reference=None)
    plots = drawn(empty)
    assert list(plots) == ["front", "curves", "budget"]
    assert entry_ids(plots["front"].svg) == []


def test_values_that_are_not_finite_are_left_out() -> None:
    record = interrupted(make_record(12))
    trials = tuple(
        replace(trial, values={"accuracy": math.nan})
        if trial.state == "complete" and trial.number % 2
        else trial
        for trial in record.trials
    )
    record = replace(record, trials=trials)
    text = front_svg(record)
    n_finite = sum(not t.number % 2 for t in with_adapters(record.trials))
    assert n_markers(text, "front-baselines") + n_markers(text, "front-trials") == n_finite


def test_front_plot_shows_the_front() -> None:
    record = make_record()
    shown = view(record)
    axes = front_plot(record.trials, shown, shown.costs[0]).axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "trainable parameters"
    assert axes.get_ylabel() == "accuracy"
    assert [text.get_text() for text in axes.texts] == [
        str(i) for i in range(1, len(shown.front) + 1)
    ]
    line = next(line for line in axes.lines if line.get_gid() == "front-line")
    assert np.asarray(line.get_ydata()).tolist() == [e.objectives["accuracy"] for e in shown.front]
    reference = next(line for line in axes.lines if line.get_gid() == "reference")
    assert shown.reference is not None
    assert set(np.asarray(reference.get_ydata()).tolist()) == {
        shown.reference.objectives["accuracy"]
    }


def test_curves_has_a_line_for_each_trial_that_reached_a_rung() -> None:
    record = make_record()
    axes = curves_plot(record.trials, view(record)).axes[0]
    assert len(axes.lines) == sum(bool(trial.rungs) for trial in record.trials)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["11", "33", "100"]
    assert axes.get_ylabel() == "minus the validation loss"
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["pruned", "complete", "on the front"]


def test_a_single_cost_is_drawn_without_a_warning() -> None:
    record = interrupted(make_record())
    tuned = next(t for t in record.trials if t.candidate.digest == record.baseline)
    record = replace(record, trials=(tuned,), front=(record.baseline,))
    shown = view(record)
    axes = front_plot(record.trials, shown, shown.costs[0]).axes[0]  # A warning fails the test.
    low, high = axes.get_xlim()
    assert low < tuned.costs.trainable_params < high


def test_budget_has_a_bar_for_each_phase_and_activity() -> None:
    budget = make_record().budget
    phases, workers = budget_plot(budget).axes
    for axes, parts in ((phases, budget.phases), (workers, budget.worker_seconds)):
        bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert [bar.get_width() for bar in bars] == list(parts.values())[::-1]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == list(parts)[::-1]


def test_site_plot_has_a_cell_for_each_site() -> None:
    shown = view(make_record())
    figure = site_plot(shown)
    for axes, entry in zip(figure.axes, shown.front, strict=False):
        assert len(axes.texts) == len(entry.candidate.plan.specs)
        assert axes.get_title().startswith(str(shown.front.index(entry) + 1))


def test_a_deep_model_is_mapped_in_one_column() -> None:
    record = make_record(8)
    deep = AdapterPlan(LayerSpec(layer, "attn.q", "lora", 4) for layer in range(40))
    shown = view(record)
    entry = shown.front[0]
    entry = replace(entry, candidate=replace(entry.candidate, plan=deep))
    figure = site_plot(replace(shown, front=(entry,), n_layers=40))
    assert len(figure.axes) == 1
    assert len(figure.axes[0].texts) == 40


def test_letters_are_unique() -> None:
    letters = method_letters(["lokr", "loha", "lora", "ia3", "oft", "ln_tuning", "lora"])
    assert len(set(letters.values())) == 6
    assert letters["ia3"] == "I"
    assert letters["lora"] == "L"


def test_a_few_diverged_trials_do_not_flatten_the_rest() -> None:
    scores = [-0.3 - 0.01 * i for i in range(40)]
    assert _floor(scores) is None
    floor = _floor([*scores, -900.0, -40.0])
    assert floor is not None
    assert -2 < floor < -0.6
