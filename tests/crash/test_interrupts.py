"""Interrupts and steering, in whatever the session is doing."""

import pytest
from anthropic import AsyncAnthropic

from managed_agents.harness.journal import INTERRUPTED
from managed_agents.scripted_model import Reply, Request, stall, text, tool_use
from tests.crash import script
from tests.crash.conftest import Finished
from tests.support.cluster import Cluster, interrupt, make_session, say
from tests.support.following import Event, following

pytestmark = pytest.mark.anyio


def types(events: list[Event]) -> list[str]:
    return [event["type"] for event in events]


def after_the_gate(request: Request) -> Reply:
    """A gated command in the first turn; in the next one a look whether it ever ended."""
    if request.turn == 1:
        return script.gated_work(request)
    if request.round == 0:
        return tool_use("bash", command=f"touch /workspace/{script.GO}; sleep 0.3; ls /workspace")
    return "Seen."


def silent_until_greeted(request: Request) -> Reply:
    if request.last_user_text.endswith("hello"):
        return "hello again"
    return [text("Hm"), stall(script.FOREVER_SECONDS)]


@pytest.mark.requirement("EVT-050")
async def test_an_interrupt_during_a_model_stream_ends_the_turn(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    cluster.model.reply = silent_until_greeted
    await cluster.api()
    cluster.worker()
    session_id = await make_session(client, tools=False)
    async with following(client, session_id) as follower:
        await say(client, session_id, "think hard")
        await cluster.model.requests(1)
        await interrupt(client, session_id)
        seen = await follower.idle()
        assert types(seen) == [
            "session.status_running",
            "session.thread_status_running",
            "user.message",
            "span.model_request_start",
            "span.model_request_end",
            "user.interrupt",
            "session.thread_status_idle",
            "session.usage",
            "session.status_idle",
        ]
        assert seen[4]["is_error"]
        assert seen[8]["stop_reason"]["type"] == "end_turn"
        await say(client, session_id, "hello")
        await follower.idle(2)
    listed = await finished(session_id)
    assert [event["content"][0]["text"] for event in listed if event["type"] == "agent.message"] == ["hello again"]


@pytest.mark.requirement("EVT-051")
@pytest.mark.parametrize("alive", [True, False], ids=["its worker lives", "its worker was killed before"])
async def test_an_interrupt_during_a_tool_call_ends_the_command(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished, alive: bool
) -> None:
    cluster.model.reply = after_the_gate
    await cluster.api()
    worker = cluster.worker()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        await cluster.appeared(script.SIDE)
        await follower.has("agent.tool_result")  # of the call beside it
        if not alive:
            await worker.kill()
        await interrupt(client, session_id)
        if not alive:
            cluster.worker()
        seen = await follower.idle()
        assert types(seen)[-5:] == [
            "agent.tool_result",
            "user.interrupt",
            "session.thread_status_idle",
            "session.usage",
            "session.status_idle",
        ]
        assert seen[-5]["is_error"]
        assert seen[-5]["content"][0]["text"] == INTERRUPTED
        await say(client, session_id, "look")
        await follower.idle(2)
    listed = await finished(session_id)
    files = [event for event in listed if event["type"] == "agent.tool_result"][-1]["content"][0]["text"].split()
    assert sorted(files) == sorted([script.GO, script.NOTES, script.SIDE])


@pytest.mark.requirement("OBS-025")
async def test_a_message_sent_while_a_tool_runs_is_taken_up_between_its_result_and_the_next_request(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    cluster.model.reply = lambda request: script.gated_work(request) if request.turn == 1 else "Steered."
    await cluster.api()
    cluster.worker()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        side = await cluster.appeared(script.SIDE)
        await say(client, session_id, "and hurry")
        side.with_name(script.GO).touch()
        seen = await follower.idle()
        assert [event["content"][0]["text"] for event in follower.queued][-1] == "and hurry"
    listed = await finished(session_id)
    assert seen == listed
    assert types(listed)[-8:] == [
        "agent.tool_result",
        "user.message",
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
    ]
    assert types(listed).count("session.status_running") == types(listed).count("session.status_idle") == 1
