"""A driver without a GPU in front of a cluster: its resources are those of the cluster."""

from __future__ import annotations

import subprocess
import sys

import pytest

from autopeft.errors import SettingsError

_SCRIPT = """
from autopeft.engine.ray_backend import ray
from autopeft.engine import ray_devices
from autopeft.engine.devices import Devices
from autopeft.errors import SettingsError, TrainingFailure

options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 10**8}
context = ray.init("local", num_cpus=3, num_gpus=2, **options)
address = context.address_info["address"]
try:
    ray_devices.cluster_devices(address)
except SettingsError as error:
    print(error)
ray_devices.devices_here = lambda: Devices("xpu", 1, 5 * 10**9)
assert ray_devices.cluster_devices(address) == Devices("xpu", 2, 5 * 10**9, 3, of_nodes=(2,))

def fails(): raise ValueError("boom")

try:
    ray_devices.on_worker(address, 0.5, fails)
except TrainingFailure as error:
    assert "boom" in str(error), error
assert ray.is_initialized(), "what the caller has joined stays joined"
print("good")
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_clusters_devices_are_asked_for_there() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT], capture_output=True, text=True
    )
    told, good = ran.stdout.strip().splitlines()[-2:]
    assert "torch sees none of the cluster's 2 GPUs" in told, ran.stderr
    assert good == "good", ran.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "no-such-host.invalid:6379"])
def test_an_address_where_nothing_listens_is_told_at_once(address: str) -> None:
    from autopeft.engine.ray_backend import join

    with pytest.raises(SettingsError, match=r"no Ray cluster answers \(ConnectionError\)"):
        join(address)
