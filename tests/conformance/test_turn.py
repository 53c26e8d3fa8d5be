"""One turn: its events, their order, the usage, and that list and stream agree."""

from datetime import datetime
from typing import Any

import pytest

from managed_agents.scripted_model import text, thinking, tool_use
from tests.support.stack import TOOLSET, Stack, message

pytestmark = pytest.mark.anyio

PLAIN = [
    "session.status_running",
    "session.thread_status_running",
    "user.message",
    "span.model_request_start",
    "agent.message",
    "span.model_request_end",
    "session.thread_status_idle",
    "session.usage",
    "session.status_idle",
]


def dumped(events: list[Any]) -> list[dict[str, Any]]:
    return [event.to_dict() for event in events]


@pytest.mark.requirement(
    "CNV-048",
    "EVT-020",
    "EVT-029",
    "EVT-030",
    "EVT-040",
    "EVT-042",
    "EVT-043",
    "EVT-063",
    "OBS-001",
    "OBS-023",
    "OBS-040",
    "OBS-041",
    "SES-001",
    "SES-033",
    "SES-038",
    "SES-040",
)
async def test_a_plain_turn(server: Stack) -> None:
    session = await server.session(["Hello!"])
    assert session.status == "idle"
    assert session.usage.cache_creation is None

    async with server.watching(session) as watch:
        sent = await server.say(session, "hi")
        assert [event.processed_at for event in sent.data] == [None]
        assert (await server.client.beta.sessions.retrieve(session.id)).status in ("running", "idle")
        idle = await watch.idle()
        # The status is committed no later than its event.
        assert (await server.client.beta.sessions.retrieve(session.id)).status == "idle"

    assert watch.types == PLAIN
    # The null copy comes first, under the same id.
    copies = [event for event in watch.events if event.processed_at is None]
    assert [event.id for event in copies] == [sent.data[0].id] == [watch.logged[2].id]
    assert idle.stop_reason.type == "end_turn"
    assert idle.stop_details is None
    assert watch.logged[4].content[0].text == "Hello!"
    assert watch.logged[5].model_request_start_id == watch.logged[3].id
    assert watch.logged[5].is_error is False

    history = await server.history(session)
    assert dumped(history) == dumped(watch.logged)
    check_instants(await raw_history(server, session))
    await check_usage(server, session)


@pytest.mark.requirement("OBS-024")
async def test_thread_events_name_the_primary_thread_and_the_agent(server: Stack) -> None:
    session = await server.session(["ok"])
    watch = await server.turn(session)

    (thread,) = [thread async for thread in server.client.beta.sessions.threads.list(session.id)]
    for event in watch.logged:
        if event.type.startswith("session.thread_status"):
            assert event.session_thread_id == thread.id
            assert event.agent_name == "tester"
    assert watch.logged[6].stop_reason.type == "end_turn"


@pytest.mark.requirement("EVT-034", "EVT-035", "EVT-036", "EVT-063", "OBS-024", "OBS-041", "SES-033")
async def test_a_tool_turn(server: Stack) -> None:
    replies = [
        [thinking("Let me look."), text("I look."), tool_use("bash", command="echo one"), tool_use("bash", command="false")],
        "Done.",
    ]
    session = await server.session(replies, tools=TOOLSET)
    watch = await server.turn(session)

    assert watch.types == [
        "session.status_running",
        "session.thread_status_running",
        "user.message",
        "span.model_request_start",
        "agent.thinking",
        "agent.message",
        "agent.tool_use",
        "agent.tool_use",
        "span.model_request_end",
        "agent.tool_result",
        "agent.tool_result",
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
    ]
    uses = [event for event in watch.logged if event.type == "agent.tool_use"]
    results = {event.tool_use_id: event for event in watch.logged if event.type == "agent.tool_result"}
    for use in uses:
        assert use.evaluated_permission == "allow"
        assert use.evaluation.type == "always_allow"
        assert use.session_thread_id is None
    assert results[uses[0].id].content[0].text.strip() == "one"
    assert results[uses[0].id].is_error is False
    assert results[uses[1].id].is_error is True
    stored = await raw_history(server, session)
    assert all("session_thread_id" in event for event in stored if event["type"] == "agent.tool_use")

    assert dumped(await server.history(session)) == dumped(watch.logged)
    check_instants(stored)
    await check_usage(server, session)
    # Results go back in the order of the calls, whatever order they finished in.
    last = server.requests(session)[-1]
    assert [(result.name, result.is_error) for result in last.tool_results] == [("bash", False), ("bash", True)]


@pytest.mark.requirement("SES-027")
async def test_initial_events_run_at_once(server: Stack) -> None:
    session = await server.session(["first", "second"], initial_events=[message("a"), message("b")])
    assert session.status == "running"
    assert "initial_events" not in session.to_dict()
    await server.idle(session)

    history = await server.history(session)
    kinds = [event.type for event in history]
    assert kinds[:5] == [
        "session.status_running",
        "session.thread_status_running",
        "user.message",
        "user.message",
        "span.model_request_start",
    ]
    assert [event.content[0].text for event in history if event.type == "user.message"] == ["a", "b"]
    assert kinds.count("session.status_running") == 1


@pytest.mark.requirement("SES-037")
async def test_status_right_after_send_is_never_idle(server: Stack) -> None:
    """Polled again and again over many turns: a turn that has not ended is never seen as idle."""
    session = await server.session(lambda _request: "ok")
    for number in range(1, 21):
        await server.say(session, f"message {number}")
        polled = await server.client.beta.sessions.retrieve(session.id)
        if polled.status == "idle":
            history = await server.history(session, types=["session.status_idle"])
            assert len(history) == number
        await server.idle(session)


@pytest.mark.requirement("EVT-041", "OBS-041")
async def test_usage_comes_right_before_every_idle(server: Stack) -> None:
    session = await server.session(["one", "two", "three"])
    for text_ in ("a", "b", "c"):
        await server.turn(session, text_)
    history = await server.history(session)
    idles = [index for index, event in enumerate(history) if event.type == "session.status_idle"]
    assert len(idles) == 3
    assert all(history[index - 1].type == "session.usage" for index in idles)
    assert sum(event.type == "session.usage" for event in history) == 3
    last = history[idles[-1] - 1]
    retrieved = await server.client.beta.sessions.retrieve(session.id)
    assert last.usage.active_seconds == pytest.approx(retrieved.usage.active_seconds, abs=1e-5)
    assert last.usage.to_dict() | {"active_seconds": 0} == retrieved.usage.to_dict() | {"active_seconds": 0}
    await check_usage(server, session)


@pytest.mark.requirement("EVT-021", "EVT-033")
async def test_several_queued_messages_are_answered_as_one_turn(server: Stack) -> None:
    session = await server.session(["both"])
    async with server.watching(session) as watch:
        await server.say(session, "one", "two")
        await watch.idle()
    assert watch.types.count("session.status_running") == 1
    assert watch.types.count("user.message") == 2
    (request,) = server.requests(session)
    assert [block["text"] for block in request.messages[-1]["content"]] == ["one", "two"]


@pytest.mark.requirement("EVT-044")
async def test_a_refusal_ends_the_turn_with_its_details(server: Stack) -> None:
    from managed_agents.scripted_model import refuse

    session = await server.session([[text("No."), refuse("cyber", "not this")], "fine"])
    watch = await server.turn(session)
    idle = watch.logged[-1]
    assert idle.stop_reason.type == "refusal"
    assert (idle.stop_details.category, idle.stop_details.explanation) == ("cyber", "not this")
    assert watch.types[-3:] == PLAIN[-3:]

    after = await server.turn(session, "something else")
    assert after.logged[-1].stop_reason.type == "end_turn"
    assert after.logged[-1].stop_details is None


@pytest.mark.requirement("EVT-066")
async def test_an_empty_answer_ends_the_turn(server: Stack) -> None:
    from managed_agents.scripted_model import stop_reason

    session = await server.session([[stop_reason("end_turn")], "now I speak"])
    watch = await server.turn(session)
    assert watch.types == [kind for kind in PLAIN if kind != "agent.message"]
    again = await server.turn(session, "are you there?")
    assert again.types == PLAIN


@pytest.mark.requirement("EVT-040", "EVT-048", "SES-039")
async def test_a_failing_model_is_retried_in_the_open(server: Stack) -> None:
    from managed_agents.scripted_model import fail

    session = await server.session([fail(529), "recovered"])
    watch = await server.turn(session)
    assert watch.types == [
        *PLAIN[:4],
        "span.model_request_end",
        "session.error",
        "session.status_rescheduled",
        "session.thread_status_rescheduled",
        "session.status_running",
        "session.thread_status_running",
        *PLAIN[3:],
    ]
    error = watch.logged[5].error
    assert (error.type, error.retry_status.type) == ("model_overloaded_error", "retrying")
    failed = watch.logged[4]
    assert failed.is_error is True
    assert set(failed.model_usage.to_dict().values()) == {0}
    assert dumped(await server.history(session)) == dumped(watch.logged)
    await check_usage(server, session)


@pytest.mark.requirement("EVT-045", "EVT-048")
async def test_a_refused_request_exhausts_and_the_session_goes_on(server: Stack) -> None:
    from managed_agents.scripted_model import fail

    session = await server.session([fail(400, "no such thing"), "better"])
    watch = await server.turn(session)
    assert watch.types == [
        *PLAIN[:4],
        "span.model_request_end",
        "session.error",
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
    ]
    assert watch.logged[5].error.retry_status.type == "exhausted"
    assert watch.logged[-1].stop_reason.type == "retries_exhausted"
    again = await server.turn(session, "again")
    assert again.logged[-1].stop_reason.type == "end_turn"


@pytest.mark.requirement("SES-058", "SES-059", "SES-060", "SES-061")
async def test_the_primary_thread(server: Stack) -> None:
    session = await server.session(["ok"])
    threads = server.client.beta.sessions.threads
    (thread,) = [thread async for thread in threads.list(session.id)]
    assert (thread.session_id, thread.parent_thread_id, thread.status) == (session.id, None, "idle")
    assert thread.stats is None
    assert thread.usage is None
    assert thread.archived_at is None
    assert thread.workflow_run_id is None
    assert thread.agent.id == session.agent.id

    await server.turn(session)
    retrieved = await threads.retrieve(thread.id, session_id=session.id)
    assert retrieved.stats is not None
    assert retrieved.stats.active_seconds > 0
    assert retrieved.usage is not None
    whole = await server.client.beta.sessions.retrieve(session.id)
    assert retrieved.usage.input_tokens == whole.usage.input_tokens
    assert [t.id async for t in threads.list(session.id, statuses=["idle"])] == [thread.id]
    assert [t.id async for t in threads.list(session.id, statuses=["running"])] == []

    path = f"/v1/sessions/{session.id}/threads"
    answer = await server.raw("GET", f"{path}/sthr_01unknown")
    assert answer.status_code == 404
    assert answer.json()["error"]["details"]["error_code"] == "thread_not_found"
    assert "statuses.0" in await server.refused("GET", f"{path}?statuses[]=busy")
    assert "limit" in await server.refused("GET", f"{path}?limit=0")
    assert "invalid page cursor" in await server.refused("GET", f"{path}?page=page_x")


async def raw_history(server: Stack, session: Any) -> list[dict[str, Any]]:
    """The history as the bytes say it, unparsed by the SDK."""
    return (await server.raw("GET", f"/v1/sessions/{session.id}/events")).json()["data"]


def check_instants(events: list[dict[str, Any]]) -> None:
    """Six digits, UTC, strictly rising."""
    stamps = [event["processed_at"] for event in events]
    assert all(len(stamp) == len("2026-11-02T09:00:00.120000Z") and stamp.endswith("Z") for stamp in stamps)
    instants = [datetime.fromisoformat(stamp) for stamp in stamps]
    assert instants == sorted(set(instants))


async def check_usage(server: Stack, session: Any) -> None:
    """The spans' figures add up to the session's."""
    spans = [event.model_usage for event in await server.history(session, types=["span.model_request_end"])]
    usage = (await server.client.beta.sessions.retrieve(session.id)).usage
    assert usage.input_tokens == sum(span.input_tokens for span in spans)
    assert usage.output_tokens == sum(span.output_tokens for span in spans)
    assert usage.cache_read_input_tokens == sum(span.cache_read_input_tokens for span in spans)
    creation = usage.cache_creation
    assert creation is not None
    written = creation.ephemeral_5m_input_tokens + creation.ephemeral_1h_input_tokens
    assert written == sum(span.cache_creation_input_tokens for span in spans)
