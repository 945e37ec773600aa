"""The examples for clusters: their syntax, their commands, and what they say of each other."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from autopeft import cli

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples" / "cluster"


def loaded(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def parsed(command: str) -> dict[str, Any]:
    verb, *arguments = shlex.split(command)
    return cli.app.commands[verb].make_context(verb, arguments).params


def test_the_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)


def test_compose_starts_a_head_two_workers_and_a_database() -> None:
    services = loaded("compose.yaml")["services"]
    assert set(services) == {"postgres", "head", "worker"}
    assert services["worker"]["deploy"]["replicas"] == 2
    assert "--num-cpus=0" in services["head"]["command"]
    command = re.search(r"autopeft (search .*)\"", " ".join(services["head"]["command"].split()))
    assert command is not None
    params = parsed(command[1])
    assert (params["ray_address"], params["output"]) == ("auto", "/runs/compose")
    assert params["storage"].startswith("postgresql+psycopg://")
    for service in ("head", "worker"):
        assert services[service]["environment"] == ["RAY_AUTH_TOKEN"]


def test_kuberay_names_valid_commands_and_volumes_that_exist() -> None:
    job = loaded("kuberay.yaml")
    assert (job["kind"], job["apiVersion"]) == ("RayJob", "ray.io/v1")
    for command in re.findall(r"autopeft (.*?--ray-address auto)", job["spec"]["entrypoint"]):
        parsed(command)
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    volumes = {volume["name"] for volume in head["volumes"]}
    assert {mount["name"] for mount in head["containers"][0]["volumeMounts"]} == volumes
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", ["compose.yaml", "kuberay.yaml", "slurm.sh"])
def test_every_example_asks_for_a_token(name: str) -> None:
    assert "RAY_AUTH_TOKEN" in (CLUSTER / name).read_text()
