"""The manifests under k8s/: they build, are valid for all who judge them, and agree with ganscale.

Needs kubectl; KubeRay's schemas are found by GANSCALE_KUBERAY_CRDS, a folder with its definitions
of custom resources (ray-operator/config/crd/bases of its repository).
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import yaml
from jsonschema import Draft202012Validator

from ganscale.cli import main
from ganscale.config import Config, load_config
from ganscale.data.building import build_shards
from ganscale.data.sources import SourceSpec
from tests.support.checkpoints import s3_bucket
from tests.support.kubernetes import (
    Json,
    build,
    cluster_spec,
    custom_resource,
    pods,
    quantity,
    schema_problems,
)

ROOT = Path(__file__).parents[2] / "k8s"
PAGE = ROOT.parent / "docs" / "how-to" / "kubernetes.md"
OVERLAYS = sorted(path.name for path in (ROOT / "overlays").iterdir())
CRDS = "GANSCALE_KUBERAY_CRDS"


pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="NOT CHECKED: k8s/ needs kubectl, which is not here"
)


@pytest.fixture(scope="module")
def built() -> dict[str, list[Json]]:
    """The documents of each overlay."""
    return {name: build(ROOT / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(scope="module")
def kuberay() -> dict[str, Draft202012Validator]:
    """KubeRay's schemas by kind."""
    folder = os.environ.get(CRDS)
    if not folder:
        pytest.skip(f"NOT CHECKED: {CRDS} names no folder with KubeRay's definitions")
    kinds = ("RayJob", "RayCluster")
    return {kind: custom_resource(Path(folder) / f"ray.io_{kind.lower()}s.yaml") for kind in kinds}


def ray_document(documents: list[Json]) -> Json:
    """The RayJob or RayCluster."""
    (found,) = (d for d in documents if d["apiVersion"].startswith("ray.io/"))
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_all_documents_fit_the_schemas_of_kubernetes(
    built: dict[str, list[Json]], name: str
) -> None:
    for document in built[name]:
        assert schema_problems(document) == [], document["kind"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_custom_resource_fits_the_schema_of_kuberay(
    built: dict[str, list[Json]], kuberay: dict[str, Draft202012Validator], name: str
) -> None:
    document = ray_document(built[name])
    assert [error.message for error in kuberay[document["kind"]].iter_errors(document)] == []


def test_the_schemas_refuse_what_is_misspelt(
    built: dict[str, list[Json]], kuberay: dict[str, Draft202012Validator]
) -> None:
    job = copy.deepcopy(ray_document(built["gpu"]))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    container["imagePullPolicies"] = "Always"
    job["spec"]["entrypont"] = "python"
    assert any("imagePullPolicies" in problem for problem in schema_problems(job))
    messages = [error.message for error in kuberay["RayJob"].iter_errors(job)]
    assert any("entrypont" in message for message in messages)
    policy = next(d for d in built["gpu"] if d["kind"] == "NetworkPolicy")
    assert schema_problems({**policy, "spec": {**policy["spec"], "ingres": []}})


def test_what_the_operator_refuses_although_the_schema_allows_it_is_not_there(
    built: dict[str, list[Json]],
) -> None:
    """After `ValidateRayJobSpec` and `ValidateRayClusterSpec` of KubeRay 1.7."""
    for name, documents in built.items():
        document = ray_document(documents)
        spec, cluster = document["spec"], cluster_spec(document)
        assert cluster is not None
        is_job = document["kind"] == "RayJob"
        # The operator appends six characters to a job's name for its cluster's.
        assert len(document["metadata"]["name"]) <= 53 - 6 * is_job
        if is_job:
            assert spec["shutdownAfterJobFinishes"] is True, name  # ttl and suspend need it
            assert "clusterSelector" not in spec
        head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
        for group in (head, workers):
            stated = {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"])
            assert not (stated and group.get("resources"))
            if cluster.get("enableInTreeAutoscaling"):
                # Unless it is stated, the operator sets it.
                assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"


def containers(documents: list[Json]) -> Iterator[tuple[str, Json, Json]]:
    """(name, pod's specification, container) of all that run."""
    for document in documents:
        for place, pod in pods(document):
            spec = pod["spec"]
            for container in [*spec.get("initContainers", []), *spec["containers"]]:
                yield f"{document['kind']}, {place}, {container['name']}", spec, container


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_keep_to_the_standard_restricted(built: dict[str, list[Json]], name: str) -> None:
    """The Pod Security Standard of this name, and a root file system that is only read."""
    for place, spec, container in containers(built[name]):
        own = container["securityContext"]
        both = {**spec.get("securityContext", {}), **own}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), place
        assert all("hostPath" not in volume for volume in spec.get("volumes", [])), place
        assert spec["automountServiceAccountToken"] is False, place
        assert both["runAsNonRoot"] is True, place
        assert both.get("runAsUser") != 0, place
        assert both["seccompProfile"] == {"type": "RuntimeDefault"}, place
        assert own["allowPrivilegeEscalation"] is False, place
        assert own["capabilities"] == {"drop": ["ALL"]}, place
        assert own["readOnlyRootFilesystem"] is True, place


@pytest.mark.parametrize("name", OVERLAYS)
def test_requests_and_limits_are_stated_and_fit(built: dict[str, list[Json]], name: str) -> None:
    for place, spec, container in containers(built[name]):
        requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
        for kind in ("cpu", "memory", "ephemeral-storage"):
            assert quantity(requests[kind]) <= quantity(limits[kind]), place
        # Files in memory count for the limit of the container that writes them.
        in_memory = [
            quantity(volume["emptyDir"]["sizeLimit"])
            for volume in spec.get("volumes", [])
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        ]
        main = spec["containers"][0]["resources"]["limits"]["memory"]
        assert sum(in_memory) <= quantity(main) / 2, place


def test_the_small_test_fits_into_the_node_that_its_page_asks_for(
    built: dict[str, list[Json]],
) -> None:
    said = re.search(r"One node with ([\d.]+) CPUs and ([\d.]+) GiB", PAGE.read_text())
    assert said is not None
    document = ray_document(built["cpu-test"])
    (group,) = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    total = {"cpu": 0.0, "memory": 0.0}
    for place, pod in pods(document):
        (container,) = pod["spec"]["containers"]
        num_pods = group["replicas"] if place == group["groupName"] else 1
        for kind in total:
            total[kind] += num_pods * quantity(container["resources"]["requests"][kind])
    assert total["cpu"] == pytest.approx(float(said[1]))
    assert total["memory"] / 1024**3 == pytest.approx(float(said[2]))


def test_what_is_submitted_to_the_standing_cluster_lies_on_its_volume(
    built: dict[str, list[Json]],
) -> None:
    (shown,) = re.findall(r"^ganscale submit (?:.*\\\n)*.*$", PAGE.read_text(), re.MULTILINE)
    (storage,) = re.findall(r"storage=(\S+)", shown)
    for place, pod in pods(ray_document(built["cluster"])):
        mounts = pod["spec"]["containers"][0]["volumeMounts"]
        (volume,) = (m["name"] for m in mounts if m["mountPath"] == storage)
        claims = {v["name"] for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v}
        assert volume in claims, place


@pytest.mark.parametrize("name", OVERLAYS)
def test_whatever_is_referred_to_is_there(built: dict[str, list[Json]], name: str) -> None:
    documents = built[name]
    there = {(d["kind"], d["metadata"]["name"]) for d in documents}
    for place, spec, container in containers(documents):
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        mounts = container.get("volumeMounts", [])
        assert {mount["name"] for mount in mounts} <= volumes, place
        paths = [mount["mountPath"] for mount in mounts]
        assert len(set(paths)) == len(paths), place
        variables = [entry["name"] for entry in container.get("env", [])]
        assert len(set(variables)) == len(variables), place
        assert ("ServiceAccount", spec["serviceAccountName"]) in there, place
        for volume in spec.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in there, place
    for document in documents:
        spec = document.get("spec", {})
        if storage_class := spec.get("storageClassName"):
            assert ("StorageClass", storage_class) in there
        if document["kind"] in ("Deployment", "StatefulSet"):
            labels = spec["template"]["metadata"]["labels"]
            assert spec["selector"]["matchLabels"].items() <= labels.items()


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
    build_shards(SourceSpec("procedural"), tmp_path / "set", num_shards=32, limit=100)
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


def test_pods_reach_the_credentials_of_their_role_at_the_addresses_of_the_clouds(
    tmp_path: Path,
) -> None:
    """And the head does as well where it has an account of its own; other pods do not."""
    parts = {
        "resources": [os.path.relpath(ROOT / "overlays" / "gpu-elastic", tmp_path.resolve())],
        "components": [os.path.relpath(ROOT / "components/cloud-identity", tmp_path.resolve())],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    documents = build(tmp_path)
    policies = [d for d in documents if d["kind"] == "NetworkPolicy"]
    assert [schema_problems(policy) for policy in policies] == [[], []]
    assert {policy["metadata"]["namespace"] for policy in policies} == {"ganscale"}
    policy = next(p for p in policies if p["metadata"]["name"] != "ganscale")
    selector, spec = policy["spec"]["podSelector"], policy["spec"]
    assert spec["policyTypes"] == ["Egress"]  # the base alone says who comes in
    opened = {
        (peer["ipBlock"]["cidr"], port["port"])
        for rule in spec["egress"]
        for peer in rule["to"]
        for port in rule["ports"]
    }
    assert opened == {
        ("169.254.169.254/32", 80),  # EC2; GKE with Dataplane V2
        ("169.254.169.252/32", 988),  # GKE without
        ("169.254.170.23/32", 80),  # EKS Pod Identity
    }
    # The operator labels the pods of a Ray cluster with their type.
    assert selector["matchExpressions"] == [{"key": "ray.io/node-type", "operator": "Exists"}]
    page = (ROOT.parent / "docs" / "how-to" / "kubernetes.md").read_text()
    for place, template in pods(ray_document(documents)):
        assert selector["matchLabels"].items() <= template["metadata"]["labels"].items(), place
        assert f"`{template['spec']['serviceAccountName']}`" in page, place
