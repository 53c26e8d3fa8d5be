"""Many sessions in flight while processes die."""

from contextlib import AsyncExitStack

import anyio
import pytest
from anthropic import AsyncAnthropic

from managed_agents.scripted_model import Reply, Request, pace, text
from tests.crash import script
from tests.crash.conftest import Finished
from tests.support.cluster import Cluster, make_session, say
from tests.support.following import following

pytestmark = pytest.mark.anyio

SESSIONS = 20
WITH_TOOLS = 5


def reply(request: Request) -> Reply:
    if request.tools:
        return script.work(request)
    return [pace(seconds_per_delta=0.1), text("a fairly long answer, in many pieces " * 4)]


async def test_twenty_sessions_in_flight_all_finish_though_one_of_two_workers_is_killed(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    cluster.model.reply = reply
    await cluster.api()
    doomed = cluster.worker()
    cluster.worker()
    session_ids = [await make_session(client, tools=number < WITH_TOOLS) for number in range(SESSIONS)]
    async with AsyncExitStack() as stack:
        followers = [await stack.enter_async_context(following(client, session_id)) for session_id in session_ids]
        async with anyio.create_task_group() as group:
            for session_id in session_ids:
                group.start_soon(say, client, session_id, "work")
        await cluster.model.requests(SESSIONS)
        await doomed.kill()
        for follower in followers:
            seen = await follower.idle()
            assert seen == await finished(follower.session_id)
    for side in cluster.in_workspaces(script.SIDE):
        assert side.read_text() == "ran\n"
    assert len(cluster.in_workspaces(script.SIDE)) == WITH_TOOLS
