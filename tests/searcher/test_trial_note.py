"""Tests of the note that optuna-dashboard shows of a trial."""

from __future__ import annotations

from dataclasses import replace

from autopeft.costs.objectives import objective
from autopeft.costs.price import Price
from autopeft.plan import Candidate, TrainSettings
from autopeft.plan_text import read_plan
from autopeft.searcher.trial_note import trial_note
from autopeft.trial import Trial

PLAN = read_plan("lora:8@attn.q,attn.v[0-2]; ia3@mlp.down[2]; dora:4@attn.q[3,5]")
TRAIN = TrainSettings(1e-3, method_rates=(("ia3", 1e-2), ("lora", 1e-4)))
TRIAL = Trial(
    4,
    Candidate(PLAN, TRAIN),
    Price(1234, 4936, 2e9, 2**20, others={"watts": 3.5}),
    state="complete",
    values={"accuracy": 0.8125, "trainable_params": 1234.0},
    rungs=((8, -0.69), (25, -0.51)),
    measured={"train_seconds": 12.3},
)
OBJECTIVES = (objective("accuracy"), objective("trainable_params"))


def test_it_says_what_was_trained_and_what_came_of_it() -> None:
    assert trial_note(TRIAL, OBJECTIVES).splitlines()[2:] == [
        "| blocks | adapters |",
        "|---|---|",
        "| 0-1 | lora r8 on q, v |",
        "| 2 | lora r8 on q, v; ia3 on down |",
        "| 3,5 | dora r4 on q |",
        "",
        "- **trained** with learning rate 0.001 (ia3 0.01, lora 0.0001), alpha / rank 2, "
        "dropout 0, 100 steps of 16 rows",
        "- **costs** 1,234 trainable parameters, 4.82 KiB on disk, 2G FLOPs of training, "
        "1 MiB of memory, watts 3.5",
        "- **results** on validation, one seed: accuracy 0.812, train_seconds 12s",
        "- **scores at the rungs** -0.69 at step 8, -0.51 at step 25",
    ]


def ending(trial: Trial) -> str:
    return trial_note(trial, OBJECTIVES).splitlines()[0].partition(", search. ")[2]


def test_it_begins_with_how_the_trial_ended() -> None:
    assert ending(TRIAL) == "Complete."
    reason = "pruned at step 8, 0.1 behind a trial that costs no more"
    assert ending(replace(TRIAL, state="pruned", reason=reason)) == f"P{reason[1:]}."
    failed = replace(TRIAL, state="failed", reason="no `x`\n| at all")
    assert ending(failed) == "Failed: `no 'x' | at all`"
    assert "Would have been pruned at step 8" in ending(replace(TRIAL, audited_at=8))
