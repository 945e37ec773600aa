"""Searches on clusters: nodes come and go, and share no disk with the driver."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = """
import sys
import time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
import autopeft

model, data, output = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
leaving = cluster.add_node(num_cpus=1)
cluster.add_node(num_cpus=1)

class ComeAndGo(autopeft.Callback):
    ended = 0

    def on_message(self, text):
        print("told:", text)

    def on_trial_end(self, trial):
        self.ended += 1
        if self.ended == 2:
            cluster.add_node(num_cpus=1)
        if self.ended == 4:
            cluster.remove_node(leaving, allow_graceful=False)
            while sum(node["Alive"] for node in ray.nodes()) > 3:
                time.sleep(0.2)  # Until the head has noticed.

result = autopeft.search(
    model=model, data=data, output=output, budget="8trials", steps=12, batch_size=8,
    max_length=16, confirm_seeds=1, max_finalists=1, precision="fp32",
    ray_address=cluster.address, callbacks=[ComeAndGo()],
)
print("verdict:", result.verdict.text)
cluster.shutdown()
"""

_SETTINGS = (
    "--budget=6trials --steps=12 --batch-size=8 --max-length=16 --confirm-seeds=1 "
    "--max-finalists=2 --precision=fp32 --ray-address=10.77.0.1:6399"
).split()
_HEAD, _NODE = "10.77.0.1", "10.77.0.2"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nodes_join_and_leave(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT, tiny_model, tiny_data, output],
        capture_output=True,
        text=True,
    )
    assert "verdict:" in ran.stdout, ran.stderr[-3000:]
    rooms = [line for line in ran.stdout.splitlines() if "the cluster has room" in line]
    assert [line.split()[6] for line in rooms][:2] == ["3", "2"], rooms
    front = json.loads((output / "front.json").read_text())
    assert front["complete"]
    assert front["trials"]["complete"] + front["trials"]["pruned"] == 8, front["trials"]


def _run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True, **options)


@pytest.fixture
def other_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A head and a node with networks and temporary folders of their own, joined by a cable."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount"))):
        pytest.skip("needs root, iproute2 and util-linux, for network namespaces")
    try:
        _run("ip", "netns", "add", "autopeft-node")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
    # `ray start` asks for a token where an earlier Ray has left one.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    inside = ("ip", "netns", "exec", "autopeft-node")
    ray = str(Path(sys.executable).with_name("ray"))
    small = "--object-store-memory=100000000", "--disable-usage-stats"
    # The node has no file that the driver writes; Python and autopeft are installed on both.
    hide = 'for f in /dev/shm "$1"; do mount -t tmpfs none "$f"; done; shift; exec "$@"'
    node: subprocess.Popen[bytes] | None = None
    try:
        _run(*"ip link add ap-head type veth peer name ap-node netns autopeft-node".split())
        _run("ip", "addr", "add", f"{_HEAD}/24", "dev", "ap-head")
        _run(*"ip link set ap-head up".split())
        _run(*inside, "ip", "addr", "add", f"{_NODE}/24", "dev", "ap-node")
        for device in ("ap-node", "lo"):
            _run(*inside, "ip", "link", "set", device, "up")
        _run(
            *(ray, "start", "--head", f"--node-ip-address={_HEAD}", "--port=6399"),
            *("--num-cpus=0", "--include-dashboard=false", *small),
        )
        node = subprocess.Popen(
            [
                *(*inside, "unshare", "--mount", "bash", "-c", hide, "bash", str(tmp_path)),
                *(ray, "start", f"--address={_HEAD}:6399", f"--node-ip-address={_NODE}"),
                *("--num-cpus=2", "--block", *small),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        yield
    finally:
        subprocess.run(
            f"ip netns pids autopeft-node | xargs -r kill -9; {ray} stop --force; "
            "ip netns del autopeft-node; ip link del ap-head",
            shell=True,
            capture_output=True,
        )
        if node is not None:
            node.wait(10)


@pytest.mark.nightly
@pytest.mark.timeout(240)
def test_a_node_without_the_model_fetches_it(
    other_machine: None, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model, output = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_model, model)
    command = str(Path(sys.executable).with_name("autopeft"))
    ran = subprocess.run(
        [
            command,
            "search",
            f"--model={model}",
            f"--data={tiny_data}",
            f"--output={output}",
            *_SETTINGS,
        ],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    front = json.loads((output / "front.json").read_text())
    assert front["trials"]["complete"] == 6
    for config in output.glob("adapters/*/adapter_config.json"):
        assert json.loads(config.read_text())["base_model_name_or_path"] == str(model)
