"""ray_configs/cluster and ray_configs/jobs are what Ray and KubeRay read. Nothing is started.

The launcher's file goes through Ray's own schema and checks. No package has KubeRay's schema: its fields are
written down here as its API (`ray.io/v1`) has them, and Ray's autoscaler reads the manifests.
"""

import re
import shlex
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import yaml

import samssl.cluster  # before ray  # noqa: F401
from samssl.commands import STAGES
from samssl.config import load_config, parse_overrides, read_yaml

ROOT = Path(__file__).parents[2]
CLUSTER, JOBS = ROOT / "ray_configs/cluster", ROOT / "ray_configs/jobs"
IN_IMAGE = "/home/ray/src/"
"""Where the Dockerfile puts this folder."""

CLUSTER_SPEC = {
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"),
    *("workerGroupSpecs", "gcsFaultToleranceOptions", "headServiceAnnotations", "managedBy", "suspend"),
}
GROUP = {"rayStartParams", "template"}
WORKER_GROUP = {"groupName", "minReplicas", "maxReplicas"}
WORKER_GROUP_OPTIONAL = {"replicas", "numOfHosts", "idleTimeoutSeconds", "scaleStrategy"}
JOB_SPEC = {
    *("entrypoint", "runtimeEnvYAML", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
    *("rayClusterSpec", "clusterSelector", "submissionMode", "activeDeadlineSeconds", "metadata", "jobId"),
}
POD = {"containers", "volumes", "tolerations", "nodeSelector", "serviceAccountName", "securityContext"}
CONTAINER = {"name", "image", "env", "ports", "resources", "volumeMounts"}


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_launcher_file_has_rays_schema() -> None:
    from ray.autoscaler._private.docker import validate_docker_config
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = manifest("aws.yaml")
    validate_config(fillout_defaults(config))
    validate_docker_config(config)
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(fillout_defaults({**config, "idle_timeout": 3}))


def test_the_launchers_head_is_on_demand_and_its_workers_are_spot_and_scale() -> None:
    nodes = manifest("aws.yaml")["available_node_types"]
    assert "InstanceMarketOptions" not in nodes["head"]["node_config"]
    assert nodes["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert nodes["gpu"]["min_workers"] < nodes["gpu"]["max_workers"]
    assert nodes["gpu"]["resources"]["GPU"] == 1


def test_the_launchers_nodes_ask_for_the_token_and_mount_what_is_shared() -> None:
    config = manifest("aws.yaml")
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert any("mount -t nfs4" in line and "/shared" in line for line in config["initialization_commands"])
    assert "--volume /shared:/shared" in config["docker"]["run_options"]


def test_kuberay_manifests_have_the_fields_of_its_api() -> None:
    cluster, job = manifest("kuberay_cluster.yaml"), manifest("kuberay_job.yaml")
    assert [(item["apiVersion"], item["kind"]) for item in (cluster, job)] == [
        ("ray.io/v1", "RayCluster"),
        ("ray.io/v1", "RayJob"),
    ]
    for item in (cluster, job):
        assert item.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", item["metadata"]["name"])
    assert job["spec"].keys() <= JOB_SPEC
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    check_cluster(cluster["spec"])


def check_cluster(spec: dict[str, Any]) -> None:
    assert spec.keys() <= CLUSTER_SPEC
    assert spec["headGroupSpec"].keys() == GROUP
    for group in spec["workerGroupSpecs"]:
        assert GROUP | WORKER_GROUP <= group.keys() <= GROUP | WORKER_GROUP | WORKER_GROUP_OPTIONAL
        assert 0 <= group["minReplicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check_pod(group["template"]["spec"])


def check_pod(pod: dict[str, Any]) -> None:
    assert pod.keys() <= POD
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert container.keys() <= CONTAINER
        assert container["image"] == "samssl:latest"
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert "MLFLOW_TRACKING_URI" in {variable["name"] for variable in container["env"]}


@pytest.mark.parametrize("name", ["kuberay_cluster.yaml", "kuberay_job.yaml"])
def test_rays_autoscaler_reads_the_manifests(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = manifest(name)["spec"]
    metadata = {"name": "samssl", "namespace": "default"}
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": metadata, "spec": spec.get("rayClusterSpec", spec)}
    )
    nodes = config["available_node_types"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    assert nodes["gpu"]["resources"]["GPU"] == 1
    assert nodes["gpu"]["max_workers"] == config["max_workers"] == 8


def test_versions_of_ray_agree() -> None:
    image = re.search(r"^FROM rayproject/ray:(\S+)-py", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert image
    assert manifest("kuberay_cluster.yaml")["spec"]["rayVersion"] == image[1]


def test_the_jobs_entrypoint_is_a_command_with_a_file_that_the_image_has() -> None:
    program, stage, option, file, *overrides = shlex.split(manifest("kuberay_job.yaml")["spec"]["entrypoint"])
    assert (program, option) == ("samssl", "--config")
    config_class = locate(STAGES[stage].config.replace(":", "."))
    assert isinstance(config_class, type)
    assert file.startswith(IN_IMAGE)
    load_config(config_class, ROOT / file.removeprefix(IN_IMAGE), parse_overrides(overrides))
    assert "/shared/runs/hippocampus" in " ".join(overrides)


def test_runtime_environments_are_rays_and_without_secrets() -> None:
    from ray.runtime_env import RuntimeEnv

    files = sorted(JOBS.glob("*.yaml"))
    assert {file.stem for file in files} == {"cpu", "gpu"}
    in_manifest = yaml.safe_load(manifest("kuberay_job.yaml")["spec"]["runtimeEnvYAML"])
    for file in files:
        environment = read_yaml(file)
        assert environment.keys() == {"working_dir", "excludes", "env_vars"}
        RuntimeEnv(env_vars=environment["env_vars"], excludes=environment["excludes"])
        assert environment["env_vars"].items() <= in_manifest["env_vars"].items()
        assert all((ROOT / name.strip("/")).exists() for name in environment["excludes"])
