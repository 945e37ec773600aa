"""What is fuzzed: each target makes one damaged or hostile input from a seed, and reads it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from mutations import TEXTS, atom, damaged, mutated
from report_samples import make_record

from autopeft.confirm.finalists import SeedScore
from autopeft.confirm.store import ConfirmationStore
from autopeft.costs import Topology
from autopeft.costs.constraints import Constraint, parse_bytes
from autopeft.engine.budget import Budget, Spent
from autopeft.engine.search_plan import SearchPlan
from autopeft.errors import SettingsError
from autopeft.plan import AdapterPlan, Candidate, TrainSettings
from autopeft.plan_text import block_lines, plan_summary, read_plan, write_plan
from autopeft.reporting.front_json import front_to_json, read_front
from autopeft.reporting.front_view import view
from autopeft.reporting.html import page
from autopeft.reporting.markup import front_html, front_markdown
from autopeft.reporting.model_card import model_card
from autopeft.reporting.plots import draw_plots
from autopeft.reporting.tables import summary
from autopeft.reporting.trials_csv import read_trials, trials_csv
from autopeft.result import SearchResult
from autopeft.searcher.samplers.prior import PriorRow, read_prior
from autopeft.searcher.samplers.warm_start import WarmStartTrial
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import SearchSettings
from autopeft.utils.serialize import strict_json, to_plain
from autopeft.utils.terminal import console
from autopeft.workspace import Workspace

Target = Callable[[random.Random, Path], None]

_SETTINGS: Mapping[str, Any] = {
    **SearchSettings(model="m", data="d.csv", output="o").to_mapping(),
    "space": {"methods": ["lora"]},
    "role_map": {"attn.q": "mix.query"},
    "columns": {"text": "review"},
    "steps": 100,
    "storage": "study.log",
    "constraints": ["trainable_params<=0.1%", "adapter_bytes<=1MB"],
}

_SPACE: Mapping[str, Any] = {
    "methods": {"lora": {"ranks": [2, 4, 8], "learning_rate": [1e-4, 1e-2]}, "ia3": None},
    "granularity": "group:2",
    "roles": ["attn.q", "attn.v", "mlp.up"],
    "placements": {"qv": ["attn.q", "attn.v"], "up": ["mlp.up"]},
    "layers": "last:2",
    "alpha": [16, 32],
    "dropout": [0.0, 0.1],
    "include_empty": True,
    "min_adapted_layers": 1,
    "max_adapted_layers": 2,
}

_TOPOLOGY = Topology(
    4, {"attn.q": (16, 16), "attn.v": (16, 16), "attn.o": (16, 16), "mlp.up": (16, 32)}
)

_PLAN = "lora:8@attn.q,attn.v[0-3]; ia3@mlp.down[1,3]; oft r4 @ q in 5"


def settings_mapping(rng: random.Random, folder: Path) -> None:
    """Settings as keywords."""
    SearchSettings.from_mapping(_mapping(mutated(dict(_SETTINGS), rng, rng.randrange(1, 4))))


def settings_flags(rng: random.Random, folder: Path) -> None:
    """Settings as the texts of flags."""
    names = rng.sample(list(_SETTINGS), 3)
    SearchSettings.from_mapping({name: rng.choice((*TEXTS, str(atom(rng)))) for name in names})


def settings_yaml(rng: random.Random, folder: Path) -> None:
    """The settings file of an output folder."""
    text = yaml.safe_dump(_changed(_SETTINGS, rng), sort_keys=False, allow_unicode=True)
    raw = text.encode("utf-8", "surrogatepass")
    (folder / "settings.yaml").write_bytes(damaged(raw, rng) if rng.random() < 0.7 else raw)
    workspace = Workspace(folder)
    settings = workspace.settings()
    workspace.storage(settings)
    workspace.study_name(settings)


def space(rng: random.Random, folder: Path) -> None:
    """A search space, its grid and a draw."""
    import numpy as np

    row = mutated(dict(_SPACE), rng, rng.randrange(1, 3))
    found = SearchSpace.from_source(_mapping(row), _TOPOLOGY)
    found.sample(np.random.default_rng(0))
    found.baselines()


def space_yaml(rng: random.Random, folder: Path) -> None:
    """The file of a search space."""
    raw = yaml.safe_dump(dict(_SPACE), sort_keys=False).encode()
    (folder / "space.yaml").write_bytes(damaged(raw, rng))
    SearchSpace.from_source(folder / "space.yaml", _TOPOLOGY)


def plan_text(rng: random.Random, folder: Path) -> None:
    """A plan in one line."""
    text = damaged(_PLAN.encode(), rng).decode("utf-8", "replace")
    plan = read_plan(text)
    assert read_plan(write_plan(plan)) == plan
    plan_summary(plan)
    block_lines(plan)


def plan_json(rng: random.Random, folder: Path) -> None:
    """A candidate as plain values."""
    row = Candidate(read_plan(_PLAN), TrainSettings(1e-3, (("lora", 1e-3),))).to_json()
    found = Candidate.from_json(mutated(row, rng, rng.randrange(1, 3)))
    assert Candidate.from_json(found.to_json()).digest == found.digest


def saved_plan(rng: random.Random, folder: Path) -> None:
    """`plan.json` of a saved adapter."""
    from autopeft.models.adapter_files import PLAN_FILE, SavedPlan

    SavedPlan(
        Candidate(read_plan("lora:8@attn.q[0-3]"), TrainSettings(1e-3)),
        "base",
        None,
        "AutoModelForSequenceClassification",
        {"num_labels": 2, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}},
        {"attn.q": "mix.query"},
        ("classifier",),
    ).write(folder)
    _rewrite(folder / PLAN_FILE, rng)
    SavedPlan.read(folder)


@lru_cache(maxsize=1)
def _front() -> str:
    return strict_json(front_to_json(view(make_record(12))))


def front(rng: random.Random, folder: Path) -> None:
    """`front.json`, and all that shows it."""
    path = folder / "front.json"
    path.write_text(_front())
    _rewrite(path, rng)
    shown = read_front(path)
    console(io.StringIO(), width=80).print(summary(shown))
    strict_json(front_to_json(shown))
    front_html(shown)
    front_markdown(shown)
    page(shown, (), ())
    result = SearchResult(folder, shown, shown.model)
    result.to_pandas()
    repr((result, result.front, result.best_config, result.baseline))
    for entry in shown.front[:1]:
        model_card(shown, entry.digest)
    if rng.random() < 0.01:
        draw_plots(shown, ())


@lru_cache(maxsize=1)
def _trials() -> bytes:
    record = make_record(12)
    return trials_csv(record.trials, record.objectives).encode()


def trials(rng: random.Random, folder: Path) -> None:
    """`trials.csv`."""
    raw = _trials()
    if rng.random() < 0.5:
        rows = list(csv.reader(io.StringIO(raw.decode())))
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = str(atom(rng)).replace("\ud800", "?")
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        raw = text.getvalue().encode()
    else:
        raw = damaged(raw, rng)
    (folder / "trials.csv").write_bytes(raw)
    found = read_trials(folder / "trials.csv")
    trials_csv(found, ())


def state(rng: random.Random, folder: Path) -> None:
    """The small files in `state/`."""
    workspace = Workspace(folder)
    kinds: tuple[tuple[str, Any, Any], ...] = (
        ("spent", Spent, Spent(3.0, 2, 1e12, {"search": 1.0}, {"train": 2.0})),
        ("plan", SearchPlan, SearchPlan(n_trials=3, open=("rungs",))),
        ("id", str, "abc"),
        ("prior", dict[str, list[dict[str, Any]]], {"trials": [{"plan": [], "train": {}}]}),
        ("prior_rows", tuple[PriorRow, ...], _PRIOR),
    )
    name, kind, value = rng.choice(kinds)
    workspace.remember(name, value)
    _rewrite(folder / "state" / f"{name}.json", rng)
    value = workspace.recall(name, kind)
    if name == "prior" and value is not None:
        for row in value.get("trials", []):
            WarmStartTrial.from_json(row)


_PRIOR = (
    PriorRow("m d", "lora", ("attn.q", "attn.v"), 8, 0.5),
    PriorRow("m d", "ia3", ("mlp.down",), 0, None, (0.0, 0.5), 1e-3),
)


def prior(rng: random.Random, folder: Path) -> None:
    """A file of trainings elsewhere."""
    path = folder / "prior.json"
    path.write_text(json.dumps(to_plain(_PRIOR)))
    _rewrite(path, rng)
    read_prior(path)


def confirmations(rng: random.Random, folder: Path) -> None:
    """The scores of finalists."""
    store = ConfirmationStore(folder)
    chosen = Candidate(AdapterPlan(), TrainSettings(1e-3))
    score = SeedScore(1, {"accuracy": 0.5}, {"accuracy": 0.4}, (1.0, 0.0), {"accuracy": 0.4})
    store.save(chosen, score, {})
    store.note_look({"a": 2})
    place = rng.choice(("looks.json", f"{chosen.digest}-seed1/score.json"))
    _rewrite(folder / "confirm" / place, rng)
    if rng.random() < 0.1:
        (folder / "confirm" / f"{rng.choice(('x', 'ab-seed', 'a-seed²', 'a-seed9'))}").mkdir()
    store.scores()
    store.done()
    store.compressed()
    store.looks()
    store.check(["accuracy"])


@lru_cache(maxsize=1)
def _saved() -> tuple[Any, Mapping[str, bytes], Mapping[str, bytes]]:
    """A tiny model, and the files of an adapter of it, as autopeft and as PEFT write them."""
    from tempfile import TemporaryDirectory

    from tiny_models import build

    from autopeft.models.attach import attach
    from autopeft.models.saving import save_adapter

    backbone = build("bert")
    plan = read_plan("lora:2@attn.q,attn.v[0-1]; ia3@mlp.down[0]")
    with TemporaryDirectory() as place:
        attached = attach(backbone, Candidate(plan, TrainSettings(1e-3)), seed=0)
        save_adapter(attached, place)
        attached.detach()
        ours = _contents(Path(place))
    with TemporaryDirectory() as place:
        attached = attach(
            backbone, Candidate(read_plan("lora:2@attn.q[0]"), TrainSettings(1e-3)), seed=0
        )
        save_adapter(attached, place)
        attached.detach()
        theirs = _contents(Path(place))
    return backbone.model, ours, {n: raw for n, raw in theirs.items() if n != "plan.json"}


def _contents(folder: Path) -> Mapping[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@lru_cache(maxsize=1)
def _study() -> Any:
    """A study of a trial, with all attributes that a search gives it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    from autopeft.searcher.controller import SearchController

    space = SearchSpace.from_source({"methods": ["lora"]}, _TOPOLOGY)
    controller = SearchController(space, ["accuracy", "trainable_params"])
    asked = controller.ask()
    assert asked is not None
    controller.tell(asked, score=0.5)
    return controller.study.get_trials()[0], controller.objectives


def study_trial(rng: random.Random, folder: Path) -> None:
    """A trial in the study of someone else."""
    import copy

    from autopeft.searcher.study import read_trial

    trial, objectives = _study()
    damaged_trial = copy.deepcopy(trial)
    changed = mutated(dict(trial.user_attrs), rng, rng.randrange(1, 3))
    damaged_trial.user_attrs = changed if isinstance(changed, dict) else {}
    read_trial(damaged_trial, objectives)


def adapter(rng: random.Random, folder: Path) -> None:
    """The folder of a saved adapter."""
    import copy

    from autopeft.models.saving import load_adapter

    model, *kinds = _saved()
    files = rng.choice(kinds)
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    name = rng.choice([name for name in files if name.endswith((".json", ".safetensors"))])
    if name.endswith(".json"):
        _rewrite(folder / name, rng)
    else:
        (folder / name).write_bytes(damaged(files[name], rng))
    load_adapter(copy.deepcopy(model), folder)


def model_config(rng: random.Random, folder: Path) -> None:
    """`config.json` of a model."""
    from tiny_models import KINDS

    from autopeft.models.backbone import build_from_config

    config = KINDS[rng.choice(("bert", "gpt2", "llama", "t5"))].config()
    config.save_pretrained(folder)
    _rewrite(folder / "config.json", rng)
    build_from_config(str(folder))


def texts(rng: random.Random, folder: Path) -> None:
    """Budgets, limits and sizes of memories."""
    number = rng.choice(("1", "1.5", "1e3", "1e999", "0", "²", "9" * 400, ".", "1.2.3", "-1", ""))
    unit = rng.choice(("", "s", "h", "trials", "flops", "Eflops", "k", "%", "GB", "\x1b", " h 3"))
    text = rng.choice((number + unit, unit + number, f"{number}{unit}, {number}{unit}"))
    call = rng.randrange(3)
    if call == 0:
        Budget.parse(text)
    elif call == 1:
        name = rng.choice(("trainable_params", "latency_ms", "adapter_bytes", "x"))
        Constraint.parse(f"{name}<={text}", base_params=1000)
    else:
        parse_bytes("fits", text)


_ROWS = [
    {"text": f'row {i}, "quoted" and ü', "label": ("good", "bad")[i % 2], "n": i} for i in range(12)
]


def _csv() -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(_ROWS[0]))
    writer.writeheader()
    writer.writerows(_ROWS)
    return text.getvalue().encode()


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_ROWS), file)
    return file.getvalue()


def _arrow() -> bytes:
    import pyarrow as pa

    file = io.BytesIO()
    table = pa.Table.from_pylist(_ROWS)
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def _zipped(raw: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.csv", raw)
    return file.getvalue()


@lru_cache(maxsize=1)
def _files() -> Mapping[str, bytes]:
    lines = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
    plain = _csv()
    return {
        "rows.csv": plain,
        "rows.tsv": plain.replace(b",", b"\t"),
        "rows.jsonl": lines,
        "rows.json": json.dumps(_ROWS).encode(),
        "rows.parquet": _parquet(),
        "rows.arrow": _arrow(),
        "rows.txt": b"one line\nanother line\n" * 6,
        "rows.conll": b"Anna B-PER\nlives O\n\nin O\nRome B-LOC\n\n" * 4,
        "rows.csv.gz": gzip.compress(plain),
        "rows.csv.bz2": bz2.compress(plain),
        "rows.csv.xz": lzma.compress(plain),
        "rows.zip": _zipped(plain),
    }


def _data(name: str) -> Target:
    def read_data(rng: random.Random, folder: Path) -> None:
        from autopeft.tasks.reading import read

        raw = _files()[name]
        for _ in range(rng.randrange(1, 3)):
            raw = damaged(raw, rng)
        (folder / name).write_bytes(raw)
        tables = read("data", str(folder / name))
        for table in tables.values():
            for column in table.column_names:
                table.head(column)

    return read_data


def data_json_values(rng: random.Random, folder: Path) -> None:
    """Rows with values of other types, up to the examples of a task."""
    from autopeft.tasks.reading import read

    rows = mutated(_ROWS, rng, 2)
    (folder / "rows.json").write_text(json.dumps(rows))
    read("data", str(folder / "rows.json"))


TARGETS: Mapping[str, tuple[int, Target]] = {
    "settings as keywords": (16, settings_mapping),
    "settings as flags": (16, settings_flags),
    "settings.yaml": (6, settings_yaml),
    "space": (6, space),
    "space.yaml": (4, space_yaml),
    "plan in a line": (16, plan_text),
    "plan in JSON": (12, plan_json),
    "plan.json of an adapter": (6, saved_plan),
    "front.json": (6, front),
    "trials.csv": (6, trials),
    "state/": (10, state),
    "prior": (10, prior),
    "confirm/": (4, confirmations),
    "adapter": (3, adapter),
    "trial of a study": (6, study_trial),
    "config.json": (3, model_config),
    "budgets and limits": (16, texts),
    "rows as JSON values": (6, data_json_values),
    **{name: (1, _data(name)) for name in ("rows.csv", "rows.tsv", "rows.csv.gz", "rows.csv.bz2")},
    **{name: (1, _data(name)) for name in ("rows.csv.xz", "rows.zip")},
    **{name: (3, _data(name)) for name in ("rows.jsonl", "rows.json", "rows.txt", "rows.conll")},
    **{name: (2, _data(name)) for name in ("rows.parquet", "rows.arrow")},
}
"""Name -> how often it is drawn, by what an input of it takes; and the target."""


def _mapping(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise SettingsError("settings", row, "must be a mapping", "give names and values")
    return row


def _changed(row: Mapping[str, Any], rng: random.Random) -> Any:
    return json.loads(json.dumps(mutated(dict(row), rng))) if rng.random() < 0.7 else dict(row)


def _rewrite(path: Path, rng: random.Random) -> None:
    """Change some values of a JSON file, or some of its bytes."""
    raw = path.read_bytes()
    if rng.random() < 0.7:
        raw = json.dumps(mutated(json.loads(raw), rng, rng.randrange(1, 3))).encode()
    if rng.random() < 0.4:
        raw = damaged(raw, rng)
    path.write_bytes(raw)
