"""Another harness thinks for the agents that ask for it; log, worker and API do not notice."""

import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.anyio


async def test_an_agent_is_run_by_the_harness_its_metadata_names(server: Stack) -> None:
    session = await server.session(["one", "two"], agent={"metadata": {"managed_agents.harness": "tiny"}})
    watch = await server.turn(session, "hello")
    await server.turn(session, "again")
    requests = server.requests(session)
    assert [request.messages for request in requests] == [
        [{"role": "user", "content": "HELLO"}],
        [{"role": "user", "content": "AGAIN"}],
    ]
    assert watch.types.count("agent.message") == 1
    assert watch.logged[-1].stop_reason.type == "end_turn"


async def test_other_agents_get_the_standard_one(server: Stack) -> None:
    session = await server.session(["one"], agent={"metadata": {"harness": "tiny"}})
    await server.turn(session, "hello")
    (request,) = server.requests(session)
    assert request.messages[0]["content"][0]["text"] == "hello"


async def test_an_unknown_harness_is_told_and_ends_the_turn(server: Stack) -> None:
    session = await server.session([], agent={"metadata": {"managed_agents.harness": "grand"}})
    watch = await server.turn(session)
    (error,) = [event.error for event in watch.logged if event.type == "session.error"]
    assert (error.type, error.retry_status.type) == ("unknown_error", "exhausted")
    assert '"grand"' in error.message
    assert watch.logged[-1].stop_reason.type == "retries_exhausted"
    assert server.requests(session) == []
