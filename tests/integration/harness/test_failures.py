"""Every way in which a model's endpoint fails becomes the right error, and the turn goes on or ends as that error says."""

import json
from typing import Any

import pytest

from managed_agents.core import limits
from managed_agents.harness.transcript import REMOVED
from managed_agents.scripted_model import Reply, Request, cut, fail, stall, text, thinking, tool_use
from tests.integration.harness.conftest import STALL_SECONDS
from tests.support.meddling import Meddler
from tests.support.stack import TOOLSET, Stack, message
from tests.support.watch import Watch

pytestmark = pytest.mark.anyio

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
HALF = [thinking("Well."), text("half an answer")]
RETRIED: dict[str, tuple[Any, str]] = {
    "429": (fail(429, retry_after=0.2), "model_rate_limited_error"),
    "429 without a time": (fail(429), "model_rate_limited_error"),
    "529": (fail(529), "model_overloaded_error"),
    "529 with a time": (fail(529, retry_after=0.2), "model_overloaded_error"),
    "500": (fail(500), "model_request_failed_error"),
    "503": (fail(503), "model_request_failed_error"),
    "504": (fail(504), "model_request_failed_error"),
    "silent from the start": ([stall(60), text("never")], "model_request_failed_error"),
    "silent in mid-stream": ([*HALF, stall(60), text("never")], "model_request_failed_error"),
    "cut before the first event": (cut(0), "model_request_failed_error"),
    "cut in mid-stream": ([*HALF, cut()], "model_request_failed_error"),
    "cut behind a call": ([tool_use("bash", command="true"), cut()], "model_request_failed_error"),
    "overloaded in mid-stream": ([*HALF, fail(529)], "model_overloaded_error"),
    "limited in mid-stream": ([*HALF, fail(429)], "model_rate_limited_error"),
    "failed in mid-stream": ([*HALF, fail(500)], "model_request_failed_error"),
}
GIVEN_UP = {
    400: "model_request_failed_error",
    401: "model_request_failed_error",
    402: "billing_error",
    403: "model_request_failed_error",
    404: "model_request_failed_error",
}
FAILED = ["span.model_request_start", "span.model_request_end"]
RESCHEDULED = ["session.status_rescheduled", "session.thread_status_rescheduled"]
RUNNING = ["session.status_running", "session.thread_status_running"]
ANSWERED = ["span.model_request_start", "agent.message", "span.model_request_end"]
IDLE = ["session.thread_status_idle", "session.usage", "session.status_idle"]


def sse(*events: dict[str, Any]) -> bytes:
    """A whole answer of an endpoint that says what it likes."""
    body = b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), json.dumps(event).encode()) for event in events)
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def answer(*blocks: dict[str, Any], usage: object = None) -> bytes:
    """A well-formed response of these blocks."""
    started = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": usage or {}}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": started}]
    for index, block in enumerate(blocks):
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        events.append({"type": "content_block_stop", "index": index})
    events.append({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}})
    return sse(*events, {"type": "message_stop"})


NONSENSE = {
    "not HTTP": b"garbage\r\n\r\n",
    "nothing": b"",
    "not a stream": b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nhi",
    "not JSON": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 19\r\n\r\nevent: x\ndata: {]}\n\n",
    "a block without a type": answer({"text": "half an answer"}),
    "text that is none": answer({"type": "text", "text": None}),
    "a call without a name": answer({"type": "tool_use", "id": "a", "input": {}}),
    "two calls of one id": answer(*[{"type": "tool_use", "id": "a", "name": "bash", "input": {}}] * 2),
    "no usage": answer({"type": "text", "text": "half an answer"}, usage="none"),
}


def check_retried(watch: Watch, error_type: str) -> None:
    """One failed try, told once, then the answer; nothing of the failed try is shown."""
    assert watch.types == [
        *RUNNING,
        "user.message",
        *FAILED,
        "session.error",
        *RESCHEDULED,
        *RUNNING,
        *ANSWERED,
        *IDLE,
    ]
    error = watch.logged[5].error
    assert (error.type, error.retry_status.type) == (error_type, "retrying")
    assert error.message
    check_failed_span(watch.logged[3], watch.logged[4])
    assert [event.content[0].text for event in watch.logged if event.type == "agent.message"] == ["recovered"]
    assert watch.logged[-1].stop_reason.type == "end_turn"


def check_failed_span(start: Any, end: Any) -> None:
    assert end.model_request_start_id == start.id
    assert end.is_error is True
    assert set(end.model_usage.to_dict().values()) == {0}


@pytest.mark.requirement("EVT-095")
@pytest.mark.parametrize("case", RETRIED)
async def test_what_may_pass_is_tried_again_in_the_open(server: Stack, case: str) -> None:
    reply, error_type = RETRIED[case]
    session = await server.session([reply, "recovered"], tools=TOOLSET)
    watch = await server.turn(session)
    check_retried(watch, error_type)
    first, second = server.requests(session)
    assert first.body == second.body
    if isinstance(reply, type(fail(429))) and reply.retry_after:
        waited = watch.logged[8].processed_at - watch.logged[6].processed_at
        assert waited.total_seconds() >= reply.retry_after


@pytest.mark.parametrize("case", NONSENSE)
async def test_an_invalid_reply_is_tried_again(server: Stack, meddler: Meddler, case: str) -> None:
    session = await server.session(["recovered"])
    async with server.watching(session) as watch:
        async with meddler.answering(NONSENSE[case]):
            await server.say(session, "go")
            await watch.until("session.error")
        await watch.idle()
    assert watch.types[-6:] == [*ANSWERED, *IDLE]
    assert {event.error.type for event in watch.logged if event.type == "session.error"} == {"model_request_failed_error"}
    assert [event.content[0].text for event in watch.logged if event.type == "agent.message"] == ["recovered"]


async def test_a_refused_connection_is_tried_again(server: Stack, meddler: Meddler) -> None:
    session = await server.session(["recovered"])
    async with server.watching(session) as watch:
        async with meddler.down():
            await server.say(session, "go")
            error = (await watch.until("session.error")).error
        await watch.idle()
    assert (error.type, error.retry_status.type) == ("model_request_failed_error", "retrying")
    assert watch.types[-6:] == [*ANSWERED, *IDLE]


@pytest.mark.requirement("EVT-095")
@pytest.mark.parametrize("status", GIVEN_UP)
async def test_what_will_be_refused_again_ends_the_turn_at_once(server: Stack, status: int) -> None:
    session = await server.session([fail(status, "not like this"), "better"])
    watch = await server.turn(session)
    assert watch.types == [*RUNNING, "user.message", *FAILED, "session.error", *IDLE]
    error = watch.logged[5].error
    assert (error.type, error.message, error.retry_status.type) == (GIVEN_UP[status], "not like this", "exhausted")
    check_failed_span(watch.logged[3], watch.logged[4])
    assert watch.logged[-1].stop_reason.type == "retries_exhausted"
    assert (await server.client.beta.sessions.retrieve(session.id)).status == "idle"
    again = await server.turn(session, "better?")
    assert again.logged[-1].stop_reason.type == "end_turn"


@pytest.mark.requirement("EVT-170")
async def test_an_image_that_the_endpoint_rejects_costs_a_turn_not_the_session(server: Stack) -> None:
    def reply(request: Request) -> Reply:
        return fail(400, "Could not process image") if "image" in str(request.messages) else "ok"

    session = await server.session(reply)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    async with server.watching(session) as watch:
        content = [image, {"type": "text", "text": "What is this?"}]
        await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.message", "content": content}])
        assert (await watch.idle()).stop_reason.type == "retries_exhausted"
        await server.say(session, "Go on without it.")
        assert (await watch.idle(2)).stop_reason.type == "end_turn"
    (message,) = server.requests(session)[-1].messages
    assert [block["text"] for block in message["content"]] == [REMOVED, "What is this?", "Go on without it."]


@pytest.mark.requirement("EVT-096")
async def test_tries_are_bounded_and_what_waits_is_flushed(server: Stack) -> None:
    session = await server.session(lambda _request: fail(529))
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.until("session.status_rescheduled", count=limits.MODEL_TRIES_MAX - 1)
        await watch.idle()
    assert watch.types.count("span.model_request_start") == limits.MODEL_TRIES_MAX
    assert [event.error.retry_status.type for event in watch.logged if event.type == "session.error"] == ["retrying", "exhausted"]
    assert watch.logged[-1].stop_reason.type == "retries_exhausted"


@pytest.mark.requirement("EVT-096")
async def test_a_new_streak_is_told_anew(server: Stack) -> None:
    session = await server.session([fail(529), tool_use("bash", command="true"), fail(500), "done"], tools=TOOLSET)
    watch = await server.turn(session)
    errors = [event.error for event in watch.logged if event.type == "session.error"]
    assert [error.type for error in errors] == ["model_overloaded_error", "model_request_failed_error"]
    assert watch.types.count("agent.tool_result") == 1


async def test_rescheduling_is_visible_and_an_interrupt_ends_it(server: Stack) -> None:
    session = await server.session([fail(429, retry_after=600), "never"])
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.until("session.thread_status_rescheduled")
        assert (await server.client.beta.sessions.retrieve(session.id)).status == "rescheduling"
        await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
        idle = await watch.idle()
    assert idle.stop_reason.type == "end_turn"
    assert len(server.requests(session)) == 1


async def test_silence_between_two_events_is_bounded_not_the_whole_response(server: Stack) -> None:
    slow = [part for word in ("one ", "two ") for part in (text(word), stall(STALL_SECONDS * 0.6))]
    session = await server.session([slow])
    watch = await server.turn(session)
    assert "session.error" not in watch.types


@pytest.mark.requirement("EVT-098")
async def test_a_cut_off_response_is_continued(server: Stack) -> None:
    from managed_agents.scripted_model import stop_reason

    session = await server.session(
        [[text("one,"), stop_reason("max_tokens")], [text("two,"), stop_reason("pause_turn")], "three"]
    )
    watch = await server.turn(session)
    assert [event.content[0].text for event in watch.logged if event.type == "agent.message"] == ["one,", "two,", "three"]
    assert watch.logged[-1].stop_reason.type == "end_turn"
    assert watch.types.count("session.status_running") == 1


async def test_a_response_that_is_paused_for_ever_is_given_up_and_an_interrupt_ends_the_wait_before(server: Stack) -> None:
    from managed_agents.scripted_model import stop_reason

    def paused(_: object) -> object:
        return [text("still…"), stop_reason("pause_turn")]

    session = await server.session(paused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "MODEL_BACKOFF_MAX_SECONDS", 0.01)
        watch = await server.turn(session)
        assert watch.types.count("agent.message") == limits.PAUSES_IN_A_ROW_MAX + 1
        (error,) = [event.error for event in watch.logged if event.type == "session.error"]
        assert (error.type, error.retry_status.type) == ("model_request_failed_error", "exhausted")
        assert watch.logged[-1].stop_reason.type == "retries_exhausted"
        patch.setattr(limits, "MODEL_BACKOFF_FIRST_SECONDS", 60.0)
        patch.setattr(limits, "MODEL_BACKOFF_MAX_SECONDS", 60.0)
        async with server.watching(session) as watch:
            await server.say(session, "again")
            await watch.until("span.model_request_start", count=3)  # which waits
            await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
            assert (await watch.idle()).stop_reason.type == "end_turn"
        assert watch.types.count("agent.message") == 2


@pytest.mark.requirement("EVT-098")
@pytest.mark.parametrize("raw", ['{"comm', ""])
async def test_a_call_cut_off_at_the_output_limit_is_told_to_the_model(server: Stack, raw: str) -> None:
    from managed_agents.scripted_model import broken_tool_use, stop_reason

    session = await server.session([[broken_tool_use("bash", raw), stop_reason("max_tokens")], "I see"], tools=TOOLSET)
    watch = await server.turn(session)
    (use,) = [event for event in watch.logged if event.type == "agent.tool_use"]
    assert use.evaluated_permission == "deny"
    (result,) = [event for event in watch.logged if event.type == "agent.tool_result"]
    assert result.is_error
    assert "output limit" in result.content[0].text


@pytest.mark.requirement("EVT-097")
async def test_calls_of_a_refused_response_do_not_run(server: Stack) -> None:
    from managed_agents.scripted_model import refuse

    session = await server.session([[text("I"), tool_use("bash", command="true"), refuse("cyber")], "fine"], tools=TOOLSET)
    watch = await server.turn(session, "do evil")
    assert "agent.tool_use" not in watch.types
    assert watch.logged[-1].stop_reason.type == "refusal"
    await server.turn(session, "do good")
    assert "evil" not in str(server.requests(session)[-1].messages)


@pytest.mark.requirement("EVT-172")
async def test_a_refusal_is_told_though_a_message_waits_and_that_begins_a_turn_of_its_own(server: Stack) -> None:
    from managed_agents.scripted_model import refuse

    session = await server.session([[text("I"), stall(STALL_SECONDS / 2), refuse("cyber")], "fine"])
    async with server.watching(session) as watch:
        await server.say(session, "do evil")
        await watch.until("span.model_request_start")
        await server.say(session, "do good")
        refused = await watch.idle()
        assert (refused.stop_reason.type, refused.stop_details.category) == ("refusal", "cyber")
        assert (await watch.idle(2)).stop_reason.type == "end_turn"
    assert watch.types[watch.types.index("session.status_idle") :][:4] == ["session.status_idle", *RUNNING, "user.message"]
    assert "evil" not in str(server.requests(session)[-1].messages)


async def test_effort_speed_and_geo_reach_the_model(server: Stack) -> None:
    def reply(request: Request) -> Reply:
        return "ok"

    session = await server.session(reply, model={"id": "claude-opus-5", "effort": "low", "speed": "fast", "inference_geo": "us"})
    watch = await server.turn(session)
    # At which speed it ran is told where fast mode was asked for.
    (end,) = [event for event in watch.logged if event.type == "span.model_request_end"]
    assert end.model_usage.speed == "fast"
    (request,) = server.requests(session)
    assert request.body["output_config"] == {"effort": "low"}
    assert (request.body["speed"], request.body["inference_geo"]) == ("fast", "us")
    assert "fast-mode-2026-02-01" in request.headers["anthropic-beta"]


@pytest.mark.parametrize("model", ["claude-opus-5-5", "claude-opus-5", "claude-opus-4-8", "claude-opus-4-5", "claude-haiku-4-5"])
async def test_thinking_is_on_and_comes_back_unaltered(server: Stack, model: str) -> None:
    call = tool_use("bash", command="true")
    session = await server.session(
        [[thinking("A hard one."), call], [thinking("Aha."), text("Done.")], "more"], tools=TOOLSET, model=model
    )
    watch = await server.turn(session)
    assert watch.types.count("agent.thinking") == 2
    await server.turn(session, "and?")  # the scripted model checks every signature
    assert server.requests(session)[-1].round == 0
    sent = [block["type"] for said in server.requests(session)[-1].messages for block in said["content"]]
    assert sent.count("thinking") == 2


async def test_the_speed_is_not_told_where_fast_mode_was_not_asked_for(server: Stack) -> None:
    watch = await server.turn(await server.session(["ok"], model="claude-opus-5"))
    (end,) = [event for event in watch.logged if event.type == "span.model_request_end"]
    assert "speed" not in end.model_usage.to_dict()


async def test_messages_sent_while_a_retry_waits_are_taken_up_by_it(server: Stack) -> None:
    session = await server.session([fail(429, retry_after=0.5), "both"])
    async with server.watching(session) as watch:
        await server.client.beta.sessions.events.send(session.id, events=[message("one")])
        await watch.until("session.status_rescheduled")
        await server.say(session, "two")
        await watch.idle()
    assert server.requests(session)[-1].user_texts == ["one\ntwo"]
