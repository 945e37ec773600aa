"""Whole searches on a tiny model, in this process or on Ray: contract, honesty, interruption."""

from __future__ import annotations

import atexit
import csv
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

import autopeft
from autopeft.errors import SettingsError, StorageError
from autopeft.result import SearchResult

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # Ray's own sockets and deprecations, and plots' fonts, are not what is tested here.
    pytest.mark.filterwarnings("default"),
]

SETTINGS: dict[str, Any] = {
    "budget": "16trials",
    "steps": 12,
    "batch_size": 8,
    "max_length": 16,
    "confirm_seeds": 2,
    "max_finalists": 3,
    "backend": "local",
    "objectives": ["trainable_params", "latency_ms"],
    "precision": "fp32",
}
RAY: dict[str, Any] = {**SETTINGS, "backend": "ray", "workers": 2}


@pytest.fixture(scope="module")
def result(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> SearchResult:
    folder = tmp_path_factory.mktemp("run") / "first"
    return autopeft.search(SETTINGS, model=str(tiny_model), data=str(tiny_data), output=str(folder))


def front_of(result: SearchResult) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((result.folder / "front.json").read_text())
    return loaded


def test_the_folder_holds_what_the_contract_says(result: SearchResult) -> None:
    for name in ("settings.yaml", "study.db", "front.json", "trials.csv", "report.html"):
        assert (result.folder / name).stat().st_size > 0, name
    assert list((result.folder / "plots").glob("*.png"))


def test_front_json_is_the_contract(result: SearchResult) -> None:
    front = front_of(result)
    assert front["schema"] == 1
    assert [o["name"] for o in front["objectives"]] == [
        "accuracy",
        "trainable_params",
        "latency_ms",
    ]
    assert front["objectives"][0]["direction"] == "maximize"
    for member in front["front"]:
        assert set(member["objectives"]) == {"accuracy", "trainable_params", "latency_ms"}
        assert set(member["objectives_ci"]) <= set(member["objectives"])
        assert member["adapter"] == f"adapters/{member['digest']}"
        assert (result.folder / member["adapter"]).is_dir()
        assert member["plan"]
        assert member["train"]["learning_rate"] > 0
    assert front["best"] in {m["digest"] for m in front["front"]}
    assert front["baseline"]["origin"] == "baseline"
    assert isinstance(front["verdict"]["beats_lora"], bool)
    assert front["trials"]["complete"] + front["trials"]["pruned"] == 16
    assert set(front["budget"]["phases"]) >= {"startup", "pricing", "search", "confirmation"}
    assert front["data"]["dropped_rows"] == 3


def test_no_member_is_dominated(result: SearchResult) -> None:
    members = front_of(result)["front"]
    points = [
        (
            -m["objectives"]["accuracy"],
            m["objectives"]["trainable_params"],
            m["objectives"]["latency_ms"],
        )
        for m in members
    ]
    for a in points:
        assert not any(all(x <= y for x, y in zip(b, a, strict=True)) and a != b for b in points)


def test_each_adapter_scores_what_front_json_says(result: SearchResult, tiny_data: Path) -> None:
    """From outside: the saved rows, the saved adapter, plain transformers code."""
    import torch
    from transformers import AutoTokenizer

    front = front_of(result)
    with tiny_data.open(encoding="utf-8") as file:
        source = list(csv.DictReader(file))
    rows = json.loads((result.folder / "state" / "splits.json").read_text())["test"]["rows"]
    tokenizer = AutoTokenizer.from_pretrained(result.base_model)
    for member in front["front"]:
        model = autopeft.load_adapter(result.base_model, result.folder / member["adapter"])
        model.eval()
        right = 0
        for row in rows:
            batch = tokenizer(source[row]["text"], return_tensors="pt")
            with torch.inference_mode():
                label = model(**batch).logits.argmax().item()
            right += model.config.id2label[label] == source[row]["label"]
        assert member["adapter_score"]["accuracy"] == pytest.approx(right / len(rows), abs=1e-6)
        assert member["adapter_score"]["n_rows"] == len(rows)
        n_live = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert n_live in (0, member["objectives"]["trainable_params"])


def test_the_splits_do_not_overlap(result: SearchResult) -> None:
    splits = json.loads((result.folder / "state" / "splits.json").read_text())
    rows = [set(splits[name]["rows"]) for name in ("train", "validation", "test")]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_confirmation_used_seeds_of_its_own(result: SearchResult) -> None:
    front = front_of(result)
    # Which members are worth a second seed depends on latencies, too, and so on the machine.
    for member in front["front"]:
        assert [seed["seed"] for seed in member["seeds"]] in ([1], [1, 2])
    assert [seed["seed"] for seed in front["baseline"]["seeds"]] == [1, 2]


def test_loras_cut_to_lower_ranks_are_marked(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    result = autopeft.search(
        SETTINGS,
        model=str(tiny_model),
        data=str(tiny_data),
        output=str(tmp_path / "loras"),
        space={"methods": {"lora": {"ranks": [8, 16]}}},
        budget="6trials",
    )
    front = front_of(result)
    known = {e["digest"]: e for e in [*front["front"], *front["dominated_finalists"]]}
    cut = [entry for entry in known.values() if entry["compressed_from"]]
    with (result.folder / "trials.csv").open(encoding="utf-8") as file:
        trained = {row["digest"] for row in csv.DictReader(file)}
    assert cut
    assert not {entry["digest"] for entry in cut} & trained
    for entry in cut:
        source = known[entry["compressed_from"]]
        assert entry["origin"] == "compressed"
        assert entry["trial"] is None
        assert entry["price"]["trainable_params"] < source["price"]["trainable_params"]
        assert entry["price"]["train_flops"] == source["price"]["train_flops"]
        assert entry["train"] == source["train"]
        # All seeds have the ranks of one plan.
        assert {s["seed"] for s in entry["seeds"]} == {s["seed"] for s in source["seeds"]}
        ranks = [{(s["layer"], s["role"]): s["rank"] for s in e["plan"]} for e in (entry, source)]
        assert all(rank <= ranks[1][site] for site, rank in ranks[0].items())
        assert f"cut from {source['digest'][:8]}" in entry["summary"]


def test_the_study_is_an_ordinary_optuna_study(result: SearchResult) -> None:
    study = optuna.load_study(
        study_name=result.folder.name, storage=f"sqlite:///{result.folder}/study.db"
    )
    states = [trial.state for trial in study.trials]
    assert optuna.trial.TrialState.RUNNING not in states
    assert len(states) == 16
    complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert all(len(t.values) == 3 and t.intermediate_values for t in complete)
    assert study.user_attrs["verdict"] == result.verdict.text
    assert study.user_attrs["budget"] == "16trials"
    artifacts = {meta.filename for meta in optuna.artifacts.get_all_artifact_meta(study)}
    adapters = {f"adapter-{member.digest[:8]}.zip" for member in result.front}
    assert {"front.png", "report.html", *adapters} <= artifacts
    front = {t.user_attrs["digest"] for t in study.best_trials}
    assert front <= {t.user_attrs["digest"] for t in complete}


def test_the_dashboard_shows_the_study(result: SearchResult) -> None:
    from optuna_dashboard import wsgi

    app = wsgi(f"sqlite:///{result.folder}/study.db")
    seen: dict[str, str] = {}
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/api/studies",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
    }
    body = b"".join(app(environ, lambda status, *_: seen.update(status=status)))
    assert seen["status"].startswith("200")
    assert json.loads(body)["study_summaries"][0]["study_name"] == result.folder.name


def test_the_result_in_python(result: SearchResult) -> None:
    assert result.best is not None
    assert result.best_config is not None
    assert result.best_config["digest"] == result.best.digest
    assert json.loads(json.dumps(result.best_config)) == result.best_config
    assert result.baseline is not None
    assert result.pick("knee").digest in {m.digest for m in result.front}
    assert result.pick(result.best.digest[:6]).digest == result.best.digest
    with pytest.raises(SettingsError, match="pick"):
        result.pick("nothing")
    limit = result.front[0].entry.price.trainable_params
    # Members of one size may differ in latency, so that the limit admits more than the first.
    admitted = [m for m in result.front if m.entry.price.trainable_params <= limit]
    assert result.pick(f"trainable_params<={limit}") in admitted
    with pytest.raises(SettingsError, match="give a wider limit"):
        result.pick("trainable_params<=1")
    model = result.best.load()
    assert model.config.num_labels == 2


def test_export_gives_an_adapter_and_a_model(result: SearchResult, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    assert result.best is not None
    merged, adapter = (
        autopeft.export(result.folder, format=format_, to=tmp_path / format_).folder
        for format_ in ("merged", "peft")
    )
    plain = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    loaded = autopeft.load_adapter(result.base_model, adapter).eval()
    ids = torch.tensor([[2, 5, 11, 3]])
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(StorageError, match="taken"):
        autopeft.export(result.folder, pick="best", to=merged)


def test_report_writes_the_pages_anew(result: SearchResult) -> None:
    before = front_of(result)
    (result.folder / "report.html").unlink()
    autopeft.report(result.folder)
    assert (result.folder / "report.html").exists()
    assert front_of(result) == before


def test_a_taken_folder_is_refused(result: SearchResult, tiny_model: Path, tiny_data: Path) -> None:
    with pytest.raises(StorageError, match="resume"):
        autopeft.search(
            SETTINGS, model=str(tiny_model), data=str(tiny_data), output=str(result.folder)
        )


def test_more_budget_goes_on_where_the_search_ended(result: SearchResult) -> None:
    with pytest.raises(SettingsError, match="model"):
        autopeft.resume(result.folder, model="other")
    again = autopeft.resume(result.folder, budget="18trials")
    front = front_of(again)
    assert sum(front["trials"].values()) == 18
    digests = [
        t.user_attrs["digest"]
        for t in optuna.load_study(
            study_name=result.folder.name, storage=f"sqlite:///{result.folder}/study.db"
        ).trials
    ]
    assert len(set(digests)) == 18


def n_finished(study: Path) -> int:
    """Trials with a result, read only.

    Optuna would create the tables that it misses, at the same moment as the search does, which
    would then fail.
    """
    try:
        with closing(sqlite3.connect(f"file:{study}?mode=ro", uri=True)) as connection:
            query = "SELECT COUNT(*) FROM trials WHERE state NOT IN ('RUNNING', 'WAITING')"
            return int(connection.execute(query).fetchone()[0])
    except sqlite3.OperationalError:  # no file yet, or no tables
        return 0


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files that no other test uses; its path is short, as Ray's must be.

    It stays to the end of the process: libraries that are imported meanwhile, such as wandb, make
    a folder in it that they write to in later tests.
    """
    folder = tempfile.mkdtemp(prefix="ap-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", None)
    return Path(folder)


@pytest.mark.timeout(600)
def test_a_killed_search_is_resumed_without_loss(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, temporary: Path
) -> None:
    folder = tmp_path / "killed"
    options = {
        **RAY,
        **{"steps": 40, "budget": "12trials", "objectives": ["trainable_params"]},
        **{"trials_per_worker": 2, "confirm_seeds": 1, "max_finalists": 1},
    }
    code = (
        "import sys, json, autopeft;"
        "autopeft.search(json.loads(sys.argv[1]), model=sys.argv[2], data=sys.argv[3],"
        "output=sys.argv[4])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(options), str(tiny_model), str(tiny_data), folder],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 300
    while time.monotonic() < until and n_finished(folder / "study.db") < 3:
        assert process.poll() is None, "the search ended by itself"
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = set(temporary.glob("autopeft-*"))
    assert left
    storage = f"sqlite:///{folder}/study.db"
    before = optuna.load_study(study_name="killed", storage=storage).trials
    finished = {t.user_attrs["digest"]: t for t in before if t.state.is_finished()}
    assert len(finished) >= 3

    result = autopeft.resume(folder)
    after = optuna.load_study(study_name="killed", storage=storage).trials
    told = [t for t in after if t.state.is_finished() and t.user_attrs.get("digest")]
    trained = [t.user_attrs["digest"] for t in told if t.state != optuna.trial.TrialState.FAIL]
    assert len(trained) == len(set(trained)), "a candidate was trained twice"
    for digest, trial in finished.items():
        same = next(t for t in after if t.number == trial.number)
        assert same.user_attrs["digest"] == digest
        assert same.values == trial.values
    interrupted = {t.user_attrs["digest"] for t in before if not t.state.is_finished()}
    assert interrupted <= set(trained), "an interrupted candidate was lost"
    assert len(trained) == 12
    assert result.front
    assert not any(path.exists() for path in left), "temporary files of the killed search"


def test_random_labels_give_no_winner(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A planted data set where nothing can help."""
    rng = np.random.default_rng(0)
    lines = tiny_data.read_text(encoding="utf-8").strip().splitlines()
    rows = [line.rsplit(",", 1)[0] for line in lines[1:] if not line.startswith(",")]
    labels = rng.permutation(["good", "bad"] * (len(rows) // 2))
    path = tmp_path / "noise.csv"
    pairs = zip(rows, labels, strict=False)
    path.write_text("text,label\n" + "\n".join(f"{r},{label}" for r, label in pairs) + "\n")
    result = autopeft.search(
        SETTINGS, model=str(tiny_model), data=str(path), output=str(tmp_path / "noise-run")
    )
    assert not result.verdict.beats_lora


def test_trials_trained_together_find_a_front_too(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Three candidates share a forward pass; stops reach them one by one."""
    found = autopeft.search(
        SETTINGS,
        model=str(tiny_model),
        data=str(tiny_data),
        output=str(tmp_path / "together"),
        budget="12trials",
        steps=60,
        confirm_seeds=1,
        max_finalists=1,
        trials_per_worker=3,
        objectives=["trainable_params"],
    )
    front = front_of(found)
    told = front["trials"]
    assert told["complete"] + told["pruned"] == 12
    assert told["failed"] == 0
    assert told["complete"] >= 3
    assert front["front"]
    assert not front["warnings"]
    told = front_of(autopeft.resume(found.folder, budget="15trials", trials_per_worker=1))["trials"]
    assert told["complete"] + told["pruned"] == 15
