from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from autopeft.errors import DataError
from autopeft.settings import SearchSettings
from autopeft.tasks.data import IGNORED, SPLITS, SplitName, TaskData
from autopeft.tasks.examples import Examples
from autopeft.tasks.load_data import load_data, read_tables
from autopeft.tasks.reading import Table
from autopeft.tasks.registry import make_task
from autopeft.tasks.splitting import SHARES
from autopeft.tasks.text_classification import TextClassification


def sentiment_rows(n: int = 60) -> list[dict[str, str]]:
    return [
        {
            "text": f"the film was {'good' if i % 2 else 'bad'} w{i}",
            "label": "pos" if i % 2 else "neg",
        }
        for i in range(n)
    ]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    pd.DataFrame(rows).to_csv(path, index=False)
    return str(path)


def load(settings: SearchSettings, tokenizer: Any) -> TaskData:
    tables = read_tables(settings)
    return load_data(settings, make_task(settings, tables["train"]), tokenizer, tables)


def texts_of(tokenizer: Any, data: Any, split: str) -> list[str]:
    part = data.splits[split]
    return [
        tokenizer.decode(
            part.tokens[part.offsets[i] : part.offsets[i + 1]], skip_special_tokens=True
        )
        for i in range(len(part))
    ]


def test_csv_is_split_encoded_and_labeled(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = sentiment_rows()
    data = load(SearchSettings(data=write_csv(tmp_path / "d.csv", rows)), encoder_tokenizer)
    assert data.labels == ("neg", "pos")
    assert sum(len(data.splits[name]) for name in SPLITS) == 60
    seen: set[int] = set()
    for name in SPLITS:
        part = data.splits[name]
        assert part.source == "d.csv"
        assert not seen & set(part.source_rows.tolist())
        seen |= set(part.source_rows.tolist())
        for text, target, row in zip(
            texts_of(encoder_tokenizer, data, name),
            part.row_arrays["labels"],
            part.source_rows,
            strict=True,
        ):
            assert text == rows[row]["text"]
            assert data.labels[target] == rows[row]["label"]
    assert seen == set(range(60))
    assert data.train.tokens.dtype == np.int32
    assert data.train.offsets.dtype == np.int64


def test_kinds_of_file_give_the_same_data(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = sentiment_rows()
    frame = pd.DataFrame(rows)
    paths = [
        tmp_path / f"d.{kind}" for kind in ("csv", "tsv", "jsonl", "json", "parquet", "csv.gz")
    ]
    frame.to_csv(paths[0], index=False)
    frame.to_csv(paths[1], index=False, sep="\t")
    paths[2].write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    paths[3].write_text(json.dumps(rows))
    frame.to_parquet(paths[4])
    frame.to_csv(paths[5], index=False)
    prints = {load(SearchSettings(data=str(p)), encoder_tokenizer).fingerprint for p in paths}
    assert len(prints) == 1


def test_a_folder_is_read_like_a_hub_data_set(tmp_path: Path, encoder_tokenizer: Any) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_csv(folder / "train.csv", sentiment_rows(60)[:40])
    write_csv(folder / "test.csv", sentiment_rows(60)[40:])
    data = load(SearchSettings(data=str(folder)), encoder_tokenizer)
    assert data.test.source.endswith(":test")
    assert len(data.test) == 20
    assert len(data.train) + len(data.validation) == 40
    named = SearchSettings(data=str(folder), validation="test", test=str(folder / "test.csv"))
    with pytest.raises(DataError, match="usable validation rows"):
        load(named, encoder_tokenizer)  # validation is the test split: no row is left for it


def test_numbers_as_labels_are_ordered_by_value(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [{"text": f"the film w{i}", "label": float(i % 12)} for i in range(120)]
    pd.DataFrame(rows).to_parquet(tmp_path / "d.parquet")
    data = load(SearchSettings(data=str(tmp_path / "d.parquet")), encoder_tokenizer)
    assert data.labels == tuple(str(i) for i in range(12))


def test_words_that_look_missing_are_kept(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [{"text": f"w{i}", "label": "None" if i % 2 else "NA"} for i in range(60)]
    data = load(SearchSettings(data=write_csv(tmp_path / "d.csv", rows)), encoder_tokenizer)
    assert data.labels == ("NA", "None")
    assert data.n_dropped == 0


def test_empty_rows_are_dropped_and_counted(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = sentiment_rows()
    rows += [{"text": " ", "label": "pos"}, {"text": "good", "label": ""}]
    data = load(SearchSettings(data=write_csv(tmp_path / "d.csv", rows)), encoder_tokenizer)
    assert data.n_dropped == 2


def test_a_text_is_in_one_split_only(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = sentiment_rows(40) + [{**r, "text": r["text"].upper() + " "} for r in sentiment_rows(40)]
    data = load(SearchSettings(data=write_csv(tmp_path / "d.csv", rows)), encoder_tokenizer)
    owner: dict[int, str] = {}
    for name in SPLITS:
        for row in data.splits[name].source_rows:
            assert owner.setdefault(int(row) % 40, name) == name


def test_own_splits_are_used_and_their_texts_leave_train(
    tmp_path: Path, encoder_tokenizer: Any
) -> None:
    rows = sentiment_rows(60)
    settings = SearchSettings(
        data=write_csv(tmp_path / "train.csv", rows),
        validation=write_csv(tmp_path / "val.csv", rows[:10]),
        test=write_csv(tmp_path / "test.csv", rows[5:20]),
    )
    data = load(settings, encoder_tokenizer)
    assert len(data.test) == 15  # kept whole
    assert len(data.validation) == 5  # five of its rows are in test
    assert len(data.train) == 40
    assert data.n_duplicates == 25
    assert data.test.source == "test.csv"


def test_a_split_of_the_source_that_is_not_used_is_told(encoder_tokenizer: Any) -> None:
    train = Table("d:train", {"text": [f"w{i}" for i in range(60)], "label": ["a", "b"] * 30})
    hidden = Table("d:test", {"text": ["w1", "w2"], "label": [None, None]})
    broken = Table("d:validation", {"text": ["w1", "w2"], "stars": [1, 2]})
    task = make_task(SearchSettings(), train)
    given: dict[SplitName, Table] = {"train": train, "validation": broken, "test": hidden}
    data = load_data(task.settings, task, encoder_tokenizer, given)
    assert "d:test is not used: the label is missing" in data.notes
    given["test"] = Table("d:test", {"text": [], "label": []})
    notes = load_data(task.settings, task, encoder_tokenizer, given).notes
    assert "d:test is not used: it has no rows" in notes
    assert any(note.startswith("d:validation is not used: label=") for note in data.notes)


def test_limits_keep_the_labels_balanced(tmp_path: Path, encoder_tokenizer: Any) -> None:
    settings = SearchSettings(
        data=write_csv(tmp_path / "d.csv", sentiment_rows(180)),
        max_train_rows=20,
        max_validation_rows=10,
        max_test_rows=14,
    )
    data = load(settings, encoder_tokenizer)
    assert [len(data.splits[name]) for name in SPLITS] == [20, 10, 14]
    for name in SPLITS:
        assert abs(data.splits[name].row_arrays["labels"].mean() - 0.5) <= 0.1


def test_pairs_carry_type_ids(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [{"a": f"good w{i}", "b": "the film", "y": str(i % 2)} for i in range(60)]
    settings = SearchSettings(
        data=write_csv(tmp_path / "d.csv", rows), text="a", text_pair="b", label="y"
    )
    part = load(settings, encoder_tokenizer).train
    assert part.token_arrays["token_type_ids"] is not None
    assert part.token_arrays["token_type_ids"][: part.offsets[1]].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_long_rows_are_cut_and_counted(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = sentiment_rows()
    rows[0]["text"] = "good " * 100
    path = write_csv(tmp_path / "d.csv", rows)
    data = load(SearchSettings(data=path, max_length=16), encoder_tokenizer)
    assert data.n_truncated == 1
    longest = max(int(data.splits[name].lengths.max()) for name in SPLITS)
    assert longest == 16


@pytest.mark.parametrize("name", ["decoder_tokenizer", "starting_tokenizer"])
def test_prompts_and_completions(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    rows = [{"prompt": f"review : w{i}", "completion": " positive"} for i in range(60)]
    settings = SearchSettings(data=write_csv(tmp_path / "d.csv", rows), task="sft")
    data = load(settings, tokenizer)
    assert data.labels == ()
    part = data.train
    first, length = (
        part.tokens[: part.offsets[1]],
        int((part.token_arrays["labels"][: part.offsets[1]] == IGNORED).sum()),
    )
    row = rows[part.source_rows[0]]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    assert first[:length].tolist() == start + tokenizer.encode(
        row["prompt"], add_special_tokens=False
    )
    assert first[length:].tolist() == [
        tokenizer.convert_tokens_to_ids("positive"),
        tokenizer.eos_token_id,
    ]
    assert data.pad_id == tokenizer.eos_token_id
    assert data.length_statistics(16).mean_targets == 2.0


@pytest.mark.parametrize("n_each", [2, 3, 4])
def test_few_rows_of_each_completion_reach_every_split(
    tmp_path: Path, decoder_tokenizer: Any, n_each: int
) -> None:
    rows = [{"prompt": f"review w{i} :", "completion": f" w{i % 20}"} for i in range(20 * n_each)]
    settings = SearchSettings(data=write_csv(tmp_path / "d.csv", rows), task="sft")
    data = load(settings, decoder_tokenizer)
    for name, share in SHARES.items():
        assert len(data.splits[name]) == pytest.approx(share * len(rows), abs=1)
    again = load(settings, decoder_tokenizer)
    assert again.fingerprint == data.fingerprint


def test_completions_that_all_differ_leave_test_rows(
    tmp_path: Path, decoder_tokenizer: Any
) -> None:
    rows = [{"prompt": f"review w{i} :", "completion": f" w{i}"} for i in range(30)]
    settings = SearchSettings(
        data=write_csv(tmp_path / "d.csv", rows[:20]),
        validation=write_csv(tmp_path / "v.csv", rows[20:]),
        task="sft",
    )
    data = load(settings, decoder_tokenizer)
    assert [len(data.splits[name]) for name in SPLITS] == [15, 10, 5]


def test_each_of_many_small_classes_is_trained_on(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [{"text": f"good w{i}", "label": f"c{i % 30}"} for i in range(60)]
    data = load(SearchSettings(data=write_csv(tmp_path / "d.csv", rows)), encoder_tokenizer)
    assert [len(data.splits[name]) for name in SPLITS] == [39, 9, 12]
    assert len(set(data.train.row_arrays["labels"].tolist())) == 30


def test_too_few_rows_to_split_are_refused_with_the_remedy(
    tmp_path: Path, decoder_tokenizer: Any
) -> None:
    rows = [{"prompt": f"review w{i} :", "completion": f" w{i}"} for i in range(18)]
    settings = SearchSettings(data=write_csv(tmp_path / "d.csv", rows), task="sft")
    remedy = r"there are 3; give more rows, or a file of validation rows \(`validation`\)$"
    with pytest.raises(DataError, match=remedy):
        load(settings, decoder_tokenizer)


def test_a_long_prompt_loses_its_beginning(tmp_path: Path, starting_tokenizer: Any) -> None:
    rows = [{"prompt": f"w{i} " + "film " * 30 + ":", "completion": " good"} for i in range(60)]
    settings = SearchSettings(data=write_csv(tmp_path / "d.csv", rows), task="sft", max_length=10)
    part = load(settings, starting_tokenizer).train
    words = starting_tokenizer.convert_ids_to_tokens(part.tokens[: part.offsets[1]])
    assert words == ["<s>", *["film"] * 6, ":", "good", "</s>"]
    assert (part.token_arrays["labels"][: part.offsets[1]] == IGNORED).sum() == 8


def test_longer_rows_of_other_splits_are_not_cut_by_default(
    tmp_path: Path, encoder_tokenizer: Any
) -> None:
    rows = sentiment_rows()
    longer = [{**row, "text": f"test {row['text']} the film was good"} for row in rows[:20]]
    settings = SearchSettings(
        data=write_csv(tmp_path / "d.csv", rows), test=write_csv(tmp_path / "t.csv", longer)
    )
    data = load(settings, encoder_tokenizer)
    assert data.n_truncated == 0
    assert data.max_length == data.test.lengths.max() > data.train.lengths.max()


def test_fingerprint_follows_the_data(tmp_path: Path, encoder_tokenizer: Any) -> None:
    path = write_csv(tmp_path / "d.csv", sentiment_rows())
    one, same, other = (
        load(SearchSettings(data=path, seed=seed), encoder_tokenizer) for seed in (0, 0, 1)
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_length_statistics(tmp_path: Path, encoder_tokenizer: Any) -> None:
    data = load(
        SearchSettings(data=write_csv(tmp_path / "d.csv", sentiment_rows())), encoder_tokenizer
    )
    found = data.length_statistics(8)
    assert found.longest == int(data.train.lengths.max())
    assert data.train.lengths.mean() <= found.mean_padded <= found.longest
    assert found.mean_targets == 1.0


BAD_ROWS = {
    "one class only": [{"text": f"w{i}", "label": "same"} for i in range(60)],
    "usable train rows >= 8": sentiment_rows(6),
    "different values": [{"text": f"w{i}", "label": f"word{i}"} for i in range(60)],
}


@pytest.mark.parametrize("problem", BAD_ROWS)
def test_data_that_cannot_be_learned_from(
    tmp_path: Path, problem: str, encoder_tokenizer: Any
) -> None:
    settings = SearchSettings(data=write_csv(tmp_path / "d.csv", BAD_ROWS[problem]))
    with pytest.raises(DataError, match=problem) as raised:
        load(settings, encoder_tokenizer)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_status == 2


def test_label_missing_in_train(tmp_path: Path, encoder_tokenizer: Any) -> None:
    other = [{"text": f"new w{i}", "label": "third"} for i in range(10)]
    settings = SearchSettings(
        data=write_csv(tmp_path / "d.csv", sentiment_rows()),
        test=write_csv(tmp_path / "t.csv", other),
    )
    with pytest.raises(DataError, match=r"label='third': occurs in test but in no training row"):
        load(settings, encoder_tokenizer)


def test_unknown_column_names_those_found(tmp_path: Path, encoder_tokenizer: Any) -> None:
    settings = SearchSettings(data=write_csv(tmp_path / "d.csv", sentiment_rows()), text="body")
    with pytest.raises(DataError, match=r"text='body': no such column.*'text', 'label'"):
        load(settings, encoder_tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("d.jsonl", b'{"text": "good", "label": 1}\n{oops\n', "line 2 is not JSON"),
        ("d.jsonl", b"[1, 2]\n", "row 1 is not an object"),
        ("d.json", b'{"text":\n1}', "does not hold a list"),
        ("d.parquet", b"not parquet", "is not a Parquet file"),
        ("d.csv", b"\xff\xfe\x00ba", "is not valid UTF-16"),
        ("d.csv", b"", "is empty"),
        ("d.csv", b"text,label\n", "no rows"),
        ("d.csv", b"text,label\na,b,c,d\ne\n'f,g,h,i,j", "line 2 has 4 fields"),
    ],
)
def test_unreadable_files(
    tmp_path: Path, name: str, content: bytes, problem: str, encoder_tokenizer: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        load(SearchSettings(data=str(tmp_path / name)), encoder_tokenizer)


def test_missing_things(tmp_path: Path, encoder_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(SearchSettings(data=str(tmp_path / "none.csv")), encoder_tokenizer)
    with pytest.raises(DataError, match="no such file or folder"):
        load(SearchSettings(data=str(tmp_path / "none")), encoder_tokenizer)
    with pytest.raises(DataError, match="no data given"):
        load(SearchSettings(), encoder_tokenizer)
    path = write_csv(tmp_path / "d.csv", sentiment_rows())
    with pytest.raises(DataError, match="test='held_out': neither a file nor a split"):
        load(SearchSettings(data=path, test="held_out"), encoder_tokenizer)


def test_long_rows_are_dropped_and_counted_if_asked(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = sentiment_rows()
    for row in rows[:20]:
        row["text"] += " the film was very good"
    data = write_csv(tmp_path / "d.csv", rows)
    found = load(SearchSettings(data=data, max_length=8, on_long="drop"), encoder_tokenizer)
    assert found.dropped == {"longer than max_length": 20}
    assert found.n_truncated == 0
    for split in found.splits.values():
        assert (split.source_rows >= 20).all()
        labels = [rows[row]["label"] for row in split.source_rows]
        assert [found.labels[i] for i in split.row_arrays["labels"]] == labels
    cut = load(SearchSettings(data=data, max_length=8), encoder_tokenizer)
    assert cut.n_truncated == 20
    assert not cut.dropped


def test_rows_that_are_all_the_same_are_named_as_the_cause(
    tmp_path: Path, encoder_tokenizer: Any
) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text('{"text": "good film", "label": 0}\n{"text": "bad", "label": 1}\n' * 30)
    problem = r"data='same.jsonl': .* \(only 2 of 60 rows differ, .*give rows that differ"
    with pytest.raises(DataError, match=problem):
        load(SearchSettings(data=str(path)), encoder_tokenizer)


def test_rows_beyond_a_limit_are_counted(tmp_path: Path, encoder_tokenizer: Any) -> None:
    path = write_csv(tmp_path / "rows.csv", sentiment_rows(100))
    data = load(SearchSettings(data=path, max_train_rows=20), encoder_tokenizer)
    assert len(data.train) == 20
    assert data.available["train"] > 20
    line = f"20 of {data.available['train']} rows for train used, as max_train_rows says"
    assert line in data.summary().lines()
    assert data.summary().columns == {"text": "text", "label": "label"}


def test_a_sources_own_splits_are_cleaned_once_and_left_out_without_labels(
    tmp_path: Path, encoder_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sentiment_rows(90)
    hidden = [{**row, "label": None} for row in rows[80:]]
    parts = {"train": rows[:60], "validation": rows[60:80], "test": hidden}
    splits = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "all"))
    cleaned: list[int] = []
    clean = TextClassification.clean

    def counted(self: TextClassification, table: Table) -> Examples:
        cleaned.append(table.n_rows)
        return clean(self, table)

    monkeypatch.setattr(TextClassification, "clean", counted)
    settings = SearchSettings(data=str(tmp_path / "all"), task="text-classification")
    data = load(settings, encoder_tokenizer)
    assert sorted(cleaned) == [10, 20, 60]
    assert data.splits["validation"].source == "all:validation"
    assert data.splits["test"].source == "all:train"
