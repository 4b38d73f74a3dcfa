"""The manifests under k8s/: they build, are valid for all who judge them, and agree with ganscale.

Needs kubectl; KubeRay's schemas are found by GANSCALE_KUBERAY_CRDS, a folder with its definitions
of custom resources (ray-operator/config/crd/bases of its repository).
"""

from __future__ import annotations

import copy
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from ganscale.cli import main
from ganscale.config import Config, load_config
from ganscale.data.building import build_shards
from ganscale.data.sources import SourceSpec
from tests.support.checkpoints import s3_bucket
from tests.support.custom_resources import Definition
from tests.support.kuberay_rules import operator_problems
from tests.support.kubernetes import Json, build, cluster_spec, kubernetes_problems, pods, quantity

ROOT = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(path.name for path in (ROOT / "overlays").iterdir())
CRDS = "GANSCALE_KUBERAY_CRDS"


class Removed:
    """A value that is taken away; its name is the same in every process that collects tests."""

    def __repr__(self) -> str:
        return "removed"


REMOVED = Removed()

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="NOT CHECKED: k8s/ needs kubectl, which is not here"
)


@pytest.fixture(scope="module")
def built() -> dict[str, list[Json]]:
    """The documents of each overlay."""
    return {name: build(ROOT / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(scope="module")
def schemas() -> dict[tuple[str, str], Definition]:
    """KubeRay's, by (apiVersion, kind)."""
    folder = os.environ.get(CRDS)
    if not folder:
        pytest.skip(f"NOT CHECKED: {CRDS} names no folder with KubeRay's definitions")
    files = [Path(folder) / f"ray.io_{name}.yaml" for name in ("rayjobs", "rayclusters")]
    return {(d.api_version, d.kind): d for d in map(Definition, files)}


def ray_document(documents: list[Json]) -> Json:
    """The RayJob or RayCluster."""
    (found,) = (d for d in documents if d["apiVersion"].startswith("ray.io/"))
    return found


def all_problems(documents: list[Json], schemas: dict[tuple[str, str], Definition]) -> list[str]:
    """What is said against documents that are applied together, by who speaks first."""
    document = ray_document(documents)
    problems = schemas[document["apiVersion"], document["kind"]].problems(document)
    return problems or operator_problems(document) or kubernetes_problems(documents)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid_for_kubernetes(built: dict[str, list[Json]], name: str) -> None:
    assert kubernetes_problems(built[name]) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid_for_kuberay(
    built: dict[str, list[Json]], schemas: dict[tuple[str, str], Definition], name: str
) -> None:
    document = ray_document(built[name])
    assert schemas[document["apiVersion"], document["kind"]].problems(document) == []
    assert operator_problems(document) == []


CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec"
WORKERS = f"{CLUSTER}.workerGroupSpecs.0"
CONTAINER = f"{WORKERS}.template.spec.containers.0"
BROKEN: list[tuple[str, str, Any, str]] = [
    # KubeRay's schemas
    ("gpu", "spec.entrypont", "python", "'entrypont' was unexpected"),
    ("gpu", "spec.backoffLimit", "many", "spec.backoffLimit: 'many' is not of type 'integer'"),
    ("gpu", f"{WORKERS}.groupName", REMOVED, "'groupName' is a required property"),
    ("gpu", f"{WORKERS}.rayStartParams", {"num-cpus": 0}, "0 is not of type 'string'"),
    ("gpu", f"{WORKERS}.replicas", 2**31, "greater than the maximum"),
    ("gpu", f"{CONTAINER}.resources.limits.memory", "much", "memory: 'much' does not match"),
    ("gpu", f"{CONTAINER}.env.1", {"name": "HOME", "value": "/"}, "HOME is there twice"),
    ("gpu", f"{CONTAINER}.ports.0.containerPort", REMOVED, "'containerPort' is a required"),
    ("gpu", "spec.managedBy", "me", "the managedBy field value must be either"),
    ("gpu-elastic", f"{CLUSTER}.autoscalerOptions.upscalingMode", "Fast", "'Fast' is not one of"),
    ("cluster", "spec.authOptions.mode", "password", "'password' is not one of"),
    # its operator
    ("gpu", "metadata.name", "ganscale-" + "x" * 40, "has at most 47 characters"),
    ("gpu", "metadata.name", "1st", "no DNS-1035 label"),
    ("gpu", "spec.submissionMode", "Magic", "submissionMode Magic is none of"),
    ("gpu", "spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished needs shutdown"),
    ("kueue", "spec.shutdownAfterJobFinishes", REMOVED, "suspend needs shutdownAfterJobFinishes"),
    ("gpu", CLUSTER, REMOVED, "one of rayClusterSpec and clusterSelector must be set"),
    ("gpu", "spec.submissionMode", "SidecarMode", "submitterPodTemplate does not go with Sidecar"),
    ("gpu", "spec.submissionMode", "InteractiveMode", "backoffLimit does not go with Interactive"),
    ("gpu", f"{WORKERS}.minReplicas", 5, "minReplicas 5 above maxReplicas 2"),
    ("gpu", f"{HEAD}.resources", {"CPU": "1"}, "both in rayStartParams and in resources"),
    ("gpu", f"{WORKERS}.idleTimeoutSeconds", 60, "idleTimeoutSeconds, which needs autoscaler v2"),
    ("gpu", f"{CLUSTER}.rayVersion", "2.51.0", "token needs Ray 2.52, not 2.51.0"),
    ("gpu", f"{CLUSTER}.rayVersion", REMOVED, "token needs rayVersion"),
    ("gpu", f"{CLUSTER}.upgradeStrategy", {"type": "None"}, "not for the cluster of a job"),
    ("gpu", f"{CLUSTER}.networkPolicy", {}, "networkPolicy needs a feature gate that is off"),
    ("gpu-elastic", f"{HEAD}.template.spec.restartPolicy", "Always", "group head to have restart"),
    ("cluster", "metadata.annotations", {"ray.io/ft-enabled": "true"}, "annotation ray.io/ft-ena"),
    # Kubernetes
    ("gpu", f"{CONTAINER}.volumeMounts.0.name", "nope", "volume nope is mounted but not there"),
    ("gpu", f"{WORKERS}.template.spec.volumes.2", REMOVED, "volume runs is mounted but not there"),
    ("gpu", f"{CONTAINER}.image", 7, "is not of type 'string'"),
    ("gpu", f"{CONTAINER}.resources.requests.cpu", "64", "requests more cpu than its limit"),
    ("gpu", f"{CONTAINER}.resources.limits", REMOVED, "no limit of memory"),
    ("gpu", f"{WORKERS}.template.spec.volumes.1.emptyDir.sizeLimit", "80Gi", "half of the memory"),
    ("gpu", f"{CONTAINER}.securityContext.capabilities.drop", ["CHOWN"], "keeps capabilities"),
    ("gpu", f"{CONTAINER}.securityContext", REMOVED, "may write to its root file system"),
    ("gpu", f"{WORKERS}.template.spec.securityContext.runAsUser", 0, "may run as root"),
    ("gpu", f"{WORKERS}.template.spec.hostNetwork", True, "hostNetwork is forbidden"),
    ("gpu", f"{WORKERS}.template.spec.serviceAccountName", "x", "account x is not among"),
    ("gpu", f"{HEAD}.template.spec.automountServiceAccountToken", REMOVED, "token is mounted"),
    ("gpu-elastic", f"{CLUSTER}.autoscalerOptions.securityContext", REMOVED, "autoscaler keeps"),
]


@pytest.mark.parametrize(("name", "place", "value", "reason"), BROKEN, ids=lambda v: str(v)[:40])
def test_a_broken_variant_is_refused_for_its_reason(
    built: dict[str, list[Json]],
    schemas: dict[tuple[str, str], Definition],
    name: str,
    place: str,
    value: Any,
    reason: str,
) -> None:
    documents = copy.deepcopy(built[name])
    change(ray_document(documents), place, value)
    assert any(reason in problem for problem in all_problems(documents, schemas))


def change(document: Json, place: str, value: Any) -> None:
    """Set or remove what lies at dotted names and numbers."""
    *way, last = (int(part) if part.isdigit() else part for part in place.split("."))
    inner: Any = document
    for part in way:
        inner = inner[part]
    if value is REMOVED:
        del inner[last]
    else:
        inner[last] = value


def test_broken_documents_beside_the_job_are_refused(built: dict[str, list[Json]]) -> None:
    for kind, place, value, reason in (
        ("PersistentVolumeClaim", "metadata.name", "Runs_1", "Runs_1 is no name"),
        ("PersistentVolumeClaim", "spec.storageClassName", "fast", "storage class fast is not"),
        ("PersistentVolumeClaim", "spec.accessModes", "ReadWriteMany", "is not of type"),
        ("NetworkPolicy", "spec.ingres", [], "'ingres' was unexpected"),
        ("StatefulSet", "spec.selector.matchLabels", {"a": "b"}, "does not select the pods"),
        ("StatefulSet", "apiVersion", "apps/v2", "Couldn't find schema for kind StatefulSet"),
        ("StatefulSet", "spec.volumeClaimTemplates", [], "volume data is mounted but not there"),
    ):
        documents = copy.deepcopy(built["cluster"])
        change(next(d for d in documents if d["kind"] == kind), place, value)
        assert any(reason in problem for problem in kubernetes_problems(documents)), reason


def test_a_default_is_filled_in_and_a_null_dropped_before_the_schema_speaks(
    built: dict[str, list[Json]], schemas: dict[tuple[str, str], Definition]
) -> None:
    job = copy.deepcopy(ray_document(built["gpu"]))
    change(job, f"{WORKERS}.minReplicas", REMOVED)  # required, with a default
    change(job, f"{WORKERS}.rayStartParams", None)
    assert schemas["ray.io/v1", "RayJob"].problems(job) == []


def entrypoint(document: Json) -> list[str]:
    """The words of a job's entrypoint."""
    return shlex.split(document["spec"]["entrypoint"])


def jobs(built: dict[str, list[Json]]) -> Iterator[tuple[str, Json]]:
    for name, documents in built.items():
        if (document := ray_document(documents))["kind"] == "RayJob":
            yield name, document


def configuration(document: Json) -> Config:
    """What an entrypoint trains."""
    words = entrypoint(document)
    words = words[words.index("train") + 1 :]
    assert words[0] == "--config"
    return load_config(words[1], words[2:])


def test_every_entrypoint_would_train(
    built: dict[str, list[Json]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_shards(SourceSpec("procedural"), tmp_path / "set", num_shards=16, limit=100)
    with s3_bucket():
        client = boto3.client("s3")
        client.create_bucket(Bucket="ganscale")
        for file in (tmp_path / "set").iterdir():
            client.upload_file(str(file), "ganscale", f"cifar10-train/{file.name}")
        client.close()
        for words in {tuple(entrypoint(document)) for _, document in jobs(built)}:
            with pytest.raises(SystemExit) as ending:
                main([*words[words.index("ganscale") + 1 :], "--dry-run"])
            printed = capsys.readouterr()
            assert ending.value.code == 0, printed.err
            assert "# parameters: " in printed.out


def test_an_entrypoint_passes_the_two_shells_between_the_operator_and_python(
    built: dict[str, list[Json]],
) -> None:
    for _, document in jobs(built):
        words = document["spec"]["entrypoint"]
        # The operator pastes it into a bash command; `ray job submit` quotes what it got, and the
        # job's supervisor gives that to a shell.
        for shell in ("bash", "sh"):
            command = [shell, "-c", f"printf '%s\\n' {words}"]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            words = subprocess.list2cmdline(printed.splitlines())
        assert shlex.split(words) == entrypoint(document)


def test_pods_have_room_for_the_workers_of_the_run(built: dict[str, list[Json]]) -> None:
    for name, document in jobs(built):
        launch = configuration(document).launch
        (group,) = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        per_pod = int(quantity(limits["cpu"]) // launch.cpus_per_worker)
        assert launch.use_gpu == ("nvidia.com/gpu" in limits)
        if launch.use_gpu:
            per_pod = min(per_pod, int(limits["nvidia.com/gpu"]))
        room = [per_pod * group[key] for key in ("minReplicas", "replicas", "maxReplicas")]
        assert room == [launch.min_workers, launch.min_workers, launch.max_workers], name
        if launch.min_workers < launch.max_workers:
            assert document["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True


def test_there_is_time_to_checkpoint_before_a_pod_is_killed(built: dict[str, list[Json]]) -> None:
    grace = Config().launch.grace_seconds
    for name, documents in built.items():
        for place, template in pods(ray_document(documents)):
            if place == "submitter":
                continue
            spec = template["spec"]
            container, allowed = spec["containers"][0], spec["terminationGracePeriodSeconds"]
            stated = {entry["name"]: entry.get("value") for entry in container["env"]}
            drain = float(stated.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
            if place == "head":
                command, option, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
                assert (command, option) == ("stop-training", "--wait")
                assert grace < float(seconds) <= allowed - drain - 10, name
            else:
                assert grace <= drain <= allowed - 30, name


def test_the_version_of_ray_is_one(built: dict[str, list[Json]]) -> None:
    repository = ROOT.parent
    pins = dict(
        line.split("==")
        for line in (repository / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    dockerfile = (repository / "cluster" / "Dockerfile").read_text()
    assert f"\nARG RAY_VERSION={pins['ray']}\n" in dockerfile
    for documents in built.values():
        document = ray_document(documents)
        cluster = cluster_spec(document)
        assert cluster is not None
        assert cluster["rayVersion"] == pins["ray"]
        images = {c["image"] for _, pod in pods(document) for c in pod["spec"]["containers"]}
        assert {image.partition(":")[2] for image in images} == {pins["ray"]}


def test_no_secret_is_in_the_manifests(built: dict[str, list[Json]]) -> None:
    assert "Secret" not in {d["kind"] for documents in built.values() for d in documents}
    for documents in built.values():
        spec = cluster_spec(ray_document(documents))
        assert spec is not None
        assert spec["authOptions"] == {"mode": "token"}


def test_only_the_autoscaler_can_speak_to_kubernetes(built: dict[str, list[Json]]) -> None:
    place = "/var/run/secrets/kubernetes.io/serviceaccount"
    for name, documents in built.items():
        assert not {"Role", "RoleBinding", "ClusterRole"} & {d["kind"] for d in documents}
        mounted = [
            container["name"]
            for _, pod in pods(ray_document(documents))
            for container in pod["spec"]["containers"]
            if any(mount["mountPath"] == place for mount in container["volumeMounts"])
        ]
        assert mounted == (["autoscaler"] if name == "gpu-elastic" else [])


def test_the_standing_cluster_has_the_pods_of_the_job(built: dict[str, list[Json]]) -> None:
    cluster = copy.deepcopy(cluster_spec(ray_document(built["cluster"])))
    assert cluster is not None
    assert cluster.pop("gcsFaultToleranceOptions")["redisAddress"] == "ganscale-redis:6379"
    base = ray_document(build(ROOT / "base"))
    assert cluster == base["spec"]["rayClusterSpec"]


def ray_containers(documents: list[Json]) -> Iterator[tuple[Json, Json]]:
    """(pod template, Ray's container) of the head and of the workers."""
    for place, template in pods(ray_document(documents)):
        if place != "submitter":
            yield template, template["spec"]["containers"][0]


def test_a_volume_of_one_node_is_mounted_on_one_node(built: dict[str, list[Json]]) -> None:
    """Else a worker's pod waits for ever on a cluster of several nodes."""
    for name, documents in built.items():
        claims = [d for d in documents if d["kind"] == "PersistentVolumeClaim"]
        of_one_node = {
            claim["metadata"]["name"]
            for claim in claims
            if claim["spec"]["accessModes"] == ["ReadWriteOnce"]
        }
        for place, template in pods(ray_document(documents)):
            mounted = {
                volume.get("persistentVolumeClaim", {}).get("claimName")
                for volume in template["spec"]["volumes"]
            }
            if place in ("head", "submitter") or not mounted & of_one_node:
                continue
            affinity = template["spec"]["affinity"]["podAffinity"]
            (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
            assert term["topologyKey"] == "kubernetes.io/hostname", name
            assert term["labelSelector"]["matchLabels"]["ray.io/node-type"] == "head"
    assert any(d["kind"] == "PersistentVolumeClaim" for d in built["cpu-test"])


def test_a_run_in_a_bucket_needs_no_shared_folder(built: dict[str, list[Json]]) -> None:
    for name in ("gpu", "gpu-elastic", "kueue"):
        assert configuration(ray_document(built[name])).checkpoint.location == "s3://ganscale/runs"
        assert not {"PersistentVolumeClaim", "StorageClass"} & {d["kind"] for d in built[name]}
        for template, _ in ray_containers(built[name]):
            (runs,) = (v for v in template["spec"]["volumes"] if v["name"] == "runs")
            assert "emptyDir" in runs


def test_kueue_finds_its_queue_on_the_job(built: dict[str, list[Json]]) -> None:
    job = ray_document(built["kueue"])
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ganscale"
    assert job["spec"]["suspend"] is True
    for name in ("gpu", "cpu-test"):
        assert "suspend" not in ray_document(built[name])["spec"]


def test_prometheus_reads_the_port_that_ray_serves_and_the_policy_opens(
    built: dict[str, list[Json]],
) -> None:
    for documents in built.values():
        (policy,) = (
            d
            for d in documents
            if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "ganscale"
        )
        opened = {
            peer["podSelector"]["matchLabels"].get("app.kubernetes.io/name"): [
                port["port"] for port in rule.get("ports", [])
            ]
            for rule in policy["spec"]["ingress"]
            for peer in rule["from"]
        }
        assert opened == {None: [], "kuberay-operator": [8265], "prometheus": [8080]}
        for template, container in ray_containers(documents):
            annotations = template["metadata"]["annotations"]
            assert annotations["prometheus.io/scrape"] == "true"
            assert annotations["prometheus.io/path"] == "/metrics"
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert annotations["prometheus.io/port"] == str(ports["metrics"]) == "8080"


def test_every_ray_container_is_probed_and_has_shared_memory(
    built: dict[str, list[Json]],
) -> None:
    """The probe is of the node's agent, which answers without a token; NCCL needs /dev/shm."""
    for documents in built.values():
        for template, container in ray_containers(documents):
            for probe in ("readinessProbe", "livenessProbe"):
                assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
            assert set(mounts) >= {"/tmp", "/dev/shm", "/runs"}
