"""The last result of a step is committed together with the request it leads to: what comes between the two is not passed over."""

import pytest

from managed_agents.eventlog import append as log
from managed_agents.eventlog import events as ev
from managed_agents.harness.loop import SessionRunner
from managed_agents.scripted_model import tool_use
from tests.support.stack import TOOLSET, Gate, Stack

pytestmark = pytest.mark.anyio

TURN = [
    "session.status_running",
    "session.thread_status_running",
    "user.message",
    "span.model_request_start",
    "agent.tool_use",
    "span.model_request_end",
]
ANSWER = ["span.model_request_start", "agent.message", "span.model_request_end"]
END = ["session.thread_status_idle", "session.usage", "session.status_idle"]


@pytest.mark.requirement("EVT-020")
async def test_a_message_that_no_hint_told_of_is_in_the_very_next_request(
    server: Stack, held: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await server.session([[tool_use("bash", command=held.command)], "as you like"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        monkeypatch.setattr(SessionRunner, "notify", lambda _runner: None)
        await server.say(session, "rather this")
        held.open()
        await watch.idle()
    assert watch.types == [*TURN, "agent.tool_result", "user.message", *ANSWER, *END]
    last = server.requests(session)[-1].messages[-1]
    assert [block["type"] for block in last["content"]] == ["tool_result", "text"]


async def test_what_somebody_else_wrote_between_is_read_and_the_result_is_there_once(server: Stack, held: Gate) -> None:
    session = await server.session([[tool_use("bash", command=held.command)], "done"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        async with server.db.transaction() as tx:
            head = await log.lock(tx, session.id)
            assert head is not None
            head.append([ev.session_error(head.primary_thread_id, "unknown_error", "beside", "retrying")])
            await log.write(tx, [head])
        held.open()
        await watch.idle()
    # The request was announced and never sent: who takes the session up again closes it.
    cut = ["agent.tool_result", "span.model_request_start", "span.model_request_end"]
    logged = [event.type for event in await server.history(session)]
    assert logged == [*TURN, "session.error", *cut, *ANSWER, *END]
    assert len(server.requests(session)) == 2
    assert [result.text for result in server.requests(session)[-1].tool_results] == ["through\n"]
