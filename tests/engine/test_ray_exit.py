"""Ray may end the search's process without a word; then the user is told, and may resume."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from autopeft.engine.ray_exit import reason_in

_CODE = """
import os, signal, sys
from pathlib import Path
from autopeft.engine.ray_exit import ExitNotice

with ExitNotice("runs/größe") as notice:
    notice.read(Path(sys.argv[1]))
    {}
"""
_LOST = """\
[2026-11-29 17:50:24,393 I 55 59] recovery.cc:6: Cannot recover object
[2026-11-29 17:50:24,394 W 55 59] connection.cc:216: The connection to the plasma store is failed. \
Terminate the process. Status: IOError: Broken pipe
"""
_NO_HEAD = """\
[2026-11-29 17:53:27,190 W 66 68] retryable_grpc_client.cc:85: GCS has been unavailable
[2026-11-29 17:53:27,190 E 66 68] rpc_client.h:204: Failed to connect to GCS within 60 seconds. \
GCS may have been killed. It's either GCS is terminated by `ray stop`. The program will terminate.
"""
_SETTINGS = (
    "--evaluate=takes_a_moment:evaluate --metric=accuracy --steps=27 --budget=200trials "
    "--confirm-seeds=1 --max-finalists=1 --workers=1"
)
_EVALUATE = """
import time

def evaluate(candidate, *, seed, report):
    time.sleep(0.1)
    return {"accuracy": 0.5, "test_accuracy": 0.5}
"""
_RESUME = "what was told is saved: `autopeft resume runs/größe` continues\n"


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("os._exit(1)", r"Ray ended the search's process \(The connection .* is failed\): .*; "),
        (
            "Path(sys.argv[1]).unlink(); os.kill(os.getpid(), 9)",
            "the search's process was killed, .*; ",
        ),
        ("sys.exit('autopeft: a mistake')", None),
    ],
)
def test_a_process_that_is_ended_says_why(end: str, told: str | None, tmp_path: Path) -> None:
    log = tmp_path / "driver.log"
    log.write_text(_LOST)
    ran = subprocess.run(
        [sys.executable, "-c", _CODE.format(end), log], capture_output=True, text=True
    )
    if told is None:
        assert ran.stderr == "autopeft: a mistake\n"
    else:
        assert re.fullmatch(f"autopeft: {told}{re.escape(_RESUME)}", ran.stderr), ran.stderr


def test_the_reason_is_ray_s_own() -> None:
    assert reason_in(_LOST) == "The connection to the plasma store is failed"
    assert reason_in(_NO_HEAD) == "Failed to connect to GCS within 60 seconds"
    assert reason_in(_NO_HEAD.splitlines()[0]) is None


@pytest.mark.nightly
@pytest.mark.timeout(240)
@pytest.mark.parametrize("killed", ["ray::RuntimeEnvAgent", "gcs_server"])
def test_the_death_of_ray_s_own_processes_is_told(
    killed: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "takes_a_moment.py").write_text(_EVALUATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3")
    output, command = tmp_path / "run", str(Path(sys.executable).with_name("autopeft"))
    asked = f"--model={tiny_model} --output={output} {_SETTINGS}".split()
    search = subprocess.Popen(
        [command, "search", *asked], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while search.poll() is None:
        children = psutil.Process(search.pid).children(recursive=True)
        found = [child for child in children if killed in "".join(child.cmdline()[:1])]
        if found and any("ray::Adapter" in child.name() for child in children):
            found[0].kill()
            break
        time.sleep(0.05)
    _, told = search.communicate()
    assert search.returncode == 1, told
    assert "autopeft: Ray ended the search's process" in told.splitlines()[-1]
    assert f"`autopeft resume {output}` continues" in told
    resumed = subprocess.run(
        [command, "resume", output, "--backend=local", "--budget=4trials"],
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((output / "front.json").read_text())["complete"]
