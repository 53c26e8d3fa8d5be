"""Fan-out: a stream delivers exactly what the log holds, in order, whoever wrote it."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import anyio
import orjson
import pytest
from sqlalchemy import text

from managed_agents.core import limits
from managed_agents.db.engine import Database
from managed_agents.db.listener import LOG_CHANNEL, Doorbell, listen
from managed_agents.eventlog import append as log
from managed_agents.eventlog import events as ev
from managed_agents.eventlog import interest
from managed_agents.eventlog.events import NewEvent
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.previews import PENDING_CHARS_MAX, PREVIEW_CHANNEL, START, Chunk, PreviewSender
from managed_agents.eventlog.subscribe import PING, Hub
from tests.support import sessions
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


@dataclass
class Process:
    """One process's share of the fan-out."""

    db: Database
    hub: Hub
    hints: Hints

    async def append(self, session_id: str, events: list[NewEvent], *, hint: bool = True) -> None:
        async with self.db.transaction() as tx:
            head = await log.lock(tx, session_id)
            assert head is not None
            rows = head.append(events)
            await log.write(tx, [head])
        if hint:
            self.hints.appended(rows)

    async def enqueue(self, session_id: str, event: NewEvent) -> None:
        async with self.db.transaction() as tx:
            head = await log.lock(tx, session_id)
            assert head is not None
            rows = head.enqueue([event], maximum=10)
            await log.write(tx, [head])
        self.hints.queued(rows)


@asynccontextmanager
async def process(url: str) -> AsyncIterator[Process]:
    db = Database(url, pool=5, application_name="test")
    hub, doorbell = Hub(db), Doorbell(url)
    async with anyio.create_task_group() as group:
        group.start_soon(hub.run)
        group.start_soon(doorbell.run)
        group.start_soon(partial(listen, url, {LOG_CHANNEL: hub.refresh}, hub.refresh_all, beside=doorbell))
        heard = anyio.Event()

        async def listening() -> None:
            heard.set()

        group.start_soon(listen, url, {PREVIEW_CHANNEL: hub.publish_previews}, listening)
        await heard.wait()
        yield Process(db, hub, Hints(hub, doorbell))
        group.cancel_scope.cancel()
    await db.dispose()


def message(thread_id: str, words: str) -> NewEvent:
    return ev.new_event("agent.message", thread_id, {"content": [{"type": "text", "text": words}]})


class Reader:
    """Collects the data of the frames of one subscription."""

    def __init__(
        self, hub: Hub, session_id: str, thread_id: str, *, seq: int = 0, previews: frozenset[str] = frozenset()
    ) -> None:
        self._frames = hub.subscribe(session_id, thread_id, seq=seq, inbox_seq=0, previews=previews)
        self.events: list[dict[str, object]] = []
        self.changed = anyio.Event()
        self.ended = anyio.Event()

    async def run(self) -> None:
        async with aclosing(self._frames) as frames:
            async for chunk in frames:
                for part in chunk.split(b"\n\n"):
                    if part and part + b"\n\n" != PING:
                        name, data = part.split(b"\n")
                        event = orjson.loads(data.removeprefix(b"data: "))
                        assert name == b"event: " + event["type"].encode()
                        self.events.append(event)
                self.changed.set()
                self.changed = anyio.Event()
        self.ended.set()

    async def wait(self, count: int) -> None:
        with anyio.fail_after(5):
            while len(self.events) < count:
                await self.changed.wait()


async def listed(process: Process, session_id: str) -> list[dict[str, object]]:
    from managed_agents.eventlog import read

    async with process.db.transaction() as tx:
        return [event.json() for event in await read.after(tx, session_id, 0, limit=10_000)]


@pytest.mark.requirement("EVT-094")
async def test_two_processes_deliver_the_same_log_to_early_and_late_readers(database_url: str) -> None:
    async with process(database_url) as one, process(database_url) as two:
        session_id, thread_id = await sessions.session(one.db, await sessions.workspace(one.db))
        readers = [Reader(p.hub, session_id, thread_id) for p in (one, two, two)]
        async with anyio.create_task_group() as group:
            for reader in readers:
                group.start_soon(reader.run)
            for n in range(30):
                await (one if n % 2 else two).append(session_id, [message(thread_id, str(n)), message(thread_id, "x")])
            late = Reader(one.hub, session_id, thread_id, seq=20)
            group.start_soon(late.run)
            for reader in readers:
                await reader.wait(60)
            await late.wait(40)
            group.cancel_scope.cancel()
        history = await listed(one, session_id)
        assert all(reader.events == history for reader in readers)
        assert late.events == history[20:]
        assert one.hub.subscribers == 0


async def test_without_any_ring_the_poll_delivers(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "POLL_SECONDS", 0.05)
    async with process(database_url) as one:
        session_id, thread_id = await sessions.session(one.db, await sessions.workspace(one.db))
        reader = Reader(one.hub, session_id, thread_id)
        async with anyio.create_task_group() as group:
            group.start_soon(reader.run)
            await one.append(session_id, [message(thread_id, "quiet")], hint=False)
            await reader.wait(1)
            group.cancel_scope.cancel()


async def test_a_hole_is_filled_from_the_table_and_a_slow_reader_loses_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SUBSCRIBER_BUFFER_EVENTS_MAX", 3)
    async with process(database_url) as one:
        session_id, thread_id = await sessions.session(one.db, await sessions.workspace(one.db))
        reader = Reader(one.hub, session_id, thread_id)
        async with anyio.create_task_group() as group:
            group.start_soon(reader.run)
            for n in range(10):
                await one.append(session_id, [message(thread_id, str(n))] * 1, hint=n % 4 == 3)
            await one.append(session_id, [message(thread_id, f"m{n}") for n in range(20)])
            await reader.wait(30)
            group.cancel_scope.cancel()
        assert reader.events == await listed(one, session_id)


@pytest.mark.requirement("EVT-030")
async def test_a_queued_event_shows_null_first_and_never_after_its_logged_form(database_url: str) -> None:
    async with process(database_url) as one:
        session_id, thread_id = await sessions.session(one.db, await sessions.workspace(one.db))
        reader = Reader(one.hub, session_id, thread_id)
        event = message(thread_id, "queued")
        async with anyio.create_task_group() as group:
            group.start_soon(reader.run)
            await one.enqueue(session_id, event)
            await reader.wait(1)
            await one.append(session_id, [event])
            await reader.wait(2)
            late = Reader(one.hub, session_id, thread_id)
            group.start_soon(late.run)
            await late.wait(1)
            group.cancel_scope.cancel()
        assert [e["processed_at"] is None for e in reader.events] == [True, False]
        assert [e["processed_at"] is None for e in late.events] == [False]


@pytest.mark.requirement("EVT-058")
async def test_streams_end_after_deletion_and_after_termination(database_url: str) -> None:
    async with process(database_url) as one, process(database_url) as two:
        workspace_id = await sessions.workspace(one.db)
        deleted, thread = await sessions.session(one.db, workspace_id)
        ended, ended_thread = await sessions.session(one.db, workspace_id)
        first = Reader(two.hub, deleted, thread)
        second = Reader(two.hub, ended, ended_thread)
        async with anyio.create_task_group() as group:
            group.start_soon(first.run)
            group.start_soon(second.run)
            async with one.db.transaction() as tx:
                await tx.execute(text("UPDATE sessions SET deleted_at = now() WHERE id = :id"), {"id": deleted})
            one.hints.changed(deleted)
            await one.append(ended, ev.terminated(ended_thread, "a"))
            with anyio.fail_after(5):
                await first.ended.wait()
                await second.ended.wait()
        assert [e["type"] for e in first.events] == ["session.deleted"]
        assert [e["type"] for e in second.events][-1] == "session.status_terminated"


@pytest.mark.requirement("OBS-044")
async def test_silence_is_broken_by_pings_and_shutdown_ends_every_stream(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STREAM_HEARTBEAT_SECONDS", 0.02)
    async with process(database_url) as one:
        session_id, thread_id = await sessions.session(one.db, await sessions.workspace(one.db))
        async with aclosing(one.hub.subscribe(session_id, thread_id, seq=0, inbox_seq=0)) as frames:
            with anyio.fail_after(5):
                assert await anext(frames) == PING
                assert await anext(frames) == PING
                one.hub.close()
                assert [chunk async for chunk in frames if chunk != PING] == []


async def test_previews_reach_any_process_and_none_of_them_is_kept(database_url: str) -> None:
    sender = PreviewSender(database_url)
    async with process(database_url) as one, process(database_url) as two, anyio.create_task_group() as group:
        session_id, thread_id = await sessions.session(one.db, await sessions.workspace(one.db))
        both = frozenset({"agent.message"})
        readers = [Reader(hub, session_id, thread_id, previews=both) for hub in (one.hub, two.hub)]
        plain = Reader(two.hub, session_id, thread_id)
        for reader in (*readers, plain):
            group.start_soon(reader.run)
        start = ev.span_start(thread_id)
        await one.append(session_id, [start])
        for reader in (*readers, plain):
            await reader.wait(1)
        assert one.hub.previewed() == two.hub.previewed() == [session_id]
        final = message(thread_id, "x" * 20_000)
        sender.push(Chunk(session_id, thread_id, 1, final.id, START, 0, "agent.message"))
        sender.push(Chunk(session_id, thread_id, 1, final.id, 0, 0, "x" * 20_000))
        sender.push(Chunk("sesn_other", thread_id, 1, final.id, 0, 0, "y"))
        group.start_soon(sender.run)
        for reader in readers:
            await reader.wait(22)  # twenty deltas of a thousand characters
        await one.append(session_id, [final])
        for reader in readers:
            await reader.wait(23)
            assert [event["type"] for event in reader.events[:2]] == ["span.model_request_start", "event_start"]
            assert [event["type"] for event in reader.events[2:]] == ["event_delta"] * 20 + ["agent.message"]
        await plain.wait(2)
        assert plain.events == await listed(one, session_id)
        group.cancel_scope.cancel()


async def test_a_flood_of_previews_is_shed(database_url: str) -> None:
    sender = PreviewSender(database_url)
    taken = [sender.push(Chunk("s", "t", 1, f"e{n}", 0, 0, "x" * 1000)) for n in range(1000)]
    assert taken[0] is True
    assert taken[-1] is False
    assert sum(taken) * 1000 <= PENDING_CHARS_MAX


async def test_interest_expires_unless_it_is_kept(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interest, "REFRESH_SECONDS", 0.05)
    db = Database(database_url, pool=3, application_name="test")
    expire = text("UPDATE preview_interests SET expires_at = clock_timestamp() - interval '1 second'")

    async def wanted(session_id: str) -> bool:
        async with db.autocommit() as tx:
            return await interest.wanted(tx, session_id)

    async with db.autocommit() as tx:
        await interest.register(tx, ["a", "b"])
        await interest.register(tx, ["a"])
    assert await wanted("a")
    assert not await wanted("c")
    async with db.autocommit() as tx:
        await tx.execute(expire)
    assert not await wanted("a")
    async with anyio.create_task_group() as group:
        group.start_soon(interest.keep, db, lambda: ["a"])

        async def kept() -> bool:
            async with db.autocommit() as tx:
                rows = [row.session_id for row in await tx.execute(text("SELECT session_id FROM preview_interests"))]
            return rows == ["a"] and await wanted("a")

        await until(kept, seconds=10)
        group.cancel_scope.cancel()
    await db.dispose()
