"""Adapters made by plain peft, scored and judged; each score is computed again outside."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

import autopeft
from autopeft import cli
from autopeft.comparing.further import check_finite
from autopeft.comparing.show import comparison_text
from autopeft.errors import UserError
from autopeft.utils.quiet import quiet_peft, quiet_transformers

pytestmark = pytest.mark.filterwarnings("default")

Compared = tuple[autopeft.AdapterComparison, Path]
_LABELS = ("bad", "good")
_QV = ["query", "value"]


def _rows(data: Path) -> tuple[list[str], torch.Tensor]:
    with data.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["text"]]
    return [row["text"] for row in rows], torch.tensor([_LABELS.index(r["label"]) for r in rows])


def _batch(model: Path, texts: list[str]) -> Any:
    return hf.AutoTokenizer.from_pretrained(model)(texts, padding=True, return_tensors="pt")


def _classifier(folder: Path) -> Any:
    with quiet_transformers():
        torch.manual_seed(1)
        return hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


def _train(model: Any, batch: Any, labels: torch.Tensor, steps: int) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


_LORA: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": _QV}
_CONFIGS: dict[str, tuple[Callable[[], peft.PeftConfig], int]] = {
    "better": (lambda: peft.LoraConfig(r=4, **_LORA), 40),
    "worse": (lambda: peft.LoraConfig(r=4, **_LORA), 0),
    "ia3": (
        lambda: peft.IA3Config(
            task_type="SEQ_CLS", target_modules=["value"], feedforward_modules=[]
        ),
        10,
    ),
    "pattern": (lambda: peft.LoraConfig(r=2, rank_pattern={"layer.1.*value": 6}, **_LORA), 10),
}


@pytest.fixture(scope="module")
def adapters(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Adapters by name: a trained and a zero LoRA, IA3, unlike ranks, a copy, a merged model."""
    folder = tmp_path_factory.mktemp("adapters")
    texts, labels = _rows(tiny_data)
    batch = _batch(tiny_model, texts[:160])
    for name, (config, steps) in _CONFIGS.items():
        with quiet_peft():
            model = peft.get_peft_model(_classifier(tiny_model), config())
        _train(model, batch, labels[:160], steps)
        model.save_pretrained(folder / name)
    shutil.copytree(folder / "better", folder / "copy")
    merged = peft.PeftModel.from_pretrained(_classifier(tiny_model), folder / "better")
    merged.merge_and_unload().save_pretrained(folder / "merged")
    return {path.name: path for path in folder.iterdir()}


def _outside(model: Any, folder: Path, data: Path) -> float:
    texts, labels = _rows(data)
    with torch.no_grad():
        found = model.eval()(**_batch(folder, texts)).logits.argmax(dim=1)
    return float((found == labels).double().mean())


@pytest.fixture(scope="module")
def found(
    adapters: dict[str, Path],
    tiny_model: Path,
    tiny_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Compared:
    """All of them on all rows, and the folder that was written."""
    output = tmp_path_factory.mktemp("compared") / "out"
    settings: dict[str, Any] = {"model": str(tiny_model), "data": str(tiny_data), "output": output}
    return autopeft.compare(list(adapters.values()), held_out=True, **settings), output


def test_scores_are_those_of_plain_peft(
    found: Compared, adapters: dict[str, Path], tiny_model: Path, tiny_data: Path
) -> None:
    compared, _ = found
    assert compared.n_rows == 400
    for name, folder in adapters.items():
        if name == "merged":
            model = hf.AutoModelForSequenceClassification.from_pretrained(folder)
        else:
            model = peft.PeftModel.from_pretrained(_classifier(tiny_model), folder)
        assert compared.entry(name).quality == _outside(model, tiny_model, tiny_data), name


def test_the_better_one_is_named_and_copies_are_too_close_to_call(found: Compared) -> None:
    compared, _ = found
    best = {"better", "copy", "merged"}
    assert {entry.name for entry in compared.entries[:3]} == best
    assert compared.judgement.headline.startswith("Too close to call: ")
    shown = {(p.better, p.worse) for p in compared.judgement.pairs if p.is_shown}
    assert all((name, "worse") in shown for name in best)
    assert not any(a in best and b in best for a, b in shown)
    assert any("they score every row alike" in line for line in compared.judgement.lines)


def test_what_maps_to_a_plan_is_priced_and_all_parameters_are_counted(
    found: Compared, adapters: dict[str, Path]
) -> None:
    compared, _ = found
    head = 2 * 16 + 2
    counts = {"better": 2 * 2 * 4 * 32, "ia3": 2 * 16, "pattern": 3 * 2 * 32 + 6 * 32}
    for name, count in counts.items():
        entry = compared.entry(name)
        assert entry.trainable_params == count + head
        assert entry.price.trainable_params == count + head
        assert entry.price.peak_memory_bytes > 0
    parts = "lora r2 @ q,v in 0; lora r2 @ q in 1; lora r6 @ v in 1"
    assert sorted(compared.entry("pattern").method.split("; ")) == sorted(parts.split("; "))
    merged = compared.entry("merged")
    assert merged.trainable_params is None
    assert merged.price is None
    assert merged.file_bytes == (adapters["merged"] / "model.safetensors").stat().st_size
    base = compared.entry("no adapter")
    assert "untrained" in base.note
    assert not base.is_on_front
    assert any(compared.entry(name).is_on_front for name in counts)


def test_json_and_plot_are_written(found: Compared) -> None:
    compared, output = found
    row = json.loads((output / "compare.json").read_text(encoding="utf-8"))
    assert row["headline"] == compared.judgement.headline
    assert [entry["name"] for entry in row["entries"]] == [e.name for e in compared.entries]
    assert "not the seeds" in row["remarks"][1]
    assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert list(compared.to_pandas().index) == [entry.name for entry in compared.entries]


def _run(*words: str) -> str:
    done = CliRunner().invoke(cli.app, ["compare", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_the_command_names_a_planted_better_adapter(
    adapters: dict[str, Path], tiny_model: Path, tiny_data: Path
) -> None:
    given = [str(adapters["better"]), str(adapters["worse"])]
    text = _run(*given, "--model", str(tiny_model), "--data", str(tiny_data))
    assert "better is the best: its accuracy is higher" in text
    assert "80 rows of sentences.csv scored: the test split" in text
    assert "not the seeds" in text


@pytest.fixture(scope="module")
def decoders(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path]]:
    """A file of texts, and LoRAs of a Llama: one trained on such texts, one zero."""
    folder = tmp_path_factory.mktemp("decoders")
    data = folder / "texts.jsonl"
    rows = [{"prompt": f"the film was {i}", "completion": "a good plot"} for i in range(60)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer("the film was [UNK] a good plot [SEP]", return_tensors="pt").input_ids
    for name, steps in (("trained", 20), ("zero", 0)):
        model = hf.AutoModelForCausalLM.from_pretrained(tiny_llama)
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
        adapted = peft.get_peft_model(model, config)
        _train(adapted, {"input_ids": ids}, ids, steps)
        adapted.save_pretrained(folder / name)
    return data, {"trained": folder / "trained", "zero": folder / "zero"}


def test_a_decoders_adapters_are_compared_with_the_base_model(
    decoders: tuple[Path, dict[str, Path]], tiny_llama: Path
) -> None:
    data, folders = decoders
    compared = autopeft.compare(
        [folders["trained"], folders["zero"]], model=str(tiny_llama), data=str(data), task="sft"
    )
    base, zero = compared.entry("no adapter"), compared.entry("zero")
    assert not base.note
    assert zero.metrics["loss"] == pytest.approx(base.metrics["loss"], abs=1e-6)
    assert compared.entry("trained").metrics["loss"] < base.metrics["loss"]
    shown = {(p.better, p.worse) for p in compared.judgement.pairs if p.is_shown}
    assert ("trained", "no adapter") in shown
    assert compared.judgement.headline.startswith("trained is the best")


@pytest.fixture(scope="module")
def forgetting(
    decoders: tuple[Path, dict[str, Path]],
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Compared:
    """The decoders' adapters with a text to retain, of windows of unlike length."""
    data, folders = decoders
    folder = tmp_path_factory.mktemp("retained")
    words = "bad poor awful scene actor very so the film".split()
    lines = [" ".join(words[n % 7 : n % 7 + 2 + n % 3]) for n in range(20)]
    own = {"name": "own", "task": "sft", "metric": "token_accuracy"}
    (folder / "kept.csv").write_text("text,source\n" + "".join(f"{w},x\n" for w in lines))
    found = autopeft.compare(
        [folders["trained"], folders["zero"]],
        model=str(tiny_llama),
        data=str(data),
        task="sft",
        retain=str(folder / "kept.csv"),
        also={**own, "data": str(folder / "kept.csv")},
        output=folder / "out",
    )
    return found, folder


def test_forgetting_is_the_loss_over_the_bare_bases(
    forgetting: Compared, decoders: tuple[Path, dict[str, Path]], tiny_llama: Path
) -> None:
    found, folder = forgetting
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_llama)
    lines = [line.split(",")[0] for line in (folder / "kept.csv").read_text().splitlines()[1:]]

    def row_losses(model: torch.nn.Module) -> list[tuple[float, int]]:
        ids = [tokenizer(f"{line}[SEP]", return_tensors="pt").input_ids for line in lines]
        return [(float(model(input_ids=i, labels=i).loss), i.shape[1] - 1) for i in ids]

    def total(losses: list[tuple[float, int]]) -> float:
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    with quiet_transformers(), quiet_peft(), torch.inference_mode():
        bare = row_losses(hf.AutoModelForCausalLM.from_pretrained(tiny_llama).eval())
        fresh = hf.AutoModelForCausalLM.from_pretrained(tiny_llama)
        adapted = peft.PeftModel.from_pretrained(fresh, decoders[1]["trained"]).eval()
        trained_rows = row_losses(adapted)
        over = total(trained_rows) - total(bare)
    trained = found.entry("trained").further["forgetting"]
    assert trained.value == pytest.approx(over, abs=1e-5)
    assert trained.interval is not None
    low, high = trained.interval
    assert low < over < high
    # It is paired by rows, each as heavy as it has tokens.
    pairs = zip(trained_rows, bare, strict=True)
    parts = [n * (loss - before - over) for (loss, n), (before, _) in pairs]
    error = math.sqrt(sum(part**2 for part in parts)) / sum(n for _, n in bare)
    assert 1.7 * error < (high - low) / 2 < 2.5 * error


@pytest.mark.parametrize("metric", ["loss", "perplexity", "token_accuracy"])
def test_a_difference_is_that_of_the_scores_where_rows_have_unlike_lengths(
    metric: str, decoders: tuple[Path, dict[str, Path]], tiny_llama: Path, tmp_path: Path
) -> None:
    """The mean over rows is another number than that over tokens, and may have another sign."""
    words = "bad poor awful scene actor very so the film plot".split()
    lines = [" ".join((words[n % 9 :] + words)[: 2 + n % 8]) + f" {n}" for n in range(80)]
    (tmp_path / "uneven.csv").write_text("text,source\n" + "".join(f"{w},x\n" for w in lines))
    found = autopeft.compare(
        list(decoders[1].values()),
        model=str(tiny_llama),
        data=str(tmp_path / "uneven.csv"),
        task="sft",
        metric=metric,
        held_out=True,
    )
    for pair in found.judgement.pairs:
        better, worse = found.entry(pair.better).quality, found.entry(pair.worse).quality
        # Perplexities are compared by their logarithms.
        of = math.log if metric == "perplexity" else float
        gain = found.objective.sign() * (of(better) - of(worse))
        assert pair.found.gain == pytest.approx(gain, abs=1e-5)
        assert pair.found.low <= pair.found.gain <= pair.found.high


def test_an_adapter_that_does_nothing_forgets_nothing(forgetting: Compared) -> None:
    found, _ = forgetting
    assert found.entry("no adapter").further["forgetting"].value == 0
    zero = found.entry("zero").further["forgetting"]
    assert zero.value == pytest.approx(0, abs=1e-6)
    assert zero.interval == pytest.approx((0, 0), abs=1e-6)
    assert found.entry("zero").further["own.token_accuracy"].value == pytest.approx(
        found.entry("no adapter").further["own.token_accuracy"].value
    )


def test_forgetting_is_in_the_table_the_files_and_the_plots(forgetting: Compared) -> None:
    found, folder = forgetting
    console = Console(width=120)
    with console.capture() as capture:
        console.print(comparison_text(found))
    text = capture.get()
    assert "forgetting is over the base model" in text
    assert "forgetting of zero: +0.0000 (+0.0000 to +0.0000): not shown" in text
    trained = found.entry("trained").further["forgetting"]
    assert trained.interval is not None
    low, high = trained.interval
    answer = "shown" if low > 0 or high < 0 else "not shown"
    line = f"forgetting of trained: {trained.value:+.4f} ({low:+.4f} to {high:+.4f}): {answer}\n"
    assert line in text
    assert "own.token_accuracy of no adapter: 0." in text
    assert "own.token_accuracy" in text
    assert "on the front of quality, size, forgetting and own.token_accuracy" in text
    row = json.loads((folder / "out" / "compare.json").read_text())
    assert [each["name"] for each in row["further"]] == ["forgetting", "own.token_accuracy"]
    told = {e["name"]: e["further"]["forgetting"]["value"] for e in row["entries"]}
    assert told["trained"] == found.entry("trained").further["forgetting"].value
    assert (folder / "out" / "compare_forgetting.png").read_bytes().startswith(b"\x89PNG")
    table = found.to_pandas()
    cells = table.loc["trained"].to_dict()
    assert cells["forgetting_low"] < cells["forgetting"] < cells["forgetting_high"]


# Mistakes


def _edited(**change: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return edit


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"x")


def _headless(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if not n.endswith("classifier.bias")}, path)


def _without_head(folder: Path) -> None:
    """As an export for a server that takes no head."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    heads = [name for name in tensors if "classifier" in name]
    save_file({name: tensors.pop(name) for name in heads}, folder / "head.safetensors")
    save_file(tensors, path)
    _edited(modules_to_save=None, task_type=None)(folder)


def _emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_emptied, "holds no adapter and no model"),
        (_pickled, "is a pickle"),
        (_headless, r"lacks 'base_model\.model\.classifier\.bias'; save or download it again"),
        (
            _without_head,
            "apart, in head.safetensors; name the run that it is of, or export it with",
        ),
        (_edited(peft_type="FUTURE"), "is of the type FUTURE, which peft"),
        (_edited(base_model_name_or_path="org/other"), "was trained on org/other, not on"),
        (_edited(r=3), "does not fit the base model"),
        (_edited(target_modules=["query", "value", "key"]), "lacks 4 tensors"),
        (_edited(target_modules=["query"]), "has, and its type has no, 4 tensors"),
        (_edited(target_modules=["q_proj"]), "does not fit the base model"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(
    change: Callable[[Path], None],
    problem: str,
    adapters: dict[str, Path],
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["worse"], folder)
    change(folder)
    with pytest.raises(UserError, match=problem) as caught:
        autopeft.compare(folder, model=str(tiny_model), data=str(tiny_data))
    assert len(str(caught.value).splitlines()) == 1


def test_a_score_that_is_no_number_is_refused_not_ranked(
    decoders: tuple[Path, dict[str, Path]], tiny_llama: Path, tmp_path: Path
) -> None:
    data, folders = decoders
    broken = tmp_path / "broken"
    shutil.copytree(folders["zero"], broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    for tensor in tensors.values():
        tensor.fill_(3e38)  # Finite, but no product of two is.
    save_file(tensors, broken / "adapter_model.safetensors", {"format": "pt"})
    settings: dict[str, Any] = {"model": str(tiny_llama), "data": str(data), "held_out": True}
    with pytest.raises(UserError, match="/broken': has a loss of nan; leave it out"):
        autopeft.compare([broken, folders["trained"]], **settings)
    with pytest.raises(UserError, match="adapter='x': has a forgetting of inf; leave it out"):
        check_finite("x", "forgetting", math.inf)


def test_a_lora_of_rank_1_with_further_options_of_pefts_is_compared(
    decoders: tuple[Path, dict[str, Path]], tiny_llama: Path, tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=1, target_modules=["q_proj"], trainable_token_indices=[7]
    )
    bare = hf.AutoModelForCausalLM.from_pretrained(tiny_llama)
    peft.get_peft_model(bare, config).save_pretrained(tmp_path / "odd")
    settings: dict[str, Any] = {"model": str(tiny_llama), "data": str(decoders[0])}
    found = autopeft.compare(tmp_path / "odd", held_out=True, **settings)
    losses = [found.entry(name).metrics["loss"] for name in ("odd", "no adapter")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_model_of_another_shape_or_without_a_head_is_refused(
    tiny_model: Path, tiny_llama: Path, tiny_data: Path
) -> None:
    settings: dict[str, Any] = {"model": str(tiny_model), "data": str(tiny_data)}
    with pytest.raises(UserError, match=r"is no copy of .*: model_type is llama, not bert"):
        autopeft.compare(tiny_llama, **settings)
    with pytest.raises(UserError, match="has no weights for classifier"):
        autopeft.compare(tiny_model, **settings)
    with pytest.raises(UserError, match="no such folder"):
        autopeft.compare("nowhere", **settings)
    with pytest.raises(UserError, match="no adapter is named"):
        autopeft.compare([], **settings)
