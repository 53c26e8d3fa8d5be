"""Several clients at one session, and sessions whose tools change between turns."""

from typing import Any

import anyio
import pytest

from managed_agents.scripted_model import text, tool_use
from tests.support.stack import TOOLSET, Stack, message, refusal

pytestmark = pytest.mark.anyio

WEATHER: dict[str, Any] = {"type": "custom", "name": "weather", "description": "Weather.", "input_schema": {"type": "object"}}
ASKING: list[dict[str, Any]] = [{**TOOLSET[0], "default_config": {"permission_policy": {"type": "always_ask"}}}, WEATHER]


async def attempt(server: Stack, session: Any, event: Any, answers: list[Any]) -> None:
    answer = await server.raw("POST", f"/v1/sessions/{session.id}/events", json={"events": [event]})
    if answer.status_code == 200:
        answers.append(event)
    else:
        assert "no non-archived thread is waiting" in refusal(answer)


async def test_of_contradicting_confirmations_sent_at_once_one_counts_and_the_others_are_told(server: Stack) -> None:
    session = await server.session([[tool_use("bash", command="echo ran")], "done"], tools=ASKING)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        idle = await watch.idle()
        (use_id,) = idle.stop_reason.event_ids
        taken: list[Any] = []
        async with anyio.create_task_group() as group:
            for result in ("allow", "deny") * 4:
                event = {"type": "user.tool_confirmation", "tool_use_id": use_id, "result": result}
                group.start_soon(attempt, server, session, event, taken)
        assert len(taken) == 1
        await watch.idle(2)
    (result,) = (event for event in watch.logged if event.type == "agent.tool_result")
    assert result.is_error is (taken[0]["result"] == "deny")


async def test_answers_messages_and_interrupts_at_once_end_in_a_legal_log(server: Stack) -> None:
    """What every log must hold is checked when the server's tests end; here, that the session can go on."""
    for _ in range(6):
        session = await server.session(
            lambda request: [tool_use("bash", command="echo x"), tool_use("weather")] if request.turn == 1 else "ok",
            tools=ASKING,
        )
        async with server.watching(session) as watch:
            await server.say(session, "go")
            idle = await watch.idle()
            bash, weather = idle.stop_reason.event_ids
            events: list[Any] = [
                {"type": "user.tool_confirmation", "tool_use_id": bash, "result": "allow"},
                {"type": "user.custom_tool_result", "custom_tool_use_id": weather, "content": []},
                {"type": "user.interrupt"},
            ]
            taken: list[Any] = []
            async with anyio.create_task_group() as group:
                for event in events:
                    group.start_soon(attempt, server, session, event, taken)
            assert events[2] in taken
            # Whichever came first, the interrupt ends it; a repeated call of the first turn may have to be interrupted again.
            await watch.until(lambda event: event.type == "user.interrupt" and event.processed_at is not None)
            await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}, message("and now")])  # pyright: ignore
            await watch.until(lambda event: event.type == "agent.message" and event.content[0].text == "ok")


async def test_tools_of_an_updated_session_count_from_its_next_turn(server: Stack) -> None:
    replies = [[tool_use("bash", command="echo one")], "one", [tool_use("bash", command="echo two")], "two", "three"]
    session = await server.session(replies, tools=TOOLSET)
    await server.turn(session)

    await server.client.beta.sessions.update(session.id, agent={"tools": [WEATHER]})
    watch = await server.turn(session, "again")
    (use,) = (event for event in watch.logged if event.type == "agent.tool_use")
    assert (use.evaluated_permission, use.evaluation) == ("deny", None)
    assert server.requests(session)[-1].tools == ["weather"]

    # Without any tool left, the API still wants those named that the conversation calls.
    await server.client.beta.sessions.update(session.id, agent={"tools": []})
    await server.turn(session, "once more")
    last = server.requests(session)[-1].body
    assert last["tool_choice"] == {"type": "none"}
    assert [tool["name"] for tool in last["tools"]] == ["bash"]  # pyright: ignore


async def test_a_waiting_session_goes_on_with_its_new_tools(server: Stack) -> None:
    session = await server.session([[tool_use("weather")], [text("now"), tool_use("glob", pattern="*")], "done"], tools=[WEATHER])
    async with server.watching(session) as watch:
        await server.say(session, "go")
        idle = await watch.idle()
        await server.client.beta.sessions.update(session.id, agent={"tools": [WEATHER, *TOOLSET]})
        result: Any = {"type": "user.custom_tool_result", "custom_tool_use_id": idle.stop_reason.event_ids[0]}
        await server.client.beta.sessions.events.send(session.id, events=[result])
        await watch.idle(2)
    assert "glob" in server.requests(session)[1].tools
    assert [event.is_error for event in watch.logged if event.type == "agent.tool_result"] == [False]
