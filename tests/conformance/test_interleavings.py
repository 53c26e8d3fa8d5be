"""Clients that meet at one agent or one session: whatever the order, the end is legal and who lost was told why.

The order is made, not hoped for: a row lock of the test holds everybody back until all have arrived, in the order that
hypothesis chose, and is then let go. What needs no lock, and what the worker does, runs freely in between.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tests.support.stack import Stack, message
from tests.support.waiting import until
from tests.support.watch import WAIT_SECONDS

pytestmark = pytest.mark.anyio

# The same examples in every run, a few seconds in all; raise it to search.
EXAMPLES = 20
RULES = settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))

STALE = "Concurrent modification detected. Please fetch the latest version and retry."
_BLOCKED = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")


@dataclass
class Race:
    """Requests under way, and their answers in the order in which they were started."""

    server: Stack
    answers: dict[int, httpx.Response] = field(default_factory=dict[int, httpx.Response])
    started: int = 0

    async def arrived(self) -> bool:
        """Everybody has an answer, or waits for the row."""
        async with self.server.db.autocommit() as tx:
            blocked = (await tx.execute(_BLOCKED)).scalar_one()
        return len(self.answers) + blocked >= self.started


@asynccontextmanager
async def held(server: Stack, table: str, row_id: str) -> AsyncIterator[None]:
    """Hold the row as long as the block runs."""
    async with server.db.transaction() as tx:
        await tx.execute(text(f"SELECT 1 FROM {table} WHERE id = :id FOR UPDATE"), {"id": row_id})
        yield


async def race(
    server: Stack, table: str, row_id: str, requests: Sequence[Callable[[], Awaitable[httpx.Response]]]
) -> list[httpx.Response]:
    """Let `requests` meet at the row, in this order; returns their answers in this order."""
    running = Race(server)

    async def run(number: int, request: Callable[[], Awaitable[httpx.Response]]) -> None:
        running.answers[number] = await request()

    with anyio.fail_after(WAIT_SECONDS):
        async with anyio.create_task_group() as group, held(server, table, row_id):
            for number, request in enumerate(requests):
                running.started += 1
                group.start_soon(run, number, request)
                await until(running.arrived, seconds=WAIT_SECONDS)
    return [running.answers[number] for number in range(len(requests))]


def error(answer: httpx.Response) -> tuple[int, str]:
    """Status and message of a refusal; what cannot change by trying again says so to the SDK."""
    body = answer.json()
    assert body["type"] == "error"
    if answer.status_code == 409:
        assert answer.headers["x-should-retry"] == "false"
    return answer.status_code, body["error"]["message"]


# Agents: updates with the version known, without one, or with one that was never current; changes and no changes; archive.
AGENT_STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["known", "none", "wrong"]), st.sampled_from(["one", "two", "same"])),
        st.just(("archive", "")),
    ),
    min_size=2,
    max_size=4,
)


@pytest.mark.requirement("AGT-053")
@RULES
@given(before=st.integers(0, 2), steps=AGENT_STEPS)
async def test_two_clients_update_one_agent(server: Stack, before: int, steps: list[tuple[str, str]]) -> None:
    agent = await server.agent(description="same")
    path = f"/v1/agents/{agent.id}"
    for number in range(before):
        await server.raw("POST", path, json={"metadata": {"n": str(number)}})
    known = before + 1

    def request(step: tuple[str, str]) -> Callable[[], Awaitable[httpx.Response]]:
        kind, change = step
        if kind == "archive":
            return lambda: server.raw("POST", f"{path}/archive")
        version = {"known": {"version": known}, "wrong": {"version": known + 10}, "none": {}}[kind]
        return lambda: server.raw("POST", path, json={"description": change, **version})

    answers = await race(server, "agents", agent.id, [request(step) for step in steps])
    final = (await server.raw("GET", path)).json()
    versions = {body["version"]: body for body in (await server.raw("GET", f"{path}/versions?limit=100")).json()["data"]}
    assert sorted(versions) == list(range(1, final["version"] + 1))
    winners: list[int] = []
    for (kind, change), answer in zip(steps, answers, strict=True):
        if answer.status_code == 200 and kind != "archive":
            body = answer.json()
            # What was answered is what is stored, whoever came after.
            assert body["description"] == change == versions[body["version"]]["description"]
            winners += [body["version"]] if kind == "known" and body["version"] > known else []
            assert kind != "wrong"
        elif kind != "archive" and error(answer) == (409, STALE):
            assert kind == "wrong" or (kind == "known" and final["version"] > known)
        elif kind != "archive":
            assert error(answer) == (400, "Cannot modify archived agent")
            assert final["archived_at"] is not None
    # Of those who named the same version at most one changed it.
    assert len(winners) <= 1
    assert (final["archived_at"] is not None) == any(kind == "archive" for kind, _ in steps)


SESSION_STEPS = st.lists(
    st.sampled_from(["send", "interrupt", "update", "mount", "archive", "delete", "retrieve", "history"]), min_size=2, max_size=5
)
GONE = "Session {id} not found"
TOLD = {
    "send": {400: "is archived or terminated and accepts no more events", 404: GONE},
    "interrupt": {400: "is archived or terminated and accepts no more events", 404: GONE},
    "update": {400: "is archived and cannot be modified", 404: GONE},
    "mount": {400: "is archived and cannot be modified", 404: GONE},
    "archive": {400: 'cannot be archived while its status is "running"', 404: GONE},
    "delete": {400: "Cannot delete session while it is running.", 404: GONE},
    "retrieve": {404: GONE},
    "history": {404: GONE},
}


def calls(server: Stack, session_id: str, file_id: str, step: str, number: int) -> Callable[[], Awaitable[httpx.Response]]:
    """The request of one step."""
    path = f"/v1/sessions/{session_id}"
    method, below, body = {
        "send": ("POST", "/events", {"events": [message(f"message {number}")]}),
        "interrupt": ("POST", "/events", {"events": [{"type": "user.interrupt"}]}),
        "update": ("POST", "", {"title": f"title {number}"}),
        "mount": ("POST", "/resources", {"type": "file", "file_id": file_id, "mount_path": f"/{number}"}),
        "archive": ("POST", "/archive", None),
        "delete": ("DELETE", "", None),
        "retrieve": ("GET", "", None),
        "history": ("GET", "/events", None),
    }[step]
    options = {} if body is None else {"json": body}
    return lambda: server.raw(method, path + below, **options)


@pytest.mark.requirement("SES-079")
@RULES
@given(working=st.booleans(), steps=SESSION_STEPS)
async def test_clients_meet_at_one_session(server: Stack, working: bool, steps: list[str]) -> None:
    file = await server.upload()
    session = await server.session([])
    async with server.watching(session) as watch:
        if working:
            await server.say(session, "before")
        requests = [calls(server, session.id, file.id, step, number) for number, step in enumerate(steps)]
        answers = await race(server, "sessions", session.id, requests)
        won: dict[str, list[int]] = {step: [] for step in TOLD}
        for number, (step, answer) in enumerate(zip(steps, answers, strict=True)):
            if answer.status_code == 200:
                won[step].append(number)
            else:
                status, said = error(answer)
                assert TOLD[step][status].format(id=session.id) in said, (step, status, said)
        assert len(won["delete"]) <= 1
        deleted, archived = bool(won["delete"]), bool(won["archive"])
        if deleted or archived:
            await watch.end_reached()
    now = await server.raw("GET", f"/v1/sessions/{session.id}")
    if deleted:
        assert error(now) == (404, GONE.format(id=session.id))
        # It may have been archived before; then that is what ended the stream.
        assert watch.events[-1].type in ("session.deleted", "session.status_terminated")
        return

    async def rests() -> Any:
        found = (await server.raw("GET", f"/v1/sessions/{session.id}")).json()
        return found if found["status"] in ("idle", "terminated") else None

    body = await until(rests, seconds=WAIT_SECONDS)
    history = [e.to_dict() for e in await server.history(session)]
    assert body["status"] == ("terminated" if archived else "idle")
    assert (body["archived_at"] is not None) == archived
    if archived:
        assert history[-1]["type"] == "session.status_terminated"
        assert sum(event["type"] == "session.status_terminated" for event in history) == 1
    # What was accepted is in the history exactly once, in the order of the answers; what was refused is not.
    said = [event["content"][0]["text"] for event in history if event["type"] == "user.message"]
    assert sorted(said) == sorted([f"message {number}" for number in won["send"]] + ["before"] * working)
    assert len([event for event in history if event["type"] == "user.interrupt"]) == len(won["interrupt"])
    assert len([event for event in history if event["type"] == "session.updated"]) == len(won["update"])
    assert len(body["resources"]) == len(won["mount"])
    # Archiving and deleting were refused only for work that was there.
    refused = [step for step, answer in zip(steps, answers, strict=True) if answer.status_code == 400]
    if "delete" in refused or "archive" in refused:
        assert working or won["send"]
