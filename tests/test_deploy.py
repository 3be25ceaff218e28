"""The files that start hintsearch on one's own machines and on Kubernetes: valid, of this version, without a secret."""

import copy
import gzip
import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dockerfile
import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
RAY_SCHEMA = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
JOB_SCHEMA = Path(__file__).parent / "data" / "kuberay" / "rayjob-1.7.0.schema.json.gz"
KUBERNETES = "1.33"
# What an interrupted search may take, and Ray's default is 3 s of.
STOP_SECONDS = "60"

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


@pytest.fixture(scope="module")
def on_premise() -> Tree:
    loaded: Tree = yaml.safe_load((DEPLOY / "cluster-onprem.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def job() -> Tree:
    loaded: Tree = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def server() -> list[Tree]:
    return list(yaml.safe_load_all((DEPLOY / "mlflow.yaml").read_text()))


@pytest.fixture(scope="module")
def stages() -> dict[str, list[dockerfile.Command]]:
    """The commands of each of the Dockerfile's stages, by the stage's name."""
    stages: dict[str, list[dockerfile.Command]] = {}
    for command in dockerfile.parse_file(str(DEPLOY / "Dockerfile")):
        if command.cmd.upper() == "FROM":
            name = command.value[-1]
            stages[name] = []
        stages[name].append(command)
    return stages


def closed(schema: Any) -> Any:
    """A schema that refuses keys it does not know, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    done = {key: closed(value) for key, value in schema.items()}
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and isinstance(schema["properties"], dict) and not free:
        done["additionalProperties"] = False
    return done


@pytest.fixture(scope="module")
def job_schema() -> Tree:
    schema: Tree = closed(json.loads(gzip.decompress(JOB_SCHEMA.read_bytes())))
    # An object's metadata are Kubernetes' own.
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def pods(job: Tree) -> dict[str, Tree]:
    """The pods' specifications, by group."""
    cluster = job["spec"]["rayClusterSpec"]
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]["spec"], **workers}


def strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value)
    else:
        yield str(tree)


def environment(container: Tree) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def test_rays_own_schema_accepts_the_on_premise_cluster(on_premise: Tree) -> None:
    jsonschema.validate(on_premise, json.loads(RAY_SCHEMA.read_text()))


def test_on_premise_machines_are_all_workers_and_the_head_runs_no_trials(on_premise: Tree) -> None:
    (nodes,) = prepare_config(copy.deepcopy(on_premise))["available_node_types"].values()
    assert nodes["min_workers"] == nodes["max_workers"] == len(on_premise["provider"]["worker_ips"])
    (start,) = (command for command in on_premise["head_start_ray_commands"] if "ray start" in command)
    assert "--num-cpus=0 --num-gpus=0" in start


def test_on_premise_nodes_get_what_the_nodes_of_the_cloud_get(on_premise: Tree) -> None:
    cloud = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert on_premise["file_mounts"] == cloud["file_mounts"]
    for cluster in (on_premise, cloud):
        setup = "\n".join(cluster["setup_commands"])
        for words in (
            "--constraint /tmp/constraints.txt /tmp/hintsearch-",
            "RAY_AUTH_MODE=token",
            "HINTSEARCH_CACHE=/mnt/hintsearch/cache",
            f"RAY_JOB_STOP_WAIT_TIME_S={STOP_SECONDS}",
        ):
            assert words in setup, words


def test_kuberays_own_schema_accepts_the_job(job: Tree, job_schema: Tree) -> None:
    jsonschema.validate(job, job_schema)


@pytest.mark.parametrize(
    ("place", "key"), [("spec", "entryPoint"), ("cluster", "enableInTreeAutoscaler"), ("pod", "restartpolicy")]
)
def test_kuberays_own_schema_would_refuse_a_misspelt_key(job: Tree, job_schema: Tree, place: str, key: str) -> None:
    wrong = copy.deepcopy(job)
    cluster = wrong["spec"]["rayClusterSpec"]
    {"spec": wrong["spec"], "cluster": cluster, "pod": pods(wrong)["gpu"]}[place][key] = "x"
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(wrong, job_schema)


def test_job_runs_trials_on_gpu_workers_alone_and_none_while_none_waits(job: Tree) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"]) == (0, 0)
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in json.dumps(pods(job)["head"])


def test_job_has_one_image_of_this_version_everywhere(job: Tree, version: str) -> None:
    images = {container["image"] for pod in pods(job).values() for container in pod["containers"]}
    assert len(images) == 1
    assert images.pop().endswith(f"/hintsearch:{version}")


def test_job_that_is_stopped_has_the_time_to_save_everything(job: Tree) -> None:
    for pod in pods(job).values():
        (container,) = pod["containers"]
        assert environment(container)["RAY_JOB_STOP_WAIT_TIME_S"] == STOP_SECONDS
        assert pod["terminationGracePeriodSeconds"] > int(STOP_SECONDS)


def test_all_pods_of_the_job_see_the_same_storage(job: Tree) -> None:
    for pod in pods(job).values():
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/mnt/hintsearch"]]["persistentVolumeClaim"] == {"claimName": "hintsearch"}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert environment(container)["HINTSEARCH_CACHE"].startswith("/mnt/hintsearch/")


def test_job_lets_nobody_in_without_a_token(job: Tree) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["networkPolicy"]["mode"] == "DenyAllIngress"


@pytest.mark.parametrize(("begun", "last"), [(False, "auto"), (True, "--resume")])
def test_job_starts_a_search_and_goes_on_with_one_that_has_begun(
    job: Tree, tmp_path: Path, begun: bool, last: str
) -> None:
    said = tmp_path / "hintsearch"
    said.write_text('#!/bin/sh\necho "$PWD $@"\n')
    said.chmod(0o755)
    results = tmp_path / "storage" / "results" / "cluster"
    results.mkdir(parents=True)
    if begun:
        (results / "journal.jsonl").touch()
    command = job["spec"]["entrypoint"].replace("/mnt/hintsearch", str(tmp_path / "storage"))
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["sh", "-c", command], env=path, capture_output=True, text=True, check=True)
    folder, *words = ended.stdout.split()
    assert folder == str(tmp_path / "storage")
    assert words[:4] == ["search", "/etc/hintsearch/study.yaml", "--name", "cluster"]
    assert words[-1] == last


def test_kubernetes_own_schema_accepts_the_tracking_server(server: list[Tree]) -> None:
    for part in server:
        kubernetes_validate.validate(part, KUBERNETES, strict=True)
    kinds = [part["kind"] for part in server]
    assert sorted(kinds) == sorted(
        ["PersistentVolumeClaim"] * 2 + ["Service"] * 2 + ["Deployment"] * 2 + ["NetworkPolicy"]
    )


def test_kubernetes_own_schema_would_refuse_a_misspelt_key(server: list[Tree]) -> None:
    (deployment,) = (part for part in server if part["kind"] == "Deployment" and part["metadata"]["name"] == "mlflow")
    wrong = copy.deepcopy(deployment)
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def named(server: list[Tree], kind: str, name: str) -> Tree:
    (found,) = (part for part in server if (part["kind"], part["metadata"]["name"]) == (kind, name))
    return found


def test_trap_15_tracking_server_answers_to_every_name_that_it_is_called_by(server: list[Tree], job: Tree) -> None:
    (container,) = named(server, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    (allowed,) = (word for word in container["command"] if word.startswith("--allowed-hosts="))
    hosts = allowed.removeprefix("--allowed-hosts=").split(",")
    service = named(server, "Service", "mlflow")
    port = service["spec"]["ports"][0]["port"]
    assert {service["metadata"]["name"], f"{service['metadata']['name']}:{port}", f"localhost:{port}"} <= set(hosts)
    for pod in pods(job).values():
        uri = environment(pod["containers"][0])["MLFLOW_TRACKING_URI"]
        assert uri.removeprefix("http://") in hosts
    probe = container["readinessProbe"]["httpGet"]
    assert {header["name"]: header["value"] for header in probe["httpHeaders"]}["Host"] in hosts


def test_tracking_server_keeps_its_runs_in_postgresql_and_its_data_on_volumes(server: list[Tree]) -> None:
    (container,) = named(server, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    database = named(server, "Service", "mlflow-postgres")
    uri = environment(container)["MLFLOW_BACKEND_STORE_URI"]
    assert uri == f"postgresql+psycopg2://mlflow:$(POSTGRES_PASSWORD)@{database['metadata']['name']}:5432/mlflow"
    claims = {part["metadata"]["name"] for part in server if part["kind"] == "PersistentVolumeClaim"}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for part in server
        if part["kind"] == "Deployment"
        for volume in part["spec"]["template"]["spec"]["volumes"]
    }
    assert used == claims


def test_no_secret_is_in_any_file(server: list[Tree]) -> None:
    for part in server:
        if part["kind"] == "Deployment":
            entries = environment(part["spec"]["template"]["spec"]["containers"][0])
            assert set(entries["POSTGRES_PASSWORD"]) == {"secretKeyRef"}
    for file in (*DEPLOY.iterdir(), ROOT / "cluster.yaml"):
        assert "kind: Secret" not in file.read_text()


def test_tracking_server_is_closed_to_other_namespaces(server: list[Tree]) -> None:
    policy = named(server, "NetworkPolicy", "mlflow")["spec"]
    (rule,) = policy["podSelector"]["matchExpressions"]
    assert set(rule["values"]) == {"mlflow", "mlflow-postgres"}
    assert policy["ingress"] == [{"from": [{"podSelector": {}}]}]
    assert not any(service["spec"].get("type") for service in server if service["kind"] == "Service")


def test_images_are_of_a_named_version(stages: dict[str, list[dockerfile.Command]], server: list[Tree]) -> None:
    for name, (start, *_) in stages.items():
        base = start.value[0]
        assert base in stages or ":" in base, name
    images = [text for part in server for text in strings(part) if "/" in text and ":" in text.rpartition("/")[2]]
    assert images
    assert not [image for image in images if image.endswith(":latest")]


@pytest.mark.parametrize("image", ["hintsearch", "mlflow"])
def test_images_run_as_a_user_without_rights(stages: dict[str, list[dockerfile.Command]], image: str) -> None:
    users = [command.value[0] for command in stages[image] if command.cmd.upper() == "USER"]
    assert users == ["hintsearch"]


def test_image_has_the_wheel_of_this_version_and_the_versions_that_were_tested(
    stages: dict[str, list[dockerfile.Command]], version: str
) -> None:
    copied = [word for command in stages["hintsearch"] if command.cmd.upper() == "COPY" for word in command.value]
    assert copied == [f"dist/hintsearch-{version}-py3-none-any.whl", "/tmp/"]
    for commands in stages.values():
        for command in commands:
            if command.cmd.upper() == "RUN" and "pip install" in command.value[0]:
                assert "--constraint /tmp/constraints.txt" in command.value[0]


def test_layers_of_the_images_hold_no_package_lists(stages: dict[str, list[dockerfile.Command]]) -> None:
    for commands in stages.values():
        for command in commands:
            if command.cmd.upper() == "RUN" and "apt-get update" in command.value[0]:
                assert "rm -rf /var/lib/apt/lists/*" in command.value[0]
                assert "--no-install-recommends" in command.value[0]


def test_the_lgpl_driver_of_postgresql_is_in_the_server_s_image_alone(
    stages: dict[str, list[dockerfile.Command]],
) -> None:
    with_driver = [name for name, commands in stages.items() if "psycopg" in str([c.value for c in commands])]
    assert with_driver == ["mlflow"]
