"""Previews through the SDK: `event_start` and `event_delta` on streams that asked for them."""

import anyio
import pytest

from managed_agents.scripted_model import cut, pace, text, thinking, tool_use
from tests.support.previews import check_previews
from tests.support.stack import TOOLSET, Gate, Stack
from tests.support.watch import Watch

pytestmark = pytest.mark.anyio

BOTH = ["agent.message", "agent.thinking"]
LONG = " ".join(f"word{n}" for n in range(400))


def check(watch: Watch) -> dict[str, str]:
    """Check every promise on one stream; returns the previewed texts by event id."""
    return check_previews(watch.events)


@pytest.mark.requirement("EVT-101", "EVT-102", "EVT-104")
async def test_a_message_is_previewed_under_its_own_id(server: Stack) -> None:
    replies = [[thinking("hm"), pace(chars_per_second=4000), text(LONG), tool_use("bash", command="true")], "done"]
    session = await server.session(replies, tools=TOOLSET)
    async with server.watching(session, event_deltas=BOTH) as watch, server.watching(session) as plain:
        await server.say(session, "go")
        await watch.idle()
        await plain.idle()
    previewed = check(watch)
    kinds = [event.event.type for event in watch.events if event.type == "event_start"]
    assert kinds[:2] == ["agent.thinking", "agent.message"]
    messages = [event for event in watch.logged if event.type == "agent.message"]
    assert LONG.startswith(previewed[messages[0].id])
    assert len(previewed[messages[0].id]) > len(LONG) / 2
    assert len([event for event in watch.events if event.type == "event_delta"]) > 1
    # Streams that did not ask, and the history, hold none.
    assert [event.to_dict() for event in plain.logged] == [event.to_dict() for event in watch.logged]
    assert not [event for event in plain.events if event.type in ("event_start", "event_delta")]
    assert [event.to_dict() for event in await server.history(session)] == [event.to_dict() for event in watch.logged]


async def test_only_the_types_asked_for_are_previewed(server: Stack) -> None:
    session = await server.session([[thinking("hm"), pace(chars_per_second=2000), text(LONG[:300])]])
    async with (
        server.watching(session, event_deltas=["agent.thinking"]) as thoughts,
        server.watching(session, event_deltas=["agent.message", "agent.message"]) as messages,
    ):
        await server.say(session, "go")
        await thoughts.idle()
        await messages.idle()
    assert check(thoughts) == {}
    assert [e.event.type for e in thoughts.events if e.type == "event_start"] == ["agent.thinking"]
    assert [e.event.type for e in messages.events if e.type == "event_start"] == ["agent.message"]


@pytest.mark.requirement("EVT-102")
async def test_an_interrupted_preview_has_no_event(server: Stack) -> None:
    session = await server.session([[pace(chars_per_second=200), text(LONG)]])
    async with server.watching(session, event_deltas=BOTH) as watch:
        await server.say(session, "go")
        with anyio.fail_after(15):
            while not [event for event in watch.events if event.type == "event_delta"]:
                await watch._changed.wait()
        await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
        await watch.idle()
    assert len(check(watch)) == 1
    assert "agent.message" not in watch.types
    assert "span.model_request_end" in watch.types


async def test_a_failed_request_is_previewed_again_under_another_id(server: Stack) -> None:
    session = await server.session(
        [[pace(chars_per_second=1000), text(LONG[:200]), cut()], [pace(chars_per_second=1000), text(LONG[:300])]]
    )
    async with server.watching(session, event_deltas=BOTH) as watch:
        await server.say(session, "go")
        await watch.idle()
    previewed = check(watch)
    assert len(previewed) == 2
    (message,) = [event for event in watch.logged if event.type == "agent.message"]
    assert message.id == list(previewed)[1]


@pytest.mark.requirement("EVT-103")
async def test_a_stream_opened_in_mid_request_gets_no_previews_of_it(server: Stack, held: Gate) -> None:
    replies = [[pace(chars_per_second=400), text(LONG[:400])], [tool_use("bash", command=held.command)], "end"]
    session = await server.session(replies, tools=TOOLSET)
    async with server.watching(session, event_deltas=BOTH) as early:
        await server.say(session, "go", "again")
        with anyio.fail_after(15):
            while not [event for event in early.events if event.type == "event_delta"]:
                await early._changed.wait()
        async with server.watching(session, event_deltas=BOTH) as late:
            await late.idle()
            await early.idle()
    assert check(early)
    first = next(event.id for event in early.logged if event.type == "agent.message")
    assert not [e for e in late.events if e.type == "event_start" and e.event.id == first]
    assert first in {event.id for event in late.logged}


@pytest.mark.requirement("EVT-105")
@pytest.mark.parametrize(
    "query", ["event_deltas[]=agent.tool_use", "event_deltas=", "&".join(["event_deltas[]=agent.message"] * 101)]
)
async def test_other_values_are_refused(server: Stack, query: str) -> None:
    session = await server.session()
    assert (await server.refused("GET", f"/v1/sessions/{session.id}/events/stream?{query}")).startswith("event_deltas")
