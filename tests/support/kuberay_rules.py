"""What KubeRay's operator (1.7) refuses although its schemas allow it.

Written after `ValidateRayJobSpec`, `ValidateRayClusterSpec` and what they call in the operator's
validation.go; a document that breaks one of these rules is accepted by the API server and then only
gets an event that says so. Feature gates are at their defaults. Problems come as sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

__all__ = ["operator_problems"]

Json = Mapping[str, Any]

_MAX_CLUSTER_NAME = 53
_SUFFIX_OF_A_JOBS_CLUSTER = 6
_OLDEST_WITH_TOKENS = (2, 52)
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")


def operator_problems(document: Json) -> list[str]:
    """Why the operator would refuse a RayJob or a RayCluster; nothing of other kinds."""
    if document.get("kind") == "RayJob":
        return list(_job_problems(document))
    if document.get("kind") == "RayCluster":
        return list(_cluster_problems(document))
    return []


def _job_problems(job: Json) -> Iterator[str]:
    yield from _name_problems(job, _MAX_CLUSTER_NAME - _SUFFIX_OF_A_JOBS_CLUSTER)
    spec = job["spec"]
    mode = spec.get("submissionMode", "K8sJobMode")
    cluster, selector = spec.get("rayClusterSpec"), spec.get("clusterSelector") or {}
    if mode not in _SUBMISSION_MODES:
        yield f"submissionMode {mode} is none of {', '.join(_SUBMISSION_MODES)}"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("suspend") and selector:
        yield "suspend does not go with clusterSelector"
    if cluster is None and not selector:
        yield "one of rayClusterSpec and clusterSelector must be set"
    if selector and not selector.get("ray.io/cluster"):
        yield "clusterSelector names no cluster"
    yield from _submission_problems(spec, mode, selector)
    yield from _ending_problems(spec)
    if "upgradeStrategy" in (cluster or {}):
        yield "upgradeStrategy is not for the cluster of a job"
    if cluster is not None:
        if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
            yield "enableK8sTokenAuth is not for jobs"
        yield from _cluster_spec_problems(cluster, job["metadata"].get("annotations") or {})
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError:
        environment = None
    if not isinstance(environment, dict):
        yield "runtimeEnvYAML is no YAML mapping"


def _submission_problems(spec: Json, mode: str, selector: Json) -> Iterator[str]:
    retries = spec.get("backoffLimit", 0)
    if retries < 0:
        yield "backoffLimit must not be negative"
    if retries > 0 and mode == "InteractiveMode":
        yield "backoffLimit does not go with InteractiveMode"
    if retries > 0 and selector:
        yield "backoffLimit does not go with clusterSelector"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(name, 1) <= 0:
            yield f"{name} must be positive"
    if mode != "SidecarMode":
        return
    for name in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
        if spec.get(name):
            yield f"{name} does not go with SidecarMode"
    head = (spec.get("rayClusterSpec") or {}).get("headGroupSpec") or {}
    if _pod(head).get("restartPolicy", "Never") != "Never":
        yield "SidecarMode needs a head with restartPolicy Never"


def _ending_problems(spec: Json) -> Iterator[str]:
    """Of what is deleted when the job is over."""
    seconds, shuts_down = (
        spec.get("ttlSecondsAfterFinished", 0),
        spec.get("shutdownAfterJobFinishes"),
    )
    if seconds < 0:
        yield "ttlSecondsAfterFinished must not be negative"
    if seconds > 0 and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules") or []
    if rules and shuts_down:
        yield "deletionRules do not go with shutdownAfterJobFinishes"
    if not rules and not ("onSuccess" in strategy and "onFailure" in strategy):
        yield "deletionStrategy needs deletionRules, or both onSuccess and onFailure"
    autoscales = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    waits: dict[str, dict[str, int]] = {}
    for rule in rules:
        condition, policy = rule.get("condition") or {}, rule.get("policy")
        states = [condition[k] for k in ("jobStatus", "jobDeploymentStatus") if k in condition]
        if len(states) != 1:
            yield "a deletion rule needs one of jobStatus and jobDeploymentStatus"
            continue
        if policy == "DeleteWorkers" and autoscales:
            yield "DeleteWorkers does not go with autoscaling"
        if policy in ("DeleteWorkers", "DeleteCluster") and spec.get("clusterSelector"):
            yield f"{policy} does not go with clusterSelector"
        if policy in waits.setdefault(states[0], {}):
            yield f"two deletion rules for {policy} after {states[0]}"
        waits[states[0]][policy] = condition.get("ttlSeconds", 0)
    for state, after in waits.items():
        ordered = [after[policy] for policy in _DELETION_ORDER if policy in after]
        if ordered != sorted(ordered):
            yield f"after {state} workers must be deleted before the cluster, and it before the job"


def _cluster_problems(cluster: Json) -> Iterator[str]:
    yield from _name_problems(cluster, _MAX_CLUSTER_NAME)
    strategy = (cluster["spec"].get("upgradeStrategy") or {}).get("type", "None")
    if strategy not in ("Recreate", "None"):
        yield f"upgradeStrategy {strategy} is neither Recreate nor None"
    yield from _cluster_spec_problems(cluster["spec"], cluster["metadata"].get("annotations") or {})


def _cluster_spec_problems(spec: Json, annotations: Json) -> Iterator[str]:
    head, workers = spec.get("headGroupSpec") or {}, spec.get("workerGroupSpecs") or []
    for name, group in [("head", head), *((w.get("groupName"), w) for w in workers)]:
        yield from _group_problems(name, group)
    if not _pod(head).get("containers"):
        return
    for worker in workers:
        yield from _size_problems(worker)
    yield from _fault_tolerance_problems(spec, head, annotations)
    yield from _autoscaling_problems(spec, head, workers)
    yield from _authentication_problems(spec)
    for name in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        if name in spec:
            yield f"{name} needs a feature gate that is off"


def _group_problems(name: str, group: Json) -> Iterator[str]:
    if not _pod(group).get("containers"):
        yield f"group {name} has no container"
    parameters = group.get("rayStartParams") or {}
    stated = {"num-cpus", "num-gpus", "memory", "resources"} & set(parameters)
    if stated and group.get("resources"):
        yield f"group {name} states resources both in rayStartParams and in resources"
    if "labels" in parameters:
        yield f"group {name} has labels in rayStartParams; they belong in labels"
    for key, value in (group.get("labels") or {}).items():
        if not re.fullmatch(r"([a-z0-9.-]+/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", key):
            yield f"group {name} has the label key {key}"
        if not re.fullmatch(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", value):
            yield f"group {name} has the label value {value}"


def _size_problems(worker: Json) -> Iterator[str]:
    # Where they are missing the schema has filled in 0 and the largest number there is.
    name, least, most = (worker.get(k) for k in ("groupName", "minReplicas", "maxReplicas"))
    if (least or 0) < 0 or (most or 0) < 0:
        yield f"group {name} has a negative number of replicas"
    if least is not None and most is not None and least > most:
        yield f"group {name} has minReplicas {least} above maxReplicas {most}"


def _fault_tolerance_problems(spec: Json, head: Json, annotations: Json) -> Iterator[str]:
    options, env = spec.get("gcsFaultToleranceOptions"), _environment(head)
    parameters = head.get("rayStartParams") or {}
    if "redis-username" in parameters or "REDIS_USERNAME" in env:
        yield "the Redis user belongs in gcsFaultToleranceOptions.redisUsername"
    if options is None:
        if "RAY_REDIS_ADDRESS" in env and annotations.get("ray.io/ft-enabled") != "true":
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    if annotations.get("ray.io/ft-enabled"):
        yield "the annotation ray.io/ft-enabled does not go with gcsFaultToleranceOptions"
    if annotations.get("ray.io/external-storage-namespace"):
        yield "the storage namespace belongs in gcsFaultToleranceOptions.externalStorageNamespace"
    if "redis-password" in parameters or "REDIS_PASSWORD" in env:
        yield "the Redis password belongs in gcsFaultToleranceOptions.redisPassword"
    if "RAY_REDIS_ADDRESS" in env:
        yield "the Redis address belongs in gcsFaultToleranceOptions.redisAddress"
    if options.get("backend") == "rocksdb":
        yield "the rocksdb backend needs a feature gate that is off"
    elif options.get("storage"):
        yield "gcsFaultToleranceOptions.storage is for the rocksdb backend"


def _autoscaling_problems(spec: Json, head: Json, workers: list[Json]) -> Iterator[str]:
    options, stated = spec.get("autoscalerOptions") or {}, "RAY_enable_autoscaler_v2"
    env = _environment(head)
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds must not be negative"
    second = options.get("version") == "v2" or env.get(stated) in ("1", "true")
    if not spec.get("enableInTreeAutoscaling"):
        if env.get(stated) in ("1", "true"):
            yield f"{stated} without enableInTreeAutoscaling"
        second = False
    elif "version" in options and stated in env:
        yield f"{stated} does not go with autoscalerOptions.version"
    for group in (head, *workers):
        name = group.get("groupName", "head")
        if second and _pod(group).get("restartPolicy", "Never") != "Never":
            yield f"autoscaler v2 needs group {name} to have restartPolicy Never"
    for worker in workers:
        name = worker.get("groupName")
        for field in ("idleTimeoutSeconds", "priority"):
            if field in worker and not second:
                yield f"group {name} has {field}, which needs autoscaler v2"
        if worker.get("suspend") and spec.get("enableInTreeAutoscaling"):
            yield f"group {name} cannot be suspended with an autoscaler"


def _authentication_problems(spec: Json) -> Iterator[str]:
    if (spec.get("authOptions") or {}).get("mode") != "token":
        return
    version = spec.get("rayVersion") or ""
    if not re.match(r"\d+\.\d+", version):
        yield "authOptions.mode token needs rayVersion"
    elif tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_WITH_TOKENS:
        yield f"authOptions.mode token needs Ray 2.52, not {version}"


def _name_problems(document: Json, longest: int) -> Iterator[str]:
    name, kind = document["metadata"].get("name", ""), document["kind"]
    if len(name) > longest:
        yield f"the name of a {kind} has at most {longest} characters, {name} has {len(name)}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name or "generated"):
        yield f"{name} is no DNS-1035 label"


def _pod(group: Json) -> Json:
    return ((group.get("template") or {}).get("spec")) or {}


def _environment(group: Json) -> dict[str, str]:
    """Of the Ray container, which is the first; a value from elsewhere is empty."""
    container = _pod(group)["containers"][0]
    return {entry["name"]: entry.get("value", "") for entry in container.get("env") or []}
