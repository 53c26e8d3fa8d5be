"""Previews while processes come and go: a worker killed in the midst of one, several api processes, a reader that sleeps."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import anyio
import orjson
import pytest
from anthropic import AsyncAnthropic
from anthropic.types.beta.sessions import BetaManagedAgentsStreamSessionEvents
from anyio.abc import SocketStream
from pydantic import TypeAdapter

from managed_agents.scripted_model import Reply, Request, pace
from managed_agents.scripted_model import text as says
from tests.crash.conftest import Claimed, Finished
from tests.support.cluster import API_KEY, Cluster, make_session, say
from tests.support.previews import check_previews

pytestmark = pytest.mark.anyio

LONG = " ".join(f"word{n}" for n in range(400))
TYPES: list[Any] = ["agent.message", "agent.thinking"]
SECONDS_MAX = 40.0
EVENT: TypeAdapter[Any] = TypeAdapter(BetaManagedAgentsStreamSessionEvents)


@dataclass
class Seen:
    """Everything that one stream delivered."""

    events: list[Any] = field(default_factory=list[Any])
    changed: anyio.Event = field(default_factory=anyio.Event)

    def add(self, event: Any) -> None:
        self.events.append(event)
        self.changed.set()
        self.changed = anyio.Event()

    async def has(self, event_type: str, count: int = 1) -> None:
        with anyio.fail_after(SECONDS_MAX):
            while sum(event.type == event_type for event in self.events) < count:
                await self.changed.wait()


@asynccontextmanager
async def previewing(client: AsyncAnthropic, session_id: str) -> AsyncIterator[Seen]:
    """Read a stream with previews while the block runs."""
    seen = Seen()
    async with (
        await client.beta.sessions.events.stream(session_id, event_deltas=TYPES) as stream,
        anyio.create_task_group() as group,
    ):

        async def read() -> None:
            async for event in stream:
                seen.add(event)

        group.start_soon(read)
        yield seen
        group.cancel_scope.cancel()


def slowly(_: Request) -> Reply:
    return [pace(chars_per_second=400), says(LONG)]


def at_once(_: Request) -> Reply:
    return [pace(chars_per_second=4000), says(LONG)]


@pytest.mark.requirement("EVT-102")
async def test_a_worker_killed_in_the_midst_of_a_preview_leaves_a_prefix_and_the_next_one_begins_anew(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished, claimed: Claimed
) -> None:
    """On two api processes at once, of which one was never asked for anything but the stream."""
    await cluster.api()
    cluster.model.reply = slowly
    first = cluster.worker()
    session_id = await make_session(client, tools=False)
    async with (
        cluster.beside() as other,
        other.client() as client_there,
        previewing(client, session_id) as here,
        previewing(client_there, session_id) as there,
    ):
        await say(client, session_id, "go")
        await here.has("event_delta")
        await there.has("event_delta")
        owner = await claimed(session_id, None)
        await first.kill()
        cluster.model.reply = at_once
        cluster.worker()
        await claimed(session_id, owner)
        await here.has("session.status_idle")
        await there.has("session.status_idle")
    for seen in (here, there):
        previewed = check_previews(seen.events)
        assert len(previewed) == 2
        broken, whole = previewed
        (said,) = [event for event in seen.events if event.type == "agent.message"]
        assert said.id == whole != broken
        assert previewed[whole]
        assert LONG.startswith(previewed[broken])
    history = await finished(session_id)
    assert not {event["type"] for event in history} & {"event_start", "event_delta"}


async def test_only_another_api_process_is_asked_for_previews(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    """The one that takes the message does not know of the wish; the worker does."""
    await cluster.api()
    cluster.model.reply = at_once
    cluster.worker()
    session_id = await make_session(client, tools=False)
    async with cluster.beside() as other, other.client() as client_there, previewing(client_there, session_id) as there:
        await say(client, session_id, "go")
        await there.has("session.status_idle")
    assert next(iter(check_previews(there.events).values()))
    await finished(session_id)


async def test_a_reader_that_sleeps_gets_a_prefix_and_every_event(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    """It takes little at a time, and nothing before the model has said everything."""
    await cluster.api()
    said = LONG * 20
    cluster.model.reply = lambda _: [pace(chars_per_second=40_000), says(said)]
    cluster.worker()
    session_id = await make_session(client, tools=False)
    async with await _unread(cluster, session_id) as stream, previewing(client, session_id) as awake:
        await say(client, session_id, "go")
        await awake.has("session.status_idle")
        events: list[Any] = []
        rest = b""
        with anyio.fail_after(SECONDS_MAX):
            while not events or events[-1].type != "session.status_idle":
                *parts, rest = (rest + await stream.receive(65536)).split(b"\n\n")
                for part in parts:
                    data = b"".join(line[6:] for line in part.split(b"\n") if line.startswith(b"data: "))
                    if data and data != b'{"type":"ping"}':
                        events.append(EVENT.validate_python(orjson.loads(data)))
    (previewed,) = check_previews(events).values()
    assert said.startswith(previewed)
    check_previews(awake.events)
    lasting = [event for event in events if not event.type.startswith("event_") and event.processed_at is not None]
    assert [event.id for event in lasting] == [event["id"] for event in await finished(session_id)]


async def _unread(cluster: Cluster, session_id: str) -> SocketStream:
    """A stream with previews whose client takes little and reads nothing yet."""
    url = urlsplit(cluster.base_url)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect((url.hostname, url.port))
    stream = await SocketStream.from_socket(raw)
    path = f"/v1/sessions/{session_id}/events/stream?event_deltas[]=agent.message"
    headers = f"x-api-key: {API_KEY}\r\nanthropic-version: 2023-06-01\r\nanthropic-beta: managed-agents-2026-04-01\r\n"
    # HTTP/1.0: no chunks to take apart.
    await stream.send(f"GET {path} HTTP/1.0\r\nhost: x\r\n{headers}\r\n".encode())
    answer = b""
    with anyio.fail_after(SECONDS_MAX):
        while not answer.endswith(b"\r\n\r\n"):
            answer += await stream.receive(1)
    assert b" 200 " in answer.split(b"\r\n")[0], answer
    return stream
