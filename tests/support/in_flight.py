"""Sessions in every state in which a server can be interrupted for good: backed up, upgraded, moved to another machine.

`begin` leaves them behind on a cluster whose worker was killed; `finish` lets a worker of a cluster made from a copy bring
all of them to rest, and checks their logs.
"""

import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import kill
from pathlib import Path

import anyio
from anthropic import AsyncAnthropic

from managed_agents.db.engine import Database
from managed_agents.scripted_model import Reply, Request, fail, stall, text, tool_use
from tests.support.cluster import Cluster, Model, cluster, history, make_session, say
from tests.support.following import Event, following
from tests.support.invariants import check_history, check_rows
from tests.support.launcher import Launcher
from tests.support.waiting import until

FOREVER_SECONDS = 600.0
STARTED = "started"
KEPT = "kept in the blob store"
BETAS = ["managed-agents-2026-04-01"]

RESTED, THINKING, CALLING, RETRYING, QUEUED = "rested", "thinking", "calling", "retrying", "queued"
STATUSES = {RESTED: "idle", THINKING: "running", CALLING: "running", RETRYING: "rescheduling", QUEUED: "running"}


def interrupted(request: Request) -> Reply:
    """The model before the interruption."""
    match request.last_user_text.split()[-1]:
        case "thinking":
            return [text("Let me th"), stall(FOREVER_SECONDS), text("ink about it.")]
        case "calling" if request.round == 0:
            return [text("On it."), tool_use("bash", command=f"touch /workspace/{STARTED}; sleep {FOREVER_SECONDS}")]
        case "retrying":
            return fail(529)
        case _:
            return undisturbed(request)


def undisturbed(request: Request) -> Reply:
    """The model after it: a command, unless the log has the result of one already, and a last word."""
    return (
        "All done."
        if request.round
        else [text("On it."), tool_use("bash", command=f"echo {KEPT} > /mnt/session/outputs/kept.txt")]
    )


async def begin(server: Cluster, client: AsyncAnthropic) -> dict[str, str]:
    """Bring one session into each state, and end without a living worker or sandbox. Returns their ids by state."""
    server.model.reply = interrupted
    worker = server.worker()
    sessions = {state: await make_session(client) for state in STATUSES}
    deleted = await make_session(client)
    async with following(client, sessions[RESTED]) as follower:
        await say(client, sessions[RESTED], RESTED)
        await follower.idle()
    asked = server.model.recorder.total
    await say(client, sessions[THINKING], THINKING)
    await server.model.requests(asked + 1)
    await say(client, sessions[CALLING], CALLING)
    await server.appeared(STARTED)
    async with following(client, sessions[RETRYING]) as follower:
        await say(client, sessions[RETRYING], RETRYING)
        await follower.has("session.status_rescheduled")
    await worker.kill()
    await say(client, sessions[QUEUED], QUEUED)
    await client.beta.sessions.delete(deleted)
    _lose_sandboxes(server.data_dir)
    return sessions


async def check_in_flight(client: AsyncAnthropic, sessions: Mapping[str, str]) -> None:
    """Check that the sessions are as `begin` left them, output files included."""
    found = {state: (await client.beta.sessions.retrieve(session_id)).status for state, session_id in sessions.items()}
    assert found == STATUSES
    (output,) = [file async for file in client.beta.files.list(scope_id=sessions[RESTED], betas=BETAS)]
    content = await client.beta.files.download(output.id, betas=BETAS)
    assert (await content.read()).decode().strip() == KEPT


async def finish(server: Cluster, client: AsyncAnthropic, db: Database, sessions: Mapping[str, str]) -> None:
    """Start a worker and wait until every session has done what it was asked, the rested one a second thing."""
    server.model.reply = undisturbed
    before = {state: await history(client, session_id) for state, session_id in sessions.items()}
    server.worker()
    await say(client, sessions[RESTED], "again")
    for state, session_id in sessions.items():
        async with following(client, session_id) as follower:
            await follower.until(_done(2 if state == RESTED else 1), seconds=60.0)
        await _check_at_rest(client, db, session_id, before[state])


async def finish_copy(database_url: str, data_dir: Path, model: Model, launcher: Launcher, sessions: Mapping[str, str]) -> None:
    """Start a server on a copy's database and files, check that the sessions are as left, and let them finish."""
    db = Database(database_url, pool=2, application_name="test")
    kept = {"master_key_file": str(data_dir / "master.key"), "blob_store": f"file://{data_dir / 'blobs'}"}
    try:
        async with cluster(database_url, model, launcher, **kept) as copy:
            await copy.api()
            async with copy.client() as client:
                await check_in_flight(client, sessions)
                await finish(copy, client, db, sessions)
    finally:
        await db.dispose()


def _done(turns: int) -> Callable[[list[Event]], bool]:
    return lambda events: sum(event["type"] == "session.status_idle" for event in events) >= turns


async def _check_at_rest(client: AsyncAnthropic, db: Database, session_id: str, before: list[Event]) -> None:
    async def rests() -> bool:
        return (await client.beta.sessions.retrieve(session_id)).status == "idle"

    await until(rests)
    listed = await history(client, session_id)
    check_history(listed)
    logged = [event for event in before if event["processed_at"] is not None]
    assert listed[: len(logged)] == logged, "what was in the log is still there, unchanged"
    last = [event for event in listed if event["type"] == "agent.message"][-1]
    assert last["content"][0]["text"] == "All done."
    with anyio.fail_after(30):
        await check_rows(db, session_id, listed)


def _lose_sandboxes(data_dir: Path) -> None:
    """Sandboxes are not part of a copy."""
    for pid in data_dir.glob("sandboxes/*/pid"):
        with suppress(ProcessLookupError):
            kill(int(pid.read_text()), signal.SIGKILL)
