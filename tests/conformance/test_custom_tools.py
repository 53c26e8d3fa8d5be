"""Custom tools: the session waits for the client's results, in whatever order, number and shape they come."""

from typing import Any

import anthropic
import anyio
import pytest
from anthropic import beta_async_tool

from managed_agents.harness.journal import INTERRUPTED
from managed_agents.scripted_model import broken_tool_use, text, tool_use
from tests.support.stack import Gate, Stack, message
from tests.support.watch import WAIT_SECONDS, Watch

pytestmark = pytest.mark.anyio

RUNNING = ["session.status_running", "session.thread_status_running"]
END = ["session.thread_status_idle", "session.usage", "session.status_idle"]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def custom(name: str = "weather") -> dict[str, Any]:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
    return {"type": "custom", "name": name, "description": "The weather of a city.", "input_schema": schema}


WEATHER = [custom()]
MIXED = [custom(), {"type": "agent_toolset_20260401"}]


def result(use: Any, *content: Any, **fields: Any) -> Any:
    blocks = [{"type": "text", "text": block} if isinstance(block, str) else block for block in content]
    return {"type": "user.custom_tool_result", "custom_tool_use_id": use.id, "content": blocks, **fields}


async def send(server: Stack, session: Any, *events: Any) -> Any:
    return await server.client.beta.sessions.events.send(session.id, events=list(events))


async def refusal(server: Stack, session: Any, *events: Any) -> str:
    with pytest.raises(anthropic.BadRequestError) as refused:
        await send(server, session, *events)
    return refused.value.body["error"]["message"]  # pyright: ignore


def of(watch: Watch, kind: str) -> list[Any]:
    return [event for event in watch.logged if event.type == kind]


async def same_as_history(server: Stack, session: Any, watch: Watch) -> None:
    assert [e.to_dict() for e in await server.history(session)] == [e.to_dict() for e in watch.logged]


@pytest.mark.requirement("EVT-083", "OBS-053")
async def test_a_custom_tool_is_offered_called_and_answered(server: Stack) -> None:
    session = await server.session([[text("I ask."), tool_use("weather", city="Bonn")], "Sunny."], tools=WEATHER)
    assert [tool.to_dict() for tool in session.agent.tools] == WEATHER
    async with server.watching(session) as watch:
        await server.say(session, "how is Bonn?")
        idle = await watch.idle()
        (use,) = of(watch, "agent.custom_tool_use")
        assert (use.name, use.input, use.session_thread_id) == ("weather", {"city": "Bonn"}, None)
        assert idle.stop_reason.to_dict() == {"type": "requires_action", "event_ids": [use.id]}

        sent = await send(server, session, result(use, "sunny"))
        assert sent.data[0].processed_at is not None
        assert (await server.client.beta.sessions.retrieve(session.id)).status in ("running", "idle")
        idle = await watch.idle(2)
        assert idle.stop_reason.type == "end_turn"
    assert watch.types == [
        *RUNNING,
        "user.message",
        "span.model_request_start",
        "agent.message",
        "agent.custom_tool_use",
        "span.model_request_end",
        *END,
        "user.custom_tool_result",
        *RUNNING,
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        *END,
    ]
    first, second = server.requests(session)
    assert first.body["tools"] == [{key: value for key, value in custom().items() if key != "type"}]
    (answer,) = second.tool_results
    assert (answer.name, answer.text, answer.is_error) == ("weather", "sunny", False)
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-073", "EVT-075")
async def test_several_calls_partial_answers_and_their_order(server: Stack) -> None:
    calls = [tool_use("weather", city=city) for city in ("Bonn", "Ulm", "Jena")]
    session = await server.session([calls, "all of them"], tools=WEATHER)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        bonn, ulm, jena = of(watch, "agent.custom_tool_use")
        await send(server, session, result(jena, "three"))
        idle = await watch.idle(2)
        assert idle.stop_reason.event_ids == [bonn.id, ulm.id]
        # Nothing had to be done: the session did not run.
        assert watch.types[-4:] == ["user.custom_tool_result", *END]
        assert watch.types.count("session.status_running") == 1
        told = await refusal(server, session, message("hurry"))
        assert f"waiting on responses to events [{bonn.id}, {ulm.id}]" in told
        await send(server, session, result(ulm, "two"), result(bonn, "one"))
        await watch.idle(3)
    assert [answer.text for answer in server.requests(session)[-1].tool_results] == ["one", "two", "three"]
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-084")
async def test_results_of_every_kind_of_content(server: Stack) -> None:
    calls = [tool_use("weather", city=str(number)) for number in range(5)]
    session = await server.session([calls, "ok"], tools=WEATHER)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a report"}, "title": "R"}
    search = {
        "type": "search_result",
        "source": "https://example.com/a",
        "title": "A",
        "content": [{"type": "text", "text": "found"}],
        "citations": {"enabled": False},
    }
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        uses = of(watch, "agent.custom_tool_use")
        nothing = {"type": "user.custom_tool_result", "custom_tool_use_id": uses[2].id}
        sent = await send(
            server,
            session,
            result(uses[0], "look", image, document),
            result(uses[1], search),
            nothing,
            result(uses[3], "it failed", image, is_error=True),
            result(uses[4], " "),
        )
        assert [block.type for block in sent.data[0].content] == ["text", "image", "document"]
        assert sent.data[1].content[0].to_dict() == search
        assert sent.data[2].content is None
        assert sent.data[3].is_error is True
        await watch.idle(2)
    answers = server.requests(session)[-1].tool_results
    assert [[block["type"] for block in answer.content] for answer in answers] == [
        ["text", "image", "document"],
        ["search_result"],
        ["text"],
        ["text"],
        ["text"],
    ]
    assert (answers[2].text, answers[4].text) == ("(no output)", "(no output)")
    assert [answer.is_error for answer in answers] == [False, False, False, True, False]


@pytest.mark.requirement("EVT-074")
async def test_an_answer_in_advance_of_the_idle_is_taken(server: Stack, held: Gate) -> None:
    calls = [tool_use("bash", command=held.command), tool_use("weather", city="Bonn")]
    session = await server.session([calls, "done"], tools=MIXED)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        (use,) = of(watch, "agent.custom_tool_use")
        await send(server, session, result(use, "early"))
        held.open()
        idle = await watch.idle()
        assert idle.stop_reason.type == "end_turn"
    assert watch.types.count("session.status_running") == 1
    assert [answer.name for answer in server.requests(session)[-1].tool_results] == ["bash", "weather"]
    await same_as_history(server, session, watch)


@pytest.mark.requirement("OBS-051")
async def test_a_repeated_answer_shows_one_more_period_and_changes_nothing(server: Stack) -> None:
    session = await server.session([[tool_use("weather", city="Bonn")], "Sunny."], tools=WEATHER)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        (use,) = of(watch, "agent.custom_tool_use")
        await send(server, session, result(use, "sunny"), result(use, "rainy"))
        await watch.idle(2)
        sent = await send(server, session, result(use, "foggy"))
        assert sent.data[0].processed_at is not None
        idle = await watch.idle(3)
        assert idle.stop_reason.type == "end_turn"
        assert watch.types[-6:] == ["user.custom_tool_result", *RUNNING, *END]
        assert len(server.requests(session)) == 2
        await server.say(session, "again")
        await watch.idle(4)
    # The first answer counts, whatever came later.
    assert [answer.text for answer in server.requests(session)[-1].all_tool_results] == ["sunny"]
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-076", "EVT-077")
async def test_answers_nobody_waits_for(server: Stack) -> None:
    session = await server.session([[tool_use("weather", city="Bonn")], "ok"], tools=WEATHER)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        (use,) = of(watch, "agent.custom_tool_use")
        unknown = {**result(use, "x"), "custom_tool_use_id": "sevt_01unknown"}
        waiting = "no non-archived thread is waiting on custom_tool_use_id"
        assert f"{waiting} sevt_01unknown" in await refusal(server, session, unknown)
        assert waiting in await refusal(server, session, {**unknown, "custom_tool_use_id": ""})
        confirmation = {"type": "user.tool_confirmation", "tool_use_id": use.id, "result": "allow"}
        assert "is a custom tool" in await refusal(server, session, confirmation)
        # An interrupt closes the call; what comes later was awaited by nobody.
        await send(server, session, {"type": "user.interrupt"})
        await watch.idle(2)
        assert of(watch, "agent.tool_result")[0].content[0].text == INTERRUPTED
        assert waiting in await refusal(server, session, result(use, "late"))
        await server.say(session, "go on")
        await watch.idle(3)
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-085")
async def test_an_unreadable_call_is_answered_by_the_server(server: Stack) -> None:
    session = await server.session([[broken_tool_use("weather", '{"city": ')], "sorry"], tools=WEATHER)
    watch = await server.turn(session)
    # Not a custom tool use: the client would run it with an input the model never gave.
    (use,) = of(watch, "agent.tool_use")
    assert use.evaluated_permission == "deny"
    assert "not valid JSON" in of(watch, "agent.tool_result")[0].content[0].text
    assert watch.logged[-1].stop_reason.type == "end_turn"


@pytest.mark.requirement("EVT-086")
async def test_a_system_message_may_accompany_a_result(server: Stack) -> None:
    session = await server.session([[tool_use("weather", city="Bonn")], "ok"], tools=WEATHER)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        (use,) = of(watch, "agent.custom_tool_use")
        instruction = {"type": "system.message", "content": [{"type": "text", "text": "Answer in French."}]}
        assert "must immediately follow" in await refusal(server, session, instruction)
        sent = await send(server, session, result(use, "sunny"), instruction)
        assert [event.processed_at is None for event in sent.data] == [False, True]
        await watch.idle(2)
    *_, user, system = server.requests(session)[-1].messages
    assert (user["role"], [block["type"] for block in user["content"]]) == ("user", ["tool_result"])
    assert system == {"role": "system", "content": [{"type": "text", "text": "Answer in French."}]}
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-093")
async def test_the_sdks_own_runner_answers_the_calls(server: Stack) -> None:
    asked: list[str] = []

    @beta_async_tool
    async def weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: its name
        """
        asked.append(city)
        return f"sunny in {city}"

    calls = [tool_use("weather", city="Bonn"), tool_use("weather", city="Ulm")]
    session = await server.session([calls, "Sunny."], tools=WEATHER)
    runner = server.client.beta.sessions.events.tool_runner(session.id, tools=[weather], max_idle=0.2)
    async with server.watching(session) as watch:
        await server.say(session, "how is the weather?")
        with anyio.fail_after(WAIT_SECONDS):
            answered = [call async for call in runner]
        await watch.until(lambda event: event.type == "session.status_idle" and event.stop_reason.type == "end_turn")
    assert sorted(asked) == ["Bonn", "Ulm"]
    assert len(answered) == 2
    assert [answer.text for answer in server.requests(session)[-1].tool_results] == ["sunny in Bonn", "sunny in Ulm"]
    await same_as_history(server, session, watch)
