"""Confirmations on disk: what is saved is read back, and damaged files are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from autopeft.confirm.finalists import Compressed, SeedScore
from autopeft.confirm.store import ConfirmationStore
from autopeft.costs import Price
from autopeft.errors import StorageError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings


def candidate(rank: int) -> Candidate:
    return Candidate(AdapterPlan([LayerSpec(0, "attn.q", "lora", rank)]), TrainSettings(1e-3))


def score(seed: int) -> SeedScore:
    return SeedScore(seed, {"loss": math.inf}, {"accuracy": 0.5}, (1.0, 0.0), {"latency_ms": 3.0})


def test_scores_and_their_origin_come_back(tmp_path: Path) -> None:
    store, price = ConfirmationStore(tmp_path), Price(3, 12, 1e6, 100)
    for seed in (1, 0):
        store.save(candidate(4), score(seed), {"a/b.bin": b"weights"})
    cut = Compressed(candidate(2), price, score(0), {})
    store.save_compressed(cut, candidate(4))
    assert store.done() == {(candidate(4).digest, 0), (candidate(4).digest, 1)}
    assert store.scores() == {
        candidate(4).digest: (score(0), score(1)),
        candidate(2).digest: (score(0),),
    }
    origin = (candidate(2), price, candidate(4).digest)
    assert store.compressed() == {candidate(2).digest: origin}


def test_what_is_cut_counts_once_its_source_is_saved(tmp_path: Path) -> None:
    store, price = ConfirmationStore(tmp_path), Price(3, 12, 1e6, 100)
    store.save_compressed(Compressed(candidate(2), price, score(0), {}), candidate(4))
    assert [*store.scores(), *store.compressed(), *store.cuts()] == []
    store.save(candidate(4), score(0), {})
    assert set(store.scores()) == {candidate(2).digest, candidate(4).digest}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seed": "one"}'])
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    store = ConfirmationStore(tmp_path)
    store.save(candidate(4), score(0), {})
    store.save_compressed(
        Compressed(candidate(2), Price(3, 12, 1e6, 100), score(0), {}), candidate(4)
    )
    for path in tmp_path.rglob("*.json"):
        path.write_text(text)
    with pytest.raises(StorageError, match=r"score\.json.*autopeft resume"):
        store.scores()
    with pytest.raises(StorageError, match=r"compressed\.json.*autopeft resume"):
        store.compressed()


def test_names_that_are_none_of_ours_are_passed_over(tmp_path: Path) -> None:
    for name in ("ab-seed", "ab-seed²", "ab-seed1x", "-seed"):
        (tmp_path / "confirm" / name).mkdir(parents=True)
    (tmp_path / "confirm" / "ab-seed3").mkdir()
    assert ConfirmationStore(tmp_path).done() == {("ab", 3)}


@pytest.mark.parametrize("part", ["objectives", "test", "validation"])
def test_a_confirmation_without_the_quality_names_its_file(tmp_path: Path, part: str) -> None:
    store = ConfirmationStore(tmp_path)
    chosen = Candidate(AdapterPlan(), TrainSettings(1e-3))
    values = {"accuracy": 0.5}
    store.save(chosen, SeedScore(1, values, values, (), values), {})
    store.check(["accuracy"])
    path = tmp_path / "confirm" / f"{chosen.digest}-seed1" / "score.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: {}}))
    with pytest.raises(StorageError, match=f"{chosen.digest}.*lacks the value of 'accuracy'"):
        store.check(["accuracy"])
