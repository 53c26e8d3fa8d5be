"""What clients send while something is going on: steering, interrupts, queues."""

from typing import Any

import anthropic
import anyio
import pytest

from managed_agents.core import limits
from managed_agents.harness.journal import INTERRUPTED
from managed_agents.scripted_model import fail, stall, text, tool_use
from tests.support.stack import TOOLSET, Gate, Stack, message
from tests.support.waiting import until
from tests.support.watch import Watch

pytestmark = pytest.mark.anyio

INTERRUPT: dict[str, Any] = {"type": "user.interrupt"}
END = ["session.thread_status_idle", "session.usage", "session.status_idle"]


async def interrupt(server: Stack, session: Any, **fields: Any) -> Any:
    return await server.client.beta.sessions.events.send(session.id, events=[{**INTERRUPT, **fields}])  # pyright: ignore


async def same_as_history(server: Stack, session: Any, watch: Watch) -> None:
    assert [e.to_dict() for e in await server.history(session)] == [e.to_dict() for e in watch.logged]


@pytest.mark.requirement("EVT-020", "OBS-025")
async def test_steering_while_a_tool_runs(server: Stack, held: Gate) -> None:
    session = await server.session([[tool_use("bash", command=held.command)], "as you like"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        sent = await server.say(session, "rather this")
        assert sent.data[0].processed_at is None
        queued = await server.history(session)
        assert (queued[-1].id, queued[-1].processed_at) == (sent.data[0].id, None)
        held.open()
        await watch.idle()
    # After the tool's result and before the next request, inside the same running period.
    assert watch.types == [
        "session.status_running",
        "session.thread_status_running",
        "user.message",
        "span.model_request_start",
        "agent.tool_use",
        "span.model_request_end",
        "agent.tool_result",
        "user.message",
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        *END,
    ]
    last = server.requests(session)[-1].messages[-1]
    assert [block["type"] for block in last["content"]] == ["tool_result", "text"]
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-042")
async def test_a_message_during_a_model_request_is_answered_in_the_same_period(server: Stack) -> None:
    session = await server.session([[stall(0.8), "one"], "two"])
    async with server.watching(session) as watch:
        await server.say(session, "a")
        await watch.until("span.model_request_start")
        await server.say(session, "b")
        await watch.idle()
    assert watch.types.count("session.status_running") == 1
    assert watch.types.count("span.model_request_end") == 2
    assert [e.content[0].text for e in watch.logged if e.type == "user.message"] == ["a", "b"]
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-049", "EVT-050", "EVT-054")
async def test_an_interrupt_ends_a_model_request(server: Stack) -> None:
    session = await server.session([[text("I begin"), stall(60), "never"], "after"])
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.until("span.model_request_start")
        await until(lambda: bool(server.requests(session)))
        sent = await interrupt(server, session)
        assert sent.data[0].processed_at is None
        idle = await watch.idle()
        assert idle.stop_reason.type == "end_turn"
        assert watch.types == [
            "session.status_running",
            "session.thread_status_running",
            "user.message",
            "span.model_request_start",
            "span.model_request_end",
            "user.interrupt",
            *END,
        ]
        assert watch.logged[4].is_error is True
        # The session can be used at once, and the model never sees the interrupt.
        await server.say(session, "again")
        await watch.idle(2)
    assert "agent.message" in watch.types
    await same_as_history(server, session, watch)
    assert all("interrupt" not in str(request.messages) for request in server.requests(session))


@pytest.mark.requirement("EVT-051")
async def test_an_interrupt_ends_a_tool(server: Stack, held: Gate) -> None:
    calls = [tool_use("bash", command=held.command), tool_use("bash", command="echo never")]
    session = await server.session([calls, "after"], tools=TOOLSET)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        await interrupt(server, session)
        await watch.idle()
        assert watch.types[-6:] == ["agent.tool_result", "agent.tool_result", "user.interrupt", *END]
        results = [e for e in watch.logged if e.type == "agent.tool_result"]
        assert [(r.is_error, r.content[0].text) for r in results] == [(True, INTERRUPTED)] * 2
        await server.say(session, "and now?")
        await watch.idle(2)
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-052")
async def test_an_interrupt_on_an_idle_session_does_nothing(server: Stack) -> None:
    session = await server.session(["ok"])
    async with server.watching(session) as watch:
        sent = await interrupt(server, session)
        assert sent.data[0].processed_at is not None
        assert (await server.client.beta.sessions.retrieve(session.id)).status == "idle"
        await watch.until("user.interrupt")
        await server.say(session, "go")
        await watch.idle()
    assert watch.types[:2] == ["user.interrupt", "session.status_running"]
    assert watch.types.count("session.status_idle") == 1
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-053", "SES-060")
async def test_an_interrupt_may_name_the_thread(server: Stack) -> None:
    session = await server.session([[stall(60), "never"]])
    (thread,) = [t async for t in server.client.beta.sessions.threads.list(session.id)]
    async with server.watching(session) as watch:
        await server.say(session, "go")
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await interrupt(server, session, session_thread_id="sthr_01unknown")
        assert unknown.value.body["error"]["details"]["error_code"] == "thread_not_found"  # pyright: ignore
        sent = await interrupt(server, session, session_thread_id=thread.id)
        assert sent.data[0].session_thread_id == thread.id
        await watch.idle()
    assert watch.types.count("user.interrupt") == 1


@pytest.mark.requirement("EVT-021", "EVT-049", "EVT-054")
async def test_messages_behind_an_interrupt_start_a_new_turn(server: Stack) -> None:
    session = await server.session([[stall(60), "never"], "new turn"])
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await until(lambda: bool(server.requests(session)))
        await server.client.beta.sessions.events.send(session.id, events=[message("queued"), INTERRUPT])  # pyright: ignore
        assert (await server.client.beta.sessions.retrieve(session.id)).status == "running"
        await watch.idle(2)
    assert watch.types[4:] == [
        "span.model_request_end",
        "user.interrupt",
        *END,
        "session.status_running",
        "session.thread_status_running",
        "user.message",
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        *END,
    ]
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-068", "OBS-046")
async def test_a_parked_session_takes_input(server: Stack) -> None:
    """The model asks to wait: until then the session is neither archived nor deleted, messages queue, an interrupt ends it."""
    session = await server.session([fail(429, retry_after=50), "recovered"])
    path = f"/v1/sessions/{session.id}"
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.until("session.thread_status_rescheduled")
        assert (await server.client.beta.sessions.retrieve(session.id)).status == "rescheduling"
        assert 'its status is "rescheduling"' in await server.refused("POST", f"{path}/archive")
        assert "Cannot delete session" in await server.refused("DELETE", path)
        sent = await server.say(session, "meanwhile")
        assert sent.data[0].processed_at is None
        assert (await server.client.beta.sessions.retrieve(session.id)).status == "rescheduling"
        await interrupt(server, session)
        # What was queued behind it starts a new turn at once.
        idle = await watch.idle(2)
    assert idle.stop_reason.type == "end_turn"
    error = next(event for event in watch.logged if event.type == "session.error").error
    assert (error.type, error.retry_status.type) == ("model_rate_limited_error", "retrying")
    assert watch.types[5:] == [
        "session.error",
        "session.status_rescheduled",
        "session.thread_status_rescheduled",
        "user.interrupt",
        *END,
        "session.status_running",
        "session.thread_status_running",
        "user.message",
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        *END,
    ]
    await same_as_history(server, session, watch)


@pytest.mark.requirement("SES-037", "SES-041")
async def test_interrupts_and_messages_at_random(server: Stack) -> None:
    """Many at once: every accepted event is in the history once, statuses alternate, and the last status is idle."""
    session = await server.session(lambda _request: [stall(0.01), text("ok")])
    sent: list[str] = []

    async def send(event: Any) -> None:
        answer = await server.client.beta.sessions.events.send(session.id, events=[event])
        sent.append(answer.data[0].id)
        # A message just accepted is being worked on, or was.
        if event["type"] == "user.message":
            polled = await server.client.beta.sessions.retrieve(session.id)
            if polled.status == "idle":
                history = await server.history(session, types=["user.message"])
                assert next(e for e in history if e.id == answer.data[0].id).processed_at is not None

    async with server.watching(session) as watch:
        for _ in range(10):
            async with anyio.create_task_group() as group:
                for event in (message("a"), INTERRUPT, message("b")):
                    group.start_soon(send, event)
        await server.idle(session)
        history = await server.history(session)
        await watch.until(lambda event: event.id == history[-1].id)
    ids = [event.id for event in history if event.type.startswith("user.")]
    assert sorted(ids) == sorted(sent)
    assert all(event.processed_at is not None for event in history)
    statuses = [event.type for event in history if event.type.startswith("session.status_")]
    assert statuses == ["session.status_running", "session.status_idle"] * (len(statuses) // 2)
    await same_as_history(server, session, watch)


@pytest.mark.requirement("EVT-023", "EVT-908")
async def test_the_inbox_is_bounded(server: Stack, held: Gate) -> None:
    session = await server.session([[tool_use("bash", command=held.command)], "done"], tools=TOOLSET)
    path = f"/v1/sessions/{session.id}/events"
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        batch = {"events": [message("x")] * 50}
        for _ in range(limits.INBOX_EVENTS_MAX // 50):
            assert (await server.raw("POST", path, json=batch)).status_code == 200
        said = await server.refused("POST", path, json={"events": [message("one too many")]})
        assert said.startswith("events: ")
        assert str(limits.INBOX_EVENTS_MAX) in said
        held.open()
        await watch.idle()
    assert watch.types.count("user.message") == 1 + limits.INBOX_EVENTS_MAX


@pytest.mark.requirement("CNV-022", "EVT-001", "EVT-024", "EVT-026", "EVT-027", "EVT-028", "EVT-901", "EVT-902")
@pytest.mark.parametrize(
    ("event", "named"),
    [
        ({"type": "user.tool_confirmation", "tool_use_id": "sevt_01x", "result": "allow"}, "events.0"),
        ({"type": "user.custom_tool_result", "custom_tool_use_id": "sevt_01x"}, "events.0"),
        ({"type": "user.tool_result", "tool_use_id": "sevt_01x"}, "events.0"),
        ({"type": "user.define_outcome", "description": "x"}, "events.0"),
        ({"type": "user.tool_confirmation", "tool_use_id": "sevt_01x", "result": "perhaps"}, "events.0.result"),
        ({"type": "user.tool_confirmation", "result": "allow"}, "events.0.tool_use_id"),
        ({"type": "user.custom_tool_result", "content": []}, "events.0.custom_tool_use_id"),
        (
            {"type": "user.custom_tool_result", "custom_tool_use_id": "x", "content": [{"type": "search_result"}]},
            "events.0.content.0",
        ),
        ({"type": "user.custom_tool_result", "custom_tool_use_id": "x", "is_error": "yes"}, "events.0.is_error"),
        ({"type": "system.message", "content": "x"}, "events.0.content"),
        (
            {
                "type": "user.message",
                "content": [
                    {
                        "type": "document",
                        "title": "",
                        "source": {"type": "text", "media_type": "text/plain", "data": "x"},
                    }
                ],
            },
            "events.0.content.0.title",
        ),
        ({"type": "agent.message", "content": []}, "events.0.type"),
        ({"type": "user.dance"}, "events.0.type"),
        ({"type": None}, "events.0.type"),
        ({}, "events.0.type"),
        ("hello", "events.0"),
        (None, "events.0"),
        ({"type": "user.message"}, "events.0.content"),
        ({"type": "user.message", "content": "hi"}, "events.0.content"),
        ({"type": "user.message", "content": []}, "events.0.content"),
        ({"type": "user.message", "content": ["hi"]}, "events.0.content.0"),
        ({**message("x"), "id": "sevt_01mine"}, "events.0.id"),
        ({**message("x"), "processed_at": None}, "events.0.processed_at"),
        (message(""), "events.0.content.0.text"),
        (message(" "), "events.0.content.0.text"),
        (message("a\x00b"), "events.0.content.0.text"),
        ({"type": "user.message", "content": [{"type": "text"}]}, "events.0.content.0.text"),
        ({"type": "user.message", "content": [{"type": "text", "text": 1}]}, "events.0.content.0.text"),
        (
            {"type": "user.message", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
            "events.0.content.0.cache_control",
        ),
        ({"type": "user.message", "content": [{"type": "redacted"}]}, "events.0.content.0.type"),
        ({"type": "user.message", "content": [{"type": "search_result"}]}, "events.0.content.0.type"),
        (
            {"type": "user.message", "content": [{"type": "image", "source": {"type": "file", "file_id": "file_01x"}}]},
            "events.0.content.0.source",
        ),
        (
            {"type": "user.message", "content": [{"type": "document", "source": {"type": "file", "file_id": "file_01x"}}]},
            "events.0.content.0.source",
        ),
        (
            {
                "type": "user.message",
                "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "%%%"}}],
            },
            "events.0.content.0.source.data",
        ),
        (
            {
                "type": "user.message",
                "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}}],
            },
            "events.0.content.0.source.data",
        ),
        (
            {
                "type": "user.message",
                "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/tiff", "data": "aGVsbG8="}}],
            },
            "events.0.content.0.source.media_type",
        ),
        *(
            (
                {"type": "user.message", "content": [{"type": kind, "source": {"type": "url", "url": url}}]},
                "events.0.content.0.source.url: Input should be",
            )
            for kind, url in (
                ("image", "file:///etc/passwd"),
                ("image", "https://"),
                ("image", "https:///path"),
                ("image", "http:// x"),
                ("image", "https://a.example/a b"),
                ("image", "https://a.example/\nHost: b"),
                ("image", "https://a.example/\u200b"),
                ("document", "https://user:password@a.example/x"),
                ("document", "https://user@a.example/x"),
                ("document", "https://a..example/x"),
                ("document", "https://a.example:99999/x"),
                ("document", "https://a.example\\b/x"),
                ("document", "https://[::g]/x"),
                ("document", "https://[::1/x"),
                ("document", "https://[::1]a/x"),
            )
        ),
        ({"type": "user.interrupt", "session_thread_id": 5}, "events.0.session_thread_id"),
        ({"type": "user.interrupt", "reason": "x"}, "events.0.reason"),
    ],
)
async def test_refused_events_are_named(server: Stack, event: Any, named: str) -> None:
    session = await server.session()
    path = f"/v1/sessions/{session.id}/events"
    said = await server.refused("POST", path, json={"events": [event]})
    assert said.startswith(named), said
    # A good one beside it is not accepted either.
    said = await server.refused("POST", path, json={"events": [message("good"), event]})
    assert said.startswith(named.replace("events.0", "events.1")), said
    assert await server.history(session) == []
    assert (await server.client.beta.sessions.retrieve(session.id)).status == "idle"


@pytest.mark.requirement("EVT-025")
async def test_addresses_reach_the_model_as_they_were_sent(server: Stack) -> None:
    urls = ["https://a.example/x.png", "http://127.0.0.1:81/é?q=1@2#f", "https://[2001:db8::1]:8443/", "https://bücher.example."]
    content: list[dict[str, Any]] = [{"type": "image", "source": {"type": "url", "url": url}} for url in urls]
    session = await server.session(["seen"])
    async with server.watching(session) as watch:
        await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.message", "content": content}])  # pyright: ignore
        await watch.idle()
    (request,) = server.requests(session)
    assert [block["source"]["url"] for block in request.messages[-1]["content"]] == urls


@pytest.mark.requirement("EVT-022", "EVT-908")
async def test_the_number_of_events_of_one_request_is_bounded(server: Stack) -> None:
    session = await server.session()
    path = f"/v1/sessions/{session.id}/events"
    assert (await server.refused("POST", path, json={"events": []})).startswith("events")
    assert (await server.refused("POST", path, json={"events": [message("x")] * 51})).startswith("events")
    assert (await server.refused("POST", path, json={})).startswith("events")
    assert (await server.refused("POST", path, json={"events": [message("x")], "extra": 1})).startswith("extra")
    assert await server.history(session) == []


@pytest.mark.requirement("EVT-025")
async def test_images_and_documents_reach_the_model(server: Stack) -> None:
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    content: list[dict[str, Any]] = [
        {"type": "text", "text": "look"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png}},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}, "title": "T"},
    ]
    session = await server.session(["seen"])
    async with server.watching(session) as watch:
        await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.message", "content": content}])  # pyright: ignore
        await watch.idle()
    assert watch.logged[-1].stop_reason.type == "end_turn"
    (request,) = server.requests(session)
    sent = [
        {name: value for name, value in block.items() if name != "cache_control"} for block in request.messages[-1]["content"]
    ]
    assert sent == content
    assert [block.type for block in watch.logged[2].content] == ["text", "image", "document"]
