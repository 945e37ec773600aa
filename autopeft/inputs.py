"""What a search was begun with: digests of its data and its model.

A search that goes on with other rows, or with another model under the same name, would compare
numbers that cannot be compared; and rows that were trained on would be among those of the test.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopeft.errors import DataError, ModelError, UserError

_BLOCK, _N_BLOCKS = 2**16, 16
"""Of a file of weights, so many bytes are read at so many places; reading all takes minutes."""

_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "preprocessor_config.json", "processor_config.json"),
)
_WEIGHTS = ("*.safetensors", "*.bin")
_BESIDE = (
    *("generation_config.json", "modules.json", "1_Pooling/config.json"),
    *("*.py", "*.model", "*.spm"),
)
"""Other files of a model's folder that decide what it computes, writes or reads."""


@dataclass(frozen=True)
class Inputs:
    """Digests of what a search was begun with; "": not known.

    Attributes:
        data: The encoded rows of all splits, in order.
        rows: Which source rows are in which split.
        model: The configuration, and samples of the weights.
        tokenizer: The files of tokenizer, chat template and processor.
        second: Quality -> the rows that measure it, and how (settings `retain`, `also`).
        beside: The model's generation config and pooling, and code of its own.
        code: Setting -> the code of the user's own part that it names, such as a metric.
    """

    data: str = ""
    rows: str = ""
    model: str = ""
    tokenizer: str = ""
    second: Mapping[str, str] = field(default_factory=dict)
    beside: str = ""
    code: Mapping[str, str] = field(default_factory=dict)

    def check_same(self, now: Inputs, *, model: str, data: object, joins: bool = False) -> None:
        """Check that a search that is resumed, or joins others, has what it was begun with.

        Args:
            now: What it has now.
            model: The setting, for a message.
            data: Likewise.
            joins: Whether it joins others: then nothing need have changed, and it has no folder.

        Raises:
            UserError: naming what differs and the remedy.
        """
        changed = {
            name: problem
            for name, problem in _PROBLEMS.items()
            if (before := getattr(self, name)) and (after := getattr(now, name)) and before != after
        }
        if not changed:
            return
        # Another tokenizer makes other rows: the first that differs is the cause.
        name, problem = next(iter(changed.items()))
        if name == "second":
            setting, value = _second_changed(self.second, now.second)
        else:
            is_data = name in ("rows", "data")
            setting, value = ("data", str(data)) if is_data else ("model", model)
        error: type[UserError] = ModelError if setting == "model" else DataError
        if joins:
            raise error(setting, value, f"the study was begun with {_OTHERS[name]}", SAME)
        what = f"its file, {_ANEW}" if name == "second" else f"the {setting}, {_ANEW}"
        raise error(setting, value, problem, f"restore {what}")

    def changed_code(self, now: Inputs) -> list[str]:
        """Return the settings whose code is another one now.

        It is told and not refused: who mends a function goes on with the search that it stopped.
        """
        return [name for name, kept in self.code.items() if now.code.get(name, kept) != kept]


def _second_changed(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str]:
    """Return setting and name of the first further quality that would be measured otherwise."""
    names = [name for name in (*before, *now) if before.get(name) != now.get(name)]
    return "also" if "." in names[0] else "retain", names[0]


_ANEW = "or begin a new search with --warm-start on this folder"


_PROBLEMS = {
    "model": "configuration or weights are not those that the search was begun with",
    "tokenizer": "tokenizer or chat template are not those that the search was begun with",
    "beside": "generation config, pooling or code are not those that the search was begun with",
    "second": "changed since the search was begun: its trials were scored on other rows",
    "rows": "changed since the search was begun: rows of the test would have been trained on",
    "data": "changed since the search was begun: the rows have other contents",
}
"""Digest -> what is wrong if it differs."""

_OTHERS = {
    "model": "another configuration or other weights",
    "tokenizer": "another tokenizer or chat template",
    "beside": "another generation config, pooling or code of the model's",
    "second": "other rows for it",
    "rows": "other rows in train, validation and test",
    "data": "rows of other contents",
}
"""Digest -> what others have in a study that a search would join."""

SAME = "use the same, or another --study-name"
"""What a search does that would join others and differs from them."""


def model_digests(model: str) -> tuple[str, str]:
    """Return digests of a model's folder: of configuration and weights, and of the tokenizer.

    Both are "" for a hub id: its files are those of a revision.
    """
    folder = Path(model)
    if not folder.is_dir():
        return "", ""
    weights = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    tokenizer = (folder / name for name in _TOKENIZER)
    return files_digest([folder / "config.json", *weights]), files_digest(tokenizer)


def beside_digest(model: str) -> str:
    """Return a digest of what else is in a model's folder; "" for a hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return ""
    return files_digest(sorted({path for pattern in _BESIDE for path in folder.glob(pattern)}))


def code_digest(part: Any) -> str:
    """Return a digest of the module that defines a part, but for its comments and layout.

    "" where there is no file of it, or the part is autopeft's own.
    """
    module = getattr(part, "__module__", None) or ""
    file = getattr(sys.modules.get(module), "__file__", None)
    # Another script may resume what one has begun.
    if module == "__main__" or module.partition(".")[0] == "autopeft" or file is None:
        return ""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):  # It is not of Python, or was changed just now.
        return ""
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def files_digest(paths: Iterable[Path]) -> str:
    """Return a digest of the files among these: all of small ones, samples of large ones."""
    found = hashlib.sha256()
    for path in filter(Path.is_file, paths):
        size = path.stat().st_size
        found.update(f"{path.name}:{size}:".encode())
        # All of a small file; of a large one, blocks from its beginning to its end.
        last = max(0, size - _BLOCK)
        step = _BLOCK if size <= _N_BLOCKS * _BLOCK else last // (_N_BLOCKS - 1)
        with path.open("rb") as file:
            for start in (*range(0, last, step), last):
                file.seek(start)
                found.update(file.read(_BLOCK))
    return found.hexdigest()[:16]


def rows_digest(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a digest of which source rows are in which split; "" without splits."""
    rows = {name: list(split["rows"]) for name, split in sorted(splits.items())}
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16] if rows else ""
