"""Tool calls that are out of the ordinary: parallel, disabled, broken, large, binary."""

import pytest

from managed_agents.scripted_model import broken_tool_use, text, tool_use
from tests.support.stack import TOOLSET, Gate, Stack

pytestmark = pytest.mark.anyio


@pytest.mark.requirement("EVT-038")
async def test_parallel_calls_are_answered_in_the_order_of_the_calls(server: Stack, held: Gate) -> None:
    calls = [
        tool_use("bash", command=held.command),
        tool_use("write", file_path="/workspace/a.txt", content="hello\n"),
        tool_use("glob", pattern="*.nothing"),
    ]
    session = await server.session([calls, "done"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.until("agent.tool_result", count=2)  # the quick ones do not wait for the slow one
        held.open()
        await watch.idle()
    names = {event.id: event.name for event in watch.logged if event.type == "agent.tool_use"}
    results = [names[event.tool_use_id] for event in watch.logged if event.type == "agent.tool_result"]
    assert results[-1] == "bash"
    assert set(results) == {"bash", "write", "glob"}
    assert [result.name for result in server.requests(session)[-1].tool_results] == ["bash", "write", "glob"]
    assert [e.to_dict() for e in await server.history(session)] == [e.to_dict() for e in watch.logged]


async def test_parallel_commands_share_the_shell_in_the_order_of_the_calls(server: Stack) -> None:
    calls = [tool_use("bash", command=f"echo {number} >> steps; wc -l < steps") for number in range(8)]
    session = await server.session([calls, "done"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
    texts = [event.content[0].text.strip() for event in watch.logged if event.type == "agent.tool_result"]
    assert texts == [str(number) for number in range(1, 9)]


@pytest.mark.requirement("EVT-037")
async def test_a_disabled_tool_is_denied_without_evaluation(server: Stack) -> None:
    toolset = [{**TOOLSET[0], "configs": [{"name": "write", "enabled": False}]}]
    calls = [tool_use("write", file_path="/workspace/a", content="x"), tool_use("no_such_tool", x=1)]
    session = await server.session([calls, "I see."], tools=toolset)
    watch = await server.turn(session)
    uses = [event for event in watch.logged if event.type == "agent.tool_use"]
    assert [use.name for use in uses] == ["write", "no_such_tool"]
    for use in uses:
        assert use.evaluated_permission == "deny"
        assert use.evaluation is None
        assert "evaluation" not in use.to_dict()
    results = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert [result.is_error for result in results] == [True, True]
    assert "not enabled" in results[0].content[0].text
    assert watch.logged[-1].stop_reason.type == "end_turn"
    assert "write" not in server.requests(session)[0].tools


@pytest.mark.requirement("EVT-039")
async def test_broken_input_is_an_error_result(server: Stack) -> None:
    session = await server.session([[broken_tool_use("bash", '{"command": "ec')], "sorry"], tools=TOOLSET)
    watch = await server.turn(session)
    (use,) = [event for event in watch.logged if event.type == "agent.tool_use"]
    (result,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert (result.tool_use_id, result.is_error) == (use.id, True)
    assert "not valid JSON" in result.content[0].text
    assert watch.logged[-1].stop_reason.type == "end_turn"


@pytest.mark.requirement("EVT-039")
async def test_wrong_input_is_an_error_result(server: Stack) -> None:
    calls = [tool_use("read"), tool_use("bash", command=5), tool_use("edit", file_path="/nope", old_string="a", new_string="b")]
    session = await server.session([calls, "sorry"], tools=TOOLSET)
    watch = await server.turn(session)
    results = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert [result.is_error for result in results] == [True] * 3
    assert watch.logged[-1].stop_reason.type == "end_turn"


@pytest.mark.requirement("OBS-043")
async def test_large_output_is_a_preview_with_a_path(server: Stack) -> None:
    session = await server.session([[tool_use("bash", command="seq 1 300000")], "long"], tools=TOOLSET)
    watch = await server.turn(session)
    (result,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    said = result.content[0].text
    assert len(said.encode()) <= 110 * 1024
    assert "/mnt/session/tool_outputs/" in said
    assert watch.logged[-1].stop_reason.type == "end_turn"


@pytest.mark.requirement("EVT-067")
async def test_strange_output_survives(server: Stack) -> None:
    command = r"printf 'a\000b\033[1m \xff\xed\xa0\x80 \xe2\x9c\x93'"
    session = await server.session([[tool_use("bash", command=command)], "odd"], tools=TOOLSET)
    watch = await server.turn(session)
    (result,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert "a\x00b" in result.content[0].text
    assert "✓" in result.content[0].text
    history = await server.history(session)
    assert [e.to_dict() for e in history] == [e.to_dict() for e in watch.logged]
    assert watch.logged[-1].stop_reason.type == "end_turn"


@pytest.mark.requirement("OBS-055")
async def test_no_output_becomes_words(server: Stack) -> None:
    session = await server.session([[tool_use("bash", command="true")], "quiet"], tools=TOOLSET)
    watch = await server.turn(session)
    (result,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert result.content[0].text.strip()
    assert result.is_error is False


@pytest.mark.requirement("ENV-033")
async def test_the_workspace_lasts_from_turn_to_turn(server: Stack) -> None:
    replies = [
        [tool_use("bash", command="cd /workspace && echo kept > note && export WHO=me")],
        "one",
        [tool_use("bash", command="cat note; echo $WHO; pwd")],
        "two",
    ]
    session = await server.session(replies, tools=TOOLSET)
    await server.turn(session)
    watch = await server.turn(session)
    (result,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert result.content[0].text.split()[:3] == ["kept", "me", "/workspace"]


@pytest.mark.requirement("EVT-035")
async def test_text_around_calls_stays_in_order(server: Stack) -> None:
    first = [text("before"), tool_use("bash", command="true"), text("after")]
    session = await server.session([first, "end"], tools=TOOLSET)
    watch = await server.turn(session)
    assert watch.types[4:8] == ["agent.message", "agent.tool_use", "agent.message", "span.model_request_end"]
