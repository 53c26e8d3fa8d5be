"""Another harness thinks for the agents that ask for it; log, worker and API do not notice."""

import pytest
from sqlalchemy import text

from tests.support.stack import Stack
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

_HANDLED = text("SELECT epoch FROM sessions WHERE id = :id AND owner IS NULL AND handled_seq = input_seq")


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


async def test_an_archived_session_of_an_unknown_harness_is_left_alone(server: Stack) -> None:
    session = await server.session([], agent={"metadata": {"managed_agents.harness": "grand"}})
    await server.client.beta.sessions.archive(session.id)

    async def handled() -> int | None:
        async with server.db.transaction() as tx:
            return (await tx.execute(_HANDLED, {"id": session.id})).scalar_one_or_none()

    assert await until(handled) == 1, "one owner was enough"
    assert [event.type for event in await server.history(session)] == [
        "session.thread_status_terminated",
        "session.status_terminated",
    ]
