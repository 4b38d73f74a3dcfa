"""Documents against the schemas of custom resource definitions, as an API server checks them.

In its order: null of a field that may not be null is dropped, defaults are filled in, the rest is
held against the schema, where an unknown field is an error; then come lists with keys, and CEL
rules. Rules about a change (`oldSelf`) do not apply to a document alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cel
import jsonschema
import yaml

__all__ = ["Definition"]

Json = dict[str, Any]

_RANGES = {"int32": 2**31, "int64": 2**63}
_KEEPS_UNKNOWN = "x-kubernetes-preserve-unknown-fields"


class Definition:
    """The stored version of the kind that a file defines."""

    def __init__(self, file: Path) -> None:
        loaded = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        spec = loaded["spec"]
        (version,) = (v for v in spec["versions"] if v["storage"])
        self.api_version = f"{spec['group']}/{version['name']}"
        self.kind = spec["names"]["kind"]
        self._schema: Json = version["schema"]["openAPIV3Schema"]
        self._validator = jsonschema.Draft202012Validator(_strict(self._schema))

    def problems(self, document: Json) -> list[str]:
        """Why an API server would refuse the document."""
        filled = _filled(document, self._schema)
        errors = self._validator.iter_errors(filled)
        found = [f"{_place(list(error.absolute_path))}: {error.message}" for error in errors]
        return found or list(_rule_problems(filled, self._schema, []))


def _filled(value: Any, schema: Json) -> Any:
    """Without nulls that are not allowed, with defaults."""
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        result = {}
        for name, inner in value.items():
            part = properties.get(name, others)
            if inner is not None or not isinstance(part, dict) or part.get("nullable"):
                result[name] = _filled(inner, part) if isinstance(part, dict) else inner
        for name, part in properties.items():
            if name not in result and "default" in part:
                result[name] = part["default"]
        return result
    if isinstance(value, list):
        return [_filled(item, schema.get("items", {})) for item in value]
    return value


def _strict(schema: Json) -> Json:
    """As JSON schema: what Kubernetes means but does not say in it."""
    result = {k: v for k, v in schema.items() if not k.startswith("x-") and k != "default"}
    if "properties" in schema:
        result["properties"] = {k: _strict(v) for k, v in schema["properties"].items()}
        if not schema.get(_KEEPS_UNKNOWN):
            result["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        result["items"] = _strict(schema["items"])
    if schema.get("nullable") and "type" in schema:
        result["type"] = [schema["type"], "null"]
    if schema.get("format") in _RANGES:
        limit = _RANGES[schema["format"]]
        result = {"minimum": -limit, "maximum": limit - 1} | result
    return result


def _rule_problems(value: Any, schema: Json, path: list[Any]) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and not cel.evaluate(rule["rule"], {"self": value}):
            yield f"{_place(path)}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, inner in value.items():
            part = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if isinstance(part, dict):
                yield from _rule_problems(inner, part, [*path, name])
    elif isinstance(value, list):
        yield from _list_problems(value, schema, path)
        for index, item in enumerate(value):
            yield from _rule_problems(item, schema.get("items", {}), [*path, index])


def _list_problems(value: list[Any], schema: Json, path: list[Any]) -> Iterator[str]:
    kind = schema.get("x-kubernetes-list-type")
    if kind == "map":
        keys = [tuple(i.get(k) for k in schema["x-kubernetes-list-map-keys"]) for i in value]
    elif kind == "set":
        keys = [(repr(item),) for item in value]
    else:
        return
    for key in sorted({k for k in keys if keys.count(k) > 1}, key=repr):
        yield f"{_place(path)}: {', '.join(map(str, key))} is there twice"


def _place(path: list[Any]) -> str:
    return ".".join(map(str, path)) or "document"
