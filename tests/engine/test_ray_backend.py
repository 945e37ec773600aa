"""A Ray that a search starts itself is its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_CODE = """
import psutil, warnings
warnings.simplefilter("always")
from autopeft.engine.ray_backend import _start_local, ray

_start_local(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20)
print("answer", ray.get(ray.remote(lambda: 42).remote()))
me = psutil.Process()
for process in (me, *me.children(recursive=True)):
    for one in process.net_connections():
        if one.status == psutil.CONN_LISTEN:
            print("listens", one.laddr.ip)
ray.shutdown()
"""


@pytest.mark.slow
def test_a_local_ray_listens_on_the_loopback_interface_and_joins_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, "RAY_ADDRESS": "192.0.2.1:6379"},
    )
    assert "answer 42" in done.stdout, done.stderr
    listening = {line.split()[1] for line in done.stdout.splitlines() if "listens" in line}
    assert listening
    assert all(address.removeprefix("::ffff:").startswith("127.") for address in listening)
    assert "RAY_ADDRESS=192.0.2.1:6379 is not joined" in done.stderr
