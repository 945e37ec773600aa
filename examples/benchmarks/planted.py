"""Two data sets whose right answer is known: one site alone matters, or nothing can be learned.

    python examples/benchmarks/planted.py --kind win --output runs/planted
    python examples/benchmarks/planted.py --kind null --output runs/null

In `win`, movie snippets are labeled by MiniLM itself (the side of the first principal component of
its mean-pooled states on which a text falls). Then 97 % of the gains and shifts of the second
LayerNorm of one block are set to 0, so that nothing else passes to the blocks above it. Training
that one LayerNorm brings them back; a low-rank update has to work around it. So a search should
find the site, and say that no LoRA of its size comes near. In `null` the labels are shuffled: no
search may say so. Prints the verdict, and for each confirmed member whether it adapts the planted
site. About 8 minutes on two cores with the default budget; one seed.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import autopeft

SITE = (1, "encoder.layer.1.output.LayerNorm")
"""Block and module of the planted site."""

_LOST = 0.97
"""Share of its gains and shifts that are lost."""

_N_TEXTS = 3500


def main() -> None:
    """Makes the data, searches, prints what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=("win", "null"), default="win")
    parser.add_argument("--cache", default="~/.cache/autopeft", help="folder of models and data")
    parser.add_argument("--budget", default="7m45s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/planted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(options.output)
    folder.mkdir(parents=True)
    model = plant(Path(options.cache).expanduser(), folder, options.kind, options.seed)
    result = autopeft.search(
        model=str(model),
        data=str(folder / "data.csv"),
        output=str(folder / "search"),
        budget=options.budget,
        seed=options.seed,
        batch_size=16,
        max_length=48,
        max_train_rows=2000,
        max_validation_rows=400,
        max_test_rows=1000,
    )
    Console().print(result.verdict.text)
    Console().print(_table(result))


def plant(cache: Path, folder: Path, kind: str, seed: int) -> Path:
    """Write the data, and for `win` the damaged model; return the model's folder."""
    source = cache / "all-MiniLM-L6-v2"
    with (cache / "movie_snippets.csv").open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:_N_TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source).eval()
    states = _pooled(model, tokenizer, texts)
    states -= states.mean(dim=0)
    labels = (states @ _directions(states) > 0).long().flatten().numpy()
    if kind == "null":
        labels = np.random.default_rng(seed).permutation(labels)
    with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((text, "ab"[label]) for text, label in zip(texts, labels, strict=True))
    if kind == "null":
        return source
    norm = model.get_submodule(SITE[1])
    assert isinstance(norm, torch.nn.LayerNorm)
    lost = torch.rand(len(norm.weight), generator=torch.Generator().manual_seed(seed)) < _LOST
    with torch.no_grad():
        norm.weight[lost] = 0.0
        norm.bias[lost] = 0.0
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def _directions(rows: Tensor) -> Tensor:
    """Return the first right singular vector of a matrix, shape (columns, 1)."""
    return torch.linalg.svd(rows, full_matrices=False).Vh[:1].T


@torch.no_grad()
def _pooled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Tensor:
    """Return the mean last hidden state of each text, shape (len(texts), width)."""
    found = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            list(texts[start : start + 64]),
            padding=True,
            truncation=True,
            max_length=48,
            return_tensors="pt",
        )
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def _table(result: autopeft.SearchResult) -> Table:
    table = Table("member", *result.front[0].objectives, "sites", "the planted site")
    for member in result.front:
        specs = member.candidate.plan.specs
        adapts = any((spec.layer, spec.role) == (SITE[0], "norm") for spec in specs)
        values = [f"{value:.4g}" for value in member.objectives.values()]
        table.add_row(member.digest[:8], *values, str(len(specs)), "yes" if adapts else "no")
    return table


if __name__ == "__main__":
    main()
