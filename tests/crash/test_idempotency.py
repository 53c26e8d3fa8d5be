"""kill -9 of the api between the commit of a keyed request and its answer: repeated under its key, it was done once."""

from typing import Any

import pytest
from anthropic import APIConnectionError, AsyncAnthropic

from tests.crash.conftest import Finished
from tests.support.cluster import Cluster, make_session
from tests.support.following import following

pytestmark = pytest.mark.anyio

KEYED = {"Idempotency-Key": "once"}
MESSAGE: Any = {"type": "user.message", "content": [{"type": "text", "text": "work"}]}


async def test_a_message_whose_answer_died_with_the_api_is_sent_once(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    api = await cluster.api()
    session_id = await make_session(client)
    await api.kill()
    await cluster.api("idempotency.committed:kill")
    with pytest.raises(APIConnectionError):
        await client.beta.sessions.events.send(session_id, events=[MESSAGE], extra_headers=KEYED)
    await cluster.api()
    first = await client.beta.sessions.events.with_raw_response.send(session_id, events=[MESSAGE], extra_headers=KEYED)
    again = await client.beta.sessions.events.with_raw_response.send(session_id, events=[MESSAGE], extra_headers=KEYED)
    assert first.headers["idempotent-replayed"] == again.headers["idempotent-replayed"] == "true"
    assert await first.text() == await again.text()
    cluster.worker()
    async with following(client, session_id) as follower:
        await follower.idle()
    listed = await finished(session_id)
    (sent,) = [event for event in listed if event["type"] == "user.message"]
    assert sent["id"] in await first.text()


async def test_a_session_whose_answer_died_with_the_api_is_made_once(cluster: Cluster, client: AsyncAnthropic) -> None:
    api = await cluster.api()
    made = await client.beta.sessions.retrieve(await make_session(client))
    await api.kill()
    await cluster.api("idempotency.committed:kill")
    body: Any = {"agent": made.agent.id, "environment_id": made.environment_id, "title": "twice"}
    with pytest.raises(APIConnectionError):
        await client.beta.sessions.create(**body, extra_headers=KEYED)
    await cluster.api()
    answered = await client.beta.sessions.create(**body, extra_headers=KEYED)
    assert {each.id async for each in client.beta.sessions.list()} == {made.id, answered.id}
