"""Tests of reading sources: what a cell means must not depend on its container."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pytest
from pyarrow import parquet

from autopeft.errors import DataError
from autopeft.tasks.reading import Table, read

ROWS = [
    {"text": f"the film, {i} {'good' if i % 2 else 'bad'}", "label": str(i % 2)} for i in range(9)
]
TEXTS = [row["text"] for row in ROWS]


def one(source: Any) -> Table:
    tables = read("data", source)
    assert list(tables) == ["train"]
    return tables["train"]


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def failure(source: Any) -> str:
    with pytest.raises(DataError) as caught:
        read("data", source)
    message = str(caught.value)
    assert "\n" not in message
    assert "repair" not in message
    assert caught.value.field == "data"
    return message


# CSV


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_any_separator_is_recognized(tmp_path: Path, separator: str, suffix: str) -> None:
    path = tmp_path / f"d.{suffix}"
    pd.DataFrame(ROWS).to_csv(path, index=False, sep=separator)
    table = one(str(path))
    assert table.columns == {"text": TEXTS, "label": [row["label"] for row in ROWS]}
    assert table.source == path.name
    is_usual = separator == {"csv": ",", "tsv": "\t"}[suffix]
    assert any("separator" in note for note in table.notes) != is_usual


@pytest.mark.parametrize(
    ("encoding", "noted"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-16", "utf-16"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
        ("cp1252", "cp1252"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_the_encoding_is_recognized_and_said(
    tmp_path: Path, encoding: str, noted: str | None, suffix: str
) -> None:
    if suffix == "csv":
        text = "text,label\ncafé “good”,pos\nnaïve,neg\n"
    else:
        rows = [{"text": "café “good”", "label": "pos"}, {"text": "naïve", "label": "neg"}]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = one(write(tmp_path / f"d.{suffix}", text, encoding))
    assert table.columns == {"text": ["café “good”", "naïve"], "label": ["pos", "neg"]}
    assert [noted in note for note in table.notes] == [True] if noted else table.notes == ()


def test_latin_1_is_the_last_resort(tmp_path: Path) -> None:
    table = one(write(tmp_path / "d.csv", "text,label\ncaf\xe9 \x81,pos\n", "latin-1"))
    assert table.columns["text"] == ["caf\xe9 \x81"]
    assert "latin-1" in table.notes[0]


def test_quotes_that_enclose_no_field_lose_no_rows(tmp_path: Path) -> None:
    # In pairs of lines, so that a reader of quoted fields swallows every other row in silence.
    lines = [f'"film {i} is good\t1' if i % 2 else f'film {i} is "bad"\t0' for i in range(400)]
    table = one(write(tmp_path / "d.tsv", "text\tlabel\n" + "\n".join(lines) + "\n"))
    assert table.n_rows == 400
    assert table.columns["text"][1] == '"film 1 is good'
    assert "quotes are read as part of the text" in table.notes[0]


def test_paired_quotes_over_two_lines_are_no_line_break(tmp_path: Path) -> None:
    lines = [f'"film {i}\t1\nfilm {i}"\t0' for i in range(50)]
    table = one(write(tmp_path / "d.tsv", "text\tlabel\n" + "\n".join(lines) + "\n"))
    assert table.n_rows == 100


def test_a_quoted_field_may_hold_line_breaks_separators_and_quotes(tmp_path: Path) -> None:
    texts = ["one\ntwo", "a, b", 'he said "hi"', "three\r\n\r\nfour", ""]
    path = tmp_path / "d.csv"
    pd.DataFrame({"text": texts, "label": list("ababa")}).to_csv(path, index=False)
    assert one(str(path)).columns == {"text": texts, "label": list("ababa")}


def test_quoted_lines_that_look_like_rows_are_joined_and_told(tmp_path: Path) -> None:
    text = "label,text\n" + "".join(f'{i % 2},"film {i}\nis, good"\n' for i in range(9))
    table = one(write(tmp_path / "d.csv", text))
    assert table.columns["text"] == [f"film {i}\nis, good" for i in range(9)]
    assert "quotes join several lines into one row 9 times" in table.notes[0]


def test_escaped_quotes_are_read(tmp_path: Path) -> None:
    table = one(write(tmp_path / "d.csv", 'text,label\n"say \\"hi\\", he",a\n"b",b\n'))
    assert table.columns == {"text": ['say "hi", he', "b"], "label": ["a", "b"]}
    assert "backslash" in table.notes[0]


def test_spaces_after_separators_do_not_hide_quotes(tmp_path: Path) -> None:
    table = one(write(tmp_path / "d.csv", '"text", "label"\n"a, b", "x"\n"c", "y"\n'))
    assert table.columns == {"text": ["a, b", "c"], "label": ["x", "y"]}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("one,two,three", "line 4 has 3 fields where the header has 2"),
        ("alone", "line 4 has 1 field where the header has 2"),
        ('"open,pos', "line 4"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, line: str, problem: str) -> None:
    text = f'text,label\n"a\nb",pos\n{line}\n"c, d",neg\n'
    message = failure(write(tmp_path / "d.csv", text))
    assert problem in message
    assert "comma" in message


def test_words_are_kept_and_empty_lines_are_no_rows(tmp_path: Path) -> None:
    text = "text,label\nNA,None\n\nnull,\n   \nnan,007\n"
    table = one(write(tmp_path / "d.csv", text))
    assert table.columns == {"text": ["NA", "null", "nan"], "label": ["None", "", "007"]}


def test_one_column_may_hold_commas(tmp_path: Path) -> None:
    text = "text\nHello, world\nwithout\nmore, and, more\n"
    assert one(write(tmp_path / "d.csv", text)).columns == {
        "text": ["Hello, world", "without", "more, and, more"]
    }
    assert "line 2 has 2 fields" in failure(write(tmp_path / "e.csv", "text\na,1\nb,0\nc,1\n"))


def test_one_column_may_hold_quoted_line_breaks(tmp_path: Path) -> None:
    texts = ["one\ntwo", 'he said "hi"\nto me', "plain", "a, b; c\td"]
    for separator, suffix in ((",", "csv"), (";", "csv"), ("\t", "tsv")):
        path = tmp_path / f"d.{suffix}"
        pd.DataFrame({"text": texts}).to_csv(path, index=False, sep=separator)
        assert one(str(path)).columns == {"text": texts}


def test_carriage_returns_end_lines(tmp_path: Path) -> None:
    for end in ("\r\n", "\r"):
        table = one(write(tmp_path / "d.csv", end.join(["text,label", "a,1", "b,2", ""])))
        assert table.columns == {"text": ["a", "b"], "label": ["1", "2"]}


def test_long_fields_are_read(tmp_path: Path) -> None:
    assert len(one(write(tmp_path / "d.csv", f"text,label\n{'w ' * 100_000},a\n")).head("text")[0])


@pytest.mark.parametrize("first", ["good,pos", "good,1"])
def test_a_missing_header_is_said(tmp_path: Path, first: str) -> None:
    label = first.split(",")[1]
    lines = [first, *(f"w{i},{label if i % 2 else '0'}" for i in range(6))]
    message = failure(write(tmp_path / "d.csv", "\n".join(lines)))
    assert "first line must name the columns" in message
    assert "text,label" in message


def test_numbers_may_name_columns(tmp_path: Path) -> None:
    assert one(write(tmp_path / "d.csv", "0,1\na,3\nb,4\n")).column_names == ["0", "1"]


@pytest.mark.parametrize("kind", ["csv", "json", "frame", "parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame([["a", "b"]], columns=["text", "text"])
    source: Any = frame
    if kind == "csv":
        source = write(tmp_path / "d.csv", "text,text\na,b\n")
    elif kind == "json":
        source = write(tmp_path / "d.jsonl", '{"text": "a", "text": "b"}\n')
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "d.parquet")
        source = str(tmp_path / "d.parquet")
    assert "two columns are named 'text'" in failure(source)


# JSON


def test_json_cells_are_kept_as_they_are_written(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"when": "2020-01-01", "label": 1, "tags": ["a"], "ok": True, "m": [{"role": "user"}]},
        {"when": "2020-01-02", "label": "1", "tags": [], "ok": False, "m": [{"x": {"y": 1}}]},
        {"late": 1.5},
    ]
    table = one(write(tmp_path / "d.jsonl", "\n\n".join(map(json.dumps, rows))))
    assert table.columns == {
        name: [row.get(name) for row in rows]
        for name in ("when", "label", "tags", "ok", "m", "late")
    }


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}, {"a": 2}]',
        '[\n  {\n    "a": 1\n  },\n  {"a": 2}\n]\n',
        '{"a": 1}\n{"a": 2}',
        '{"data": [{"a": 1}, {"a": 2}], "version": "1"}',
        '{"a": [1, 2]}',
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_every_layout_of_json_is_read(tmp_path: Path, text: str, suffix: str) -> None:
    assert one(write(tmp_path / f"d.{suffix}", text)).columns == {"a": [1, 2]}


def test_one_row_whose_value_is_a_list_is_a_row(tmp_path: Path) -> None:
    table = one(write(tmp_path / "d.jsonl", '{"text": "a", "tags": ["x", "y"]}\n'))
    assert table.columns == {"text": ["a"], "tags": [["x", "y"]]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1}\n{"a": 2\n{"a": 3}', "line 2 is not JSON"),
        ('[{"a": 1},\n{"a": }]', "line 2 is not JSON"),
        ('{"a": 1}\n[1]', "line 2 is not an object"),
        ('{"a": 1}\nnull', "line 2 is not an object"),
        ("[1, 2]", "row 1 is not an object"),
        ('"text"', "does not hold a list of rows"),
        ('{"text": {"0": "a"},\n "label": {"0": "b"}}', "does not hold a list of rows"),
        ("[]", "no rows"),
        ("", "is empty"),
        ("\n \n", "is empty"),
    ],
)
def test_malformed_json_is_said_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in failure(write(tmp_path / "d.jsonl", text))


# Compression, several files, folders


def compressed(kind: str, name: str, content: bytes, path: Path) -> None:
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"folder/{name}", content)
            archive.writestr(f"__MACOSX/folder/._{name}", b"\x00")
        return
    pack: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
    }
    path.write_bytes(pack[kind](content))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_compressed_files_are_read(tmp_path: Path, kind: str, suffix: str) -> None:
    plain = tmp_path / f"d.{suffix}"
    frame = pd.DataFrame(ROWS)
    if suffix == "parquet":
        frame.to_parquet(plain)
    elif suffix.startswith("json"):
        frame.to_json(plain, orient="records", lines=suffix == "jsonl")
    else:
        frame.to_csv(plain, index=False, sep="\t" if suffix == "tsv" else ",")
    packed = tmp_path / f"d.{suffix}.{kind}"
    compressed(kind, plain.name, plain.read_bytes(), packed)
    table = one(str(packed))
    assert table.columns == one(str(plain)).columns
    assert table.columns["text"] == TEXTS
    assert table.notes == ()


def test_first_bytes_say_the_compression(tmp_path: Path) -> None:
    content = b"text,label\na,b\n"
    (tmp_path / "a.csv").write_bytes(gzip.compress(content))
    (tmp_path / "b.csv.gz").write_bytes(content)
    (tmp_path / "c.csv.gz").write_bytes(bz2.compress(content))
    for name, said in (("a.csv", "gzip"), ("b.csv.gz", "not compressed"), ("c.csv.gz", "bzip2")):
        table = one(str(tmp_path / name))
        assert table.columns == {"text": ["a"], "label": ["b"]}
        assert said in table.notes[0]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip"])
def test_a_truncated_file_is_said_to_be_damaged(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"d.csv.{kind}"
    content = "text,label\n" + "\n".join(
        f"{np.random.default_rng(i).random()},b" for i in range(500)
    )
    compressed(kind, "d.csv", content.encode(), path)
    path.write_bytes(path.read_bytes()[:-200])
    message = failure(str(path))
    assert "is a damaged" in message
    assert "download it again" in message


def test_an_archive_of_several_files_is_refused(tmp_path: Path) -> None:
    assert "unpack it" in failure(write(tmp_path / "d.tar", "a"))
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("a.csv", "text\na\n")
        archive.writestr("b.csv", "text\nb\n")
    assert "holds 2 data files" in failure(str(tmp_path / "d.zip"))


def test_lists_and_patterns_join_files_in_order(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n')
    second = write(tmp_path / "b.jsonl", '{"text": "b"}\n')
    expected = {"text": ["a", "b"], "label": [1, None]}
    for source in ([first, second], str(tmp_path / "*.jsonl"), [Path(first), Path(second)]):
        table = one(source)
        assert table.columns == expected
        assert table.source == "a.jsonl and 1 more file"
        assert any("no row has the field 'label'" in note for note in table.notes)
    write(tmp_path / "a.csv", "text,label\na,1\n")
    write(tmp_path / "b.csv", "text,lable\nb,2\n")
    assert "has no column" in failure(str(tmp_path / "*.csv"))
    assert "b.jsonl" in failure([first, str(tmp_path / "b.jsnl")])
    assert "no file has such a name" in failure(str(tmp_path / "*.parquet"))
    write(tmp_path / "b.jsonl", '{"text": ')
    assert "b.jsonl line 1 is not JSON" in failure([first, second])


def test_a_folder_of_files_means_what_the_files_mean(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.csv", "text;label\nNA;007\n")
    write(folder / "test.csv", "text;label\nb;1\n")
    tables = read("data", str(folder))
    assert set(tables) == {"train", "test"}
    assert tables["train"].columns == {"text": ["NA"], "label": ["007"]}
    assert tables["test"].source == "set:test"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "datasets cannot read" in failure(str(empty))
    write(empty / "train.csv", "text,label\na\n")
    assert "train.csv line 2 has 1 field" in failure(str(empty))
    assert "no data given" in failure("")


def test_saved_datasets_are_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [0, 1, -1], "tags": [[0], [1, 0], []]},
        features=datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["neg", "pos"]),
                "tags": datasets.List(datasets.ClassLabel(names=["O", "B"])),
            }
        ),
    )
    expected = {
        "text": ["a", "b", "c"],
        "label": ["neg", "pos", None],
        "tags": [["O"], ["B", "O"], []],
    }
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "two"))
    assert one(str(tmp_path / "one")).columns == expected
    assert one(rows).columns == expected
    for source in (str(tmp_path / "two"), datasets.DatasetDict(train=rows, test=rows)):
        tables = read("data", source)
        assert set(tables) == {"train", "test"}
        assert tables["test"].columns == expected
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"cut")
    assert "save_to_disk" in failure(str(tmp_path / "one"))


def test_arrow_files_with_false_offsets_are_refused(tmp_path: Path) -> None:
    """Arrow reads where they point, and that ends the process."""
    rows = datasets.Dataset.from_dict({"text": ["aaaa", "bbbb", "cccc"]})
    rows.save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    raw = file.read_bytes()
    offsets = np.array([0, 4, 8, 12], np.int32).tobytes()
    assert raw.count(offsets) == 1
    shutil.copy(file, tmp_path / "rows.arrow")
    assert one(str(tmp_path / "rows.arrow")).columns == {"text": ["aaaa", "bbbb", "cccc"]}
    (tmp_path / "saved" / "cache-of-datasets.arrow").write_bytes(b"cut")
    assert one(str(tmp_path / "saved")).columns == {"text": ["aaaa", "bbbb", "cccc"]}
    false = np.array([0, 4, 2**30, 12], np.int32).tobytes()
    for path in (file, tmp_path / "rows.arrow"):
        path.write_bytes(raw.replace(offsets, false))
    for source in ("saved", "rows.arrow"):
        assert "out of bounds" in failure(str(tmp_path / source))


def test_image_folders_are_opened_but_not_decoded(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for i in range(2):
            PIL.Image.new("RGB", (4, 3), (i, 0, 0)).save(folder / f"{i}.png")
    table = one_split(read("data", str(tmp_path / "images")))
    assert sorted(table.columns["label"]) == ["cat", "cat", "dog", "dog"]
    assert [image.size for image in table.columns["image"]] == [(4, 3)] * 4
    (tmp_path / "images" / "dog" / "1.png").write_bytes(b"no image")
    message = failure(str(tmp_path / "images"))
    assert "1.png" in message
    assert "not a readable image" in message
    assert message.endswith("remove or replace it")


def one_split(tables: dict[str, Table]) -> Table:
    assert list(tables) == ["train"]
    return tables["train"]


def test_parquet_keeps_values(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "text": ["a", None, ""],
            "score": [1.5, float("nan"), 2.0],
            "ok": [True, False, True],
            "tags": [["a"], [], ["b", "c"]],
            "kind": pd.Categorical(["x", None, "y"]),
        }
    )
    frame.to_parquet(tmp_path / "d.parquet")
    expected = {
        "text": ["a", None, ""],
        "score": [1.5, None, 2.0],
        "ok": [True, False, True],
        "tags": [["a"], [], ["b", "c"]],
        "kind": ["x", None, "y"],
    }
    assert one(str(tmp_path / "d.parquet")).columns == expected
    assert one(frame).columns == expected
    content = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(content[:-10])
    assert "cannot be read as Parquet" in failure(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize("columns", [{}, {"text": [], "label": []}])
def test_parquet_without_rows_or_columns_has_no_rows(
    tmp_path: Path, columns: dict[str, list[str]]
) -> None:
    pd.DataFrame(columns, dtype="str").to_parquet(tmp_path / "d.parquet")
    assert "there are no rows in it" in failure(str(tmp_path / "d.parquet"))


def test_conll_lines_become_sentences(tmp_path: Path) -> None:
    text = "-DOCSTART- O\n\nEU B-ORG\nrejects O\n\n\nPeter B-PER\n"
    assert one(write(tmp_path / "d.conll", text)).columns == {
        "tokens": [["EU", "rejects"], ["Peter"]],
        "ner_tags": [["B-ORG", "O"], ["B-PER"]],
    }
    assert "line 2 has 1 fields" in failure(write(tmp_path / "e.bio", "EU B-ORG\nrejects\n"))
    message = failure(write(tmp_path / "f.bio", " ".join("12345\n")))
    assert "line 1 has 5 fields where 1 to 4 are expected" in message


def test_words_with_tags_in_a_text_file_are_no_texts(tmp_path: Path) -> None:
    text = "-DOCSTART-\n\nEU NNP B-ORG\nrejects VBZ O\n\nPeter NNP B-PER\nsays VBZ O\n"
    table = one(write(tmp_path / "d.txt", text))
    assert table.columns["ner_tags"] == [["B-ORG", "O"], ["B-PER", "O"]]
    assert "a word and its tags a line" in table.notes[0]
    assert one(write(tmp_path / "e.txt", "vitamin B-12\nplan O\nno tag\n")).column_names == ["text"]


def test_lines_of_text_are_rows(tmp_path: Path) -> None:
    table = one(write(tmp_path / "d.txt", "one\n\ntwo, three\n"))
    assert table.columns == {"text": ["one", "two, three"]}
    assert "one text a line" in table.notes[0]


# Objects


def test_lists_of_dicts_keep_values_and_lose_numpy(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": np.int64(1), "tags": np.array([1, 2])},
        {"text": pd.NA, "label": "1", "score": float("nan")},
    ]
    table = one(rows)
    assert table.columns == {
        "text": ["a", None],
        "label": [1, "1"],
        "tags": [[1, 2], None],
        "score": [None, None],
    }
    assert type(table.columns["label"][0]) is int
    assert "row 2 is not an object" in failure([{"text": "a"}, ["b"]])


def test_other_objects_are_refused_with_a_way_out() -> None:
    rows = datasets.Dataset.from_list([{"text": "a"}])
    assert "Dataset.from_list" in failure(rows.to_iterable_dataset())
    assert "DatasetDict" in failure({"text": ["a"]})
    assert "to_pandas" in failure(rows.data.table)
    assert "a DataFrame" in failure(3)
    assert "no rows" in failure([])
    assert "no rows" in failure(pd.DataFrame({"text": []}))


# What cannot be found


def test_paths_and_hub_ids_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text\na\n")
    message = failure(str(tmp_path / "trian.csv"))
    assert "no such file" in message
    assert "there is 'train.csv'" in message
    assert "no such file" in failure("nowhere.csv")
    assert "no such file" in failure("./nowhere")
    assert "no such file" in failure("a/b/c")
    assert "web address" in failure("https://example.org/d.csv")
    path = write(tmp_path / "d.xlsx", "PK\x03\x04")
    assert "unknown kind (.xlsx)" in failure(path)
    with pytest.raises(DataError, match="data_name='sst2': is only for hub datasets"):
        read("data", str(tmp_path / "train.csv"), name="sst2")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ValueError("Dataset 'a/b' is a gated dataset on the Hub."), "accept its terms"),
        (ValueError("Config name is missing.\nPlease pick one: ['x']"), "set data_name"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "check the name and the network"),
        (RuntimeError("Dataset scripts are no longer supported"), "refs/convert/parquet"),
    ],
)
def test_hub_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert remedy in failure("a/b")


def test_a_binary_file_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(bytes(range(256)) * 20)
    assert "binary" in failure(str(tmp_path / "d.csv"))


def test_reading_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("temp", "cache", "data"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "data" / "train.csv.gz", index=False)
    frame.to_parquet(tmp_path / "data" / "d.parquet")
    for source in ("data/train.csv.gz", "data/d.parquet", "data/*.gz"):
        assert one(str(tmp_path / source)).columns["text"] == TEXTS
    (tmp_path / "data" / "d.parquet").unlink()
    assert read("data", str(tmp_path / "data"))["train"].columns["text"] == TEXTS
    left = [path for name in ("temp", "cache") for path in (tmp_path / name).rglob("*")]
    assert left == []
    assert os.listdir(tmp_path / "data") == ["train.csv.gz"]


def test_importing_the_reader_imports_no_library() -> None:
    code = (
        "import sys, autopeft.tasks.reading as r; r.read('data', [{'a': 1}]);"
        "print(sorted({'datasets', 'pandas', 'pyarrow', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("d.csv", "<!DOCTYPE html>\n<html>404, not found</html>\n", "is a web page"),
        ("d.parquet", "version https://git-lfs.github.com/spec/v1\noid a\n", "git lfs pull"),
        ("d.parquet", "text,label\na,b\n", "is not a Parquet file"),
        ("d.csv", "sep=;\ntext;label\na;b\n", "remove the first line"),
        ("d.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "line 2 holds half a character"),
        ("data", "text,label\na,b\n", "unknown kind (no suffix)"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, text: str, problem: str) -> None:
    assert problem in failure(write(tmp_path / name, text))


def test_content_beats_the_name(tmp_path: Path) -> None:
    pd.DataFrame(ROWS).to_parquet(tmp_path / "a.csv")
    write(tmp_path / "b.csv", "".join(json.dumps(row) + "\n" for row in ROWS))
    for name, kind in (("a.csv", "Parquet"), ("b.csv", "JSON")):
        table = one(str(tmp_path / name))
        assert table.columns["text"] == TEXTS
        assert f"{kind} file, in spite of its name" in table.notes[0]


def test_names_may_look_like_patterns(tmp_path: Path) -> None:
    assert one(write(tmp_path / "d[1].csv", "text,label\na,b\n")).columns["text"] == ["a"]


def test_files_of_a_folder_that_are_not_read_are_said(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.csv", f"text\n{i}\n")
    write(tmp_path / "about.json", '{"title": "late"}\n')
    write(tmp_path / "LICENSE.txt", "free\n")
    table = one(str(tmp_path))
    assert table.columns["text"] == ["0", "1", "2"]
    why = "because the folder's rows are in files of one kind (.csv)"
    assert any(f"LICENSE.txt, about.json left out, {why}" in note for note in table.notes)
    write(tmp_path / "train.csv", "text\na\n")
    table = one(str(tmp_path))
    assert table.columns["text"] == ["a"]
    why = "because the folder's splits are in other files"
    assert any(f"0.csv, 1.csv, 2.csv left out, {why}" in note for note in table.notes)


def test_rows_in_files_of_two_kinds_are_not_halved(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text\na\n")
    write(tmp_path / "b.jsonl", '{"text": "b"}\n')
    problem = "same columns in files of two kinds, b.jsonl and a.csv; name all of them"
    assert problem in failure(str(tmp_path))
    assert one(str(tmp_path / "*")).columns["text"] == ["a", "b"]
    (tmp_path / "a.csv").rename(tmp_path / "train.csv")
    table = one(str(tmp_path))  # Its name says which file it is.
    assert table.columns["text"] == ["a"]
    assert any("b.jsonl left out" in note for note in table.notes)


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in ("/dev/zero", str(tmp_path / "pipe"), [tmp_path / "pipe"]):
        assert "is a pipe or device, not a file" in failure(source)
    assert "data='/': is the root of the file system" in failure("/")


def test_a_format_for_tensors_does_not_change_values() -> None:
    rows = datasets.Dataset.from_list([{"x": [1, 2], "y": 1}]).with_format("numpy")
    table = one(rows.select([0]))
    assert table.columns == {"x": [[1, 2]], "y": [1]}
    assert type(table.columns["y"][0]) is int


def test_images_in_parquet_are_opened(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 3)).save(buffer, "PNG")
    cells = [{"bytes": buffer.getvalue(), "path": "a.png"}, None]
    pd.DataFrame({"image": cells, "label": ["a", "b"]}).to_parquet(tmp_path / "d.parquet")
    opened, missing = one(str(tmp_path / "d.parquet")).columns["image"]
    assert opened.size == (4, 3)
    assert missing is None


def test_a_class_without_a_name_is_refused(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["neg", "pos"])})
    named = datasets.Dataset.from_dict({"label": [0, 1, -1]}, features=features)
    assert read("data", named)["train"].columns["label"] == ["neg", "pos", None]
    metadata = named.data.table.schema.metadata
    path = tmp_path / "labels.parquet"
    parquet.write_table(pa.table({"label": [0, 5]}).replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match="row 2 of the column 'label' is class 5"):
        read("data", str(path))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip"])
def test_an_archive_made_to_fill_a_disk_is_refused(tmp_path: Path, kind: str) -> None:
    text = b"text,label\n" + b"a" * (70 * 2**20)
    path = tmp_path / f"rows.csv.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("rows.csv", text)
    else:
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]
        path.write_bytes(pack(text))
    with pytest.raises(DataError, match="more than 250 times its own size"):
        read("data", str(path))


def test_the_size_of_a_file_is_limited_by_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\n" + b"a,b\n" * 1000))
    assert read("data", str(path))["train"].n_rows == 1000
    with pytest.raises(DataError, match=r"larger than 2.93 KiB.*max_data_gb"):
        read("data", str(path), max_bytes=3000)
    plain = tmp_path / "rows.csv"
    plain.write_bytes(b"text,label\n" + b"a,b\n" * 1000)
    with pytest.raises(DataError, match="max_data_gb"):
        read("data", str(plain), max_bytes=3000)


def test_a_billion_rows_of_one_value_are_not_written_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": pa.array(["a"] * 100_000)}), path)
    assert path.stat().st_size < 50_000
    with pytest.raises(DataError, match="max_data_gb"):
        read("data", str(path), max_bytes=50_000)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'[{"text": ' + b"1" * 5000 + b"}]", "a number of 5000 digits"),
        (b'[{"text": ' + b"[" * 500 + b"]" * 500 + b"}]", "nested deeper than 64"),
        (b"[" * 20_000, "without end|nested deeper"),
        (
            json.dumps([{f"name {i}": 1} for i in range(10_001)]).encode(),
            "more than 10,000 different fields",
        ),
    ],
)
def test_hostile_rows_are_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read("data", str(tmp_path / "rows.json"))
