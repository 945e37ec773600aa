from __future__ import annotations

import random

import pytest
import seqeval.metrics as seqeval
import sklearn.metrics as sk

from autopeft.tasks.metrics import METRICS, bootstrap_draws
from autopeft.tasks.tag_metrics import entity_counts, entity_f1, entity_precision, entity_recall


def random_rows() -> tuple[list[list[str]], list[list[str]]]:
    chooser = random.Random(0)
    labels = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-LOC", "S-PER")
    true = [[chooser.choice(labels) for _ in range(chooser.randint(1, 9))] for _ in range(60)]
    found = [[t if chooser.random() < 0.7 else chooser.choice(labels) for t in r] for r in true]
    return true, found


def test_entities_are_scored_as_seqeval_does() -> None:
    true, found = random_rows()
    assert entity_f1(true, found) == pytest.approx(seqeval.f1_score(true, found))
    assert entity_precision(true, found) == pytest.approx(seqeval.precision_score(true, found))
    assert entity_recall(true, found) == pytest.approx(seqeval.recall_score(true, found))


def test_draws_resample_rows() -> None:
    true, found = random_rows()
    draws = bootstrap_draws(METRICS["entity_f1"], true, found, 50, 0)
    assert draws.mean() == pytest.approx(entity_f1(true, found), abs=0.05)
    assert 0.0 < draws.std() < 0.2


def test_other_schemes_of_entities_and_none() -> None:
    bilou = [["U-PER", "O", "B-LOC", "I-LOC", "L-LOC"]]
    assert entity_counts(bilou, [["U-PER", "O", "B-LOC", "L-LOC", "O"]]).tolist() == [[1, 2, 2]]
    assert entity_f1([["O", "O"]], [["O", "O"]]) == 0.0
    true, found = [["NOUN", "VERB"], ["NOUN"]], [["NOUN", "NOUN"], ["NOUN"]]
    expected = sk.f1_score(["NOUN", "VERB", "NOUN"], ["NOUN"] * 3, average="macro")
    assert entity_f1(true, found) == pytest.approx(expected)
