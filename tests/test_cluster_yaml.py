"""The cluster file that ships: Ray accepts it, only workers run trials, and every node gets the same hintsearch."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from hintsearch.search.study import load_study
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).parents[1]
SCHEMA = Path(ray.autoscaler.__file__).parent / "ray-schema.json"

Cluster = dict[str, Any]


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    loaded: Cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def _workers(cluster: Cluster) -> dict[str, dict[str, Any]]:
    types: dict[str, dict[str, Any]] = cluster["available_node_types"]
    return {name: node for name, node in types.items() if name != cluster["head_node_type"]}


def _wheels(cluster: Cluster) -> dict[str, str]:
    return {remote: local for remote, local in cluster["file_mounts"].items() if local.endswith(".whl")}


def _setup(cluster: Cluster) -> str:
    return "\n".join(cluster["setup_commands"])


def test_rays_own_schema_accepts_the_cluster(cluster: Cluster) -> None:
    jsonschema.validate(cluster, json.loads(SCHEMA.read_text()))


def test_rays_own_schema_would_refuse_a_misspelt_key(cluster: Cluster) -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        jsonschema.validate({**cluster, "idle_timeout": 5}, json.loads(SCHEMA.read_text()))


def test_the_head_is_one_of_the_node_types(cluster: Cluster) -> None:
    assert cluster["head_node_type"] in cluster["available_node_types"]


def test_trap_28_the_dashboard_is_on_the_heads_loopback_interface(cluster: Cluster) -> None:
    (start,) = (command for command in cluster["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start.split()


def test_trap_29_usage_statistics_are_off_on_every_node(cluster: Cluster) -> None:
    assert "RAY_USAGE_STATS_ENABLED=0" in _setup(cluster)


def test_workers_scale_from_zero(cluster: Cluster) -> None:
    workers = _workers(cluster)
    assert workers
    assert all(worker["min_workers"] == 0 for worker in workers.values())
    assert cluster["max_workers"] >= 1


def test_workers_have_gpus(cluster: Cluster) -> None:
    assert all(worker["resources"]["GPU"] >= 1 for worker in _workers(cluster).values())


def test_workers_are_spot_instances_and_the_head_is_not(cluster: Cluster) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    for worker in _workers(cluster).values():
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_the_head_offers_no_cpu_and_no_gpu_to_trials(cluster: Cluster) -> None:
    resources = cluster["available_node_types"][cluster["head_node_type"]]["resources"]
    # An absent CPU would be detected from the instance type; an absent GPU is none, for the head's type has none.
    assert resources["CPU"] == 0
    assert resources.get("GPU", 0) == 0


def test_every_node_gets_one_wheel_of_this_version(cluster: Cluster) -> None:
    wheels = _wheels(cluster)
    assert len(wheels) == 1
    [(remote, local)] = wheels.items()
    assert Path(remote).name == Path(local).name
    name, version, *_ = parse_wheel_filename(Path(local).name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (name, str(version)) == (project["name"], project["version"])


def test_the_mounted_wheel_is_what_setup_installs(cluster: Cluster) -> None:
    [remote] = _wheels(cluster)
    installs = [command for command in cluster["setup_commands"] if "pip install" in command]
    assert any(remote in command.split() for command in installs)
    assert re.findall(r"\S+\.whl", _setup(cluster)) == [remote]


def test_setup_installs_the_same_dependencies_on_every_node(cluster: Cluster) -> None:
    installs = [
        command
        for command in [*cluster["setup_commands"], *cluster["head_setup_commands"]]
        if re.search(r"\bpip install\b", command)
    ]
    assert installs
    for command in installs:
        constraints = re.search(r"--constraint (\S+)", command)
        assert constraints, command
        assert constraints[1] in cluster["file_mounts"]


def test_every_node_mounts_the_shared_storage(cluster: Cluster) -> None:
    assert re.search(r"mount -t nfs4 .* /mnt/hintsearch$", _setup(cluster), re.MULTILINE)


def test_nodes_demand_the_token_that_they_are_given(cluster: Cluster) -> None:
    assert re.findall(r"RAY_AUTH_MODE=(\w+)", _setup(cluster)) == ["token"]
    assert "~/.ray/auth_token" in cluster["file_mounts"]


@pytest.mark.parametrize("study", sorted(path.stem for path in (ROOT / "studies").glob("*.yaml")))
def test_workers_of_a_shipped_studys_trials_fit_on_the_nodes(cluster: Cluster, study: str) -> None:
    """A trial that fits on no node would wait for ever on a cluster that grows for trials that wait."""
    resources = load_study(study).resources
    rayjob = next(yaml.safe_load_all((ROOT / "deploy" / "rayjob.yaml").read_text()))
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    nodes = [(node["resources"]["CPU"], node["resources"]["GPU"]) for node in _workers(cluster).values()]
    for cpus, gpus in [*nodes, (int(limits["cpu"]), int(limits["nvidia.com/gpu"]))]:
        assert resources.cpus_per_worker <= cpus
        assert resources.gpus_per_worker <= gpus
