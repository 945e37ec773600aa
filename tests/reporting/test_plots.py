import itertools
import math
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from report_samples import hostile, interrupted, make_record

from autopeft.costs.objectives import objective
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.reporting.curves import _floor
from autopeft.reporting.front_plot import _place_numbers, front_plot
from autopeft.reporting.front_view import view
from autopeft.reporting.plots import draw_plots, write_plots
from autopeft.reporting.sites_map import method_letters, where_plot
from autopeft.reporting.trials_csv import trial_lines


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_every_plot_is_drawn_and_settings_are_left_alone(tmp_path: Path):
    before = dict(mpl.rcParams)
    record = make_record(20)
    plots = write_plots(view(record), trial_lines(record), tmp_path)
    assert sorted(plots) == ["budget.png", "curves.png", "front.png", "where.png"]
    for name, content in plots.items():
        width, height = size(content)
        assert width == 1280
        assert height > 200
        assert (tmp_path / name).read_bytes() == content
    assert dict(mpl.rcParams) == before


def test_each_further_cost_has_its_own_front():
    record = make_record(12)
    record = replace(record, objectives=(*record.objectives, objective("adapter_bytes")))
    trials = tuple(
        replace(o, values={**o.values, "adapter_bytes": o.costs.adapter_bytes})
        if o.state == "complete"
        else o
        for o in record.trials
    )
    record = replace(record, trials=trials)
    assert "front_adapter_bytes.png" in draw_plots(view(record), trial_lines(record))


@pytest.mark.parametrize("record", [interrupted(make_record(20)), hostile()])
def test_odd_runs_are_drawn(record):
    assert draw_plots(view(record), trial_lines(record))


def test_an_empty_run_is_drawn_without_a_map():
    empty = replace(
        interrupted(make_record(8)), trials=(), front=(), best=None, baseline=None, reference=None
    )
    plots = draw_plots(view(empty), ())
    assert sorted(plots) == ["budget.png", "curves.png", "front.png"]


def test_values_that_are_no_numbers_are_left_out():
    record = interrupted(make_record(12))
    trials = tuple(
        replace(o, values={"accuracy": math.nan}) if o.state == "complete" and o.number % 2 else o
        for o in record.trials
    )
    record = replace(record, trials=trials)
    assert draw_plots(view(record), trial_lines(record))


def test_front_plot_holds_the_front():
    record = make_record()
    shown = view(record)
    axes = front_plot(trial_lines(record), shown, shown.costs[0]).axes[0]
    assert axes.get_xscale() == "log"
    labels = [text.get_text() for text in axes.texts]
    assert labels == [str(i) for i in range(1, len(shown.front) + 1)]
    line = next(line for line in axes.lines if len(line.get_xdata()) == len(shown.front))
    assert list(line.get_ydata()) == [e.objectives["accuracy"] for e in shown.front]


def test_numbers_keep_clear_of_each_other():
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    spots = [(0.5 + 0.004 * i, 0.5 + 0.004 * i) for i in range(5)]
    points = [(x, y, str(i)) for i, (x, y) in enumerate(spots)]
    _place_numbers(axes, points, spots)
    pixels = axes.transData.transform(spots)
    scale = figure.dpi / 72
    places = [
        (x + text.xyann[0] * scale, y + text.xyann[1] * scale)
        for (x, y), text in zip(pixels, axes.texts, strict=True)
    ]
    assert min(math.dist(a, b) for a, b in itertools.combinations(places, 2)) > 8 * scale
    assert min(math.dist(a, b) for a in places for b in pixels) > 8 * scale


def test_a_deep_model_is_mapped_in_one_column():
    record = make_record(8)
    deep = AdapterPlan(LayerSpec(layer, "attn.q", "lora", 4) for layer in range(40))
    shown = view(record)
    entry = shown.front[0]
    entry = replace(entry, candidate=replace(entry.candidate, plan=deep))
    figure = where_plot(replace(shown, front=(entry,), n_layers=40))
    assert len(figure.axes) == 1
    assert len(figure.axes[0].texts) == 40


def test_letters_are_unique():
    letters = method_letters(["lokr", "loha", "lora", "ia3", "oft", "ln_tuning", "lora"])
    assert len(set(letters.values())) == 6
    assert letters["ia3"] == "I"
    assert letters["lora"] == "L"


def test_a_few_diverged_trials_do_not_flatten_the_rest():
    scores = [-0.3 - 0.01 * i for i in range(40)]
    assert _floor(scores) is None
    assert -2 < _floor([*scores, -900.0, -40.0]) < -0.6
