"""`system.message`: where it may stand, who takes it, and where the model finds it."""

from typing import Any

import anthropic
import pytest

from tests.support.stack import Stack, message

pytestmark = pytest.mark.anyio


def system(*texts: str) -> Any:
    return {"type": "system.message", "content": [{"type": "text", "text": text} for text in texts]}


async def send(server: Stack, session: Any, *events: Any) -> Any:
    return await server.client.beta.sessions.events.send(session.id, events=list(events))


async def refused(server: Stack, session: Any, *events: Any) -> anthropic.BadRequestError:
    with pytest.raises(anthropic.BadRequestError) as raised:
        await send(server, session, *events)
    return raised.value


@pytest.mark.requirement("EVT-087")
async def test_it_is_appended_behind_its_message_and_stays_for_later_turns(server: Stack) -> None:
    session = await server.session(["Oui.", "Encore."])
    async with server.watching(session) as watch:
        sent = await send(server, session, message("hello"), system("In French.", "Be brief."))
        assert [event.type for event in sent.data] == ["user.message", "system.message"]
        assert [event.processed_at for event in sent.data] == [None, None]
        await watch.idle()
        assert watch.types[2:4] == ["user.message", "system.message"]
        await server.say(session, "and again")
        await watch.idle(2)
    roles = [[m["role"] for m in request.messages] for request in server.requests(session)]
    assert roles == [["user", "system"], ["user", "system", "assistant", "user"]]
    added = server.requests(session)[1].messages[1]
    assert [block["text"] for block in added["content"]] == ["In French.", "Be brief."]
    # The top-level prompt is as it was.
    assert server.requests(session)[0].body["system"] == server.requests(session)[1].body["system"]
    history = await server.history(session)
    assert [e.to_dict() for e in history] == [e.to_dict() for e in watch.logged]


@pytest.mark.requirement("EVT-086")
async def test_where_it_may_not_stand(server: Stack) -> None:
    session = await server.session([])
    cases: list[tuple[list[Any], str]] = [
        ([system("a")], "events.0: a system.message must immediately follow"),
        ([system("a"), message("b")], "events.0: a system.message must be the last event"),
        ([message("a"), system("b"), message("c")], "events.1: a system.message must be the last event"),
        ([message("a"), system("b"), system("c")], "events: at most one system.message"),
        ([{"type": "user.interrupt"}, system("b")], "events.1: a system.message must immediately follow"),
        ([message("a"), system()], "events.1.content"),
        ([message("a"), system(" ")], "events.1.content.0.text"),
        ([message("a"), system(*["x"] * 1001)], "events.1.content"),
    ]
    for events, told in cases:
        error = await refused(server, session, *events)
        assert told in error.body["error"]["message"]  # pyright: ignore
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    error = await refused(server, session, message("a"), {"type": "system.message", "content": [image]})
    assert "events.1.content.0.type" in error.body["error"]["message"]  # pyright: ignore
    assert await server.history(session) == []


@pytest.mark.requirement("EVT-088")
async def test_only_models_that_take_it(server: Stack) -> None:
    agent = await server.client.beta.agents.create(name="older", model="claude-opus-4-7")
    session = await server.client.beta.sessions.create(agent=agent.id, environment_id=server.environment_id)
    error = await refused(server, session, message("a"), system("b"))
    assert error.body["error"]["details"]["error_code"] == "model_does_not_support_mid_conversation_system"  # pyright: ignore
