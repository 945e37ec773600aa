from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autopeft.engine import worker_environment as environment_module
from autopeft.engine.worker_environment import thread_environment, worker_environment


def test_workers_have_one_thread_each() -> None:
    assert worker_environment()["OMP_NUM_THREADS"] == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is taken on Linux only")
def test_workers_start_with_rays_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    variables = worker_environment()
    if "LD_PRELOAD" not in variables:
        pytest.skip("Ray brings no allocator here that works")
    tried = subprocess.run(
        [sys.executable, "-c", "print('jemalloc' in open('/proc/self/maps').read())"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert (tried.stdout, tried.stderr) == ("True\n", "")


def test_a_users_own_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libmine.so")
    assert worker_environment() == thread_environment()


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is taken on Linux only")
def test_an_allocator_that_does_not_load_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "libjemalloc.so"
    broken.write_text("built for another machine")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(environment_module, "_jemalloc", lambda: broken)
    assert worker_environment() == thread_environment()
