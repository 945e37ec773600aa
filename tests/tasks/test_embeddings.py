from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from searches import loads, searched

from autopeft.errors import DataError, SettingsError
from autopeft.models.backbone import build_meta
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.embeddings import (
    Embeddings,
    cosent_loss,
    layers_after_pooling,
    own_pooling,
    positive_ranks,
    ranking_losses,
    text_groups,
)
from autopeft.tasks.load_data import load_data
from autopeft.tasks.preview import preview_of
from autopeft.tasks.reading import Table
from autopeft.tasks.registry import make_task
from autopeft.training.evaluation import evaluate
from autopeft.training.setup import TrainingSetup

WORDS = [f"w{i}" for i in range(60)]


def texts_of(n: int = 40) -> dict[str, list[str]]:
    chooser = random.Random(0)
    anchors = [" ".join(chooser.sample(WORDS, 5)) for _ in range(n)]
    positives = [" ".join(anchor.split()[:3]) for anchor in anchors]
    negatives = [" ".join(chooser.sample(WORDS, 3)) for _ in range(n)]
    return {"anchor": anchors, "positive": positives, "negative": negatives}


def scored(n: int = 40, top: float = 5.0) -> dict[str, list[Any]]:
    texts = texts_of(n)
    shares = [i % 6 / 5 for i in range(n)]
    second = [
        " ".join(a.split()[: round(5 * share)] or ["w0"])
        for a, share in zip(texts["anchor"], shares, strict=True)
    ]
    return {"sentence1": texts["anchor"], "sentence2": second, "score": [top * s for s in shares]}


def pairs() -> dict[str, list[str]]:
    return {role: values for role, values in texts_of().items() if role != "negative"}


def loaded(columns: Any, tokenizer: Any, **settings: Any) -> tuple[Any, TaskData]:
    table = Table("memory", columns)
    task = make_task(SearchSettings(model="tiny", task="embeddings", **settings), table)
    task.processor = tokenizer
    data = load_data(task.settings, task, tokenizer, {"train": table})
    return task.bound(data), data


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=240,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return hf.BertModel(config).eval()


def embedded(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Unit-length means of hidden states, as sentence-transformers computes them."""
    found = []
    for text in texts:  # without padding
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        found.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0))
    return torch.stack(found).double()


@pytest.mark.parametrize("with_negatives", [False, True])
def test_ranking_is_the_loss_of_sentence_transformers(
    with_negatives: bool, model: Any, encoder_tokenizer: Any
) -> None:
    columns = texts_of() if with_negatives else pairs()
    task, data = loaded(columns, encoder_tokenizer)
    assert data.train.sequences_per_row == (3 if with_negatives else 2)
    batch = collate(data, "train", np.arange(6))
    rows = data.train.source_rows[:6].tolist()
    anchors, *others = (
        embedded(model, encoder_tokenizer, [values[row] for row in rows])
        for values in columns.values()
    )
    logits = 20.0 * anchors @ torch.cat(others).T
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    with torch.no_grad():
        assert float(task.loss(model, batch)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loss", ["cosent", "cosine"])
def test_losses_of_scores(loss: str, model: Any, encoder_tokenizer: Any) -> None:
    columns = scored(top=1.0)
    task, data = loaded(columns, encoder_tokenizer, task_options={"loss": loss})
    assert {m.name for m in task.measured} == {"spearman", "pearson", "loss"}
    assert task.quality.name == "spearman"
    batch = collate(data, "train", np.arange(6))
    rows = data.train.source_rows[:6].tolist()
    first, second = (
        embedded(model, encoder_tokenizer, [columns[name][row] for row in rows])
        for name in ("sentence1", "sentence2")
    )
    cosines = (first * second).sum(dim=1).tolist()
    labels = [columns["score"][row] for row in rows]
    if loss == "cosine":
        expected = np.mean([(c - y) ** 2 for c, y in zip(cosines, labels, strict=True)])
    else:
        terms = [
            np.exp(20.0 * (cosines[j] - cosines[i]))
            for i in range(6)
            for j in range(6)
            if labels[i] > labels[j]
        ]
        expected = np.log1p(np.sum(terms))
    with torch.no_grad():
        assert float(task.loss(model, batch)) == pytest.approx(float(expected), rel=1e-4)


def test_texts_that_belong_together_are_no_negatives() -> None:
    columns = [["q", "Q", "r", "s"], ["a", "b", "a", "c"], ["x", "c", "a", "b"]]
    text, group = map(torch.from_numpy, text_groups(columns))
    assert group[0, 0] == group[1, 0] == group[2, 1] == group[3, 2] != group[3, 0]
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(4, 3, 5), dim=-1)
    losses = ranking_losses(vectors, group, text, 20.0)
    cosines = 20.0 * vectors[:, 0] @ vectors[:, 1:].transpose(0, 1).reshape(8, 5).T
    # Candidates: a b a c, x c a b; an anchor's own negative stays, even if others join it.
    allowed = [[0, 3, 4, 5], [1, 3, 4, 5], [2, 3, 4, 5, 6], [3, 0, 1, 2, 4, 6, 7]]
    for row, places in enumerate(allowed):
        expected = torch.logsumexp(cosines[row, places], dim=0) - cosines[row, places[0]]
        assert float(losses[row]) == pytest.approx(float(expected), rel=1e-3)


def test_ranks_count_equal_texts_once_and_ties_as_better() -> None:
    axis = torch.eye(4)
    vectors = torch.stack(
        [
            torch.stack([axis[0], axis[0], axis[1]]),
            torch.stack([axis[1], axis[2], axis[1]]),
            torch.stack([axis[3], axis[3], axis[1]]),
        ]
    )
    columns = [["q", "r", "s"], ["a", "b", "c"], ["x", "x", "x"]]
    text, group = map(torch.from_numpy, text_groups(columns))
    # The cosines of r with a, b and c are 0, and with x, which counts once, 1.
    assert positive_ranks(vectors, group, text).tolist() == [1, 4, 1]


def test_ranks_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(23, 2, 6), dim=-1)
    text, group = map(torch.from_numpy, text_groups([WORDS[:23], WORDS[23:46]]))
    whole = positive_ranks(vectors, group, text), ranking_losses(vectors, group, text, 20.0)
    monkeypatch.setattr("autopeft.tasks.embeddings._ROWS_AT_ONCE", 5)
    assert torch.equal(positive_ranks(vectors, group, text), whole[0])
    torch.testing.assert_close(ranking_losses(vectors, group, text, 20.0), whole[1])


def test_scores_do_not_depend_on_batches(
    model: Any, encoder_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (texts_of(), scored()):
        task, data = loaded(columns, encoder_tokenizer)
        whole = evaluate(model, TrainingSetup(task, data), "train")
        with monkeypatch.context() as patch:
            patch.setattr("autopeft.training.evaluation.TOKEN_BUDGET", {"cpu": 16})
            parts = evaluate(model, TrainingSetup(task, data), "train")
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
        assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4)


def test_previews_name_the_texts(encoder_tokenizer: Any) -> None:
    for columns, names in ((texts_of(), list(texts_of())), (scored(), ["sentence1", "sentence2"])):
        task, data = loaded(columns, encoder_tokenizer)
        row = preview_of(data, task).rows[0]
        assert [sequence.name for sequence in row.sequences] == names
        assert bool(row.target) == ("score" in columns)


def test_equal_anchors_are_in_one_split(encoder_tokenizer: Any) -> None:
    texts = pairs()
    texts["anchor"] = [texts["anchor"][i // 2] for i in range(40)]
    _, data = loaded(texts, encoder_tokenizer)
    seen = [{row // 2 for row in split.source_rows.tolist()} for split in data.splits.values()]
    assert sum(map(len, seen)) == 20


def test_what_cannot_be_learned_is_refused(encoder_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="neither an anchor and a positive nor two sentences"):
        loaded({"anchor": ["a"] * 40, "text": ["b"] * 40}, encoder_tokenizer)
    with pytest.raises(DataError, match="row 3 of memory holds 2"):
        loaded(scored(), encoder_tokenizer, task_options={"loss": "cosine"})
    with pytest.raises(SettingsError, match="use cosent"):
        loaded(scored(), encoder_tokenizer, task_options={"loss": "ranking"})
    with pytest.raises(SettingsError, match="needs two sentences and a score"):
        loaded(pairs(), encoder_tokenizer, task_options={"loss": "cosent"})
    with pytest.raises(SettingsError, match="needs pairs with scores"):
        loaded(pairs(), encoder_tokenizer, metric="spearman")
    with pytest.raises(SettingsError, match="needs an anchor and a positive"):
        loaded(scored(), encoder_tokenizer, metric="ndcg_at_10")
    with pytest.raises(DataError, match="all rows have the same positive"):
        loaded({**pairs(), "positive": ["w1"] * 40}, encoder_tokenizer)
    for name in ("pooling", "loss"):
        with pytest.raises(SettingsError, match=f"no such {name}"):
            loaded(pairs(), encoder_tokenizer, task_options={name: "other"})


def test_pooling_is_the_models_own(tmp_path: Path) -> None:
    assert own_pooling(str(tmp_path)) is None
    (tmp_path / "1_Pooling").mkdir()
    for config, expected in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
        assert own_pooling(str(tmp_path)) == expected
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(SettingsError, match="pools by pooling_mode_max_tokens"):
        own_pooling(str(tmp_path))
    named = SearchSettings(model=str(tmp_path), data="x", task_options={"pooling": "cls"})
    (note,) = Embeddings().configured(named).notes(())
    assert "first token, as task_options.pooling asks" in note
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling" / "config.json").unlink()
    assert layers_after_pooling(str(tmp_path)) == ["Dense"]


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_other_poolings_read_one_token(pooling: str, model: Any, encoder_tokenizer: Any) -> None:
    task, data = loaded(pairs(), encoder_tokenizer, task_options={"pooling": pooling})
    batch = collate(data, "train", np.arange(4))
    with torch.no_grad():
        found = task.embeddings(model, batch)
        text = pairs()["positive"][int(data.train.source_rows[2])]
        hidden = model(**encoder_tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden[0 if pooling == "cls" else -1], dim=0)
    torch.testing.assert_close(found[2, 1], expected, rtol=1e-4, atol=1e-5)
    (window,) = task.windows(batch).values()
    assert window.starts.shape == (8,)


def test_a_pooler_that_the_checkpoint_lacks_is_no_head(model: Any, tmp_path: Path) -> None:
    state = {n: t for n, t in model.state_dict().items() if "pooler" not in n}
    model.save_pretrained(tmp_path, state_dict=state)
    assert build_meta(str(tmp_path), auto_class="AutoModel").head == ()


def test_cosent_without_an_order_is_nothing() -> None:
    cosines = torch.tensor([0.5, 0.2], requires_grad=True)
    loss = cosent_loss(cosines, torch.ones(2), 20.0)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert cosines.grad is not None
    assert not cosines.grad.any()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["triplets", "scores"])
def test_a_saved_adapter_embeds_alike_from_outside(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    words = "the film was a plot and scene actor very so good fine great bad poor cold".split()
    spelled = dict(zip(WORDS, (f"{a} {b}" for a in words for b in words[:4]), strict=False))
    columns: dict[str, list[Any]] = texts_of(80) if kind == "triplets" else scored(80)
    columns = {
        role: [
            " ".join(spelled[w] for w in value.split()) if isinstance(value, str) else value
            for value in values
        ]
        for role, values in columns.items()
    }
    path = tmp_path / "rows.jsonl"
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SettingsError, match="micro_batch_tokens=64: embeddings compares all rows"):
        searched(tiny_model, path, tmp_path / "no", task="embeddings", micro_batch_tokens=64)
    found = searched(tiny_model, path, tmp_path / "run", task="embeddings")
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    for how, model in loads(found, "AutoModel", tmp_path / "merged").items():
        test = {role: [values[row] for row in found.test_rows] for role, values in columns.items()}
        if kind == "scores":
            first, second = (embedded(model, tokenizer, test[f"sentence{i}"]) for i in (1, 2))
            cosines = (first * second).sum(dim=1).numpy()
            expected = float(np.corrcoef(cosines, test["score"])[0, 1])
            assert found.score["pearson"] == pytest.approx(expected, rel=1e-4), how
            continue
        vectors = [embedded(model, tokenizer, test[role]) for role in test]
        similar = vectors[0] @ torch.cat(vectors[1:]).T
        own = similar.diagonal()[:, None]
        ranks = (similar >= own - 1e-7).sum(dim=1)
        assert found.score["recall_at_1"] == pytest.approx(float((ranks == 1).double().mean()))
        loss = torch.nn.functional.cross_entropy(20.0 * similar, torch.arange(len(ranks)))
        assert found.score["loss"] == pytest.approx(float(loss), rel=1e-4), how
