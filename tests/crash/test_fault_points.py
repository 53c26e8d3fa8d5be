"""An api process dies while it accepts a message: the message is in the log once. Workers: tests/crash/matrix."""

import signal

import pytest
from anthropic import APIConnectionError, AsyncAnthropic

from tests.crash.conftest import Finished, Undisturbed
from tests.support.cluster import Cluster, history, make_session, say
from tests.support.following import following
from tests.support.invariants import normalised

pytestmark = pytest.mark.anyio

# What an api passes while it accepts a message, and whether the message is durable there.
API = {"append.before_known": False, "hints.before": True}


@pytest.mark.requirement("SES-082")
@pytest.mark.parametrize("point", API)
async def test_a_message_is_accepted_once_though_the_api_dies_before_it_answers(
    cluster: Cluster, client: AsyncAnthropic, undisturbed: Undisturbed, finished: Finished, point: str
) -> None:
    first = await cluster.api()
    expected = await undisturbed()
    cluster.worker()
    session_id = await make_session(client)
    await first.kill()
    armed = await cluster.api(f"{point}:kill")
    with pytest.raises(APIConnectionError):
        await say(client, session_id, "work")
    assert await armed.ended() == -signal.SIGKILL
    await cluster.api()
    async with following(client, session_id) as follower:
        # What a careful client does: look whether it arrived before sending it again.
        accepted = [event for event in await history(client, session_id) if event["type"] == "user.message"]
        assert len(accepted) == API[point]
        if not accepted:
            await say(client, session_id, "work")
        seen = await follower.idle()
    listed = await finished(session_id)
    assert seen == listed
    assert normalised(listed) == expected
