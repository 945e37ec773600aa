"""What one GPU does: steps, packs, cache, memory prices and trials an hour, at real widths.

    python examples/benchmarks/gpu.py --output gpu.json

Needs one GPU and no hub: decoders of 0.5, 3 and 8 billion parameters are made from their
configuration with random weights, the texts are random tokens. Five tables:

1. a training step of a full-depth LoRA at equal batch: HF Trainer with peft (bf16), TRL and Unsloth
   (`pip install unsloth`, in a process of its own) where they are installed, and autopeft; tokens
   a second, and the allocator's peak;
2. the throughput of 1, 4, 8 and 16 LoRAs that share a forward pass, beside one after another;
3. a step with the lower half of the blocks frozen, with and without the activation cache;
4. `peak_memory_bytes` of the price beside what the allocator held, for every method;
5. trials an hour: attach, train, score.

`--shapes 0.5B` leaves the larger ones out. `--shapes tiny --device cpu` checks the command on a
machine without a GPU; its numbers say nothing about one, and memory is not compared.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from autopeft import methods
from autopeft.costs.plan_rules import is_legal
from autopeft.errors import UserError
from autopeft.methods import LINEAR_ROLES
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.profiling.measure import price_table
from autopeft.tasks.data import EncodedSplit, TaskData
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.training.activation_cache import ActivationCache
from autopeft.training.multi_trainer import MultiTrainer
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer

_RANK = 16
_PACKS = (1, 4, 8, 16)
_ENDLESS = 100_000
"""Steps of a training that the benchmark ends itself."""


@dataclass(frozen=True)
class Shape:
    """A decoder, and a batch that suits it.

    Attributes:
        config: Sizes, as `LlamaConfig` names them.
        rows: Rows of a batch.
        length: Tokens of a row.
    """

    config: dict[str, int]
    rows: int
    length: int


def _llama(
    width: int, ffn: int, blocks: int, heads: int, kv: int, vocabulary: int
) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
    }


SHAPES = {
    "tiny": Shape(_llama(32, 64, 4, 4, 2, 128), 4, 16),
    "0.5B": Shape(_llama(896, 4864, 24, 14, 2, 151_936), 8, 512),
    "3B": Shape(_llama(3072, 8192, 28, 24, 8, 128_256), 8, 512),
    "8B": Shape(_llama(4096, 14_336, 32, 32, 8, 128_256), 4, 512),
}
"""Widths and depths of well-known decoders."""


@dataclass(frozen=True)
class Bench:
    """A model on the device, and rows to train it on.

    Attributes:
        name: Its shape's.
        shape: The shape.
        backbone: The model, frozen, in bf16 on an accelerator.
        setup: How it is trained.
        steps: Steps that are timed, after a third as many that are not.
    """

    name: str
    shape: Shape
    backbone: Backbone
    setup: TrainingSetup
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.shape.rows * self.shape.length

    def plan(self, lowest: int = 0, rank: int = _RANK) -> AdapterPlan:
        """Return LoRA on all linear modules from a block up."""
        topology = self.backbone.topology
        return AdapterPlan(
            LayerSpec(layer, role, "lora", rank)
            for layer in range(lowest, topology.n_layers)
            for role in LINEAR_ROLES
            if role in topology.shapes
        )

    def candidate(self, plan: AdapterPlan, *, rows: int = 0, steps: int = _ENDLESS) -> Candidate:
        """Return a plan with a constant small rate."""
        return Candidate(plan, TrainSettings(1e-4, steps=steps, batch_size=rows or self.shape.rows))


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "3B", "8B"])
    parser.add_argument("--device", default="", help="instead of this machine's accelerator")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("--unsloth", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.device and not torch.accelerator.is_available():
        parser.error(
            "this machine has no accelerator; --device cpu --shapes tiny checks the command"
        )
    if not options.device and torch.accelerator.device_count() > 1:
        parser.error("Trainer would use all GPUs; show it one, e.g. CUDA_VISIBLE_DEVICES=0")
    if options.unsloth:
        print(json.dumps(_unsloth_alone(options.unsloth, options.shapes[0], options.steps)))
        return
    device = options.device or str(torch.accelerator.current_accelerator())
    console = Console()
    found: dict[str, Any] = {"device": _device_name(device), "torch": torch.__version__}
    console.print(f"{found['device']}, torch {torch.__version__}")
    for name in options.shapes:
        found[name] = here = {}
        with bench(name, device, options.steps) as made:
            for title, measure in TABLES.items():
                here[title] = rows = measure(made)
                console.print(_table(f"{name}: {title}", rows))
        if options.output:
            Path(options.output).write_text(json.dumps(found, indent=1))


@contextmanager
def bench(name: str, device: str, steps: int) -> Iterator[Bench]:
    """Make a shape's model on a device; free its memory at the end."""
    shape, is_cpu = SHAPES[name], torch.device(device).type == "cpu"
    dtype = torch.float32 if is_cpu else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape.config), dtype=dtype)
    backbone = Backbone(model.eval(), auto_class="AutoModelForCausalLM")
    data = _data(shape)
    task = SupervisedFineTuning().bound(data)
    setup = TrainingSetup(task, data, device, "fp32" if is_cpu else "bf16")
    try:
        yield Bench(name, shape, backbone, setup, steps)
    finally:
        del model, backbone, setup
        _clear(device)


def _data(shape: Shape) -> TaskData:
    """Return rows of random tokens that all have a loss."""
    rng = np.random.default_rng(0)

    def split(n_rows: int) -> EncodedSplit:
        vocabulary = shape.config["vocab_size"]
        tokens = rng.integers(1, vocabulary, n_rows * shape.length).astype(np.int32)
        return EncodedSplit(
            tokens=tokens,
            offsets=np.arange(n_rows + 1, dtype=np.int64) * shape.length,
            source_rows=np.arange(n_rows),
            source="random tokens",
            token_arrays={"labels": tokens},
        )

    n_rows = 16 * shape.rows
    return TaskData(
        task="sft",
        splits={"train": split(n_rows), "validation": split(64), "test": split(8)},
        labels=(),
        pad_id=0,
        max_length=shape.length,
    )


# --- 1: a step -----------------------------------------------------------------------------------


def _steps(bench: Bench) -> list[dict[str, Any]]:
    rivals: dict[str, tuple[str, Callable[[Bench], float]]] = {
        "HF Trainer + peft": ("peft", _trainer),
        "TRL": ("trl", _trl),
        "autopeft": ("autopeft", _ours),
    }
    rows: list[dict[str, Any]] = []
    for name, (package, seconds_of) in rivals.items():
        if importlib.util.find_spec(package) is None:
            rows.append({"who": name, "ms a step": f"{package} is not installed"})
            continue
        _clear(bench.setup.device)
        seconds = seconds_of(bench)
        rows.append({"who": name, **_row(bench, seconds, _peak(bench.setup.device))})
    if importlib.util.find_spec("unsloth") is None:
        rows.append({"who": "Unsloth", "ms a step": "unsloth is not installed"})
    else:
        rows.append({"who": "Unsloth", **_unsloth(bench)})
    for row in rows:
        if "tokens/s" in row:
            row["x Trainer"] = f"{float(row['tokens/s']) / float(rows[0]['tokens/s']):.2f}"
    return rows


def _row(bench: Bench, seconds: float, peak: str) -> dict[str, Any]:
    return {
        "ms a step": f"{1000 * seconds:.1f}",
        "tokens/s": f"{bench.tokens / seconds:.0f}",
        "peak GB": peak,
    }


def _ours(bench: Bench) -> float:
    with attach(bench.backbone, bench.candidate(bench.plan()), seed=0) as attached:
        return _timed(
            bench, Trainer(attached, bench.setup, attached.candidate.train, seed=0).train_to
        )


def _timed(bench: Bench, train_to: Callable[[int], None]) -> float:
    """Return the seconds of a step, device's work included, after steps that are not timed."""
    before = max(3, bench.steps // 3)
    train_to(before)
    began = time.perf_counter()
    train_to(before + bench.steps)
    return (time.perf_counter() - began) / bench.steps


def _trainer(bench: Bench) -> float:
    collator = transformers.default_data_collator
    return _hugging_face(
        bench, transformers.Trainer, transformers.TrainingArguments, data_collator=collator
    )


def _trl(bench: Bench) -> float:
    import trl

    tokenizer = _empty_tokenizer()
    return _hugging_face(bench, trl.SFTTrainer, trl.SFTConfig, processing_class=tokenizer)


def _empty_tokenizer() -> Any:
    """TRL and Unsloth ask for a tokenizer, though the rows have their tokens."""
    import tokenizers

    empty = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=empty, pad_token="<pad>", eos_token="<pad>"
    )


def _unsloth(bench: Bench) -> dict[str, Any]:
    """Run Unsloth in a process of its own: it changes transformers for the rest of one."""
    model = bench.backbone.model
    assert isinstance(model, PreTrainedModel)
    first = "import runpy, sys, unsloth; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _empty_tokenizer().save_pretrained(folder)
        command = [sys.executable, "-c", first, __file__, "--unsloth", folder]
        command += ["--shapes", bench.name, "--steps", str(bench.steps)]
        try:
            model.to("cpu")  # The device is for one model.
            _clear(bench.setup.device)
            ran = subprocess.run(command, capture_output=True, text=True)
        finally:
            model.to(bench.setup.device)
    if ran.returncode:
        return {"ms a step": (ran.stderr.strip().splitlines() or ["failed"])[-1][:60]}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _unsloth_alone(folder: str, name: str, steps: int) -> dict[str, Any]:
    """Measure Unsloth's LoRA in this process; it was imported before transformers."""
    from unsloth import FastLanguageModel

    shape, device = SHAPES[name], str(torch.accelerator.current_accelerator())
    model, _tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=shape.length, dtype=torch.bfloat16, load_in_4bit=False
    )
    data = _data(shape)
    backbone = Backbone(model, auto_class="AutoModelForCausalLM")
    setup = TrainingSetup(SupervisedFineTuning().bound(data), data, device, "bf16")
    bench = Bench(name, shape, backbone, setup, steps)
    wrapped = FastLanguageModel.get_peft_model(
        model,
        r=_RANK,
        lora_alpha=_RANK,
        lora_dropout=0,
        target_modules=_targets(bench),
        use_gradient_checkpointing=False,
    )
    _clear(device)
    collator = transformers.default_data_collator
    kinds = (transformers.Trainer, transformers.TrainingArguments)
    seconds = _trained(bench, wrapped, *kinds, data_collator=collator)
    return _row(bench, seconds, _peak(device))


def _hugging_face(bench: Bench, trainer_class: Any, arguments_class: Any, **more: Any) -> float:
    """Return the seconds of a step of peft's LoRA under a trainer, its data loading included."""
    import peft

    model = bench.backbone.model
    config = peft.LoraConfig(
        r=_RANK, lora_alpha=_RANK, target_modules=_targets(bench), task_type="CAUSAL_LM"
    )
    assert isinstance(model, PreTrainedModel)
    wrapped = peft.get_peft_model(model, config)
    try:
        return _trained(bench, wrapped, trainer_class, arguments_class, **more)
    finally:
        wrapped.unload()
        model.requires_grad_(False)
        model.eval()


def _trained(
    bench: Bench, wrapped: Any, trainer_class: Any, arguments_class: Any, **more: Any
) -> float:
    """Return the seconds of a step of a `PeftModel` under a trainer."""
    import datasets

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    train = bench.setup.data.train
    rows = [train.tokens[a:b].tolist() for a, b in itertools.pairwise(train.offsets)]
    columns = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    before = max(3, bench.steps // 3)
    watch = _StepWatch(before)
    is_cpu = bench.setup.device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        trainer_class(
            model=wrapped,
            args=arguments_class(
                output_dir=folder,
                per_device_train_batch_size=bench.shape.rows,
                max_steps=before + bench.steps,
                bf16=not is_cpu,
                use_cpu=is_cpu,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                **{_checkpointing(arguments_class): False},
            ),
            train_dataset=datasets.Dataset.from_dict({**columns, "labels": rows}),
            callbacks=[watch],
            **more,
        ).train()
    return watch.seconds / bench.steps


def _checkpointing(arguments_class: Any) -> str:
    """Return what transformers calls gradient checkpointing; TRL has it on if nobody says no."""
    names = {each.name for each in fields(arguments_class)}
    return min(names & {"activation_checkpointing", "gradient_checkpointing"})


def _targets(bench: Bench) -> list[str]:
    """Return the names of the linear modules, as peft takes them."""
    return sorted({path.rpartition(".")[2] for path in _linear_paths(bench)})


def _linear_paths(bench: Bench) -> Iterator[str]:
    for spec in bench.plan().specs:
        yield from bench.backbone.layout.modules[spec.layer, spec.role]


class _StepWatch:
    """A callback of Trainer: the time between two steps' ends, the device's work included.

    Args:
        first: The step after which the clock starts.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._began = self._ended = 0.0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Only the first and the last timed step wait for the device."""
        if state.global_step in (self._first, state.max_steps):
            _wait(args.device)
            self._began, self._ended = self._ended, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of all timed steps."""
        return self._ended - self._began


# --- 2: packs ------------------------------------------------------------------------------------


def _packs(bench: Bench) -> list[dict[str, Any]]:
    """Each LoRA on a quarter of the batch: what one candidate leaves idle is what packs fill."""
    n_rows = max(1, bench.shape.rows // 4)
    alone = 0.0
    rows = []
    for size in _PACKS:
        _clear(bench.setup.device)
        lanes: dict[int, Trainer] = {}
        try:
            for index in range(size):
                candidate = bench.candidate(bench.plan(), rows=n_rows)
                attached = attach(bench.backbone, candidate, seed=index)
                lanes[index] = Trainer(attached, bench.setup, candidate.train, seed=index)
                attached.park()
            seconds = _timed(bench, MultiTrainer(lanes, bench.setup).train_to)
        finally:
            for lane in lanes.values():
                lane.attached.unpark()
                lane.attached.detach()
        alone = alone or seconds
        rows.append(
            {
                "LoRAs": str(size),
                "ms a step": f"{1000 * seconds:.1f}",
                "tokens/s": f"{size * n_rows * bench.shape.length / seconds:.0f}",
                "x one after another": f"{size * alone / seconds:.2f}",
                "peak GB": _peak(bench.setup.device),
            }
        )
    return rows


# --- 3: cache ------------------------------------------------------------------------------------


def _cache(bench: Bench) -> list[dict[str, Any]]:
    lowest = bench.backbone.topology.n_layers // 2
    rows = []
    for name in ("without", "with"):
        _clear(bench.setup.device)
        setup = bench.setup
        with tempfile.TemporaryDirectory() as folder:
            if name == "with":
                cache = ActivationCache(
                    bench.backbone.model,
                    bench.backbone.layout.blocks,
                    setup.data,
                    device=setup.device,
                    precision=setup.precision,
                    max_bytes=32 << 30,
                    folder=Path(folder),
                )
                setup = replace(setup, cache=cache.below(lowest))
            with attach(bench.backbone, bench.candidate(bench.plan(lowest)), seed=0) as attached:
                training = Trainer(attached, setup, attached.candidate.train, seed=0)
                training.evaluate("train")  # Fills the cache before the clock starts.
                seconds = _timed(bench, training.train_to)
        rows.append({"cache": name, "ms a step": f"{1000 * seconds:.1f}"})
    rows[1]["gain"] = f"{float(rows[0]['ms a step']) / float(rows[1]['ms a step']):.2f}"
    return rows


# --- 4: memory -----------------------------------------------------------------------------------


def _memory(bench: Bench) -> list[dict[str, Any]]:
    device = bench.setup.device
    with torch.device("meta"):
        config = LlamaConfig(**bench.shape.config)
        bare = AutoModelForCausalLM.from_config(config, dtype=bench.backbone.model.dtype)
    meta = Backbone(bare, auto_class="AutoModelForCausalLM")
    shape = bench.shape
    prices = price_table(
        meta,
        batch_size=shape.rows,
        mean_length=shape.length,
        longest_length=shape.length,
        device=device,
        prompt_sizes=[
            n for m in methods.all_methods() if MODEL in m.roles for n in m.default_ranks
        ],
        dtype=str(bench.backbone.model.dtype).removeprefix("torch."),
    ).as_trained(
        has_activation_cache=False,
        most_logit_tokens=shape.rows * bench.setup.data.length_statistics(shape.rows).most_targets,
    )
    rows = []
    for name in (method.name for method in methods.all_methods()):
        plan = plan_of(bench, name)
        if plan is None:
            continue
        _clear(device)
        candidate = bench.candidate(plan)
        row = {"method": name}
        try:
            priced = prices.price(candidate).peak_memory_bytes
            row["priced GB"] = f"{priced / 1e9:.3f}"
            with attach(bench.backbone, candidate, seed=0) as attached:
                Trainer(attached, bench.setup, candidate.train, seed=0).train_to(2)
        except UserError as error:
            row["allocated GB"] = str(error).splitlines()[0][:60]
        else:
            row["allocated GB"] = _peak(device)
            if held := _held(device):
                row["priced/allocated"] = f"{priced / held:.3f}"
        rows.append(row)
    return rows


def plan_of(bench: Bench, name: str) -> AdapterPlan | None:
    """Return the method wherever it can go, at its middle size; None if it can go nowhere."""
    method, topology = methods.get(name), bench.backbone.topology
    ranks = method.default_ranks or (0,)
    for rank in sorted(ranks, key=lambda r: abs(r - statistics.median(ranks))):
        specs = [
            spec
            for layer in range(topology.n_layers)
            for role in method.roles
            if role in topology.shapes
            and is_legal(topology, spec := LayerSpec(layer, role, name, rank))
        ]
        if specs:
            return AdapterPlan(specs)
    return None


# --- 5: trials -----------------------------------------------------------------------------------


def _trials(bench: Bench) -> list[dict[str, Any]]:
    """Attach, 100 steps, 64 validation rows, at different depths; no two trials alike."""
    n = bench.backbone.topology.n_layers
    seconds = []
    for lowest in (0, n // 2, n - 1):
        _clear(bench.setup.device)
        candidate = bench.candidate(bench.plan(lowest), steps=5 * bench.steps)
        began = time.perf_counter()
        with attach(bench.backbone, candidate, seed=0) as attached:
            Trainer(attached, bench.setup, candidate.train, seed=0).advance(candidate.train.steps)
        seconds.append(time.perf_counter() - began)
    return [
        {
            "steps a trial": str(5 * bench.steps),
            "trials an hour": f"{3600 / statistics.mean(seconds):.0f}",
            "all, half, last block, s": ", ".join(f"{s:.1f}" for s in seconds),
        }
    ]


TABLES: Mapping[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "a step of a full-depth LoRA": _steps,
    "LoRAs that share a forward pass": _packs,
    "activation cache, upper half adapted": _cache,
    "memory, priced and allocated": _memory,
    "trials": _trials,
}
"""Title -> what measures it."""


# --- the device ----------------------------------------------------------------------------------


def _device_name(device: str) -> str:
    kind = torch.device(device).type
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def _wait(device: str | torch.device) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def _clear(device: str) -> None:
    """Begin a measurement: nothing is left over, and the peak is what is held now."""
    gc.collect()
    if torch.device(device).type != "cpu":
        module = torch.get_device_module(torch.device(device))
        module.empty_cache()
        module.reset_peak_memory_stats()


def _held(device: str) -> int:
    """Return the most bytes that were allocated since `_clear`; 0 on a CPU."""
    if torch.device(device).type == "cpu":
        return 0
    return int(torch.get_device_module(torch.device(device)).max_memory_allocated())


def _peak(device: str) -> str:
    held = _held(device)
    return f"{held / 1e9:.3f}" if held else "-"


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    return table


if __name__ == "__main__":
    main()
