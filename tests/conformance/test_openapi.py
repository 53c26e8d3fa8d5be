"""Requests made from the document against the live server: never a 5xx, and no answer that contradicts the document."""

import functools
import json
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from managed_agents.api.app import ROUTERS
from managed_agents.api.openapi import undescribed
from managed_agents.api.reference import document_path
from tests.support.stack import Stack

pytestmark = pytest.mark.anyio

EXAMPLES = 8
EXAMPLES_FULL = 300
SEED = 20261121
CALL_SECONDS_MAX = 30.0
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
]
DOCUMENT: dict[str, Any] = json.loads(document_path().read_text())


def without_fixed_headers() -> dict[str, Any]:
    """The document without the headers that every request of these tests sends right (test_edge sends them wrong)."""
    document = json.loads(json.dumps(DOCUMENT))
    for found in (each for path in document["paths"].values() for each in path.values()):
        found["parameters"] = [
            each for each in found["parameters"] if each["in"] != "header" or each["name"] == "Idempotency-Key"
        ]
    return document


OPERATIONS = sorted(f"{method.upper()} {path}" for path, found in DOCUMENT["paths"].items() for method in found)
# What does not end by itself is checked by its own test below.
CALLED = [each for each in OPERATIONS if not each.endswith("/stream")]


async def test_the_served_document_is_the_committed_one_and_complete(server: Stack) -> None:
    answer = await server.http.get("/openapi.json")
    assert answer.content == document_path().read_bytes()
    assert undescribed(ROUTERS) == []
    Draft202012Validator(DOCUMENT["components"]["schemas"]["Error"])


async def test_the_page_loads_nothing_from_elsewhere(server: Stack) -> None:
    page = await server.http.get("/docs")
    assert page.status_code == 200
    assert "://" not in page.text
    for part in ("docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "docs/start.js", "docs/favicon.png"):
        found = await server.http.get(f"/{part}")
        assert found.status_code == 200, part
        assert found.content
    assert (await server.http.get("/docs/nothing.js")).json()["error"]["type"] == "not_found_error"


async def known(server: Stack) -> Callable[[Any, Any], Any]:
    """Return a function that puts ids of what exists in the places for ids."""
    session = await server.session(lambda _request: "ok")
    spare = await server.session(lambda _request: "ok")
    file = await server.upload()
    (thread,) = [each async for each in server.client.beta.sessions.threads.list(session.id)]
    ids = {
        "agent_id": session.agent.id,
        "agent": session.agent.id,
        "environment_id": server.environment_id,
        "session_id": session.id,
        "thread_id": thread.id,
        "file_id": file.id,
        "scope_id": spare.id,
    }

    def replaced(value: Any, name: Any = None) -> Any:
        if isinstance(value, dict):
            return {key: replaced(each, key) for key, each in value.items()}
        if isinstance(value, list):
            return [replaced(each) for each in value]
        return ids[name] if name in ids and isinstance(value, str) else value

    return replaced


def explored(server: Stack, operation: Any, replaced: Callable[[Any, Any], Any], mode: GenerationMode, examples: int) -> None:
    """Send `examples` requests of one operation, valid by the document or not, and check each answer."""
    headers = {key: value for key, value in server.headers().items() if key != "content-type"}
    # What breaks a form is decided by its encoding, which the generator does not undo: only 5xx and contradictions count.
    form = "multipart/form-data" in operation.definition.raw.get("requestBody", {}).get("content", {})
    checks = [each for each in CHECKS if not (form and each is negative_data_rejection)]
    changes_the_shared = operation.method.upper() == "DELETE" or operation.path.endswith("archive")

    @seed(SEED)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), real=st.booleans())
    def send(case: Any, real: bool) -> None:
        if real and not changes_the_shared:
            case.path_parameters = replaced(case.path_parameters, None)
            if isinstance(case.body, dict | list):
                case.body = replaced(case.body, None)
        response = case.call(base_url=server.base_url, headers=headers, timeout=CALL_SECONDS_MAX, session=connection)
        try:
            case.validate_response(response, checks=checks, headers=headers)
        except FailureGroup as failures:  # a BaseException, which would end the event loop under the server
            raise AssertionError("\n".join(str(each) for each in failures.exceptions)) from None

    with requests.Session() as connection:
        connection.trust_env = False
        send()


async def run(server: Stack, called: str, examples: int) -> None:
    method, path = called.split(" ")
    operation = schemathesis.openapi.from_dict(without_fixed_headers())[path][method]
    replaced = await known(server)
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        await anyio.to_thread.run_sync(functools.partial(explored, server, operation, replaced, mode, examples))


@pytest.mark.parametrize("called", CALLED)
async def test_no_answer_contradicts_the_document(server: Stack, called: str) -> None:
    await run(server, called, EXAMPLES)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("called", CALLED)
async def test_no_answer_contradicts_the_document_for_long(server: Stack, called: str) -> None:
    await run(server, called, EXAMPLES_FULL)
