"""Every method of the official SDK for these resources, asynchronous and not, with strict validation of every answer.

The list of methods is read from the SDK: one that nobody calls here fails the test.
"""

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import anyio.to_thread
import httpx2
import pytest
from anthropic import Anthropic, APIStatusError, AsyncAnthropic

from tests.support.stack import Stack

pytestmark = pytest.mark.anyio

RESOURCES = (
    "agents",
    "agents.versions",
    "environments",
    "sessions",
    "sessions.events",
    "sessions.resources",
    "sessions.threads",
    "sessions.threads.events",
)
# Runs tools on the client's side with methods that are called here.
HELPERS = {"sessions.events.tool_runner"}


def resource(client: Any, path: str) -> Any:
    """`client.beta.sessions.events` for `sessions.events`."""
    found = client.beta
    for part in path.split("."):
        found = getattr(found, part)
    return found


def methods(client: Any) -> set[str]:
    """Every public method of the resources that makes a request."""
    return {
        f"{path}.{name}"
        for path in RESOURCES
        for name, member in inspect.getmembers(type(resource(client, path)), inspect.isfunction)
        if not name.startswith("_")
    } - HELPERS


class Calls:
    """Calls methods by name and notes which."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.called: set[str] = set()

    def method(self, name: str) -> Callable[..., Any]:
        self.called.add(name)
        path, _, method = name.rpartition(".")
        return getattr(resource(self.client, path), method)


def everything(suffix: str) -> Generator[tuple[str, tuple[Any, ...], dict[str, Any]], Any, None]:
    """One call of each method after the other; the answer of each is sent in, so that both clients share one scenario."""
    agent = yield "agents.create", (), {"name": "a", "model": "claude-opus-5", "metadata": {"k": "v"}}
    yield "agents.update", (agent.id,), {"version": 1, "description": "d"}
    yield "agents.retrieve", (agent.id,), {"version": 1}
    yield "agents.list", (), {"limit": 1, "include_archived": True, "created_at_gte": agent.created_at}
    yield "agents.versions.list", (agent.id,), {"limit": 1}
    environment = yield "environments.create", (), {"name": f"sdk {suffix}", "config": {"type": "cloud"}}
    yield "environments.update", (environment.id,), {"description": "d", "metadata": {"k": "v"}}
    yield "environments.retrieve", (environment.id,), {}
    yield "environments.list", (), {"limit": 1, "include_archived": False}
    session = yield "sessions.create", (), {"agent": agent.id, "environment_id": environment.id, "title": "t"}
    yield "sessions.update", (session.id,), {"title": "u", "metadata": {"k": "v"}, "agent": {"tools": []}}
    yield "sessions.retrieve", (session.id,), {}
    yield "sessions.list", (), {"limit": 1, "order": "asc", "statuses": ["idle", "running"], "agent_id": agent.id}
    file = yield "files.upload", (), {"file": ("a.txt", b"a", "text/plain")}
    added = yield "sessions.resources.add", (session.id,), {"type": "file", "file_id": file.id}
    yield "sessions.resources.retrieve", (added.id,), {"session_id": session.id}
    yield "sessions.resources.list", (session.id,), {"limit": 1}
    refused = yield "sessions.resources.update", (added.id,), {"session_id": session.id, "authorization_token": "t"}
    assert refused.status_code == 400
    yield "sessions.resources.delete", (added.id,), {"session_id": session.id}
    threads = yield "sessions.threads.list", (session.id,), {"limit": 5, "statuses": ["idle"]}
    (thread,) = threads
    yield "sessions.threads.retrieve", (thread.id,), {"session_id": session.id}
    refused = yield "sessions.threads.archive", (thread.id,), {"session_id": session.id}
    assert refused.status_code == 400
    sent = yield "sessions.events.send", (session.id,), {"events": [{"type": "user.interrupt"}]}
    assert sent.data[0].processed_at is not None
    listed = yield "sessions.events.list", (session.id,), {"types": ["user.interrupt"], "order": "desc", "limit": 1}
    assert [event.id for event in listed] == [sent.data[0].id]
    again = yield "sessions.threads.events.list", (thread.id,), {"session_id": session.id, "limit": 1}
    assert [event.id for event in again][-1] == sent.data[0].id
    yield "sessions.archive", (session.id,), {}
    # Of an ended session there is nothing to stream: both streams end at once.
    streamed = yield "sessions.events.stream", (session.id,), {"event_deltas": ["agent.message"]}
    assert streamed == []
    streamed = yield "sessions.threads.events.stream", (thread.id,), {"session_id": session.id}
    assert streamed == []
    yield "sessions.delete", (session.id,), {}
    yield "environments.archive", (environment.id,), {}
    yield "environments.delete", (environment.id,), {}
    yield "agents.archive", (agent.id,), {}


REFUSALS = {"sessions.resources.update", "sessions.threads.archive"}
STREAMS = {"sessions.events.stream", "sessions.threads.events.stream"}


@contextmanager
def refusal() -> Iterator[dict[str, Any]]:
    """Keep the error that the block has to raise."""
    kept: dict[str, Any] = {}
    with pytest.raises(APIStatusError) as raised:
        yield kept
    kept["error"] = raised.value


@pytest.mark.requirement("CNV-003")
async def test_every_method_async(server: Stack) -> None:
    calls = Calls(server.client)
    scenario = everything("async")
    answer: Any = None
    while True:
        try:
            name, arguments, options = scenario.send(answer)
        except StopIteration:
            break
        method = calls.method(name)
        if name in REFUSALS:
            with refusal() as kept:
                await method(*arguments, **options)
            answer = kept["error"]
        elif name in STREAMS:
            async with await method(*arguments, **options) as stream:
                answer = [event async for event in stream]
        else:
            made = method(*arguments, **options)
            answer = [each async for each in made] if name.endswith("list") else await made
    assert methods(AsyncAnthropic(api_key="x")) <= calls.called


@pytest.mark.requirement("CNV-003")
async def test_every_method_sync(server: Stack) -> None:
    def run() -> None:
        plain = httpx2.Client(timeout=30.0, trust_env=False, verify=False)
        with Anthropic(
            base_url=server.base_url,
            api_key=server.caller.secret,
            max_retries=0,
            timeout=30.0,
            _strict_response_validation=True,
            http_client=plain,
        ) as client:
            calls = Calls(client)
            scenario = everything("sync")
            answer: Any = None
            while True:
                try:
                    name, arguments, options = scenario.send(answer)
                except StopIteration:
                    break
                method = calls.method(name)
                if name in REFUSALS:
                    with refusal() as kept:
                        method(*arguments, **options)
                    answer = kept["error"]
                elif name in STREAMS:
                    with method(*arguments, **options) as stream:
                        answer = list(stream)
                else:
                    made = method(*arguments, **options)
                    answer = list(made) if name.endswith("list") else made
            assert methods(client) <= calls.called

    await anyio.to_thread.run_sync(run)
