"""The last result of a step is committed together with the request it leads to: what comes between the two is not passed over."""

import pytest

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


async def test_what_the_api_wrote_meanwhile_comes_before_the_result(server: Stack, held: Gate) -> None:
    replies = [[tool_use("bash", command=held.command)], [tool_use("bash", command="echo more")], "done"]
    session = await server.session(replies, tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        await server.client.beta.sessions.update(session.id, title="as it goes")
        held.open()
        await watch.idle()
    again = ["agent.tool_result", "span.model_request_start", "agent.tool_use", "span.model_request_end"]
    assert watch.types == [*TURN, "session.updated", *again, "agent.tool_result", *ANSWER, *END]
    shown = [[result.text for result in request.tool_results] for request in server.requests(session)]
    assert shown == [[], ["through\n"], ["more\n"]]
    assert [event.to_dict() for event in await server.history(session)] == [event.to_dict() for event in watch.logged]
