"""A turn that a bug keeps failing, of ours or of a harness that was plugged in, ends where its client can see it.

Tried a bounded number of times, then told, closed and idle; the next message begins anew.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text

from managed_agents.core import limits
from managed_agents.scripted_model import tool_use
from tests.integration.harness.failing import Bugs
from tests.support.stack import Stack
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

AGENT = {"metadata": {"managed_agents.harness": "failing"}}
TOOL: dict[str, Any] = {"type": "custom", "name": "weather", "description": "Weather.", "input_schema": {"type": "object"}}


def always(_: Any) -> bool:
    return True


@pytest.fixture(autouse=True)
def healthy(bugs: Bugs) -> Iterator[None]:
    """Whatever a test turned on ends with it."""
    yield
    bugs.__init__()


def check_given_up(events: list[Any]) -> None:
    """The newest running period ends with the error, the flushed message, and the order of any idle."""
    *_, error, flushed, thread, _, idle = events
    assert flushed.type == "user.message"
    assert (error.type, error.error.type, error.error.retry_status.type) == ("session.error", "unknown_error", "exhausted")
    assert "failed repeatedly" in error.error.message
    assert (thread.type, thread.stop_reason.type) == ("session.thread_status_idle", "retries_exhausted")
    assert (idle.type, idle.stop_reason.type) == ("session.status_idle", "retries_exhausted")


@pytest.mark.requirement("EVT-152")
async def test_a_turn_whose_harness_raises_is_given_up_and_the_next_message_begins_anew(server: Stack, bugs: Bugs) -> None:
    session = await server.session(["hello"], agent=AGENT)
    bugs.wrong = {"decide": always}
    async with server.watching(session) as watch:
        await server.say(session, "one")
        await watch.idle()
        assert [event.type for event in watch.logged].count("session.error") == 1
        assert bugs.raised == limits.CRASHES_MAX
        check_given_up(watch.logged)

        # The bug is still there: the same once more, no sooner and no later.
        await server.say(session, "two")
        await watch.idle(2)
        assert bugs.raised == 2 * limits.CRASHES_MAX

        bugs.wrong = {}
        await server.say(session, "three")
        assert (await watch.idle(3)).stop_reason.type == "end_turn"
    (request,) = server.requests(session)
    assert request.user_texts == ["three"], "what was flushed is not for the model"


async def test_a_poisoned_log_ends_every_turn_and_a_repaired_server_reads_it(server: Stack, bugs: Bugs) -> None:
    session = await server.session(["first", "second"], agent=AGENT)
    await server.turn(session, "fine")
    bugs.wrong = {"apply": lambda event: event.type == "agent.message"}
    for text_ in ("one", "two"):
        watch = await server.turn(session, text_)
        assert watch.logged[-1].stop_reason.type == "retries_exhausted"
    bugs.wrong = {}
    assert (await server.turn(session, "three")).logged[-1].stop_reason.type == "end_turn"


@pytest.mark.parametrize("error", [KeyError, OSError, TimeoutError])
async def test_a_failure_that_passes_costs_only_time(server: Stack, bugs: Bugs, error: type[Exception]) -> None:
    """Also one that looks like trouble with the database."""
    session = await server.session(["hello"], agent=AGENT)
    bugs.wrong, bugs.left, bugs.error = {"decide": always}, 2, error
    watch = await server.turn(session)
    assert bugs.raised == 2
    assert watch.logged[-1].stop_reason.type == "end_turn"
    assert "session.error" not in watch.types


async def test_a_harness_that_fails_before_it_begins_takes_nobody_down(server: Stack, bugs: Bugs) -> None:
    session, other = await server.session(["hello"], agent=AGENT), await server.session(["hello"])
    bugs.wrong, bugs.error = {"transcript": always}, OSError
    async with server.watching(session) as watch:
        await server.say(session, "one")
        assert (await server.turn(other)).logged[-1].stop_reason.type == "end_turn"
        assert (await watch.idle()).stop_reason.type == "retries_exhausted"
    assert bugs.raised == limits.CRASHES_MAX


async def test_calls_and_waits_that_were_open_are_closed(server: Stack, bugs: Bugs) -> None:
    session = await server.session([tool_use("weather"), "done"], tools=[TOOL], agent=AGENT)
    bugs.wrong = {"decide": lambda turn: bool(turn.pending)}
    watch = await server.turn(session)
    (call,) = [event for event in watch.logged if event.type == "agent.custom_tool_use"]
    (result,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert (result.tool_use_id, result.is_error) == (call.id, True)
    bugs.wrong = {}
    assert (await server.turn(session, "again")).logged[-1].stop_reason.type == "end_turn"


async def test_an_interrupt_of_a_session_that_waits_ends_the_wait_though_its_harness_raises(server: Stack, bugs: Bugs) -> None:
    session = await server.session([tool_use("weather"), "done"], tools=[TOOL], agent=AGENT)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        assert (await watch.idle()).stop_reason.type == "requires_action"
        bugs.wrong = {"decide": always}
        await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
        assert (await watch.idle(2)).stop_reason.type == "retries_exhausted"
        bugs.wrong = {}
        await server.say(session, "again")
        assert (await watch.idle(3)).stop_reason.type == "end_turn"


async def test_a_session_that_cannot_even_be_given_up_is_left_alone(server: Stack, bugs: Bugs) -> None:
    async def row() -> Any:
        async with server.db.transaction() as tx:
            found = text("SELECT owner, crashes, input_seq > handled_seq AS waits FROM sessions WHERE id = :id")
            return (await tx.execute(found, {"id": session.id})).one()

    async def move_thread(old: str, new: str) -> None:
        async with server.db.transaction() as tx:
            await tx.execute(text("UPDATE session_threads SET id = :new WHERE id = :old"), {"old": old, "new": new})

    session = await server.session(["hello"], agent=AGENT)
    thread = (await anext(aiter(server.client.beta.sessions.threads.list(session.id)))).id
    bugs.wrong = {"decide": always}
    await server.say(session, "one")
    await until(lambda: bugs.raised > 0)
    await move_thread(thread, "sthr_gone")  # no event that changes the thread can be folded any more
    await until(lambda: _left_alone(row))
    raised = bugs.raised
    assert raised == limits.CRASHES_MAX

    bugs.wrong = {}
    await move_thread("sthr_gone", thread)
    await server.say(session, "two")
    assert (await server.idle(session)).status == "idle"
    assert [event.type for event in await server.history(session)][-1] == "session.status_idle"


async def _left_alone(row: Any) -> bool:
    found = await row()
    return (found.owner, found.crashes, found.waits) == (None, 0, False)
