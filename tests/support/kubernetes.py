"""Kustomize overlays as documents, and what is wrong with them.

Kubernetes' own schemas come with the package kubernetes-validate. They say nothing about what
refers to what, and nothing about pods in custom resources, so that is checked here: pods are found
in every kind and held against the schema of a Pod, the Pod Security Standard "restricted", and
rules that only an API server or a kubelet would apply.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

__all__ = ["Json", "build", "cluster_spec", "kubernetes_problems", "pods", "quantity"]

Json = dict[str, Any]

VERSIONS = ("1.30", "1.37")
"""Of Kubernetes: the oldest and the newest that manifests must be valid in."""

_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {f"{prefix}i": 1024.0**power for power, prefix in enumerate("KMGT", 1)}
_SAFE_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip


def build(folder: Path) -> list[Json]:
    """The documents that `kubectl apply -k` would send."""
    command = ["kubectl", "kustomize", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def kubernetes_problems(documents: list[Json]) -> list[str]:
    """What is wrong with documents that are applied together."""
    problems: list[str] = []
    names = [(d["kind"], d["metadata"]["name"]) for d in documents]
    for document in documents:
        label = f"{document['kind']} {document['metadata']['name']}"
        found = [*_schema_problems(json.dumps(document)), *_name_problems(document, names)]
        for place, pod in pods(document):
            wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **pod}
            inside = _schema_problems(json.dumps(wrapped)) or [
                *_security_problems(pod["spec"]),
                *_resource_problems(pod["spec"]),
                *_reference_problems(pod["spec"], names),
            ]
            found += [f"{place}: {problem}" for problem in inside]
        problems += [f"{label}: {problem}" for problem in found]
    return problems


def pods(document: Json) -> Iterator[tuple[str, Json]]:
    """(place, pod template) of all pods that a document brings about.

    The operator puts an autoscaler beside the head, with what `autoscalerOptions` says of it.
    """
    spec = document.get("spec", {})
    if document["kind"] in ("StatefulSet", "Deployment", "Job"):
        template = dict(spec["template"])
        claims = [{"name": c["metadata"]["name"]} for c in spec.get("volumeClaimTemplates", [])]
        volumes = [{**claim, "emptyDir": {}} for claim in claims]
        yield "template", _with(template, volumes=template["spec"].get("volumes", []) + volumes)
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
    cluster = cluster_spec(document)
    if cluster is None:
        return
    head = cluster["headGroupSpec"]["template"]
    if cluster.get("enableInTreeAutoscaling"):
        options = cluster.get("autoscalerOptions", {})
        fields = ("securityContext", "resources", "env", "volumeMounts")
        container = {key: options[key] for key in fields if key in options}
        container |= {"name": "autoscaler", "image": head["spec"]["containers"][0]["image"]}
        head = _with(head, containers=[*head["spec"]["containers"], container])
    yield "head", head
    for group in cluster.get("workerGroupSpecs", []):
        yield group.get("groupName", "workers"), group["template"]


def cluster_spec(document: Json) -> Json | None:
    """The Ray cluster that a document describes."""
    if document["kind"] == "RayJob":
        found: Json | None = document["spec"].get("rayClusterSpec")
        return found
    return document["spec"] if document["kind"] == "RayCluster" else None


def quantity(text: str | int | float) -> float:
    """The number that Kubernetes reads in `200m` or `4Gi`; raises `ValueError` where it is none."""
    match = re.fullmatch(r"([0-9.]+)([kMGT]i?|m?)", str(text))
    if match is None:
        raise ValueError(f"{text} is no quantity")
    return float(match[1]) * _UNITS[match[2]]


def _with(template: Json, **changes: Any) -> Json:
    return {**template, "spec": {**template["spec"], **changes}}


@cache
def _schema_problems(text: str) -> list[str]:
    document, problems = json.loads(text), []
    for version in VERSIONS if not document["apiVersion"].startswith("ray.io/") else ():
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = ".".join(map(str, error.path))
            problems.append(f"{place}: {error.message} (Kubernetes {version})")
        except kubernetes_validate.SchemaNotFoundError as error:
            problems.append(error.message)
    return problems


def _name_problems(document: Json, names: list[tuple[str, str]]) -> Iterator[str]:
    name, spec = document["metadata"]["name"], document.get("spec", {})
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name):
        yield f"{name} is no name"
    labels = spec.get("template", {}).get("metadata", {}).get("labels", {})
    selected = spec.get("selector", {}).get("matchLabels", {}) if labels else {}
    if not selected.items() <= labels.items():
        yield "the selector does not select the pods of its template"
    storage_class = spec.get("storageClassName")
    if storage_class and ("StorageClass", storage_class) not in names:
        yield f"storage class {storage_class} is not among the documents"


def _security_problems(spec: Json) -> Iterator[str]:
    """The Pod Security Standard "restricted", and a read-only root file system."""
    pod = spec.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"{name} is forbidden"
    for volume in spec.get("volumes", []):
        if kinds := set(volume) - {"name"} - _SAFE_VOLUMES:
            yield f"volume {volume['name']} is of a forbidden kind, {', '.join(kinds)}"
    if spec.get("automountServiceAccountToken") is not False:
        yield "a service account's token is mounted"
    for container in _containers(spec):
        own, name = container.get("securityContext", {}), container["name"]
        both = {**pod, **own}
        if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
            yield f"{name} may run as root"
        if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{name} has no seccomp profile"
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may gain privileges"
        capabilities = own.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
            yield f"{name} keeps capabilities"
        if own.get("readOnlyRootFilesystem") is not True:
            yield f"{name} may write to its root file system"


def _resource_problems(spec: Json) -> Iterator[str]:
    in_memory = 0.0
    for volume in spec.get("volumes", []):
        size = (volume.get("emptyDir") or {}).get("sizeLimit")
        if (volume.get("emptyDir") or {}).get("medium") == "Memory":
            if size is None:
                yield f"volume {volume['name']} may fill the memory"
            in_memory += quantity(size or 0)
    for container in _containers(spec):
        resources, name = container.get("resources", {}), container["name"]
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        for kind in ("cpu", "memory", "ephemeral-storage"):
            if kind not in requests or kind not in limits:
                yield f"{name} has no request or no limit of {kind}"
        for kind, amount in requests.items():
            if quantity(amount) > quantity(limits.get(kind, "1T")):
                yield f"{name} requests more {kind} than its limit"
    main = spec["containers"][0].get("resources", {}).get("limits", {}).get("memory")
    if main and in_memory > quantity(main) / 2:
        yield "volumes in memory take more than half of the memory limit"


def _reference_problems(spec: Json, names: list[tuple[str, str]]) -> Iterator[str]:
    """Names of volumes, claims and accounts that must be there."""
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    used: set[str] = set()
    for container in _containers(spec):
        mounts = container.get("volumeMounts", [])
        used |= {mount["name"] for mount in mounts}
        paths = [mount["mountPath"] for mount in mounts]
        if len(set(paths)) < len(paths):
            yield f"{container['name']} mounts two volumes at one place"
        variables = [entry["name"] for entry in container.get("env", [])]
        for name in {v for v in variables if variables.count(v) > 1}:
            yield f"{container['name']} sets {name} twice"
    for name in sorted(used - volumes):
        yield f"volume {name} is mounted but not there"
    for name in sorted(volumes - used):
        yield f"volume {name} is not mounted"
    for volume in spec.get("volumes", []):
        claim: Mapping[str, str] = volume.get("persistentVolumeClaim") or {}
        if claim and ("PersistentVolumeClaim", claim["claimName"]) not in names:
            yield f"claim {claim['claimName']} is not among the documents"
    account = spec.get("serviceAccountName", "default")
    if ("ServiceAccount", account) not in names:
        yield f"service account {account} is not among the documents"


def _containers(spec: Json) -> list[Json]:
    return [*spec.get("initContainers", []), *spec["containers"]]
