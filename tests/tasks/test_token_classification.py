from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import seqeval.metrics as seqeval
import torch
import transformers as hf
from searches import loads, logits_of, searched
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from autopeft.errors import DataError
from autopeft.models.backbone import joins_words, load_tokenizer
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import collate
from autopeft.tasks.load_data import load_data, read_tables
from autopeft.tasks.reading import Table
from autopeft.tasks.registry import make_task
from autopeft.tasks.token_classification import TokenClassification
from autopeft.training.evaluation import evaluate
from autopeft.training.setup import TrainingSetup

# Words that the tiny model knows.
GOOD = ("good", "fine", "great", "lovely", "warm")
BAD = ("bad", "poor", "awful", "cold", "dull")
PLAIN = ("the", "film", "was", "a", "plot", "and", "scene", "actor", "very", "so")

CLASS = "AutoModelForTokenClassification"
TAGS = ("B-BAD", "B-GOOD", "I-GOOD", "O")
SMALL = {
    "vocab_size": 240,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def rows_of(n: int = 60, words: tuple[str, ...] = ("the", "film", "was")) -> Any:
    """Rows of words and tags: "good very" is an entity of two words, "bad" one of one."""
    chooser = random.Random(0)
    tokens, tags = [], []
    for i in range(n):
        own = [(chooser.choice(words), "O") for _ in range(chooser.randint(2, 6))]
        place = chooser.randrange(len(own))
        entity = [("good", "B-GOOD"), ("very", "I-GOOD")] if i % 2 else [("bad", "B-BAD")]
        own[place:place] = entity
        own.append((f"w{i}", "O"))
        tokens.append([word for word, _ in own])
        tags.append([tag for _, tag in own])
    return tokens, tags


def table_of(**columns: Any) -> Table:
    tokens, tags = rows_of()
    return Table("memory", {"tokens": tokens, "ner_tags": tags, **columns})


def loaded(table: Table, tokenizer: Any, config: Any = None, **settings: Any) -> Any:
    task = make_task(SearchSettings(**settings), table, config)
    task.processor = tokenizer
    data = load_data(task.settings, task, tokenizer, {"train": table})
    return task.bound(data), data


def spelling_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Several tokens a word, like BERT's."""
    pieces = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    names = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *pieces, *(f"##{piece}" for piece in pieces)]
    vocabulary = {piece: i for i, piece in enumerate(names)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers.processors import TemplateProcessing

    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]"
    )


def aligned_as_in_run_ner(
    tokenizer: Any, tokens: list[str], tags: list[int], max_length: int
) -> dict[str, Any]:
    """The alignment that transformers' own example of NER does."""
    coded = tokenizer(tokens, is_split_into_words=True, truncation=True, max_length=max_length)
    labels, previous = [], None
    for word in coded.word_ids():
        if word is None:
            labels.append(-100)
        elif word != previous:
            labels.append(tags[word])
        else:
            labels.append(-100)
        previous = word
    return {**coded, "labels": labels}


def tiny(name: str, n_labels: int) -> Any:
    torch.manual_seed(0)
    configs: dict[str, Any] = {
        "bert": lambda: hf.BertConfig(**SMALL),
        "gpt2": lambda: hf.GPT2Config(vocab_size=240, n_embd=16, n_layer=1, n_head=2),
        "llama": lambda: hf.LlamaConfig(**SMALL),
    }
    config = configs[name]()
    config.num_labels = n_labels
    return getattr(hf, CLASS).from_config(config).eval()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_encoding_and_loss_are_those_of_transformers(name: str) -> None:
    tokenizer = spelling_tokenizer()
    task, data = loaded(table_of(), tokenizer, max_length=24)
    assert data.task == "token-classification"
    assert data.labels == TAGS
    tokens, tags = rows_of()
    rows = np.arange(8)
    batch = collate(data, "train", rows)
    features = [
        aligned_as_in_run_ner(
            tokenizer, tokens[row], [TAGS.index(tag) for tag in tags[row]], max_length=24
        )
        for row in data.train.source_rows[rows]
    ]
    expected = hf.DataCollatorForTokenClassification(tokenizer)(features)
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[key], expected[key]), key
    model = tiny(name, len(TAGS))
    with torch.no_grad():
        whole = model(**expected).loss
        assert float(task.loss(model, batch)) == pytest.approx(float(whole), rel=1e-5)
        parts = task.losses(model, batch, 2)
        alone = [task.loss(model, collate(data, "train", part)) for part in (rows[:4], rows[4:])]
        torch.testing.assert_close(parts, torch.stack(alone))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_scores_are_those_of_one_row_at_a_time(name: str) -> None:
    task, data = loaded(table_of(), spelling_tokenizer())
    model = tiny(name, len(TAGS))
    found = evaluate(model, TrainingSetup(task, data), "test")
    alone = [
        evaluate(model, TrainingSetup(task, data), "test", rows=np.asarray([i]))
        for i in range(len(data.test))
    ]
    n_words = np.asarray([len(rows_of()[0][row]) for row in data.test.source_rows])
    right = np.asarray([each.metrics["token_accuracy"] for each in alone]) * n_words
    assert found.metrics["token_accuracy"] == pytest.approx(right.sum() / n_words.sum())
    np.testing.assert_allclose(found.rows, [-each.loss for each in alone], rtol=1e-4)
    weights = (data.test.token_arrays["labels"] != -100).sum()
    assert set(found.metrics) == {
        "entity_f1",
        "entity_precision",
        "entity_recall",
        "token_accuracy",
        "loss",
    }
    assert found.metrics["loss"] == found.loss
    assert weights == sum(len(rows_of()[0][row]) for row in data.test.source_rows)


def test_class_labels_and_lists_as_text_give_the_same_data(
    tmp_path: Path, encoder_tokenizer: Any
) -> None:
    tokens, tags = rows_of()
    prints = []
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=list(TAGS))),
        }
    )
    ids = [[TAGS.index(tag) for tag in own] for own in tags]
    made = datasets.Dataset.from_dict({"tokens": tokens, "ner_tags": ids}, features=features)
    (tmp_path / "set").mkdir()
    made.to_parquet(tmp_path / "set" / "train.parquet")
    settings = SearchSettings(data=str(tmp_path / "set"))
    prints.append(loaded(read_tables(settings)["train"], encoder_tokenizer)[1].fingerprint)
    as_text = table_of(tokens=list(map(str, tokens)), ner_tags=list(map(json.dumps, tags)))
    for table in (table_of(), as_text):
        prints.append(loaded(table, encoder_tokenizer)[1].fingerprint)
    assert len(set(prints)) == 1


def test_words_that_are_cut_are_counted(encoder_tokenizer: Any) -> None:
    _, data = loaded(table_of(), encoder_tokenizer, max_length=5)
    tokens, _ = rows_of()
    for name, split in data.splits.items():
        lost = sum(max(0, len(tokens[row]) - 3) for row in split.source_rows)
        assert split.notes == (f"{lost} word{'s' * (lost > 1)} of memory cut at 5 tokens",), name
        assert split.n_truncated == sum(len(tokens[row]) > 3 for row in split.source_rows)
    _, data = loaded(table_of(), encoder_tokenizer, max_length=9, on_long="drop")
    n_short = sum(len(own) <= 7 for own in tokens)
    assert n_short < 60
    assert sum(map(len, data.splits.values())) == n_short
    assert data.dropped == {"longer than max_length": 60 - n_short}


def test_words_without_a_token_have_no_label(encoder_tokenizer: Any) -> None:
    tokens, tags = rows_of()
    tokens[0][1] = " "
    _, data = loaded(table_of(tokens=tokens), encoder_tokenizer)
    assert sum("1 word of memory without a token" in note for note in data.notes) == 1
    n_labels = sum((split.token_arrays["labels"] != -100).sum() for split in data.splits.values())
    assert n_labels == sum(map(len, tags)) - 1


@pytest.mark.parametrize(
    ("column", "cell", "problem"),
    [
        ("ner_tags", ["O"], r"row 8 of memory has \d tokens and 1 tags"),
        ("ner_tags", "O O", "row 8 of memory holds 'O O' where a list is expected"),
        ("ner_tags", ["O", None], "row 8 of memory holds None where a tag is expected"),
        ("tokens", ["good", 3], "row 8 of memory holds 3 where a word is expected"),
        ("tokens", {"a": 1}, "row 8 of memory holds"),
    ],
)
def test_rows_of_another_kind_are_refused(
    column: str, cell: Any, problem: str, encoder_tokenizer: Any
) -> None:
    tokens, tags = rows_of()
    values: dict[str, list[Any]] = {"tokens": tokens, "ner_tags": tags}
    values[column][7] = cell
    with pytest.raises(DataError, match=problem) as raised:
        loaded(Table("memory", values), encoder_tokenizer)
    assert "\n" not in str(raised.value)


def test_empty_rows_are_dropped_and_unknown_tags_refused(encoder_tokenizer: Any) -> None:
    tokens, tags = rows_of()
    tokens[0], tags[0], tags[1] = [], [], None
    _, data = loaded(Table("memory", {"tokens": tokens, "tags": tags}), encoder_tokenizer)
    assert data.dropped == {"the tokens are missing": 1, "the tags are missing": 1}
    task = make_task(SearchSettings(), table_of())
    other = Table("other", {"tokens": [["good", "w1"]] * 4, "tags": [["B-NEW", "O"]] * 4})
    with pytest.raises(DataError, match="'B-NEW': occurs in test but in no training row"):
        load_data(task.settings, task, encoder_tokenizer, {"train": table_of(), "test": other})


def test_rare_tags_are_in_training(encoder_tokenizer: Any) -> None:
    _, tags = rows_of()
    tags[0][-1] = "B-RARE"
    for seed in range(5):
        _, data = loaded(table_of(ner_tags=tags), encoder_tokenizer, seed=seed)
        assert "B-RARE" in data.labels


def test_tags_without_entities_are_told(encoder_tokenizer: Any) -> None:
    _, tags = rows_of()
    parts = [["X" if tag == "O" else "ADJ" for tag in own] for own in tags]
    _, data = loaded(table_of(ner_tags=parts), encoder_tokenizer)
    assert any("the tags have no B- and I-" in note for note in data.notes)


def test_byte_level_tokenizers_get_spaces_before_words(tmp_path: Path) -> None:
    made = Tokenizer(
        models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    hf.GPT2Tokenizer(tokenizer_object=made, vocab=made.get_vocab(), merges=[]).save_pretrained(
        tmp_path
    )
    hf.GPT2Config().save_pretrained(tmp_path)
    assert joins_words(load_tokenizer(str(tmp_path)))
    tokenizer = TokenClassification().load_processor(str(tmp_path))
    assert not joins_words(tokenizer)
    coded = tokenizer(["ab", "c"], is_split_into_words=True)
    assert tokenizer.convert_ids_to_tokens(coded["input_ids"]) == ["Ġ", "a", "b", "Ġ", "c"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_a_saved_adapter_scores_what_front_json_says(tiny_model: Path, tmp_path: Path) -> None:
    chooser = random.Random(0)
    rows = []
    for i in range(100):
        words = [chooser.choice((*PLAIN, GOOD[0], BAD[0])) for _ in range(chooser.randint(3, 8))]
        words = [GOOD[i % 5], BAD[i % 3], *words, str(i)]
        tags = ["B-GOOD" if w in GOOD else "B-BAD" if w in BAD else "O" for w in words]
        rows.append({"tokens": words, "ner_tags": tags})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = searched(tiny_model, path, tmp_path / "run", steps=40)
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    tests = [rows[row] for row in found.test_rows]
    true = [row["ner_tags"] for row in tests]
    batch = tokenizer(
        [row["tokens"] for row in tests],
        is_split_into_words=True,
        padding=True,
        return_tensors="pt",
    )
    for name, model in loads(found, CLASS, tmp_path / "merged").items():
        logits = logits_of(model, **batch)
        assert logits.shape[0] == len(tests), name
        predicted = [
            [
                model.config.id2label[int(logits[i, batch.word_ids(i).index(w)].argmax())]
                for w in range(len(tags))
            ]
            for i, tags in enumerate(true)
        ]
        assert found.score["entity_f1"] == pytest.approx(
            seqeval.f1_score(true, predicted), abs=1e-9
        ), name
        accuracy = seqeval.accuracy_score(true, predicted)
        assert found.score["token_accuracy"] == pytest.approx(accuracy, abs=1e-9), name
