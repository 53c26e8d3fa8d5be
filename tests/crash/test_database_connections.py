"""The database drops every connection in mid-turn."""

import anyio
import pytest
from anthropic import APIStatusError, AsyncAnthropic
from sqlalchemy import text

from managed_agents.db.engine import Database
from tests.crash import script
from tests.crash.conftest import Finished, Undisturbed
from tests.support.cluster import Cluster, make_session, say
from tests.support.following import following
from tests.support.invariants import normalised

pytestmark = pytest.mark.anyio

_TERMINATE = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


async def terminate_all(db: Database) -> None:
    """End every connection to the database but this one."""
    async with db.transaction() as tx:
        assert len((await tx.execute(_TERMINATE)).all()) > 3


async def test_lost_connections_during_a_model_stream_cost_a_retry_and_nothing_else(
    cluster: Cluster, client: AsyncAnthropic, db: Database, undisturbed: Undisturbed, finished: Finished
) -> None:
    await cluster.api()
    expected = await undisturbed()
    cluster.model.reply = script.stalling_once(script.work, in_round=1)
    cluster.worker()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        await cluster.model.requests(2)
        await terminate_all(db)
        seen = await follower.idle()
        assert follower.connections == 1
    listed = await finished(session_id)
    assert seen == listed
    assert normalised(listed) == expected


async def test_lost_connections_during_a_tool_call_do_not_run_it_again(
    cluster: Cluster, client: AsyncAnthropic, db: Database, finished: Finished
) -> None:
    cluster.model.reply = script.gated_work
    await cluster.api()
    cluster.worker()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        side = await cluster.appeared(script.SIDE)
        await terminate_all(db)
        side.with_name(script.GO).touch()
        seen = await follower.idle()
    assert seen == await finished(session_id)
    assert side.read_text() == "ran\n"


async def test_whoever_asks_while_connections_are_lost_is_answered_or_told_to_come_again(
    cluster: Cluster, client: AsyncAnthropic, db: Database
) -> None:
    await cluster.api()
    await make_session(client)
    patient, seen = client, list[int]()
    client = client.with_options(max_retries=0)

    async def ask(number: int) -> None:
        try:
            if number % 2:
                await client.beta.environments.create(name=f"asked {number}")
            else:
                await client.beta.agents.list()
            seen.append(200)
        except APIStatusError as error:
            seen.append(error.status_code)

    for start in range(0, 100, 20):
        await terminate_all(db)
        async with anyio.create_task_group() as group:
            for number in range(start, start + 20):
                group.start_soon(ask, number)
        await patient.beta.agents.list()
    assert len(seen) == 100
    assert set(seen) <= {200, 529}
