"""Listing and streaming events: filters, pages, heartbeat, readers, wrong addresses."""

from datetime import timedelta
from typing import Any

import anyio
import httpx
import pytest

from managed_agents.core import limits
from managed_agents.eventlog.events import PERSISTED_TYPES
from managed_agents.scripted_model import tool_use
from tests.support.stack import TOOLSET, Gate, Stack, message
from tests.support.watch import WAIT_SECONDS

pytestmark = pytest.mark.anyio


def path_of(session: Any) -> str:
    return f"/v1/sessions/{session.id}/events"


async def three_turns(server: Stack) -> tuple[Any, list[Any]]:
    session = await server.session(["one", "two", "three"])
    for text in ("a", "b", "c"):
        await server.turn(session, text)
    return session, await server.history(session)


@pytest.mark.requirement("EVT-061", "EVT-065")
async def test_types(server: Stack) -> None:
    session, everything = await three_turns(server)
    some = await server.history(session, types=["user.message", "agent.message"])
    assert [e.id for e in some] == [e.id for e in everything if e.type in ("user.message", "agent.message")]
    assert await server.history(session, types=["session.error"]) == []
    # Every type of the SDK's enum is known, whether this server emits it or not.
    assert len(PERSISTED_TYPES) == 41
    assert await server.history(session, types=sorted(PERSISTED_TYPES)) == everything
    for unknown in ("session.deleted", "event_start", "status_idle", ""):
        said = await server.refused("GET", f"{path_of(session)}?types[]=user.message&types[]={unknown}")
        assert said.startswith("types.1")


@pytest.mark.requirement("CNV-045", "EVT-062")
async def test_order_and_pages(server: Stack) -> None:
    session, everything = await three_turns(server)
    ids = [e.id for e in everything]
    assert [e.id for e in await server.history(session, order="desc")] == ids[::-1]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        for limit in (1, 4, 26, 27, 1000):
            assert [e.id for e in await server.history(session, order=order, limit=limit)] == expected
    first = (await server.raw("GET", f"{path_of(session)}?limit=27")).json()
    assert set(first) == {"data", "next_page"}
    assert (len(first["data"]), first["next_page"]) == (27, None)


@pytest.mark.requirement("EVT-061")
async def test_bounds_compare_with_processed_at(server: Stack) -> None:
    session, everything = await three_turns(server)
    middle = everything[10]
    at = middle.processed_at
    ids = [e.id for e in everything]
    assert [e.id for e in await server.history(session, created_at_gt=at)] == ids[11:]
    assert [e.id for e in await server.history(session, created_at_gte=at)] == ids[10:]
    assert [e.id for e in await server.history(session, created_at_lt=at)] == ids[:10]
    assert [e.id for e in await server.history(session, created_at_lte=at)] == ids[:11]
    last = everything[12].processed_at
    assert [e.id for e in await server.history(session, created_at_gte=at, created_at_lt=last, limit=1)] == ids[10:12]
    assert await server.history(session, created_at_gt=everything[-1].processed_at + timedelta(microseconds=1)) == []


@pytest.mark.requirement("EVT-029", "EVT-031", "EVT-032")
async def test_queued_events_are_listed_last(server: Stack, held: Gate) -> None:
    session = await server.session([[tool_use("bash", command=held.command)], "done"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        sent = await server.say(session, "x", "y", "z")
        queued = [event.id for event in sent.data]
        listed = await server.history(session, limit=2)
        assert [e.id for e in listed[-3:]] == queued
        assert [e.processed_at for e in listed[-3:]] == [None] * 3
        assert [e.id for e in (await server.history(session, order="desc", limit=2))[:3]] == queued[::-1]
        assert [e.id for e in await server.history(session, types=["user.message"])][1:] == queued
        everything = await server.history(session, created_at_gte="2020-01-01T00:00:00Z")
        assert not {e.id for e in everything} & set(queued)
        # A page is read while the events wait, the next one after they were taken up: none is missed.
        before = [e.id for e in listed]
        cut = len(before) - 2
        page = (await server.raw("GET", f"{path_of(session)}?limit={cut}")).json()
        held.open()
        await watch.idle()
        rest = (await server.raw("GET", f"{path_of(session)}?page={page['next_page']}")).json()
    seen = {event["id"] for event in page["data"] + rest["data"]}
    assert seen == {e.id for e in await server.history(session)}
    assert rest["next_page"] is None


@pytest.mark.requirement("CNV-023", "CNV-045")
@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=1.5", "limit"),
        ("order=up", "order"),
        ("page=nonsense", "invalid page cursor"),
        ("page=page_WyJzZXNzaW9ucyJd", "invalid page cursor"),
        ("created_at[gt]=now", "created_at[gt]"),
        ("created_at=2026-01-01T00:00:00Z", "created_at"),
        ("event_deltas[]=agent.message", "event_deltas"),
        ("types[]=user.message%00", "types"),
        ("after_id=sevt_01x", "after_id"),
    ],
)
async def test_refused_queries_name_the_parameter(server: Stack, query: str, named: str) -> None:
    session = await server.session()
    assert (await server.refused("GET", f"{path_of(session)}?{query}")).startswith(named)


@pytest.mark.requirement("CNV-040", "OBS-031")
async def test_a_cursor_keeps_its_order(server: Stack) -> None:
    session, _ = await three_turns(server)
    cursor = (await server.raw("GET", f"{path_of(session)}?limit=2")).json()["next_page"]
    said = await server.refused("GET", f"{path_of(session)}?order=desc&page={cursor}")
    assert said == "page token order does not match request"


@pytest.mark.requirement("CNV-045")
@pytest.mark.parametrize("bytes_max", [1, 400, 1000])
async def test_a_page_is_bounded_in_bytes(server: Stack, monkeypatch: pytest.MonkeyPatch, bytes_max: int) -> None:
    session, everything = await three_turns(server)
    monkeypatch.setattr(limits, "EVENTS_PAGE_BYTES_MAX", bytes_max)
    page = (await server.raw("GET", path_of(session))).json()
    assert 1 <= len(page["data"]) < 10
    assert page["next_page"] is not None
    for order, expected in (("asc", everything), ("desc", everything[::-1])):
        assert [e.id for e in await server.history(session, order=order)] == [e.id for e in expected]


@pytest.mark.requirement("EVT-055", "EVT-057")
async def test_silence_is_broken_by_pings(server: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STREAM_HEARTBEAT_SECONDS", 0.05)
    session = await server.session()
    async with server.http.stream("GET", f"{path_of(session)}/stream", headers=server.headers()) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["request-id"].startswith("req_")
        lines = []
        with anyio.fail_after(WAIT_SECONDS):
            async for line in answer.aiter_lines():
                lines.append(line)
                if len(lines) == 6:
                    break
    assert lines == ["event: ping", 'data: {"type":"ping"}', ""] * 2


@pytest.mark.requirement("EVT-055", "EVT-059")
async def test_many_readers_get_the_same(server: Stack) -> None:
    session = await server.session(["ok"])
    frames: list[list[str]] = []

    async def read(ready: anyio.Event) -> None:
        lines: list[str] = []
        async with (
            httpx.AsyncClient(base_url=server.base_url, timeout=30.0) as http,
            http.stream("GET", f"{path_of(session)}/stream", headers=server.headers()) as answer,
        ):
            ready.set()
            async for line in answer.aiter_lines():
                if line.startswith("event: ping"):
                    continue
                lines.append(line)
                if '"session.status_idle"' in line:
                    break
        frames.append(lines)

    with anyio.fail_after(WAIT_SECONDS):
        async with anyio.create_task_group() as group:
            for _ in range(30):
                ready = anyio.Event()
                group.start_soon(read, ready)
                await ready.wait()
            await server.say(session, "go")
    assert len(frames) == 30
    logged = [[line for line in lines if '"processed_at":null' not in line and line.startswith("data")] for lines in frames]
    assert all(lines == logged[0] for lines in logged)
    raw = (await server.raw("GET", path_of(session))).content
    # Byte for byte what the list answers.
    assert b'{"data":[%b]' % b",".join(line.removeprefix("data: ").encode() for line in logged[0]) in raw


@pytest.mark.requirement("EVT-056")
async def test_a_stream_starts_at_now(server: Stack) -> None:
    session = await server.session(["one", "two"])
    await server.turn(session)
    watch = await server.turn(session, "second")
    assert watch.types[0] == "session.status_running"
    assert [e.content[0].text for e in watch.logged if e.type == "user.message"] == ["second"]


@pytest.mark.requirement("EVT-059")
async def test_a_reader_that_leaves_stops_nothing(server: Stack, held: Gate) -> None:
    session = await server.session([[tool_use("bash", command=held.command)], "done"], tools=TOOLSET)
    async with server.watching(session):
        await server.say(session, "go")
        await held.started()
    held.open()
    await server.idle(session)
    assert (await server.history(session))[-1].type == "session.status_idle"


@pytest.mark.requirement("CNV-061", "EVT-060", "OBS-020")
async def test_wrong_addresses(server: Stack) -> None:
    session = await server.session()
    for suffix in ("/sesn_01unknown/events/stream", "/nonsense/events/stream", "/sesn_01unknown/events"):
        await server.refused("GET", f"/v1/sessions{suffix}", status=404)
    for path in (
        f"{path_of(session)}/stream/",
        f"{path_of(session)}/",
        f"/v1/sessions/{session.id}/stream",
        f"/v1/sessions/{session.id}/threads/sthr_01x/events/stream",
        "/v1/sessions/",
        "/v1/nothing",
        "/v2/sessions",
        "/",
    ):
        assert await server.refused("GET", path, status=404) == "not found"
        assert await server.refused("GET", path, status=404, headers={}) == "not found"
    for method in ("PUT", "PATCH", "DELETE"):
        await server.refused(method, path_of(session), status=405)
    await server.refused("POST", f"{path_of(session)}/stream", status=405)
    head = await server.raw("HEAD", path_of(session))
    assert head.status_code == 405
    assert head.content == b""
    await server.refused("GET", f"{path_of(session)}/stream?limit=5")


@pytest.mark.requirement("CNV-028", "EVT-060")
async def test_foreign_and_old_names_in_a_stream_are_not_served(server: Stack) -> None:
    session = await server.session()
    without = server.headers(without="anthropic-beta")
    assert await server.refused("GET", f"{path_of(session)}/stream", status=404, headers=without) == "not found"
    assert (
        await server.refused("POST", path_of(session), status=404, headers=without, json={"events": [message("x")]})
        == "not found"
    )
    assert await server.history(session) == []


@pytest.mark.requirement("EVT-058")
async def test_a_stream_of_an_archived_session_ends_at_once(server: Stack) -> None:
    session = await server.session(["hello"])
    await server.turn(session)
    await server.client.beta.sessions.archive(session.id)
    with anyio.fail_after(5):
        async with await server.client.beta.sessions.events.stream(session.id) as stream:
            assert [event async for event in stream] == []
