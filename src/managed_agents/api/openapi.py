"""The API's OpenAPI document, from what reads the requests (`web/operation.py`) and the SDK's types of the answers.

Committed as docs/api/openapi.json: `make docs` writes it, `make check` compares. A server serves that file, so that it
never imports the SDK, which costs seconds.
"""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import orjson
from fastapi import APIRouter
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from managed_agents import __version__
from managed_agents.core import limits
from managed_agents.web import auth, idempotency
from managed_agents.web.models import QueryModel
from managed_agents.web.operation import CHANGING, Answer, Operation, Shape, described

Json = dict[str, Any]

COMPONENTS = "#/components/schemas/"
SDK = "anthropic.types.beta"

# Every status that the edge or a rule may answer with, beside 2xx; all of them carry the envelope.
REFUSALS: Mapping[int, tuple[str, str]] = {
    400: ("BadRequest", "A field is missing, unknown, malformed or not served yet, or the state forbids it."),
    401: ("Unauthorized", "No key, or not a valid one."),
    403: ("Forbidden", "The key's scope or workspace does not allow it."),
    404: ("NotFound", "No such object in this workspace, or the beta header is missing."),
    408: ("RequestTimeout", "The request arrived too slowly."),
    409: ("Conflict", "Something else stands in the way: a name, a version, a key that is in use."),
    413: ("TooLarge", "The body is larger than allowed."),
    429: ("TooManyRequests", "Too many requests or streams; `retry-after` says when to come again."),
    431: ("HeadersTooLarge", "The head of the request is larger than allowed."),
    500: ("InternalError", "A bug of the server, logged under the same request id."),
    529: ("Overloaded", "No capacity right now; `retry-after` says when to come again."),
}

ERROR: Json = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "error"},
        "request_id": {"type": "string", "pattern": "^req_"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "additionalProperties": False,
            "properties": {
                "type": {
                    "enum": [
                        "invalid_request_error",
                        "authentication_error",
                        "permission_error",
                        "not_found_error",
                        "conflict_error",
                        "request_too_large",
                        "rate_limit_error",
                        "timeout_error",
                        "api_error",
                        "overloaded_error",
                    ]
                },
                "message": {"type": "string", "minLength": 1},
                "details": {
                    "type": "object",
                    "required": ["error_code"],
                    "properties": {"error_code": {"type": "string"}},
                },
            },
        },
    },
}


def document(routers: Sequence[APIRouter]) -> Json:
    """Return the document of the API's endpoints among those of `routers`. Imports the SDK."""
    found = [(route, operation) for route in _routes(routers) if (operation := described(route.endpoint)) is not None]
    schemas, components = _schemas(found)
    paths: dict[str, Json] = {}
    for route, operation in found:
        for method in sorted(route.methods or ()):
            paths.setdefault(route.path, {})[method.lower()] = _operation(route, method, operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Managed Agents",
            "version": __version__,
            "description": "An open, self-hosted server for the Claude Managed Agents API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"api_key": []}, {"bearer": []}],
        "tags": [{"name": name} for name in dict.fromkeys(str(tag) for route, _ in found for tag in route.tags)],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
            "headers": {
                "request-id": {"required": True, "schema": {"type": "string", "pattern": "^req_"}},
                "retry-after": {"required": False, "schema": {"type": "string"}},
                idempotency.REPLAYED: {
                    "description": "The answer is that of an earlier request with the same `Idempotency-Key`.",
                    "required": False,
                    "schema": {"const": "true"},
                },
            },
            "responses": {name: _refusal(text) for name, text in REFUSALS.values()},
            "schemas": {"Error": ERROR, **dict(sorted(components.items()))},
        },
    }


def encoded(routers: Sequence[APIRouter]) -> str:
    """Return the document as it is committed: one field a line, so that changes can be read."""
    return orjson.dumps(document(routers), option=orjson.OPT_INDENT_2).decode() + "\n"


def undescribed(routers: Sequence[APIRouter]) -> list[str]:
    """Return the API's endpoints that the document would leave out."""
    return [
        f"{method} {route.path}"
        for route in _routes(routers)
        if route.path.startswith("/v1/") and described(route.endpoint) is None
        for method in sorted(route.methods or ())
    ]


def _routes(routers: Sequence[APIRouter]) -> Iterator[APIRoute]:
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute):
                yield route


# Schemas


_Key = tuple[str, str]


def _schemas(found: Sequence[tuple[APIRoute, Operation]]) -> tuple[dict[_Key, Json], dict[str, Json]]:
    """Return a schema for each request and answer, and what they refer to."""
    requests: list[tuple[_Key, JsonSchemaMode, TypeAdapter[Any]]] = []
    answers: dict[_Key, tuple[_Key, JsonSchemaMode, TypeAdapter[Any]]] = {}
    for route, operation in found:
        if operation.body is not None:
            requests.append((_request_key(route), "validation", TypeAdapter(operation.body)))
        if (key := _answer_key(operation.answer)) is not None and key not in answers:
            answers[key] = (key, "serialization", TypeAdapter(_answer_type(operation.answer)))
    taken, request_components = _generated(requests)
    given, answer_components = _generated(list(answers.values()))
    # The SDK's sentences are its own; ours describe requests.
    for schema in (*answer_components.values(), *given.values()):
        _strip(schema)
    clash = request_components.keys() & answer_components.keys()
    assert not clash, f"a request model has the name of an answer: {sorted(clash)}"
    return {**taken, **given}, {**request_components, **answer_components}


def _generated(
    wanted: Sequence[tuple[_Key, JsonSchemaMode, TypeAdapter[Any]]],
) -> tuple[dict[_Key, Json], dict[str, Json]]:
    schemas, definitions = TypeAdapter.json_schemas(wanted, ref_template=COMPONENTS + "{model}")
    components = cast(dict[str, Json], definitions.get("$defs", {}))
    return {key: schema for (key, _), schema in schemas.items()}, components


def _request_key(route: APIRoute) -> _Key:
    return ("request", f"{sorted(route.methods or ())[0]} {route.path}")


def _answer_key(answer: Answer) -> _Key | None:
    name = answer.name or (answer.own.__name__ if answer.own is not None else "")
    return ("answer", name) if name else None


def _answer_type(answer: Answer) -> Any:
    if answer.own is not None:
        return answer.own
    module, _, name = f"{SDK}.{answer.name}".rpartition(".")
    return getattr(importlib.import_module(module), name)


def _strip(schema: Any) -> None:
    if isinstance(schema, list):
        for each in cast(list[Any], schema):
            _strip(each)
    if not isinstance(schema, dict):
        return
    fields = cast(Json, schema)
    for name in ("description", "title"):
        if isinstance(fields.get(name), str):
            del fields[name]
    for each in fields.values():
        _strip(each)


# Operations


def _operation(route: APIRoute, method: str, operation: Operation, schemas: Mapping[_Key, Json]) -> Json:
    rule = _rule(route)
    found: Json = {
        "operationId": f"{'_'.join(str(tag) for tag in route.tags)}_{route.name}".replace("-", "_").rstrip("_"),
        "tags": [str(tag) for tag in route.tags],
        "parameters": [
            *_path_parameters(route.path),
            *_query_parameters(operation.query),
            *_header_parameters(rule, changing=method in CHANGING),
        ],
        "responses": {
            "200": _success(operation.answer, schemas, changing=method in CHANGING),
            **{str(status): {"$ref": f"#/components/responses/{name}"} for status, (name, _) in REFUSALS.items()},
        },
    }
    if operation.body is not None:
        schema = schemas[_request_key(route)]
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    elif operation.form is not None:
        found["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _form(operation.form)}}}
    elif method in CHANGING:
        empty = {"type": "object", "additionalProperties": False}
        found["requestBody"] = {"required": False, "content": {"application/json": {"schema": empty}}}
    return found


def _rule(route: APIRoute) -> auth.Beta:
    for dependency in _dependencies(route.dependant):
        if isinstance(dependency.call, auth.Authenticated):
            return dependency.call.rule
    raise AssertionError(f"{route.path} names no actor")


def _dependencies(dependant: Dependant) -> Iterator[Dependant]:
    for dependency in dependant.dependencies:
        yield dependency
        yield from _dependencies(dependency)


def _path_parameters(path: str) -> list[Json]:
    names = re.findall(r"{(\w+)}", path)
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names]


def _query_parameters(model: type[QueryModel]) -> list[Json]:
    schema = TypeAdapter(model).json_schema()
    found: list[Json] = []
    for name, field in cast(dict[str, Json], schema.get("properties", {})).items():
        kind = _without_null(field)
        kind.pop("title", None)
        parameter: Json = {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": kind}
        if kind.get("type") == "array":
            parameter |= {"name": f"{name}[]", "style": "form", "explode": True}
        found.append(parameter)
    return found


def _without_null(field: Json) -> Json:
    """A parameter is there or not: null does not exist in a query."""
    kinds = [kind for kind in cast(list[Json], field.get("anyOf", [])) if kind.get("type") != "null"]
    if len(kinds) != 1:
        return field
    return {**{name: value for name, value in field.items() if name not in ("anyOf", "default")}, **kinds[0]}


def _header_parameters(rule: auth.Beta, *, changing: bool) -> list[Json]:
    found: list[Json] = [
        {
            "name": "anthropic-version",
            "in": "header",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
            "example": "2023-06-01",
        },
        {
            "name": "anthropic-beta",
            "in": "header",
            "required": rule in (auth.Beta.REQUIRED, auth.Beta.REQUIRED_ONLY),
            "schema": {"type": "string", "enum": [auth.MANAGED_AGENTS]},
            "description": "A comma-separated list that has this value.",
        },
        {
            "name": "anthropic-workspace-id",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "The workspace of the key; with a key of the organization's administrator any of its workspaces.",
        },
    ]
    if changing:
        found.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": {
                    "type": "string",
                    "minLength": 1,
                    "maxLength": limits.IDEMPOTENCY_KEY_CHARS_MAX,
                    "pattern": r"^[\x20-\x7e]+$",
                },
                "description": "An extension of this server: a request repeated under its key is worked on once.",
            }
        )
    return found


def _form(fields: type[BaseModel]) -> Json:
    schema = fields.model_json_schema()
    assert "$defs" not in schema, "fields of a form are plain"
    schema["properties"]["file"] = {"type": "string", "format": "binary"}
    schema["required"] = ["file", *schema.get("required", [])]
    return schema


# Answers


def _refusal(text: str) -> Json:
    return {
        "description": text,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in ("request-id", "retry-after")},
        "content": {"application/json": {"schema": {"$ref": COMPONENTS + "Error"}}},
    }


def _success(answer: Answer, schemas: Mapping[_Key, Json], *, changing: bool) -> Json:
    key = _answer_key(answer)
    schema = schemas[key] if key is not None else {}
    headers = ["request-id", *([idempotency.REPLAYED] if changing else [])]
    return {
        "description": "Done." if changing else "Found.",
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
        "content": _content(answer.shape, schema),
    }


def _content(shape: Shape, schema: Json) -> Json:
    cursor = {"type": ["string", "null"]}
    match shape:
        case Shape.OBJECT:
            return {"application/json": {"schema": schema}}
        case Shape.LIST:
            return {"application/json": {"schema": _page(schema, {}, [])}}
        case Shape.PAGE:
            return {"application/json": {"schema": _page(schema, {"next_page": cursor}, [])}}
        case Shape.PAGE_BOTH_WAYS:
            both = {"next_page": cursor, "prev_page": cursor}
            return {"application/json": {"schema": _page(schema, both, list(both))}}
        case Shape.PAGE_OF_OBJECTS:
            ends = {"has_more": {"type": "boolean"}, "first_id": cursor, "last_id": cursor}
            return {"application/json": {"schema": _page(schema, ends, list(ends))}}
        case Shape.PAGE_OF_FILES:
            more = {"next_page": cursor, "has_more": {"type": "boolean"}, "first_id": cursor, "last_id": cursor}
            return {"application/json": {"schema": _page(schema, more, list(more))}}
        case Shape.STREAM:
            text: Json = {
                "type": "string",
                "description": (
                    "Server-sent events. The `event` of a frame is the event's `type`, its `data` one JSON object of "
                    "`x-event-schema`. A `ping` every 10 seconds keeps proxies from cutting the stream; after an `error` frame, "
                    "whose data is an Error, it ends."
                ),
            }
            return {"text/event-stream": {"schema": text, "x-event-schema": schema}}
        case Shape.BYTES:
            return {"*/*": {"schema": {"type": "string", "format": "binary"}}}


def _page(item: Json, more: Json, required: Sequence[str]) -> Json:
    return {
        "type": "object",
        "required": ["data", *required],
        "additionalProperties": False,
        "properties": {"data": {"type": "array", "items": item}, **more},
    }
