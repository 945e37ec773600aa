"""What ends a command without a result: one line, the right exit status, and nothing lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from report_samples import interrupted, make_record
from tokenizers import processors

from autopeft import api, cli
from autopeft.errors import DataError, ModelError, SettingsError, TrainingFailure
from autopeft.preparing.prepare import prepare
from autopeft.preparing.task_data import load_task
from autopeft.reporting.front_view import view
from autopeft.result import SearchResult
from autopeft.settings import SearchSettings
from autopeft.training.trainer import Trainer

pytestmark = [pytest.mark.timeout(240), pytest.mark.filterwarnings("default")]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of the command line."""
    monkeypatch.setattr("sys.argv", ["autopeft", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_budget_that_ends_before_the_first_trial_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = replace(interrupted(make_record(8)), trials=(), front=(), baseline=None)
    result = SearchResult(Path("runs/short"), view(replace(record, reference=None)), "model")
    monkeypatch.setattr(api, "resume", lambda *_, **__: result)
    assert run(monkeypatch, "resume", "runs/short") == 1
    error = capsys.readouterr().err
    assert "budget ended before the first" in error
    assert "autopeft resume runs/short --budget" in error


def test_a_member_that_is_not_there_is_not_proposed() -> None:
    shown = view(make_record(8))
    result = SearchResult(Path("runs/short"), replace(shown, best=None, baseline=None), "model")
    with pytest.raises(SettingsError) as raised:
        result.pick("best")
    known = ", ".join(entry.digest[:8] for entry in shown.entries())
    assert str(raised.value) == (
        "pick='best': no such member in runs/short; use a limit or one of knee, " + known
    )
    none = replace(interrupted(make_record(8)), trials=(), front=(), baseline=None, reference=None)
    with pytest.raises(SettingsError, match="resume the search"):
        SearchResult(Path("runs/short"), view(none), "model").pick("knee")


@pytest.mark.parametrize("command", ["price", "advise"])
def test_nothing_is_said_to_be_saved_where_nothing_is(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, command, stop)
    assert run(monkeypatch, command, "model", *(["data"] if command == "advise" else [])) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_no_completed_trial_is_a_failure_with_the_commonest_reason(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def fail(self: Trainer, step: int) -> None:
        calls.append(step)
        raise TrainingFailure("out of luck" if len(calls) == 1 else f"loss is NaN at {len(calls)}")

    monkeypatch.setattr(Trainer, "advance", fail)
    output = tmp_path / "run"
    flags = ["--model", tiny_model, "--data", tiny_data, "--output", output, "--steps", 9]
    status = run(monkeypatch, "search", *flags, "--budget", "4trials", "--backend", "local")
    shown = capsys.readouterr()
    assert status == 1
    lines = [line for line in shown.err.splitlines() if line.startswith("autopeft:")]
    assert len(lines) == 1
    assert "no trial was completed (4 failed)" in lines[0]
    assert "3 of 4 failed with: TrainingFailure: loss is NaN at 2" in lines[0]
    assert "best adapter" not in shown.out
    front = json.loads((output / "front.json").read_text())
    assert (front["complete"], front["front"], front["best"]) == (False, [], None)
    assert (output / "trials.csv").exists()
    assert (output / "report.html").exists()
    assert run(monkeypatch, "report", output) == 0
    assert "best adapter" not in capsys.readouterr().out


def test_a_search_whose_adapters_all_failed_is_a_failure(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    advance = Trainer.advance

    def fail(self: Trainer, step: int) -> Any:
        if self.attached.candidate.plan.specs:
            raise TrainingFailure("out of luck")
        return advance(self, step)

    monkeypatch.setattr(Trainer, "advance", fail)
    flags = ["--model", tiny_model, "--data", tiny_data, "--output", tmp_path / "run", "--steps", 9]
    assert run(monkeypatch, "search", *flags, "--budget", "4trials", "--backend", "local") == 1
    shown = capsys.readouterr()
    assert "no trial of an adapter was completed (1 complete, 3 failed)" in shown.err
    assert "best adapter" not in shown.out
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert (front["complete"], front["front"], front["best"]) == (False, [], None)
    assert "all 3 trials of adapters failed" in front["verdict"]["text"]
    assert "No adapter could be trained" in (tmp_path / "run" / "report.html").read_text()
    assert run(monkeypatch, "report", tmp_path / "run") == 0


def test_what_nobody_foresaw_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def surprise(*_: Any, **__: Any) -> None:
        raise LookupError("no such\nshelf")

    monkeypatch.setattr(api, "price", surprise)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    assert run(monkeypatch, "price", "--model", "m", "--data", "d") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("autopeft: unexpected LookupError: no such shelf; ")
    assert "report it" in line
    assert cli.DEBUG in line
    monkeypatch.setenv(cli.DEBUG, "1")
    assert run(monkeypatch, "price", "--model", "m", "--data", "d") == 1
    assert "Traceback" in capsys.readouterr().err


def _prepared(model: Path, data: Path, **more: Any) -> Any:
    given = {"model": str(model), "data": str(data), "budget": "3trials", "workers": 1, **more}
    return prepare(SearchSettings.from_mapping(given))


@pytest.mark.parametrize("what", ["a word", "padding"])
def test_tokens_beyond_the_embedding_are_refused(
    what: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    hf.AutoModel.from_pretrained(tiny_model).save_pretrained(tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    n_rows = len(tokenizer)
    if what == "a word":
        tokenizer.add_tokens(["7"])
    else:
        tokenizer.add_special_tokens({"pad_token": "<new-pad>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"has {n_rows} rows: they do not belong") as caught:
        _prepared(tmp_path, tiny_data)
    assert f"the token {n_rows} ({'7' if what == 'a word' else '<new-pad>'})" in str(caught.value)
    # Its own remedy leads out.
    model = hf.AutoModel.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    assert _prepared(tmp_path, tiny_data).data.pad_id < len(tokenizer)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_rows_that_a_classifier_cannot_read_by_their_end_token_are_refused(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    end = tokenizer.sep_token_id
    size = {"d_model": 16, "vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config: Any = {
        "t5": hf.T5Config(**size, d_kv=8, d_ff=16, num_layers=2, num_heads=2),
        "bart": hf.BartConfig(**size, **heads, encoder_ffn_dim=16, decoder_ffn_dim=16),
    }[kind]
    config.decoder_start_token_id = 0
    config.save_pretrained(tmp_path)
    ends = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", end)])
    tokenizer.backend_tokenizer.post_processor = ends
    tokenizer.save_pretrained(tmp_path)
    data = tmp_path / "rows.csv"
    rows = [f"{word} film {n},{word}" for n in range(40) for word in ("good", "bad")]
    data.write_text("\n".join(["text,label", *rows]))
    read = SearchSettings(model=str(tmp_path), data=str(data))
    assert load_task(read)[1].name == "text-classification"
    data.write_text("\n".join(["text,label", *rows, "good [SEP] film,good"]))
    with pytest.raises(DataError, match=r"row 81 has 2 end tokens, most rows 1; the model is "):
        load_task(read)
    load_task(replace(read, model=str(tiny_model)))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"end token \({end}\), but its tokenizer adds none;"):
        load_task(read)
