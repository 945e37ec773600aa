"""Is anything lost or repeated when a search is killed at random moments?

    python examples/benchmarks/kills.py --kills 100 --seed 0

Small searches are killed, and resumed until they are complete; then `kill_checks.py` compares the
log that trainings and driver wrote with the study and the run folder. Searches are of six kinds:

- function: a training function, in the driver's process, SQLite;
- journal: the same, the study in a journal file;
- postgres: the same, in a PostgreSQL server that is restarted, too (where it is installed);
- training: a tiny BERT is trained;
- ray: the function in two workers of a local Ray;
- cluster: the function on a Ray cluster of three nodes that outlives the driver.

Killed are the driver (SIGKILL), its process group, the driver by SIGTERM, a worker, a process of
Ray's own (raylet, agents, the head's server), a node, the database. A kill comes after a random
number of lines of the log and up to 0.3 s more, so during start-up, search, confirmation and
report. If Ray ends the driver because it has lost a process of its own, the last line must say so.
At the end no process, lock, temporary folder or shared memory of a search may be left.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests" / "helpers"))

import kill_checks
import kill_search
import postgres
from rich.console import Console
from rich.table import Table

import autopeft

KINDS = ("function", "journal", "postgres", "training", "ray", "cluster")
_HERE = Path(__file__).parent
_SHARE = {"function": 6, "journal": 4, "postgres": 6, "training": 4, "ray": 6, "cluster": 6}
"""So many kills each before the next kind."""

_WAYS = {
    "function": ("driver", "group", "term"),
    "journal": ("driver", "group", "term"),
    "postgres": ("driver", "term", "database", "database"),
    "training": ("driver", "group", "term"),
    "ray": ("driver", "group", "term", "worker", "engine", "engine"),
    "cluster": ("driver", "term", "worker", "node", "node"),
}
_MOST_LINES = {"training": 30, "ray": 70, "cluster": 70}
"""A kill comes after fewer lines of a session's log, by default than 100."""

_TOO_LONG = 150.0
"""A session of so many seconds hangs."""


@dataclass
class Total:
    """What was counted in all searches."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    searches: Counter[str] = field(default_factory=Counter)
    trained_again: Counter[str] = field(default_factory=Counter)
    given_up: int = 0
    seconds_off: float = 0.0
    problems: list[str] = field(default_factory=list)


class Killed:
    """One search: its process is begun again until it is complete."""

    def __init__(self, kind: str, place: Path, assets: tuple[Path, Path], chance: random.Random):
        self.kind, self.folder, self._chance = kind, place / "run", chance
        self.temporary, self.log = place / "t", place / "log.jsonl"
        self.temporary.mkdir()
        self.log.touch()
        self._output = place / "output.txt"
        self._server: Any = None
        self._cluster: Any = None
        self.seconds, self.n_sessions = 0.0, 0
        self._is_killed = False  # The last session, perhaps after its last report.
        self.snapshots: list[kill_checks.Ended] = []
        os.environ[kill_search.LOG] = str(self.log)
        model, data = assets
        self.settings: dict[str, Any] = {
            **(kill_search.TRAINING if kind == "training" else kill_search.FUNCTION),
            **{"model": str(model), "objectives": ["trainable_params"], "backend": "local"},
            "seed": chance.randrange(1000),
        }
        self.storage = f"sqlite:///{self.folder}/study.db"
        if kind == "training":
            self.settings["data"] = str(data)
        if kind == "journal":
            self.storage = self.settings["storage"] = str(place / "study.log")
        if kind == "postgres":
            self._server = postgres.PostgresServer()
            self.storage = self.settings["storage"] = self._server.url
        if kind in ("ray", "cluster"):
            self.settings |= {"backend": "ray", "workers": 2}
        if kind == "cluster":
            self._cluster = ClusterProcess(self.temporary)
            self.settings["ray_address"] = self._cluster.address
            del self.settings["workers"]

    def session(self, way: str | None) -> bool:
        """Run the search, and kill something unless `way` is None; return whether it was killed."""
        before = len(kill_checks.read_log(self.log))
        child = self._fork()
        self.n_sessions += 1
        n_lines = self._chance.randrange(_MOST_LINES.get(self.kind, 100))
        pause, status, killed_by = 0.3 * self._chance.random(), None, None
        until = time.monotonic() + _TOO_LONG
        while status is None:
            time.sleep(0.002)
            status = _exit_status(child)
            if time.monotonic() > until:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise RuntimeError(f"the search hangs; see {self._output}")
            if way and status is None and self.log.read_bytes().count(b"\n") >= before + n_lines:
                time.sleep(pause)
                if (status := _exit_status(child)) is None:
                    if self._kill(way, child):
                        killed_by = way
                        kill_search.note("killed", way=way)
                    way = None
        call = next(r for r in kill_checks.read_log(self.log)[before:] if r["event"] == "call")
        self.seconds += time.time() - call["at"]
        self.snapshots.append(self._stored())
        self._is_killed = status == -signal.SIGKILL
        if killed_by == "engine" and status == 1:
            self._check_told()
        elif status not in ((0, -signal.SIGKILL, -signal.SIGTERM, 130) if killed_by else (0,)):
            raise RuntimeError(f"the search ended with {status}; see {self._output}")
        return killed_by is not None

    def _check_told(self) -> None:
        """Check that the user was told, last of all, that Ray ended the process."""
        told = "autopeft: Ray ended the search's process"
        if _until_none(lambda: [] if told in self._last_line() else [self._last_line()], 5.0):
            raise RuntimeError(f"Ray ended the search without a word; see {self._output}")

    def _last_line(self) -> str:
        return (self._output.read_text().splitlines() or [""])[-1]

    def _stored(self) -> kill_checks.Ended:
        return kill_checks.ended(kill_checks.stored_trials(self.storage, self.folder.name))

    def _fork(self) -> int:
        """Start the search's process: a fork of this one, which has imported torch."""
        child = os.fork()
        if child:
            with suppress(PermissionError):  # It may have done so itself.
                os.setpgid(child, child)
            return child
        status = 1
        try:
            os.setpgid(0, 0)
            file = os.open(self._output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.environ |= {"TMPDIR": str(self.temporary), "RAY_TMPDIR": str(self.temporary)}
            # By default, a driver waits for a lost head for a minute.
            os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "5"
            tempfile.tempdir = None
            signal.signal(signal.SIGINT, signal.default_int_handler)
            kill_search.search(self.folder, self.settings)
            status = 0
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _kill(self, way: str, child: int) -> bool:
        """Kill something; return False if there was nothing to kill."""
        if way in ("worker", "engine"):
            marked = _marked(self.log).items()
            found = [
                p for p, text in marked if (_is_engine if way == "engine" else _is_worker)(text)
            ]
            if not found:
                return False
            kill_search.note("kill", way=way)
            with suppress(ProcessLookupError):
                os.kill(self._chance.choice(found), signal.SIGKILL)
            return True
        kill_search.note("kill", way=way)
        if way == "node":
            self._cluster.replace_node(self._chance)
        elif way == "database":
            self._server.stop()
            time.sleep(self._chance.random())
            self._server.start()
        elif way == "group":
            os.killpg(child, signal.SIGKILL)
        else:
            os.kill(child, signal.SIGTERM if way == "term" else signal.SIGKILL)
        return True

    def is_complete(self) -> bool:
        """Return whether the last report says so."""
        path = self.folder / "front.json"
        return path.exists() and bool(json.loads(path.read_text())["complete"])

    def check(self) -> kill_checks.Found:
        """Compare the log with the study and the folder."""
        trials = kill_checks.stored_trials(self.storage, self.folder.name)
        log = kill_checks.read_log(self.log)
        return kill_checks.check(
            log, self.folder, trials, self.snapshots, self.seconds, self.n_sessions
        )

    def close(self) -> list[str]:
        """Stop what is the harness's own, and return what is left of the search."""
        problems = []
        if self._server is not None:
            self._server.remove()
        if self._cluster is not None:
            if left := _until_none(lambda: _workers(self.log)):
                problems.append(f"workers left on the cluster: {left}")
            self._cluster.stop()
        if left := _until_none(lambda: list(_marked(self.log).values())):
            problems.append(f"processes left: {left}")
        scratch = [p.name for p in self.temporary.glob("autopeft-*")]
        # Who is killed cannot take back its note beside the lock; whoever has the lock ignores it.
        locks = (".lock", ".holder.json") if self._is_killed else (".lock",)
        partial = [str(p) for p in self.folder.rglob(".*") if p.name not in locks]
        if scratch or partial:
            problems.append(f"files left: {scratch + partial}")
        return problems


def _is_engine(text: str) -> bool:
    """Return whether a command line is that of a process of Ray's own."""
    return "/site-packages/ray/" in text or (text.startswith("ray::") and "Agent" in text)


def _is_worker(text: str) -> bool:
    return text.startswith("ray::") and "Agent" not in text


def _exit_status(child: int) -> int | None:
    """Return the exit status of a child, negative if a signal ended it; None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _marked(log: Path) -> dict[int, str]:
    """Return the command lines, by process, of what a search has started."""
    mark, found = f"{kill_search.LOG}={log}".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(entry.name)] = text.strip()
    return found


def _workers(log: Path) -> list[str]:
    """Return what runs for a search on its cluster; idle processes and agents are the cluster's."""
    names = _marked(log).values()
    own = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return [name for name in names if name.startswith("ray::") and not name.startswith(own)]


def _until_none(look: Callable[[], list[str]], seconds: float = 60.0) -> list[str]:
    """Return what is still there after a while.

    Agents of a Ray whose raylet was killed look for it every few seconds, and then end.
    """
    until = time.monotonic() + seconds
    while (left := look()) and time.monotonic() < until:
        time.sleep(0.2)
    return left


class ClusterProcess:
    """A cluster of a head and three nodes in a process of its own, which outlives drivers."""

    def __init__(self, temporary: Path) -> None:
        here, there = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        self._pipe = here
        self._process = fork.Process(target=_serve_cluster, args=(there, temporary))
        self._process.start()
        if not here.poll(100):
            raise RuntimeError("the cluster does not start")
        self.address = here.recv()

    def replace_node(self, chance: random.Random) -> None:
        """Remove a node as if its machine were lost; add another one."""
        self._pipe.send((chance.randrange(3), chance.random()))
        self._pipe.recv()

    def stop(self) -> None:
        """Stop all nodes."""
        self._pipe.send(None)
        self._process.join(60)


def _serve_cluster(pipe: Any, temporary: Path) -> None:
    os.environ["RAY_TMPDIR"] = str(temporary)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    pipe.send(cluster.address)
    while (wanted := pipe.recv()) is not None:
        index, seconds = wanted
        cluster.remove_node(nodes.pop(index), allow_graceful=False)
        time.sleep(seconds)
        nodes.append(cluster.add_node(num_cpus=1))
        pipe.send("done")
    cluster.shutdown()


def run(
    kinds: tuple[str, ...],
    n_kills: int,
    seed: int,
    place: Path,
    most_seconds: float,
    only: tuple[str, ...] = (),
) -> Total:
    """Kill searches of these kinds in turn, if need be in these ways only."""
    chance, total = random.Random(seed), Total()
    assets = kill_search.write_assets(place)
    began = time.monotonic()
    shm = _shared()
    number = 0
    while total.kills.total() < n_kills and time.monotonic() - began < most_seconds:
        kind = kinds[number % len(kinds)]
        folder = place / f"{number}"
        folder.mkdir()
        number += 1
        killed = Killed(kind, folder, assets, chance)
        n_left = min(_SHARE[kind], n_kills - total.kills.total())
        ways: list[str] = []
        try:
            while not killed.is_complete():
                possible = [way for way in _WAYS[kind] if not only or way in only]
                way = chance.choice(possible) if len(ways) < n_left else None
                if killed.session(way) and way:
                    ways.append(way)
            found = killed.check()
        except RuntimeError as error:
            found = kill_checks.Found([str(error)])
        found.problems += killed.close()
        total.searches[kind] += 1
        total.kills.update((kind, way) for way in ways)
        total.trained_again[kind] += found.trained_again
        total.given_up += found.given_up
        total.seconds_off = max(total.seconds_off, abs(found.seconds_off) / killed.n_sessions)
        total.problems += [f"{folder.name} ({kind}, {'+'.join(ways)}): {p}" for p in found.problems]
        print(f"{kind}: {', '.join(ways) or 'no kill'}", *found.problems, sep="\n  ", flush=True)
        if not found.problems:
            shutil.rmtree(folder)
    total.problems += [f"shared memory left: {path}" for path in _own(shm)]
    return total


def _shared() -> set[Path]:
    # Others may keep folders there, such as an MLflow server.
    return {path for path in Path("/dev/shm").iterdir() if path.is_file()}


def _own(before: set[Path]) -> list[Path]:
    """Return new files in shared memory that no living process has mapped."""
    new = _shared() - before
    mapped = ""
    for entry in Path("/proc").glob("[0-9]*/maps") if new else ():
        with suppress(OSError):
            mapped += entry.read_text()
    return [path for path in new if str(path) not in mapped]


def main() -> None:
    """Kill, and print what was counted; exit with 1 if anything was lost or repeated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--ways", default="", help="such as driver,worker [default: all]")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no search after them")
    options = parser.parse_args()
    kinds = tuple(options.kinds.split(","))
    if "postgres" in kinds and (why := postgres.missing()):
        print(f"postgres is left out: {why}")
        kinds = tuple(kind for kind in kinds if kind != "postgres")
    sys.path.append(str(_HERE))
    paths = (str(_HERE), str(Path(autopeft.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    place = Path(tempfile.mkdtemp(prefix="k"))
    ways = tuple(filter(None, options.ways.split(",")))
    if wrong := [kind for kind in kinds if ways and not set(ways) & set(_WAYS.get(kind, ()))]:
        parser.error(f"--ways {options.ways}: none of them ends {', '.join(wrong)}")
    total = run(kinds, options.kills, options.seed, place, 60 * options.minutes, ways)
    table = Table("kind", "searches", "kills", "of what", "trained again")
    for kind in kinds:
        ways = {way: n for (k, way), n in total.kills.items() if k == kind}
        shown = ", ".join(f"{way} {n}" for way, n in ways.items())
        table.add_row(
            kind, f"{total.searches[kind]}", f"{sum(ways.values())}", shown,
            f"{total.trained_again[kind]}",
        )  # fmt: skip
    Console().print(table)
    print(
        f"{total.kills.total()} kills, {len(total.problems)} problems; {total.given_up} candidates "
        f"given up after three deaths; spent seconds off by {total.seconds_off:.2f} a session"
    )
    if total.problems:
        print(*total.problems, f"the run folders are in {place}", sep="\n")
        sys.exit(1)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
