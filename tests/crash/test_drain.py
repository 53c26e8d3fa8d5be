"""Workers that are told to stop: sessions go to others after the step at hand, within a bound, and nobody can tell."""

import signal
from contextlib import AsyncExitStack

import anyio
import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text

from managed_agents.db.engine import Database
from managed_agents.scripted_model import Reply, Request, pace, stall
from managed_agents.scripted_model import text as says
from tests.crash import script
from tests.crash.conftest import Claimed, Finished, Undisturbed, Working
from tests.support.cluster import Cluster, make_session, say
from tests.support.following import Event, following
from tests.support.invariants import normalised
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

SESSIONS = 12
WORKERS = 3
CAP = 2


def hiccups(events: list[Event]) -> list[str]:
    """What a client could notice of a worker's end."""
    failed = [event["type"] for event in events if event["type"] == "span.model_request_end" and event["is_error"]]
    failed += [event["type"] for event in events if event["type"] == "agent.tool_result" and event["is_error"]]
    return failed + [event["type"] for event in events if event["type"] in ("session.error", "session.status_rescheduled")]


def slow_work(request: Request) -> Reply:
    """The work of `script`, in answers that take a while: most sessions are in the midst of one at any time."""
    reply = script.work(request)
    return [pace(seconds_per_delta=0.02), *(reply if isinstance(reply, list) else [says(reply)])]


async def test_workers_are_replaced_one_by_one_and_no_session_shows_it(
    cluster: Cluster, client: AsyncAnthropic, undisturbed: Undisturbed, finished: Finished
) -> None:
    await cluster.api()
    expected = await undisturbed()
    before = len(cluster.in_workspaces(script.SIDE))
    cluster.model.reply = slow_work
    workers = [cluster.worker() for _ in range(WORKERS)]
    session_ids = [await make_session(client) for _ in range(SESSIONS)]
    async with AsyncExitStack() as stack:
        followers = [await stack.enter_async_context(following(client, session_id)) for session_id in session_ids]
        async with anyio.create_task_group() as group:
            for session_id in session_ids:
                group.start_soon(say, client, session_id, "work")
        asked = SESSIONS
        for old in workers:
            await cluster.model.requests(asked)
            cluster.worker()
            old.signal(signal.SIGTERM)
            assert await old.ended() == 0
            asked += SESSIONS // 2
        for follower in followers:
            seen = await follower.idle()
            assert seen == await finished(follower.session_id)
            assert hiccups(seen) == []
            assert normalised(seen) == expected
    sides = cluster.in_workspaces(script.SIDE)
    assert len(sides) == before + SESSIONS
    assert {side.read_text() for side in sides} == {"ran\n"}


async def test_a_draining_worker_finishes_its_step_and_hands_the_rest_over(
    cluster: Cluster, claimed: Claimed, working: Working, finished: Finished
) -> None:
    async with working() as work:
        cluster.worker()
        work.worker.signal(signal.SIGTERM)
        await until(lambda: "stopping" in work.worker.log.read_text())
        work.side.with_name(script.GO).touch()
        assert await work.worker.ended() == 0
        await claimed(work.session_id, work.owner)
        seen = await work.follower.idle()
    listed = await finished(work.session_id)
    assert seen == listed
    assert hiccups(listed) == []
    assert work.side.read_text() == "ran\n"


@pytest.mark.parametrize("doing", ["a call", "a model request"])
async def test_what_takes_longer_than_the_bound_is_given_up_and_goes_on_elsewhere(
    database_url: str, cluster: Cluster, client: AsyncAnthropic, finished: Finished, doing: str
) -> None:
    calling = doing == "a call"
    cluster.model.reply = script.gated_work if calling else script.stalling_once(script.work)
    await cluster.api()
    cluster.settings["MANAGED_AGENTS_DRAIN_SECONDS"] = "0.3"
    old = cluster.worker()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        if calling:
            side = await cluster.appeared(script.SIDE)
        else:
            await cluster.model.requests(1)
        with anyio.fail_after(15):
            old.signal(signal.SIGTERM)
            assert await old.ended() == 0
        cluster.worker()
        if calling:
            side.with_name(script.GO).touch()
        await follower.idle()
    listed = await finished(session_id)
    assert hiccups(listed) == ([] if calling else ["span.model_request_end"])
    assert {side.read_text() for side in cluster.in_workspaces(script.SIDE)} == {"ran\n"}


async def test_a_worker_runs_no_more_sessions_at_once_than_it_is_allowed(
    cluster: Cluster, client: AsyncAnthropic, db: Database, finished: Finished
) -> None:
    released = anyio.Event()

    def reply(_request: Request) -> Reply:
        return "Done." if released.is_set() else [stall(600), says("Thinking of it.")]

    async def owned() -> list[str]:
        async with db.transaction() as tx:
            return list((await tx.execute(text("SELECT id FROM sessions WHERE owner IS NOT NULL"))).scalars())

    cluster.model.reply = reply
    await cluster.api()
    cluster.settings["MANAGED_AGENTS_WORKER_TURNS"] = str(CAP)
    session_ids = [await make_session(client, tools=False) for _ in range(3 * CAP)]
    for session_id in session_ids:
        await say(client, session_id, "think")
    cluster.worker()
    await cluster.model.requests(CAP)
    # The model says nothing: none ends before a second worker has as much.
    assert len(await owned()) == CAP
    cluster.worker()
    await cluster.model.requests(2 * CAP)
    running = await owned()
    assert len(running) == 2 * CAP
    released.set()
    for session_id in running:
        await client.beta.sessions.events.send(session_id, events=[{"type": "user.interrupt"}])
    most = 0

    async def look() -> bool:
        nonlocal most
        most = max(most, len(await owned()))
        return cluster.model.recorder.total == len(session_ids) and not await owned()

    await until(look)
    assert most <= 2 * CAP
    for session_id in session_ids:
        await finished(session_id)


async def test_a_session_that_was_given_back_goes_on_though_nobody_was_told(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    cluster.model.reply = script.gated_work
    await cluster.api()
    old = cluster.worker("worker.gave_back:kill")
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        side = await cluster.appeared(script.SIDE)
        old.signal(signal.SIGTERM)
        await until(lambda: "stopping" in old.log.read_text())
        side.with_name(script.GO).touch()
        assert await old.ended() == -signal.SIGKILL
        cluster.worker()
        await follower.idle()
    assert hiccups(await finished(session_id)) == []
    assert side.read_text() == "ran\n"


async def test_whoever_frees_a_dead_worker_s_sessions_may_die_too(
    cluster: Cluster, client: AsyncAnthropic, undisturbed: Undisturbed, finished: Finished
) -> None:
    await cluster.api()
    expected = await undisturbed()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        assert await cluster.worker("turn.response_logged:kill").ended() == -signal.SIGKILL
        assert await cluster.worker("worker.freed:kill").ended() == -signal.SIGKILL
        cluster.worker()
        await follower.idle()
    assert normalised(await finished(session_id)) == expected
