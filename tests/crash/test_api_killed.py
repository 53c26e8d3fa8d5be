"""kill -9 of the api while clients follow a stream."""

import pytest
from anthropic import APIConnectionError, AsyncAnthropic

from tests.crash import script
from tests.crash.conftest import Finished
from tests.support.cluster import Cluster, interrupt, make_session, say
from tests.support.following import following

pytestmark = pytest.mark.anyio


@pytest.mark.requirement("EVT-063")
async def test_a_client_that_reconnects_has_seen_every_event_exactly_once(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    cluster.model.reply = script.gated_work
    api = await cluster.api()
    cluster.worker()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        side = await cluster.appeared(script.SIDE)
        await follower.has("agent.tool_use", 2)
        await api.kill()
        # Written while no api runs, so no stream can show it.
        side.with_name(script.GO).touch()
        await cluster.model.requests(3)
        api = await cluster.api()
        seen = await follower.idle()
        assert follower.connections == 2
        await api.kill()
        await cluster.api()
        await say(client, session_id, "once more")
        seen = await follower.idle(2)
    assert seen == await finished(session_id)


@pytest.mark.requirement("EVT-094")
async def test_two_api_processes_show_the_same_stream(cluster: Cluster, client: AsyncAnthropic, finished: Finished) -> None:
    await cluster.api()
    cluster.worker()
    session_id = await make_session(client)
    async with (
        cluster.beside() as other,
        other.client() as other_client,
        following(client, session_id) as here,
        following(other_client, session_id) as there,
    ):
        await say(other_client, session_id, "work")
        assert await here.idle() == await there.idle()
    await finished(session_id)


async def test_an_interrupt_whose_hint_died_with_the_api_is_noticed_by_the_poll(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    cluster.model.reply = script.gated_work
    api = await cluster.api()
    cluster.worker()
    session_id = await make_session(client)
    await say(client, session_id, "work")
    await cluster.appeared(script.SIDE)
    await api.kill()
    await cluster.api("hints.before:kill")
    with pytest.raises(APIConnectionError):
        await interrupt(client, session_id)
    await cluster.api()
    async with following(client, session_id) as follower:
        await follower.idle()
    listed = await finished(session_id)
    assert [event["type"] for event in listed].count("user.interrupt") == 1
