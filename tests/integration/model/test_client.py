"""The model client against the scripted model, over real HTTP."""

import socket
import ssl
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import httpx
import pytest
from pydantic import SecretStr

from managed_agents.model.client import AnthropicModelClient, Deadlines
from managed_agents.model.endpoint import Endpoint
from managed_agents.model.errors import (
    Auth,
    BadRequest,
    Billing,
    Cut,
    ModelError,
    Overloaded,
    RateLimited,
    ServerFailed,
    Stalled,
    TooLong,
)
from managed_agents.model.events import (
    BadToolInput,
    BlockFinished,
    BlockStarted,
    MessageFinished,
    MessageStarted,
    ModelEvent,
    ModelRequest,
    TextDelta,
)
from managed_agents.model.models import Models

from .conftest import KEY

pytestmark = pytest.mark.anyio
BASH = {"name": "bash", "input_schema": {"type": "object"}}


def ask(said: str, *betas: str, **more: object) -> ModelRequest:
    messages = [{"role": "user", "content": said}]
    body = {"model": "claude-opus-5", "max_tokens": 4000, "messages": messages, "tools": [BASH], **more}
    return ModelRequest(body, betas)


async def events_of(client: AnthropicModelClient, request: ModelRequest) -> list[ModelEvent]:
    with anyio.fail_after(10):
        async with client.stream(request) as events:
            return [event async for event in events]


async def failure_of(client: AnthropicModelClient, request: ModelRequest) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await events_of(client, request)
    assert KEY not in repr(caught.value)
    assert KEY not in str(caught.value)
    return caught.value


async def requests_in(base_url: str, state: str, said: str) -> None:
    """Wait until the scripted model has a request with these words in this state."""
    with anyio.fail_after(10):
        async with httpx.AsyncClient(base_url=base_url) as http:
            while True:
                data = (await http.get("/_scripted/requests")).json()["data"]
                there = [r["body"]["messages"][-1]["content"] for r in data if r["state"] == state]
                if said in there:
                    return
                await http.get("/_scripted/wait", params={"count": len(there) + 1, "state": state, "seconds": 5})


async def test_events_are_complete_and_lossless(client: AnthropicModelClient) -> None:
    events = await events_of(client, ask("all blocks"))
    started, finished = events[0], events[-1]
    assert isinstance(started, MessageStarted)
    assert isinstance(finished, MessageFinished)
    assert started.id == finished.id
    assert started.request_id == finished.request_id is not None
    assert [e.block["type"] for e in events if isinstance(e, BlockStarted)] == [
        "thinking",
        "text",
        "tool_use",
    ]
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "I will look."
    assert [e.block for e in events if isinstance(e, BlockFinished)] == finished.content
    thought, said, used = finished.content
    assert (thought["thinking"], bool(thought["signature"])) == ("Let me look.", True)
    assert said == {"type": "text", "text": "I will look."}
    assert used["input"] == {"command": "ls", "deep": {"a": [1, None]}}
    assert used["caller"] == {"type": "direct"}
    assert (finished.stop_reason, finished.stop_details, finished.bad_inputs) == ("tool_use", None, {})
    assert finished.usage["output_tokens"] > started.usage["output_tokens"]
    assert finished.usage["cache_creation"] == {
        "ephemeral_5m_input_tokens": 0,
        "ephemeral_1h_input_tokens": 0,
    }
    assert finished.usage["service_tier"] == "standard"
    result = {"type": "tool_result", "tool_use_id": used["id"], "content": "a.txt"}
    history = [{"role": "user", "content": "all blocks"}, {"role": "assistant", "content": finished.content}]
    again = ask("", messages=[*history, {"role": "user", "content": [result]}])
    assert isinstance((await events_of(client, again))[-1], MessageFinished)


async def test_broken_tool_input_is_told_not_raised(client: AnthropicModelClient) -> None:
    events = await events_of(client, ask("broken input"))
    finished = events[-1]
    assert isinstance(finished, MessageFinished)
    assert finished.bad_inputs == {1: BadToolInput('{"command": "ls'), 2: BadToolInput("[1]")}
    assert finished.content[1]["input"] == {}
    assert [e.bad_input for e in events if isinstance(e, BlockFinished)] == [
        None,
        *finished.bad_inputs.values(),
    ]


async def test_truncated_tool_input_is_told_too(client: AnthropicModelClient) -> None:
    finished = (await events_of(client, ask("all blocks", max_tokens=9)))[-1]
    assert isinstance(finished, MessageFinished)
    assert finished.stop_reason == "max_tokens"
    assert list(finished.bad_inputs) == [2]


async def test_refusal_details_arrive(client: AnthropicModelClient) -> None:
    finished = (await events_of(client, ask("refuse")))[-1]
    assert isinstance(finished, MessageFinished)
    assert finished.stop_details == {"type": "refusal", "category": "bio", "explanation": "No."}


@pytest.mark.parametrize(
    ("said", "error", "status", "retryable"),
    [
        ("rate", RateLimited, 429, True),
        ("overloaded", Overloaded, 529, True),
        ("server", ServerFailed, 500, True),
        ("gateway", ServerFailed, 504, True),
        ("billing", Billing, 402, False),
        ("auth", Auth, 401, False),
        ("forbidden", Auth, 403, False),
        ("large", TooLong, 413, False),
        ("unprocessable", BadRequest, 422, False),
        ("event overloaded", Overloaded, None, True),
        ("event rate", RateLimited, None, True),
        ("event invalid", BadRequest, None, False),
        ("event api", ServerFailed, None, True),
        ("event too long", TooLong, None, False),
        ("cut first", Cut, None, True),
        ("cut inside", Cut, None, True),
    ],
)
async def test_every_failure_has_its_class(
    client: AnthropicModelClient, said: str, error: type[ModelError], status: int | None, retryable: bool
) -> None:
    failed = await failure_of(client, ask(said))
    assert type(failed) is error
    assert (failed.status, failed.retryable) == (status, retryable)
    assert failed.request_id is not None
    if status is not None:
        assert failed.message == f"scripted {said} for key [key]"
    assert failed.retry_after == (3 if status else None)


async def test_what_the_upstream_refuses_is_a_bad_request(client: AnthropicModelClient) -> None:
    failed = await failure_of(client, ask("hi", max_tokens=10**6))
    assert type(failed) is BadRequest
    assert failed.message.startswith("max_tokens: 1000000 > 128000")
    assert type(await failure_of(client, ask("hi", model="claude-nothing"))) is BadRequest
    assert type(await failure_of(client, ask("hi", metadata={"user_id": object()}))) is BadRequest


@pytest.mark.parametrize("said", ["stall first", "stall inside"])
async def test_silence_is_a_stall(endpoint: Endpoint, said: str) -> None:
    client = AnthropicModelClient(endpoint, deadlines=Deadlines(stall_seconds=0.2))
    assert type(await failure_of(client, ask(said))) is Stalled
    await requests_in(endpoint.base_url, "disconnected", said)
    await client.aclose()


async def test_a_response_that_never_ends_is_a_stall(endpoint: Endpoint) -> None:
    client = AnthropicModelClient(endpoint, deadlines=Deadlines(request_seconds=0.2))
    assert type(await failure_of(client, ask("slow"))) is Stalled
    await client.aclose()


async def test_cancelling_closes_the_connection_at_once(client: AnthropicModelClient, base_url: str) -> None:
    said = "stall inside"
    begun = anyio.Event()
    request = ask(said, metadata={"user_id": "cancelled"})

    async def read() -> None:
        async with client.stream(request) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    begun.set()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await begun.wait()
            tasks.cancel_scope.cancel()
        await requests_in(base_url, "disconnected", said)
    assert isinstance((await events_of(client, ask("hi")))[-1], MessageFinished)


async def test_leaving_early_closes_the_connection_too(client: AnthropicModelClient, base_url: str) -> None:
    async with client.stream(ask("slow")) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break
    await requests_in(base_url, "disconnected", "slow")


async def test_connections_are_used_again(client: AnthropicModelClient) -> None:
    ports = set()
    for _ in range(3):
        async with client.stream(ask("hi")) as events:
            async for event in events:
                if isinstance(event, MessageFinished):
                    break  # as the harness does: what follows must be drained, or the connection is lost
        (connection,) = client.anthropic._client._transport._pool.connections
        ports.add(id(connection))
    assert len(ports) == 1


async def test_the_environment_has_no_say(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "leaked-token")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "leaked-key")
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "x-leaked: yes\nauthorization: Bearer leaked")
    monkeypatch.setenv("ANTHROPIC_PROFILE", "leaked")
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    client = AnthropicModelClient(endpoint)
    assert "leaked" not in str(client.anthropic.default_headers)
    finished = (await events_of(client, ask("headers", "beta-1", "beta-2")))[-1]
    assert isinstance(finished, MessageFinished)
    seen = finished.content[-1]["text"]
    assert "leaked" not in seen
    assert "anthropic-beta=beta-1,beta-2" in seen
    await client.aclose()


async def test_a_refused_connection_is_a_cut(endpoint: Endpoint) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = Endpoint(f"http://127.0.0.1:{closed.getsockname()[1]}", SecretStr(KEY), False, True)
        client = AnthropicModelClient(nowhere)
        failed = await failure_of(client, ask("hi"))
    assert type(failed) is Cut
    await client.aclose()


async def test_an_address_that_the_libraries_below_did_not_foresee_is_a_cut() -> None:
    client = AnthropicModelClient(Endpoint("http://127.0.0.1:99999", SecretStr(KEY), False, True))
    assert type(await failure_of(client, ask("hi"))) is Cut
    await client.aclose()


@asynccontextmanager
async def serving(handle: Callable[[anyio.abc.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """A server of one's own; its base URL."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        yield f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


def raw(status: str, kind: str, body: bytes, length: int | None = None, more: str = "") -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{more}content-length: {size}\r\n\r\n".encode() + body


NO_MONEY = b'{"type":"error","error":{"type":"billing_error","message":"no money"}}'
NO_CREDIT = b'{"type":"error","error":{"type":"invalid_request_error","message":"Your credit balance is too low"}}'
SSE = "text/event-stream"
ANSWERS = [
    (raw("200 OK", "application/json", b"{}"), ServerFailed),
    (raw("200 OK", SSE, b"event: x\ndata: nope\n\n"), ServerFailed),
    (raw("200 OK", SSE, b'event: x\ndata: {"type":"message_stop"}\n\n'), ServerFailed),
    (raw("200 OK", SSE, b""), Cut),
    (raw("200 OK", SSE, b"event: ping\n", 99), Cut),
    (raw("307 Go", "text/html", b"", more="location: http://127.0.0.1:9/\r\n"), BadRequest),
    (raw("502 Bad", "text/html", b"<html>"), ServerFailed),
    (raw("400 Bad", "application/json", NO_MONEY), Billing),
    (raw("400 Bad", "application/json", NO_CREDIT), Billing),
    (b"garbage\r\n\r\n", Cut),
    (b"", Cut),
]


@pytest.mark.parametrize("number", range(len(ANSWERS)))
async def test_other_servers_odd_answers_are_our_errors(number: int) -> None:
    answer, error = ANSWERS[number]

    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(answer)

    async with serving(handle) as base_url:
        client = AnthropicModelClient(Endpoint(base_url, SecretStr(KEY), False, True))
        assert type(await failure_of(client, ask("hi"))) is error
        await client.aclose()


async def test_a_key_beyond_ascii_goes_out_as_utf_8_and_is_the_endpoints_to_refuse() -> None:
    received: list[bytes] = []

    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            received.append(await stream.receive())
            await stream.send(raw("401 No", "application/json", b"{}"))

    async with serving(handle) as base_url:
        client = AnthropicModelClient(Endpoint(base_url, SecretStr("sk-sch\u00f6n"), False, True))
        failed = await failure_of(client, ask("hi", "beta-1", "beta-2"))
        await client.aclose()
    assert type(failed) is Auth
    assert "sk-sch\u00f6n".encode() in received[0]
    assert b"beta-1,beta-2" in received[0]


async def test_a_header_that_cannot_be_written_is_not_shown() -> None:
    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()

    async with serving(handle) as base_url:
        client = AnthropicModelClient(Endpoint(base_url, SecretStr(f"{KEY}\n"), False, True))
        failed = await failure_of(client, ask("hi"))
        await client.aclose()
    assert type(failed) is Cut
    assert KEY not in "".join(traceback.format_exception(failed))


ENDLESS = b"HTTP/1.1 529 Busy\r\ncontent-type: application/json\r\ncontent-length: 99999\r\n\r\n"


@pytest.mark.parametrize(
    ("begun", "deadlines", "error"),
    [
        (ENDLESS, Deadlines(stall_seconds=1.0), Overloaded),
        (ENDLESS, Deadlines(request_seconds=1.0), Overloaded),
        (b"HTTP/1.1 200 OK\r\nx-endless: ", Deadlines(request_seconds=0.5), Stalled),
    ],
    ids=["body by stall", "body by request", "head by request"],
)
async def test_what_trickles_for_ever_is_read_for_so_long_only(
    begun: bytes, deadlines: Deadlines, error: type[ModelError]
) -> None:
    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(begun)
            try:
                while True:
                    await stream.send(b" ")
                    await anyio.sleep(0.02)
            except anyio.BrokenResourceError:
                return  # how the client's end is heard

    async with serving(handle) as base_url:
        client = AnthropicModelClient(Endpoint(base_url, SecretStr(KEY), False, True), deadlines=deadlines)
        failed = await failure_of(client, ask("hi"))
        await client.aclose()
    assert type(failed) is error
    assert failed.status == (529 if error is Overloaded else None)


async def test_hundreds_of_streams_at_once(client: AnthropicModelClient) -> None:
    finished: list[ModelEvent] = []

    async def one() -> None:
        finished.append((await events_of(client, ask("hi")))[-1])

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            for _ in range(300):
                tasks.start_soon(one)
    assert len(finished) == 300


async def test_limits_are_asked_once_and_have_fallbacks(client: AnthropicModelClient, base_url: str) -> None:
    now = 0.0
    models = Models(client.anthropic, clock=lambda: now)
    haiku = await models.retrieve("claude-haiku-4-5")
    assert (haiku.exists, haiku.max_tokens, haiku.max_input_tokens) == (True, 64_000, 200_000)
    assert haiku.capabilities["image_input"] == {"supported": True}
    assert await models.retrieve("claude-haiku-4-5") is haiku
    now = 3601.0
    assert await models.retrieve("claude-haiku-4-5") is not haiku
    assert (await models.retrieve("claude-nothing")).exists is False

    nowhere = AnthropicModelClient(Endpoint(f"{base_url}/elsewhere", SecretStr(KEY), False, True))
    unknown = await Models(nowhere.anthropic).retrieve("claude-opus-5")
    assert (unknown.exists, unknown.max_tokens) == (None, 32_000)
    await nowhere.aclose()


async def test_tls_endpoints_share_one_context() -> None:
    client = AnthropicModelClient(Endpoint("https://models.example", SecretStr(KEY), False, False))
    assert isinstance(client._verify, ssl.SSLContext)
    await client.aclose()
