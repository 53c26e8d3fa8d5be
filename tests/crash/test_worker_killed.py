"""kill -9 of a worker: in a model's answer, in a tool call, between the end of the work and its idle."""

from collections.abc import Awaitable

import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text

from managed_agents.core import limits
from managed_agents.db.engine import Database
from tests.crash import script
from tests.crash.conftest import Claimed, Finished, Undisturbed, Working
from tests.support.cluster import Cluster, make_session, say
from tests.support.following import Event, following
from tests.support.invariants import normalised
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


def failed_spans(events: list[Event]) -> list[bool]:
    return [event["is_error"] for event in events if event["type"] == "span.model_request_end"]


@pytest.mark.requirement("SES-080")
async def test_a_worker_killed_during_a_model_stream_leaves_the_log_of_undisturbed_work(
    cluster: Cluster, client: AsyncAnthropic, undisturbed: Undisturbed, finished: Finished
) -> None:
    await cluster.api()
    expected = await undisturbed()
    cluster.model.reply = script.stalling_once(script.work, in_round=1)
    worker = cluster.worker()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        await cluster.model.requests(2)
        await worker.kill()
        cluster.worker()
        seen = await follower.idle()
    listed = await finished(session_id)
    assert seen == listed
    assert failed_spans(listed) == [False, True, False, False]
    assert normalised(listed) == expected


@pytest.mark.requirement("SES-081")
@pytest.mark.parametrize("when", ["it still runs", "it ended meanwhile"])
async def test_a_command_whose_worker_was_killed_runs_once_and_its_result_is_logged(
    cluster: Cluster, claimed: Claimed, working: Working, finished: Finished, when: str
) -> None:
    async with working() as work:
        await work.worker.kill()
        if when == "it ended meanwhile":
            work.side.with_name(script.GO).touch()
            await cluster.appeared(script.ENDED)
        cluster.worker()
        await claimed(work.session_id, work.owner)
        work.side.with_name(script.GO).touch()
        seen = await work.follower.idle()
    listed = await finished(work.session_id)
    assert seen == listed
    results = [event["content"][0]["text"] for event in normalised(listed) if event["type"] == "agent.tool_result"]
    assert results[0].strip() == "finished"
    assert results[2].splitlines() == ["1", "a note"]
    assert work.side.read_text() == "ran\n"
    assert failed_spans(listed) == [False, False, False]


@pytest.mark.requirement("OBS-045")
async def test_a_session_survives_the_death_of_every_worker_that_takes_it(
    cluster: Cluster, client: AsyncAnthropic, undisturbed: Undisturbed, finished: Finished
) -> None:
    await cluster.api()
    expected = await undisturbed()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        for point in ("turn.loaded", "turn.request_logged", "turn.response_arrived", "hands.created", "turn.outcome_arrived"):
            assert await cluster.worker(f"{point}:kill").ended() == -9
        cluster.worker()
        await follower.idle()
    assert normalised(await finished(session_id)) == expected


@pytest.mark.parametrize("point", ["turn.outcome_logged:kill:3", "turn.response_arrived:kill:3", "turn.before_idle:kill"])
async def test_outputs_are_collected_though_the_worker_that_ran_the_command_died(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished, point: str
) -> None:
    await cluster.api()
    worker = cluster.worker(point)
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        assert await worker.ended() == -9
        cluster.worker()
        await follower.idle()
    await finished(session_id)

    async def files() -> list[str]:
        listed = client.beta.files.list(scope_id=session_id, betas=["managed-agents-2026-04-01"])
        return [file.filename async for file in listed]

    assert await until(files) == [script.REPORT]


async def test_a_turn_that_kills_whoever_runs_it_is_given_up(
    cluster: Cluster, client: AsyncAnthropic, db: Database, finished: Finished
) -> None:
    async def crashes() -> int:
        async with db.transaction() as tx:
            return (await tx.execute(text("SELECT crashes FROM sessions WHERE id = :id"), {"id": session_id})).scalar_one()

    await cluster.api()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        assert await cluster.worker("turn.response_arrived:kill").ended() == -9
        assert await cluster.worker("turn.response_arrived:kill").ended() == -9
        assert await crashes() == 1
        async with db.transaction() as tx:  # as after more of the same
            await tx.execute(text("UPDATE sessions SET crashes = :n"), {"n": limits.CRASHES_MAX - 1})
        cluster.worker()
        await until(lambda: _is(crashes(), limits.CRASHES_MAX))
        async with db.transaction() as tx:  # what it would wait for
            await tx.execute(text("UPDATE sessions SET not_before = NULL"))
        seen = await follower.idle()
        assert seen[-1]["stop_reason"]["type"] == "retries_exhausted"
        (error,) = [event["error"] for event in seen if event["type"] == "session.error"]
        assert (error["type"], error["retry_status"]["type"]) == ("unknown_error", "exhausted")
        # A new message is a new chance.
        await say(client, session_id, "work")
        assert (await follower.idle(2))[-1]["stop_reason"]["type"] == "end_turn"
    await finished(session_id)


async def _is(value: Awaitable[int], wanted: int) -> bool:
    return await value == wanted
