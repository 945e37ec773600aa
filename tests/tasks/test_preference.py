"""DPO and its kin: TRL's losses, the base as reference, and adapters scored from outside."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from chat_samples import chat_model, chat_tokenizer
from covering import usual_first
from searches import SHORT, loads, logits_of, searched
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from training_samples import with_lora

import autopeft
from autopeft.engine.executor import Executor
from autopeft.engine.loaded_model import LoadedModel
from autopeft.engine.messages import WorkerContext
from autopeft.errors import SettingsError
from autopeft.models.attach import attach
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import Batch, collate
from autopeft.tasks.conversations import read_rows
from autopeft.tasks.data import IGNORED, SPLITS, TaskData
from autopeft.tasks.examples import Examples
from autopeft.tasks.preference import LOSSES, Preference
from autopeft.training.acceleration import NO_ACCELERATION
from autopeft.training.evaluation import evaluate
from autopeft.training.latency import measure_latency_ms
from autopeft.training.precision import Precision
from autopeft.training.trainer import Trainer

Row = dict[str, Any]


def pair(number: int) -> Row:
    """A question with a good and a bad answer of unlike length."""
    good, bad = f"It is blue {number}.", "I do not know" + " at all" * (number % 4) + "."
    return {"prompt": f"What color is sky {number}?", "chosen": f" {good}", "rejected": f" {bad}"}


def chat_pair(number: int) -> Row:
    row = pair(number)
    asked = {"role": "user", "content": row["prompt"]}
    return {
        name: [asked, {"role": "assistant", "content": row[name].strip()}]
        for name in ("chosen", "rejected")
    }


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("llama"))


# Losses


def encoded(task: Preference, tokenizer: Any, n: int = 12) -> TaskData:
    rows = [pair(number) for number in range(n)]
    read = read_rows({name: [row[name] for row in rows] for name in rows[0]})
    examples = Examples({"row": read.rows}, np.arange(n, dtype=np.int64), "memory")
    split = task.encode(tokenizer, examples, (), 10_000)
    return TaskData(task.name, dict.fromkeys(SPLITS, split), (), pad_id=0)


def with_options(**options: Any) -> Preference:
    return Preference().configured(SearchSettings(task_options=options))


def sums_and_counts(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each answer, and its number of tokens, both (2 b,)."""
    labels = batch.labels[:, 1:]
    is_learned = labels != IGNORED
    logits = model(**batch.model_inputs()).logits[:, :-1].float()
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * is_learned).sum(1), is_learned.sum(1)


def dpo_of_trl(model: Any, base: Any, batch: Batch, kind: str, beta: float) -> float:
    """The loss that TRL's DPOTrainer computes of its own batch: chosen answers, then rejected."""
    trl = pytest.importorskip("trl")
    order = torch.arange(len(batch.labels)).reshape(-1, 2).T.flatten()
    inputs = {
        "input_ids": batch.input_ids[order],
        "attention_mask": batch.attention_mask[order],
        "completion_mask": (batch.labels[order] != IGNORED).long(),
    }

    policy = copy.deepcopy(model)
    head = pytest.importorskip("trl.trainer.utils").add_fused_lm_head
    head(policy, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))

    def same(value: Any) -> Any:
        return value

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
        beta=beta,
        label_smoothing=0.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    reference, _ = sums_and_counts(base, batch)
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference.view(-1, 2).unbind(1)
    return float(trl.DPOTrainer._compute_loss(trainer, policy, inputs, False))


def expected_loss(model: Any, base: Any, batch: Batch, task: Preference) -> float:
    """What TRL's trainers compute."""
    kind, beta = task.option("loss"), task.option("beta")
    if kind in ("dpo", "ipo"):
        return dpo_of_trl(model, base, batch, {"dpo": "sigmoid"}.get(kind, kind), beta)
    sums, counts = sums_and_counts(model, batch)
    chosen, rejected = (sums / counts).view(-1, 2).unbind(1)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        beta=beta,
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=task.option("gamma"),
        label_smoothing=0.0,
    )
    if kind == "simpo":
        cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer
        return float(cpo.cpo_loss(trainer, chosen, rejected)[0].mean())
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    # The likelihood term is the mean over the answer's tokens, as in the paper; TRL adds those of
    # the prompt to it.
    return float((-chosen - orpo.odds_ratio_loss(trainer, chosen, rejected)[0]).mean())


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("default")
def test_losses_are_those_of_trl(loss: str, beta: float, llama: Path) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(llama).eval()
    task = with_options(loss=loss, beta=beta)
    data = task.on_base_model(base, encoded(task, chat_tokenizer(None)), "cpu")
    batch = collate(data, "train", np.arange(6))
    untrained = hf.AutoModelForCausalLM.from_pretrained(llama).eval()
    model = with_lora(untrained, ["q_proj", "v_proj", "up_proj"]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        assert float(task.loss(model, batch)) == pytest.approx(
            expected_loss(model, base, batch, task), rel=1e-4
        )
        parts = task.losses(model, batch, 3)
        for part in range(3):
            own = collate(data, "train", np.arange(2 * part, 2 * part + 2))
            assert float(parts[part]) == pytest.approx(float(task.loss(model, own)), rel=1e-4)
        if loss == "dpo":  # Without an adapter no answer is preferred to what the base prefers.
            scores = task.score(base, batch)
            assert scores["loss"].tolist() == pytest.approx([np.log(2)] * 6)
            assert scores["margin"].tolist() == pytest.approx([0.0] * 6, abs=1e-5)
            margins = {"margin": scores["margin"].double().numpy()}
            accuracy, rows = task.loss_metric("preference_accuracy", margins)
            assert accuracy == 0.5
            assert rows.tolist() == [0.5] * 6


def test_extreme_answers_have_finite_orpo_losses_and_gradients() -> None:
    task = with_options(loss="orpo")
    log_p = torch.tensor([[0.0, -1e-9], [-1e-9, -200.0]], requires_grad=True)
    task._log_probabilities = lambda *_: log_p  # type: ignore[method-assign]
    losses, margins = task._compared(torch.nn.Identity(), Any)  # type: ignore[arg-type]
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(margins).all()
    assert torch.isfinite(log_p.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "kto"}, r"task_options\.loss='kto': no such loss; use one of dpo, ipo, simpo"),
        ({"beta": 0}, r"task_options\.beta=0: must be a number above 0"),
        ({"beta": "much"}, r"task_options\.beta='much'"),
        ({"alpha": 1.0}, "task_options='alpha': preference has no such option"),
    ],
)
def test_impossible_options_are_one_line(options: Row, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        with_options(**options)


@pytest.mark.parametrize("metric", ["rougeL", "token_accuracy", "regex=a(.)"])
def test_metrics_of_text_are_refused(metric: str) -> None:
    with pytest.raises(SettingsError, match="not measured by preference"):
        Preference().configured(SearchSettings(metric=metric))


# What a worker computes


def prepared(llama: Path, tmp_path: Path, **settings: Any) -> PreparedSearch:
    data = write(tmp_path / "pairs.jsonl", [chat_pair(number) for number in range(80)])
    return prepare(
        SearchSettings(
            model=str(llama),
            data=str(data),
            batch_size=8,
            steps=12,
            budget="2trials",
            backend="local",
            **settings,
        )
    )


def without(context: WorkerContext, **changes: Any) -> WorkerContext:
    window = changes.pop("window", context.window)
    settings = dataclasses.replace(context.settings, **changes)
    return dataclasses.replace(context, settings=settings, window=window)


def test_every_worker_finds_the_same_reference(llama: Path, tmp_path: Path) -> None:
    context = prepared(llama, tmp_path).context()
    workers = [LoadedModel(context) for _ in range(2)]
    for name in SPLITS:
        first, second = (w.setup.data.splits[name].row_arrays["reference"] for w in workers)
        assert np.array_equal(first, second)
        assert first.shape == (len(context.data.splits[name]), 2)
    base, data = workers[0].backbone.model, workers[0].setup.data
    sums, _ = sums_and_counts(base, collate(data, "test", np.arange(3)))
    reference = data.test.row_arrays["reference"][:3]
    np.testing.assert_allclose(reference, sums.detach().view(-1, 2), rtol=1e-5)


def test_a_model_without_adapters_prefers_nothing_where_bf16_is_faster(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.training.precision._measured", lambda *_: "bf16")
    worker = LoadedModel(prepared(llama, tmp_path).context())
    assert worker.setup.precision == "fp32"
    found = evaluate(worker.backbone.model, worker.setup, "validation")
    assert found.metrics["preference_accuracy"] == 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_model_has_no_margin_against_itself(
    precision: Precision, llama: Path, tmp_path: Path
) -> None:
    context = without(prepared(llama, tmp_path).context(), precision=precision)
    setup = LoadedModel(context).setup
    model = LoadedModel(context).backbone.model
    for split, way in (("train", precision), ("validation", precision), ("test", "fp32")):
        found = evaluate(model, dataclasses.replace(setup, precision=way), split)  # type: ignore[arg-type]
        # In bf16, batches of another shape round differently.
        assert abs(found.metrics["margin"]) < (1e-6 if way == "fp32" else 1e-4), split
        assert way == "bf16" or found.metrics["preference_accuracy"] == 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_cache_and_last_block_hold_for_two_answers_a_row(
    loss: str, precision: Any, llama: Path, tmp_path: Path
) -> None:
    search = prepared(llama, tmp_path, task_options={"loss": loss}, precision=precision)
    assert search.window == "completion"
    fast = LoadedModel(without(search.context(), activation_cache=True))
    plain = LoadedModel(without(search.context(), activation_cache=False, window=None))
    plan = AdapterPlan([LayerSpec(1, "attn.q", "lora", 2), LayerSpec(1, "mlp.up", "lora", 4)])
    candidate = Candidate(plan, TrainSettings(1e-2, steps=12, batch_size=8))
    found = []
    for worker in (fast, plain):
        setup = worker.setup_above(1)
        with attach(worker.backbone, candidate, seed=0) as attached:
            trainer = Trainer(attached, setup, candidate.train, seed=0)
            trainer.train_to(12)
            found.append(evaluate(attached.model, setup, "validation"))
    cache = fast.setup_above(1).cache
    assert cache is not NO_ACCELERATION
    assert fast._cache is not None
    assert not fast._cache.is_off
    assert fast.setup.last_block is not NO_ACCELERATION
    assert not fast.setup.last_block.is_off  # type: ignore[attr-defined]
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert found[0].loss == pytest.approx(found[1].loss, rel=tolerance)
    assert found[0].metrics["margin"] == pytest.approx(found[1].metrics["margin"], abs=tolerance)


def test_the_price_counts_both_answers(llama: Path, tmp_path: Path) -> None:
    search = prepared(llama, tmp_path, activation_cache=False)
    worker = LoadedModel(without(search.context(), window=None))
    data = worker.setup.data
    sites = [LayerSpec(layer, "attn.q", "lora", 2) for layer in (0, 1)]
    candidate = Candidate(AdapterPlan(sites), TrainSettings(1e-2, steps=1, batch_size=8))
    prices = dataclasses.replace(search.prices, read_share=1.0, has_activation_cache=False)
    counted, n_tokens = [], []
    with attach(worker.backbone, candidate, seed=0) as attached:
        for rows in np.arange(48).reshape(-1, 8):
            batch = collate(data, "train", rows)
            with FlopCounterMode(display=False) as counter:
                worker.setup.task.loss(attached.model, batch).backward()
            counted.append(counter.get_total_flops())
            n_tokens.append(batch.input_ids.numel())
    step = prices.price(candidate).train_flops
    # Real batches are padded to other lengths than the mean one.
    per_token = np.sum(counted) / np.sum(n_tokens)
    assert step == pytest.approx(per_token * prices.tokens, rel=0.05)
    assert prices.tokens == pytest.approx(16 * data.length_statistics(8).mean_padded, rel=0.05)


def test_latency_is_of_one_answer(llama: Path, tmp_path: Path) -> None:
    search = prepared(llama, tmp_path)
    worker = LoadedModel(search.context())
    shapes: set[tuple[int, ...]] = set()
    worker.backbone.model.register_forward_pre_hook(
        lambda _m, _a, inputs: shapes.add(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    data = worker.setup.data
    measure_latency_ms(worker.backbone.model, data, device="cpu", repeats=1)
    ((n_rows, length),) = shapes
    assert n_rows == 1
    assert length in np.diff(data.validation.offsets)


# Searches


def of_answer(tokenizer: Any, prompt: Any, answer: Any) -> tuple[list[int], int]:
    """The tokens of prompt and answer, and the position where the answer begins."""
    if isinstance(answer, str):
        start = tokenizer(prompt)["input_ids"]
        return [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id], len(start)
    asked = tokenizer.apply_chat_template(answer[:1], add_generation_prompt=True, return_dict=False)
    return tokenizer.apply_chat_template(answer, return_dict=False), len(asked)


def log_probability(model: Any, tokens: list[int], start: int) -> float:
    logits = logits_of(model, input_ids=torch.tensor([tokens]))[0, start - 1 : -1].double()
    return -float(functional.cross_entropy(logits, torch.tensor(tokens[start:]), reduction="sum"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", usual_first(["text", "messages"], "messages"))
def test_a_saved_adapter_scores_what_front_json_says(
    kind: str, llama: Path, tmp_path: Path
) -> None:
    rows = [(pair if kind == "text" else chat_pair)(number) for number in range(60)]
    found = searched(
        llama,
        write(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        task_options={"beta": 0.5},
        metric="margin",
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(llama)
    base = hf.AutoModelForCausalLM.from_pretrained(llama).eval()
    for how, model in loads(found, "AutoModelForCausalLM", tmp_path / "merged").items():
        margins = []
        for row in found.test_rows:
            one = rows[row]
            answers = [
                of_answer(tokenizer, one.get("prompt"), one[name])
                for name in ("chosen", "rejected")
            ]
            good, bad = (
                log_probability(model, *each) - log_probability(base, *each) for each in answers
            )
            margins.append(0.5 * (good - bad))
        assert found.score["margin"] == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-5), how
        loss = np.mean(np.log1p(np.exp(-np.asarray(margins))))
        assert found.score["loss"] == pytest.approx(loss, rel=1e-5), how
        share = np.mean(np.asarray(margins) > 0)
        assert found.score["preference_accuracy"] == pytest.approx(share), how


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_candidates_trained_together_score_as_those_trained_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def separate(_executor: Executor, reason: str) -> Any:
        pytest.fail(reason)

    monkeypatch.setattr(Executor, "_separate", separate)
    data = str(write(tmp_path / "rows.jsonl", [chat_pair(number) for number in range(60)]))
    found: dict[int, dict[str, float]] = {}
    for n in (1, 3):
        settings = {**SHORT, "budget": "6trials", "sampler": "random", "trials_per_worker": n}
        where = {"model": str(llama), "data": data, "output": str(tmp_path / f"run{n}")}
        autopeft.search({**settings, **where, "metric": "margin"})
        with (tmp_path / f"run{n}" / "trials.csv").open(encoding="utf-8") as file:
            trials = [row for row in csv.DictReader(file) if row["state"] == "complete"]
        found[n] = {trial["digest"]: float(trial["objective.margin"]) for trial in trials}
    shared = found[1].keys() & found[3].keys()
    assert len(shared) >= 4
    for digest in shared:
        assert found[3][digest] == pytest.approx(found[1][digest], rel=1e-3, abs=1e-5)
