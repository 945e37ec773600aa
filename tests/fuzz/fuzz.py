"""Damaged and hostile inputs by the thousand: only a UserError may be raised, within ten seconds.

python tests/fuzz/fuzz.py --inputs 100000 --seed 0
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]

from targets import TARGETS  # noqa: E402

from autopeft.errors import UserError  # noqa: E402

LIMIT_SECONDS = 10


@dataclass(frozen=True)
class Fault:
    """An input that raised something else than a UserError, or took too long."""

    target: str
    seed: str
    text: str

    @property
    def kind(self) -> str:
        """Where it was raised: faults of one kind are told once."""
        lines = self.text.strip().splitlines()
        ours = [line.strip() for line in lines if "autopeft" in line and line.startswith("  File")]
        return f"{self.target}: {lines[-1][:60]} {ours[-1] if ours else ''}"


class TooSlow(Exception):
    """An input took longer than `LIMIT_SECONDS`."""


def _alarm(*_: object) -> None:
    raise TooSlow(f"more than {LIMIT_SECONDS} s")


def run(
    n_inputs: int, seed: int, only: str = "", counts: Counter[str] | None = None
) -> Iterator[Fault]:
    """Yield the faults among so many inputs; `counts` gets the number of inputs by target."""
    chosen = {name: each for name, each in TARGETS.items() if only in name}
    names, weights = list(chosen), [weight for weight, _ in chosen.values()]
    draw = random.Random(f"{seed}")
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    # What a target imports takes seconds once, and is no time of an input.
    for number, (_, target) in enumerate(chosen.values()):
        (home / f"first-{number}").mkdir()
        with suppress(Exception):
            target(random.Random(0), home / f"first-{number}")
    before = signal.signal(signal.SIGALRM, _alarm)
    try:
        for number in range(n_inputs):
            (name,) = draw.choices(names, weights)
            place = home / "run"
            place.mkdir()
            if counts is not None:
                counts[name] += 1
            key = f"{seed}-{number}"
            signal.alarm(LIMIT_SECONDS)
            try:
                chosen[name][1](random.Random(key), place)
            except UserError as error:
                if len(str(error).splitlines()) != 1:
                    yield Fault(name, key, f"not one line: {str(error)!r}")
            except Exception:
                yield Fault(name, key, traceback.format_exc())
            finally:
                signal.alarm(0)
                shutil.rmtree(place)
    finally:
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(home, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the inputs and print the faults, each kind once; return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a target's name")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    kinds: dict[str, list[Fault]] = {}
    began = time.monotonic()
    for fault in run(options.inputs, options.seed, options.only, counts):
        kinds.setdefault(fault.kind, []).append(fault)
    for kind, faults in kinds.items():
        sys.stdout.write(f"{len(faults)} x {kind}\n  seed {faults[0].seed}\n{faults[0].text}\n\n")
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"{count:>7} {name}\n")
    seconds = time.monotonic() - began
    sys.stdout.write(
        f"{sum(counts.values())} inputs, {len(kinds)} kinds of faults, {seconds:.0f} s\n"
    )
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
