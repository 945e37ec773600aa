"""Does a long search grow? Memory, handles and threads of driver and worker, trial after trial.

    python examples/benchmarks/soak.py --trials 1000

A tiny BERT is trained for a few steps in one worker of Ray. After a fifth of the trials, and after
all of them, resident memory, file handles and threads are read from /proc, with the bytes in shared
memory. What the study itself must hold of the trials in between is measured in a fresh process that
reads it, and taken off the driver's memory. Exit status 1: something grew by more than
`--most-growth`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import optuna
from kill_search import write_assets
from rich.console import Console
from rich.table import Table

import autopeft

_READ = """
import gc, os, sys
from autopeft.searcher.study import read_study
import soak
study = read_study("sqlite:///" + sys.argv[1], "first")
gc.collect()
before = soak.resident(os.getpid())
study = read_study("sqlite:///" + sys.argv[2], sys.argv[3])
gc.collect()
print(soak.resident(os.getpid()) - before)
"""


def resident(pid: int) -> int:
    """Return the resident bytes of a process that are its own."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no Anonymous in smaps_rollup")


@dataclass(frozen=True)
class Measured:
    """What one process holds."""

    memory: int
    handles: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Measured:
        place = Path(f"/proc/{pid}")
        handles, threads = (len(os.listdir(place / name)) for name in ("fd", "task"))
        return cls(resident(pid), handles, threads)


def _worker() -> int:
    """Return the process in which Ray trains."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"AdapterTrainable" in (entry / "cmdline").read_bytes()
            if is_worker and f"/{os.getpid()}" in _ancestors(int(entry.name)):
                return int(entry.name)
        except OSError:
            continue
    raise RuntimeError("there is no worker of Ray")


def _ancestors(pid: int) -> str:
    path = ""
    while pid > 1:
        path += f"/{pid}"
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return path


def _shared() -> int:
    """Return the bytes that this user's files in shared memory take."""
    return sum(f.stat().st_blocks * 512 for f in Path("/dev/shm").glob("*") if f.is_file())


class Watch(autopeft.Callback):
    """Measures after some of the trials."""

    def __init__(self, at: set[int]) -> None:
        self._at, self._n_ended = at, 0
        self.found: dict[int, tuple[Measured, Measured, int, float]] = {}

    def on_trial_end(self, trial: autopeft.Trial) -> None:
        self._n_ended += 1
        if self._n_ended in self._at:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            now = Measured.of(os.getpid()), Measured.of(_worker()), _shared(), time.monotonic()
            self.found[self._n_ended] = now
            print(f"{self._n_ended} trials: driver {now[0]}, worker {now[1]}", flush=True)


def main() -> None:
    """Search, print what was held, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sampler", default="autopeft")
    parser.add_argument("--most-growth", type=float, default=0.05)
    options = parser.parse_args()
    first, last = options.trials // 5, options.trials
    watch = Watch({first * part for part in range(1, 5)} | {last})
    with tempfile.TemporaryDirectory() as place:
        model, data = write_assets(Path(place))
        folder = Path(place) / "run"
        autopeft.search(
            model=model, data=data, output=folder, budget=f"{last}trials", steps=options.steps,
            batch_size=8, max_length=16, precision="fp32", sampler=options.sampler, workers=1,
            trials_per_worker=1, confirm_seeds=1, max_finalists=1, callbacks=[watch],
            progress=False,
        )  # fmt: skip
        study = _study_bytes(folder) * (last - first) / last
    table = Table("after trials", "driver", "worker", "handles", "threads", "shared MB", "seconds")
    began = watch.found[first][3]
    for n_trials, (driver, worker, shared, at) in watch.found.items():
        table.add_row(
            f"{n_trials:,}", f"{driver.memory / 1e6:.1f} MB", f"{worker.memory / 1e6:.1f} MB",
            f"{driver.handles}, {worker.handles}", f"{driver.threads}, {worker.threads}",
            f"{shared / 1e6:.1f}", f"{at - began:.0f}",
        )  # fmt: skip
    Console(width=100).print(table)
    before, after = watch.found[first], watch.found[last]
    growth = {
        "driver's memory": (after[0].memory - study) / before[0].memory,
        "worker's memory": after[1].memory / before[1].memory,
        "driver's handles": after[0].handles / before[0].handles,
        "worker's handles": after[1].handles / before[1].handles,
        "driver's threads": after[0].threads / before[0].threads,
        "worker's threads": after[1].threads / before[1].threads,
    }
    print(f"the study holds {study / 1e6:.1f} MB of the {last - first} trials in between")
    for name, share in growth.items():
        print(f"{name}: {100 * (share - 1):+.1f} %")
    if max(growth.values()) > 1 + options.most_growth:
        sys.exit(1)


def _study_bytes(folder: Path) -> float:
    """Return what reading the study adds to the memory of a process."""
    study = folder / "study.db"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    one = folder / "one.db"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.create_study(storage=f"sqlite:///{one}", study_name="first")
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(one), str(study), folder.name],
        capture_output=True, text=True, check=True, env=env,
    )  # fmt: skip
    return float(done.stdout)


if __name__ == "__main__":
    main()
