"""Hostile connections and bodies against the server's own listener: bounded, refused in the envelope, nobody else affected."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import SocketStream

from managed_agents.api.app import create_app
from managed_agents.core import limits
from managed_agents.processes.lifetime import serving
from tests.integration.api.conftest import Served

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 30.0
CONNECTIONS_MAX = 20


@pytest.fixture
async def port(served: Served, free_tcp_port: int) -> AsyncIterator[int]:
    """The application behind the listener that processes use."""
    async with serving(create_app(served.services), host="127.0.0.1", port=free_tcp_port, connections_max=CONNECTIONS_MAX):
        yield free_tcp_port


def head(served: Served, *more: str, method: str = "POST", path: str = "/v1/agents") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in served.headers().items()), *more]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


async def answer(stream: SocketStream) -> tuple[int, dict[str, Any]]:
    """Read until the other side closes; return status and the envelope."""
    received = b""
    with anyio.fail_after(WAIT_SECONDS):
        try:
            while True:
                received += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass
    top, _, content = received.partition(b"\r\n\r\n")
    return int(top.split(b" ")[1]), json.loads(content)


async def exchanged(port: int, raw: bytes) -> tuple[int, dict[str, Any]]:
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(raw)
        return await answer(stream)


def is_envelope(said: dict[str, Any]) -> bool:
    return said["type"] == "error" and bool(said["error"]["message"]) and said["request_id"].startswith("req_")


async def well(served: Served, port: int) -> None:
    """The rest of the service answers."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_SECONDS, trust_env=False) as client:
        assert (await client.get("/v1/agents", headers=served.headers())).status_code == 200


BROKEN = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"NONSENSE / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /caf\xc3\xa9 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nbad header: y\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nx: a\x00b\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999999\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
    b"POST /v1/agents HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
]


@pytest.mark.parametrize("raw", BROKEN, ids=range(len(BROKEN)))
async def test_broken_http_is_a_400_in_the_envelope(served: Served, port: int, raw: bytes) -> None:
    status, said = await exchanged(port, raw)
    assert status in (400, 401)
    assert is_envelope(said)
    await well(served, port)


@pytest.mark.parametrize(
    "more",
    [
        ["x-absurd: " + "a" * (2 * limits.HEAD_BYTES_MAX)],
        [f"x-{number}: y" for number in range(20_000)],
        ["a" * (2 * limits.HEAD_BYTES_MAX) + ": x"],
    ],
    ids=["long", "many", "name"],
)
async def test_absurd_headers_are_refused(served: Served, port: int, more: list[str]) -> None:
    status, said = await exchanged(port, head(served, *more, method="GET"))
    assert (status, is_envelope(said)) == (431, True)
    await well(served, port)


async def test_an_absurd_path_is_refused(served: Served, port: int) -> None:
    status, said = await exchanged(port, head(served, method="GET", path="/v1/agents?x=" + "y" * (2 * limits.HEAD_BYTES_MAX)))
    assert (status, is_envelope(said)) == (431, True)


async def test_endless_trailers_are_refused(served: Served, port: int) -> None:
    body = b"2\r\n{}\r\n0\r\nx-trailer: " + b"a" * (3 * limits.HEAD_BYTES_MAX)
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(head(served, "transfer-encoding: chunked"))
        with anyio.fail_after(WAIT_SECONDS), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.send(body)
            while True:
                await stream.receive()
    await well(served, port)


async def test_slow_heads_are_cut_off(served: Served, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS_MAX", 0.3)
    for start in (b"", b"POST /v1/agents HTTP/1.1\r\nhost: x\r\nx-slow: "):
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            if start:
                await stream.send(start)
            status, said = await answer(stream)
        assert (status, is_envelope(said)) == (408, True)


async def test_a_kept_connection_that_begins_another_head_slowly_is_cut_off(
    served: Served, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS_MAX", 0.3)
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        first = await stream.receive()
        assert b"200 OK" in first
        await stream.send(b"GET /healthz HT")
        status, said = await answer(stream)
    assert (status, is_envelope(said)) == (408, True)


async def test_slow_bodies_are_refused(served: Served, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_STALL_SECONDS", 0.3)
    for path in ("/v1/agents", "/v1/agents/agent_01x/archive"):
        status, said = await exchanged(port, head(served, "content-length: 1000", path=path) + b'{"name": ')
        assert (status, said["error"]["type"], is_envelope(said)) == (408, "timeout_error", True)
    form = head(served, "content-length: 1000", path="/v1/files").replace(
        b"content-type: application/json", b"content-type: multipart/form-data; boundary=x"
    )
    status, said = await exchanged(port, form + b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\nabc')
    assert (status, is_envelope(said)) == (408, True)
    await well(served, port)


async def test_a_body_that_drips_steadily_is_refused_too(served: Served, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_GRACE_SECONDS", 0.5)
    async with await anyio.connect_tcp("127.0.0.1", port) as stream, anyio.create_task_group() as group:

        async def drip() -> None:
            try:
                while True:
                    await stream.send(b" ")
                    await anyio.sleep(0.05)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return

        await stream.send(head(served, "content-length: 100000"))
        group.start_soon(drip)
        status, said = await answer(stream)
        group.cancel_scope.cancel()
    assert (status, is_envelope(said)) == (408, True)


async def test_an_answered_request_may_not_go_on_for_ever(served: Served, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS_MAX", 0.5)
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{")
        status, _ = await answer(stream)  # closed by the server: no end of the body is needed
    assert status == 401


async def test_connections_beyond_the_limit_are_turned_away(served: Served, port: int) -> None:
    async with anyio.create_task_group() as group:
        opened: list[SocketStream] = []
        for _ in range(CONNECTIONS_MAX):
            opened.append(await anyio.connect_tcp("127.0.0.1", port))
        async with await anyio.connect_tcp("127.0.0.1", port) as one_more:
            status, said = await answer(one_more)
        assert (status, said["error"]["type"]) == (529, "overloaded_error")
        for stream in opened:
            group.start_soon(stream.aclose)
    with anyio.fail_after(WAIT_SECONDS):
        while True:
            try:
                await well(served, port)
                break
            except (AssertionError, httpx.HTTPError):
                await anyio.lowlevel.checkpoint()


async def test_large_bodies_share_a_budget_and_give_it_back(served: Served, port: int) -> None:
    capacity = served.services.capacity
    capacity.body_bytes_max = 1024 * 1024
    async with await anyio.connect_tcp("127.0.0.1", port) as holding:
        await holding.send(head(served, "content-length: 1200000") + b'{"name": "' + b"x" * 1_000_000)
        with anyio.fail_after(WAIT_SECONDS):
            while capacity.body_bytes < 700_000:
                await anyio.lowlevel.checkpoint()
        status, said = await exchanged(port, head(served, "content-length: 900000") + b'{"name": "' + b"y" * 800_000)
        assert (status, said["error"]["type"]) == (529, "overloaded_error")
        # Small ones are not affected.
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            made = await client.post("/v1/agents", headers=served.headers(), json={"name": "a", "model": "m"})
            assert made.status_code == 200
    with anyio.fail_after(WAIT_SECONDS):
        while capacity.body_bytes:
            await anyio.lowlevel.checkpoint()


async def test_open_streams_of_a_workspace_are_limited(served: Served, port: int) -> None:
    served.services.capacity.streams_max = 3
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_SECONDS, trust_env=False) as client:
        headers = served.headers()
        agent = (await client.post("/v1/agents", headers=headers, json={"name": "a", "model": "m"})).json()
        environment = (await client.post("/v1/environments", headers=headers, json={"name": "e"})).json()
        body = {"agent": agent["id"], "environment_id": environment["id"]}
        session = (await client.post("/v1/sessions", headers=headers, json=body)).json()
        path = f"/v1/sessions/{session['id']}/events/stream"
        async with (
            client.stream("GET", path, headers=headers) as one,
            client.stream("GET", path, headers=headers) as two,
            client.stream("GET", path, headers=headers) as three,
        ):
            assert {one.status_code, two.status_code, three.status_code} == {200}
            refused = await client.get(path, headers=headers)
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert refused.headers["retry-after"]
            assert (await client.get("/v1/agents", headers=headers)).status_code == 200
        with anyio.fail_after(WAIT_SECONDS):
            while served.services.capacity.streams:
                await anyio.lowlevel.checkpoint()
        async with client.stream("GET", path, headers=headers) as again:
            assert again.status_code == 200


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"name":"a","name":"b","model":"m"}', "name: the key is given more than once"),
        (b'{"name":"a","model":"m","metadata":{"k":"1","k":"2"}}', "k: the key is given more than once"),
        (b'{"name":"a","model":"m","metadata":{"k":"1","\\u006b":"2"}}', "k: the key is given more than once"),
        (b'{"name":"a","model":{"id":"m","id":"m"}}', "id: the key is given more than once"),
        (b"[" + b"[]," * 10_000_000 + b"1]", "body: more than"),
        (b'["a"' + b',"a"' * 5_000_000 + b"]", "body: more than"),
        (b'["' + b'\\"' * 10_000_000, "body: invalid JSON"),
        (b'"' * 20_000_000, "body: "),
        (b'{"name": ' + b"9" * 1_000_000 + b"}", "body: "),
        (b'{"a":' * 50_000, "body: "),
        (b'{"name":"\xff"}', "body: not valid UTF-8"),
    ],
    ids=["twice", "nested", "escaped", "inner", "lists", "strings", "escapes", "quotes", "number", "deep", "utf-8"],
)
async def test_hostile_documents(served: Served, raw: httpx.AsyncClient, content: bytes, named: str) -> None:
    refused = await raw.post("/v1/agents", headers=served.headers(), content=content)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["message"].startswith(named), refused.text


async def test_keys_that_only_look_repeated_are_fine(served: Served, raw: httpx.AsyncClient) -> None:
    text = '"name": "x", {"name" : 1, \\ "a":'
    body = {"name": text, "model": "m", "metadata": {"a": text, '"': '\\":', "name": "", 'b\\": ': "x"}}
    made = await raw.post("/v1/agents", headers=served.headers(), json=body)
    assert made.status_code == 200, made.text
    assert made.json()["metadata"] == body["metadata"]
