"""What is found out about a model and its data before any time is spent."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from searches import searched

from autopeft.costs import Price
from autopeft.costs.memory import CONTEXT_BYTES
from autopeft.engine.devices import WORKER_BYTES, Devices
from autopeft.engine.executor import Executor
from autopeft.engine.messages import Job
from autopeft.errors import ModelError, SettingsError, SpaceError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing import pricing, workers
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.settings import SearchSettings
from autopeft.training.acceleration import NO_ACCELERATION
from autopeft.training.last_block import LastBlock

COSTS = Price(1, 4, 1.0, 1)


def _prepared(
    model: Path, data: Path, *, note: Callable[[str], None] = lambda _: None, **more: Any
) -> PreparedSearch:
    rows = {"model": str(model), "data": str(data), "steps": 9, "batch_size": 8, "max_length": 16}
    return prepare(
        SearchSettings.from_mapping({**rows, "budget": "3trials", "workers": 1, **more}), note=note
    )


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, Path]:
    """A tiny Llama, and prompts with completions."""
    data = tmp_path_factory.mktemp("prompts") / "pairs.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        for number in range(80):
            writer.writerow([f"the film was a plot {number}", "good" if number % 2 else "very bad"])
    return tiny_llama, data


def test_task_columns_and_all_that_was_read_are_told_as_one_block(
    tiny_model: Path, tiny_data: Path
) -> None:
    told: list[str] = []
    settings = SearchSettings(model=str(tiny_model), data=str(tiny_data), workers=1)
    prepare(settings, note=told.append)
    headline, *lines = told[0].split("\n  ")
    assert headline == "task text-classification (text=text, label=label)"
    assert lines[1:] == ["2 labels: bad, good", "3 rows dropped: the text is missing"]


def test_a_search_that_names_no_space_takes_that_of_its_task(
    causal: tuple[Path, Path], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    row = '{"prompt": "the film was %d", "chosen": " good", "rejected": " bad"}'
    pairs.write_text("\n".join(row % number for number in range(60)))
    told: list[str] = []
    asked = {"model": str(causal[0]), "data": str(pairs), "workers": 1}
    ready = prepare(SearchSettings.from_mapping(asked), note=told.append)
    assert ready.settings.space == "preference"
    assert any(line.startswith("space preference, the default of preference:") for line in told)
    low, high = ready.space.config.methods["lora"].learning_rate or (0.0, 0.0)
    assert low <= 5e-6 < high < 2e-3, "TRL trains LoRA at 5e-6 for DPO"
    assert _prepared(causal[0], pairs, space="default").settings.space == "default"
    assert _prepared(*causal).settings.space == "default"
    with pytest.raises(SpaceError, match="must name a method"):
        _prepared(*causal, space={})


def test_a_server_that_cannot_load_the_trained_head_is_refused_before_any_training(
    tiny_model: Path, tiny_data: Path, causal: tuple[Path, Path]
) -> None:
    """Regression: `export --for mlx` was the first to refuse a search of a classifier."""
    with pytest.raises(SettingsError, match="servable='mlx': must hold: is a language model") as at:
        _prepared(tiny_model, tiny_data, servable="mlx")
    assert "use one of peft, vllm, llamacpp, ollama, transformers, or leave" in str(at.value)
    with pytest.raises(SettingsError, match=r"SGLang 0\.5\.23 has shapes for; .*self\.query"):
        _prepared(tiny_model, tiny_data, servable="sglang")  # A BERT.
    assert _prepared(tiny_model, tiny_data, servable="transformers").settings.servable
    assert _prepared(*causal, servable="mlx").settings.servable == "mlx"


def test_modules_that_a_server_cannot_adapt_are_not_searched(
    causal: tuple[Path, Path], tmp_path: Path
) -> None:
    """SGLang has no shapes for the output projection and the feed-forward part of OPT."""
    folder = tmp_path / "opt"
    shutil.copytree(causal[0], folder, ignore=lambda _, names: [n for n in names if "model" in n])
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48, "num_hidden_layers": 2}
    vocabulary = hf.AutoConfig.from_pretrained(causal[0]).vocab_size
    config = hf.OPTConfig(vocab_size=vocabulary, word_embed_proj_dim=32, **sizes)
    hf.OPTForCausalLM(config).save_pretrained(folder)
    told: list[str] = []
    ready = _prepared(folder, causal[1], servable="sglang", note=told.append)
    assert "servable by sglang: without the modules attn.o, mlp.up, mlp.down" in told
    for space in (ready.space, ready.with_plan(ready.plan).space):
        roles = {spec.role for specs in space.grid.sites.values() for spec in specs}
        assert roles == {"attn.q", "attn.k", "attn.v"}
    assert _prepared(*causal, servable="sglang").unserved == ()


def test_an_encoder_is_read_at_its_first_token(tiny_model: Path, tiny_data: Path) -> None:
    ready = _prepared(tiny_model, tiny_data)
    assert ready.window == "first"
    assert ready.prices.read_share < 0.3
    assert ready.prices.logit_weights == 0
    assert isinstance(Executor(ready.context()).setup.last_block, LastBlock)


def test_a_decoder_is_read_where_it_predicts_a_completion(causal: tuple[Path, Path]) -> None:
    ready = _prepared(*causal, task="sft")
    assert ready.window == "completion"
    assert 0.0 < ready.prices.read_share < 0.7
    assert ready.prices.logit_weights > 0
    assert 0.0 < ready.prices.logit_tokens < ready.prices.tokens


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_a_hybrid_is_searched_in_the_blocks_that_fit(
    causal: tuple[Path, Path], tmp_path: Path
) -> None:
    from tiny_models import KINDS
    from transformers import AutoTokenizer, JambaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(causal[0])
    config = KINDS["jamba"].config()
    config.vocab_size = len(tokenizer)
    JambaForCausalLM(config).save_pretrained(tmp_path / "jamba")
    tokenizer.save_pretrained(tmp_path / "jamba")
    found = searched(tmp_path / "jamba", causal[1], tmp_path / "run", task="sft")
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert front["trials"]["failed"] == 0
    assert found.score["loss"] > 0
    assert list(front["unsearched"])[:2] == ["experts.gate_up", "mamba.in_proj"]
    assert 0.3 < sum(front["unsearched"].values()) < 0.9
    sites = {(s["layer"], s["role"]) for m in front["front"] for s in m["plan"]}
    assert not {(0, "attn.q"), (1, "mlp.up")} & sites


def test_adapters_in_the_last_block_alone_cost_little(tiny_model: Path, tiny_data: Path) -> None:
    prices = _prepared(tiny_model, tiny_data).prices
    train = TrainSettings(1e-3, steps=9, batch_size=8)

    def flops(layer: int) -> float:
        plan = AdapterPlan([LayerSpec(layer, "mlp.up", "lora", 2)])
        return prices.price(Candidate(plan, train)).train_flops

    assert flops(1) < 0.3 * flops(0)


def test_what_cannot_be_told_is_computed_whole(
    tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.preparing.windows.read_positions", lambda *_: None)
    ready = _prepared(tiny_model, tiny_data)
    assert ready.window is None
    assert ready.prices.read_share == 1.0
    assert Executor(ready.context()).setup.last_block is NO_ACCELERATION


def test_precision_is_settled_before_there_are_workers(
    tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.training.precision._measured", lambda *_: "bf16")
    ready = _prepared(tiny_model, tiny_data)
    assert ready.settings.precision == "bf16"
    monkeypatch.setattr("autopeft.training.precision._measured", lambda *_: "fp32")
    # A slower machine, or a busy one, trains as the others do.
    assert Executor(ready.context()).setup.precision == "bf16"


def test_prices_know_that_the_activation_cache_has_no_room(
    tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    settings = {"model": str(tiny_model), "data": str(tiny_data), "workers": 1, "steps": 9}

    def flops(**more: Any) -> float:
        ready = prepare(SearchSettings.from_mapping({**settings, **more}), note=told.append)
        candidate = Candidate(
            AdapterPlan([LayerSpec(1, "attn.q", "lora", 2)]), TrainSettings(1e-3, steps=9)
        )
        return ready.prices.price(candidate).train_flops

    small = flops(activation_cache_gb=1e-6)
    assert any("the activation cache is off: the training rows need" in line for line in told)
    assert small == flops(activation_cache=False) > flops()
    monkeypatch.setattr(pricing, "room_on_disk", lambda _: 10)
    assert flops() < small, "there is memory"
    monkeypatch.setattr(pricing, "available_memory_bytes", lambda: 10)
    told.clear()
    assert flops() == small
    assert any("have no room for them" in line for line in told)


def _on(monkeypatch: pytest.MonkeyPatch, devices: Devices) -> None:
    monkeypatch.setattr(workers, "find_devices", lambda _: devices)


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    causal: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    least = min(
        ready.prices.price(c).peak_memory_bytes
        for ready in [_prepared(*causal, task="sft", gradient_checkpointing=False)]
        for c in ready.space.baselines()
    )
    _on(monkeypatch, Devices(memory_bytes=WORKER_BYTES + least - 1))
    with pytest.raises(ModelError, match=r"the cheapest training needs .* are free; use ") as error:
        _prepared(*causal, task="sft", gradient_checkpointing=False)
    assert "which needs" in error.value.remedy
    _on(monkeypatch, Devices(memory_bytes=WORKER_BYTES + 10))
    with pytest.raises(ModelError, match="use a larger device or a smaller model"):
        _prepared(*causal, task="sft", gradient_checkpointing=False)


def test_candidates_that_cannot_fit_are_excluded_and_others_change_nothing(
    causal: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _prepared(*causal, task="sft").constraints == ()
    plain = _prepared(*causal, task="sft")
    peaks = [plain.prices.price(c).peak_memory_bytes for c in plain.space.baselines()]
    told: list[str] = []
    _on(monkeypatch, Devices(memory_bytes=WORKER_BYTES + max(peaks) + 1))
    (limit,) = _prepared(*causal, task="sft", note=told.append).constraints
    assert limit.name == "peak_memory_bytes"
    assert limit.limit == max(peaks) + 1
    assert any("of memory are not trained" in line for line in told)


def test_the_memory_of_a_device_bounds_its_workers(
    causal: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(memory: int | None, **more: Any) -> PreparedSearch:
        _on(monkeypatch, Devices("cuda", 2, memory))
        return _prepared(*causal, task="sft", workers=None, ray_address="there", **more)

    ready = prepared(24 * 10**9, gpus_per_worker=0.4)
    assert (ready.settings.workers, ready.settings.gpus_per_worker) == (4, 0.4)
    assert ready.device == "cuda"
    small = prepared(int(2.2 * CONTEXT_BYTES), gpus_per_worker=0.25)
    assert (small.settings.workers, small.settings.gpus_per_worker) == (4, 0.5)
    assert prepared(None, gpus_per_worker=0.25).settings.workers == 8
    assert prepared(24 * 10**9).settings.workers == 2


def test_memory_bounds_what_is_trained_together(
    causal: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _prepared(*causal, task="sft")
    prices = plain.prices
    largest = max(plain.space.baselines(), key=lambda c: prices.price(c).peak_memory_bytes)
    told: list[str] = []

    def fitting(room: int, **more: Any) -> list[int]:
        _on(monkeypatch, Devices(memory_bytes=WORKER_BYTES + room))
        told.clear()
        ready = _prepared(*causal, task="sft", note=told.append, **more)
        return [n for n in range(1, 6) if ready.context().fits([largest] * n)]

    assert fitting(prices.pack_bytes([largest] * 2), trials_per_worker=4) == [1, 2]
    (line,) = [line for line in told if "at once" in line]
    assert line == "memory of a worker is free for 2 of 4 of the largest LoRAs at once"
    assert fitting(prices.pack_bytes([largest] * 4), trials_per_worker=4) == [1, 2, 3, 4]
    assert not any("at once" in line for line in told)


def test_a_training_comes_before_the_cache_on_a_device(
    tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = _prepared(tiny_model, tiny_data)
    pack = ready.space.baselines()[:2]
    room = float(ready.prices.pack_bytes(pack) + 1000)
    context = replace(ready, room=room).context()
    assert context.left_beside(pack) == 1000
    assert context.left_beside(pack[:1]) > 1000
    executor = Executor(context)
    executor.context = replace(context, device="cuda")
    limits: list[float] = []
    assert executor._cache is not None
    monkeypatch.setattr(executor._cache, "limit_on_device", limits.append)
    executor.begin([Job("search", candidate, COSTS, 0) for candidate in pack])
    assert limits == [1000]


def test_gradient_checkpointing_is_on_where_nothing_else_fits(
    causal: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def prepared(room: float | None, **more: Any) -> PreparedSearch:
        memory = None if room is None else int((room + CONTEXT_BYTES) / 0.95)
        _on(monkeypatch, Devices("cuda", 1, memory))
        told.clear()
        rows = {"task": "sft", "workers": None, "ray_address": "there", **more}
        return _prepared(*causal, note=told.append, **rows)

    free = prepared(24e9)
    assert free.settings.gradient_checkpointing is False
    assert prepared(None).settings.gradient_checkpointing is False
    prices, known = free.prices, free.space.baselines()
    again = prices.with_checkpointing()
    plain, saving = (max(t.price(c).peak_memory_bytes for c in known) for t in (prices, again))
    assert saving < plain
    tight = prepared((plain + saving) / 2)
    assert tight.settings.gradient_checkpointing is True
    assert tight.prices.has_checkpointing
    assert tight.context().settings.trains_alone == "gradient_checkpointing"
    (line,) = [line for line in told if "checkpointing" in line]
    assert line.startswith("gradient checkpointing is on: a LoRA needs ")
    for asked in ({"gradient_checkpointing": False}, {"trials_per_worker": 2}):
        assert not prepared((plain + saving) / 2, **asked).prices.has_checkpointing
        assert not any("checkpointing" in line for line in told)


def test_seconds_that_are_compared_are_not_compiled_by_chance(causal: tuple[Path, Path]) -> None:
    told: list[str] = []
    rows: dict[str, Any] = {"task": "sft", "torch_compile": "auto"}
    compared = _prepared(*causal, note=told.append, **rows, objectives=["train_seconds"])
    assert compared.settings.torch_compile is False
    assert any(line.startswith("torch_compile=auto is off: ") for line in told)
    told.clear()
    assert _prepared(*causal, note=told.append, **rows).settings.torch_compile == "auto"
    assert not any("torch_compile" in line for line in told)


def test_a_model_may_need_several_devices(
    causal: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def prepared(memory: float, **more: Any) -> PreparedSearch:
        _on(monkeypatch, Devices("cuda", 4, int(memory)))
        rows = {"task": "sft", "workers": None, "ray_address": "there", **more}
        rows["gradient_checkpointing"] = False
        return _prepared(*causal, note=told.append, **rows)

    needed = prepared(24e9).prices.price(prepared(24e9).space.baselines()[0]).peak_memory_bytes
    little = (CONTEXT_BYTES + 0.7 * needed) / 0.95
    with pytest.raises(ModelError, match=r"the cheapest training needs .*; or use gpus_per_worker"):
        prepared(little)
    ready = prepared(little, gpus_per_worker=4)
    assert (ready.settings.workers, ready.settings.devices_per_worker) == (1, 4)
    assert "the model's blocks are spread over 4 devices of each worker" in told
    with pytest.raises(SettingsError, match=r"gpus_per_worker=5.0: a machine has 4; use"):
        prepared(24e9, gpus_per_worker=5)


def test_packing_is_for_decoders_that_keep_rows_apart(
    causal: tuple[Path, Path], tiny_data: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    told: list[str] = []
    data = tmp_path / "texts.jsonl"
    rows = [{"text": f"film {number} " + "the plot was " * (number % 7)} for number in range(90)]
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = SearchSettings(
        model=str(causal[0]), data=str(data), task="sft", packing=True, batch_size=32
    )
    ready = prepare(settings, note=told.append)
    (line,) = [line for line in told if line.startswith("packing: ")]
    packed, padded = (int(word) for word in line.split() if word.isdigit())
    assert packed < padded
    assert ready.prices.tokens == pytest.approx(packed, rel=0.1)
    assert ready.trials_per_worker == 1
    with pytest.raises(SettingsError, match="packing=True: text-classification takes each row"):
        prepare(replace(settings, task="text-classification", data=str(tiny_data)))
    bloom = tmp_path / "bloom"
    AutoTokenizer.from_pretrained(causal[0]).save_pretrained(bloom)
    BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4)).save_pretrained(bloom)
    with pytest.raises(SettingsError, match="bloom does not keep packed rows apart"):
        prepare(replace(settings, model=str(bloom)))
