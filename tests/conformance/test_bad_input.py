"""Hostile requests: every one is a 4xx in the envelope, and nothing changes."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.stack import Stack, message, refusal

pytestmark = pytest.mark.anyio

DEEP = 100_000


def bodies() -> list[tuple[bytes, int]]:
    text = json.dumps(message("x"))
    return [
        (b"", 400),
        (b" ", 400),
        (b"null", 400),
        (b"[]", 400),
        (b"7", 400),
        (b'"text"', 400),
        (b"{", 400),
        (b'{"events":[', 400),
        (b'{"events":[]} trailing', 400),
        (b"{'events':[]}", 400),
        (b'{"events":NaN}', 400),
        (b'{"events":1e999}', 400),
        (b'{"events":' + b"9" * 400 + b"}", 400),
        (b'{"events":-' + b"9" * 5000 + b"}", 400),
        (b'{"events":"\xff\xfe"}', 400),
        (b"\xef\xbb\xbf{}", 400),
        (b'{"events":["\\ud800"]}', 400),
        (b'{"\\udfff":1}', 400),
        (b'{"events":["\\u0000"]}', 400),
        (b'{"\\u0000":1}', 400),
        (b"[" * DEEP + b"]" * DEEP, 400),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, 400),
        (b'{"events":' + b"[" * 120 + b"]" * 120 + b"}", 400),
        (b'{"events":[' + b"0," * 300_000 + b"0]}", 400),
        (b'{"events":[%b],"events":[7]}' % text.encode(), 400),
    ]


@pytest.mark.requirement("CNV-057", "CNV-059")
@pytest.mark.parametrize(("content", "status"), bodies(), ids=range(len(bodies())))
@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/sessions/{id}", "/v1/sessions/{id}/events", "/v1/sessions/{id}/archive"])
async def test_bodies_that_are_no_request(server: Stack, path: str, content: bytes, status: int) -> None:
    if path.endswith("archive") and not content.strip():
        return  # archive takes an empty body
    session = await shared(server)
    answer = await server.raw("POST", path.format(id=session.id), content=content)
    refusal(answer, status=status)
    await unchanged(server, session)


_shared: dict[int, Any] = {}


async def shared(server: Stack) -> Any:
    """One session for all requests that must not change it."""
    if id(server) not in _shared:
        _shared[id(server)] = await server.session(title="kept", metadata={"a": "1"})
    return _shared[id(server)]


async def unchanged(server: Stack, session: Any) -> None:
    found = await server.client.beta.sessions.retrieve(session.id)
    assert (found.status, found.title, found.metadata) == ("idle", "kept", {"a": "1"})
    assert found.updated_at == session.updated_at
    assert await server.history(session) == []
    assert [s.id async for s in server.client.beta.sessions.list(agent_id=session.agent.id)] == [session.id]


@pytest.mark.requirement("CNV-058")
@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"events": [{"type": "user.message", "content": [{"type": "text", "text": "a\x00"}]}]}, "events.0.content.0.text"),
        ({"events": [{"type": "user.message", "content": [{"type": "text", "text": "a\ud800"}]}]}, "events.0.content.0.text"),
        ({"events": [{"type": "user.message", "content": [{"type": "text", "te\udc00xt": "a"}]}]}, "events.0.content.0.te"),
        ({"events": [{"type": "user.message", "content": 10**30}]}, "events.0.content"),
    ],
)
async def test_what_cannot_be_stored_is_named(server: Stack, body: dict[str, Any], named: str) -> None:
    session = await shared(server)
    said = await server.refused("POST", f"/v1/sessions/{session.id}/events", content=json.dumps(body).encode())
    assert said.startswith(named), said
    await unchanged(server, session)


@pytest.mark.requirement("CNV-034")
async def test_a_huge_body_is_refused_whether_declared_or_not(server: Stack) -> None:
    session = await shared(server)
    path = f"/v1/sessions/{session.id}/events"
    huge = json.dumps({"events": [message("x" * (33 * 1024 * 1024))]}).encode()
    said = await server.refused("POST", path, status=413, content=huge)
    assert "32 MB" in said

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(huge), 1 << 20):
            yield huge[start : start + (1 << 20)]

    answer = await server.raw("POST", path, content=chunks())
    assert answer.json()["error"]["type"] == "request_too_large"
    refusal(answer, status=413)
    await unchanged(server, session)


@pytest.mark.requirement("CNV-077")
async def test_a_large_body_below_the_limit_is_taken(server: Stack) -> None:
    session = await server.session(["read"])
    text = "x" * (8 * 1024 * 1024)
    async with server.watching(session) as watch:
        await server.say(session, text)
        await watch.idle()
    (stored,) = [event for event in watch.logged if event.type == "user.message"]
    assert stored.content[0].text == text


@pytest.mark.requirement("CNV-060")
@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"content_type": "text/plain"}, "content-type"),
        ({"content_type": "application/json; charset=latin-1"}, "content-type"),
        ({"content_type": "multipart/form-data; boundary=x"}, "content-type"),
        ({"content_encoding": "gzip"}, "content-encoding"),
        ({"content_encoding": "br, gzip"}, "content-encoding"),
    ],
)
async def test_wrong_kinds_of_body(server: Stack, headers: dict[str, str], named: str) -> None:
    session = await shared(server)
    content = json.dumps({"events": [message("x")]}).encode()
    said = await server.refused("POST", f"/v1/sessions/{session.id}/events", headers=server.headers(**headers), content=content)
    assert said.startswith(named)
    await unchanged(server, session)


@pytest.mark.requirement("CNV-062")
@pytest.mark.parametrize(
    "bad",
    [
        "x",
        "sesn_",
        "sesn_01%00",
        "sesn_01%ff",
        "sesn_01%ED%A0%80",
        "agent_01x",
        "sesn_01" + "x" * 5000,
        "..",
        "%2e%2e",
        "'; --",
        "%F0%9F%92%A9",
    ],
)
async def test_ids_that_are_none(server: Stack, bad: str) -> None:
    for method, path, options in (
        ("GET", f"/v1/sessions/{bad}", {}),
        ("POST", f"/v1/sessions/{bad}", {"json": {"title": "x"}}),
        ("DELETE", f"/v1/sessions/{bad}", {}),
        ("POST", f"/v1/sessions/{bad}/archive", {}),
        ("GET", f"/v1/sessions/{bad}/events", {}),
        ("POST", f"/v1/sessions/{bad}/events", {"json": {"events": [message("x")]}}),
        ("GET", f"/v1/sessions/{bad}/events/stream", {}),
        ("GET", f"/v1/sessions/{bad}/threads", {}),
        ("GET", f"/v1/sessions/{bad}/threads/{bad}", {}),
    ):
        answer = await server.raw(method, path, **options)
        assert answer.status_code in (404, 405), answer.text
        refusal(answer, status=answer.status_code)


@pytest.mark.requirement("CNV-062")
async def test_bad_ids_below_a_good_session(server: Stack) -> None:
    session = await shared(server)
    for bad in ("x", "sthr_", "sthr_01%00", "sthr_01%ff", "sthr_" + "x" * 5000):
        await server.refused("GET", f"/v1/sessions/{session.id}/threads/{bad}", status=404)
    for agent in ("agent_01\x00", "x" * 100_000, "agent_01\u2713"):
        body = {"agent": agent, "environment_id": server.environment_id}
        answer = await server.raw("POST", "/v1/sessions", json=body)
        assert answer.status_code in (400, 404)
        refusal(answer, status=answer.status_code)


@pytest.mark.requirement("CNV-063")
async def test_many_parameters(server: Stack) -> None:
    session = await shared(server)
    query = "&".join(f"types[]=user.message&x{n}=1" for n in range(1500))
    assert (await server.refused("GET", f"/v1/sessions/{session.id}/events?{query}")).startswith("query")
    query = "&".join(["types[]=user.message"] * 1500)
    assert (await server.raw("GET", f"/v1/sessions/{session.id}/events?{query}")).status_code == 200
