"""Kustomize overlays as documents, their pods, and what schemas say of them.

Schemas are those of Kubernetes, from the package kubernetes-validate, and those of KubeRay's
definitions of custom resources.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

Json = dict[str, Any]

VERSIONS = ("1.30", "1.37")
"""Of Kubernetes: the oldest and the newest that manifests must be valid in."""

_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {f"{prefix}i": 1024.0**power for power, prefix in enumerate("KMGT", 1)}


def build(folder: Path) -> list[Json]:
    """The documents that `kubectl apply -k` would send."""
    command = ["kubectl", "kustomize", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


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


def schema_problems(document: Json) -> list[str]:
    """What Kubernetes' schemas say against a document, and against the pods that it brings about.

    Those of custom resources are with whoever defines them (`custom_resource`).
    """
    found = [] if _is_custom(document) else _problems(json.dumps(document))
    for place, pod in pods(document):
        wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **pod}
        found += [f"{place}: {problem}" for problem in _problems(json.dumps(wrapped))]
    return found


def custom_resource(file: Path) -> jsonschema.Draft202012Validator:
    """A validator of the stored version of the kind that a file defines; refuses unknown fields."""
    loaded = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (v for v in loaded["spec"]["versions"] if v["storage"])
    return jsonschema.Draft202012Validator(_strict(version["schema"]["openAPIV3Schema"]))


def _is_custom(document: Json) -> bool:
    return str(document["apiVersion"]).startswith("ray.io/")


@cache
def _problems(text: str) -> list[str]:
    document, problems = json.loads(text), []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = ".".join(map(str, error.path))
            problems.append(f"{place}: {error.message} (Kubernetes {version})")
        except kubernetes_validate.SchemaNotFoundError as error:
            problems.append(error.message)
    return problems


def _strict(schema: Json) -> Json:
    """The JSON schema that an OpenAPI schema of Kubernetes means."""
    result = {k: v for k, v in schema.items() if not k.startswith("x-") and k != "default"}
    properties = schema.get("properties", {})
    if properties:
        result["properties"] = {k: _strict(v) for k, v in properties.items()}
        result["additionalProperties"] = schema.get("x-kubernetes-preserve-unknown-fields", False)
    elif isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _strict(schema["additionalProperties"])
    if "required" in schema:  # a server fills in what has a default
        missing = [k for k in schema["required"] if "default" not in properties.get(k, {})]
        result["required"] = missing
    if "items" in schema:
        result["items"] = _strict(schema["items"])
    return result
