"""A session runs on beyond the model's context: the history is summarised for the model, and the log keeps everything."""

from typing import Any

import pytest

from managed_agents.core import limits
from managed_agents.eventlog import read
from managed_agents.harness.compaction import INSTRUCTION
from managed_agents.harness.context import READ_ROWS, Context
from managed_agents.harness.prompt import Brief, rules_of
from managed_agents.harness.transcript import Transcript
from managed_agents.scripted_model import Reply, Request, fail, refuse, stall, stop_reason, text, tool_use
from managed_agents.scripted_model.usage import count_tokens
from tests.integration.harness.conftest import CONTEXT_TOKENS
from tests.support.stack import TOOLSET, Stack
from tests.support.watch import Watch

pytestmark = pytest.mark.anyio

COMPACTED = "agent.thread_context_compacted"
LONG = "All work and no play makes Jack a dull boy. " * 270  # 3,000 tokens of the scripted model's
BRIEFLY = "<conversation>"


def asks_for_summary(request: Request) -> bool:
    return request.last_user_text.endswith(INSTRUCTION)


def summarising(reply: Reply = "The summary.", *, otherwise: Reply = LONG) -> Any:
    """A model that talks a lot, and sums up when asked to."""
    return lambda request: reply if asks_for_summary(request) else otherwise


def compactions(watch: Watch) -> int:
    return watch.types.count(COMPACTED)


@pytest.mark.requirement("EVT-120")
async def test_a_session_of_many_contexts_runs_on(server: Stack) -> None:
    session = await server.session(summarising())
    async with server.watching(session) as watch:
        for number in range(1, 31):
            await server.say(session, f"message {number}: {LONG}")
            idle = await watch.idle(number)
            assert idle.stop_reason.type == "end_turn"
    asked = [count_tokens(request.body) for request in server.requests(session)]
    assert sum(count for count in asked) > 8 * CONTEXT_TOKENS
    assert max(asked) <= CONTEXT_TOKENS
    assert compactions(watch) >= 8
    # The log has it all, and the newest request has the summary and what was said since.
    said = [event.content[0].text for event in watch.logged if event.type == "user.message"]
    assert said == [f"message {number}: {LONG}" for number in range(1, 31)]
    last = server.requests(session)[-1]
    assert "The summary." in last.user_texts[0]
    assert not any(event.type == "session.error" for event in watch.logged)
    # A compaction stands between the two ends of its span, and its cost counts.
    first = watch.types.index(COMPACTED)
    assert watch.types[first - 1 : first + 2] == ["span.model_request_start", COMPACTED, "span.model_request_end"]
    assert watch.logged[first + 1].is_error is False
    assert watch.logged[first + 1].model_usage.output_tokens > 0
    assert set(watch.logged[first].to_dict()) == {"id", "type", "processed_at"}


@pytest.mark.requirement("EVT-120")
async def test_a_turn_of_many_contexts_runs_on(server: Stack) -> None:
    """The agent works on through compactions in the midst of its turn, and each time asks about its last result first."""

    def reply(request: Request) -> Reply:
        if asks_for_summary(request):
            return f"Did {request.count('summary')} times."
        if request.count("call") > 12:
            return "done"
        return tool_use("bash", command="yes 0123456789abcdef | head -n 400")

    session = await server.session(reply, tools=TOOLSET)
    watch = await server.turn(session)
    assert compactions(watch) >= 2
    assert watch.types.count("agent.tool_result") == 12
    assert watch.types.count("session.status_running") == 1
    assert watch.logged[-1].stop_reason.type == "end_turn"
    after = server.requests(session)[-1]
    assert after.user_texts[0].endswith("Go on from there.")


@pytest.mark.requirement("EVT-121")
async def test_what_the_user_said_last_survives_word_for_word(server: Stack) -> None:
    session = await server.session(summarising())
    async with server.watching(session) as watch:
        await server.say(session, LONG)
        await watch.idle()
        await server.say(session, f"The answer is 42. {LONG}")
        await watch.idle(2)
    assert compactions(watch) == 1
    # The message that did not fit waited, and came behind the summary: in the request for it, it was not yet there.
    summary = next(request for request in server.requests(session) if asks_for_summary(request))
    assert "42" not in str(summary.messages)
    last = server.requests(session)[-1].messages
    assert len(last) == 1
    assert last[0]["content"][1]["text"] == f"The answer is 42. {LONG}"


async def test_a_message_larger_than_the_context_is_cut_for_the_model_only(server: Stack) -> None:
    huge = f"Begin. {LONG * 10} The end."
    session = await server.session(summarising(otherwise="ok"))
    watch = await server.turn(session, huge)
    assert compactions(watch) == 1
    assert watch.logged[-1].stop_reason.type == "end_turn"
    assert next(event for event in watch.logged if event.type == "user.message").content[0].text == huge
    (brief,) = [request for request in server.requests(session) if asks_for_summary(request)]
    assert brief.last_user_text.startswith(BRIEFLY)
    cut = server.requests(session)[-1].messages[0]["content"][1]["text"]
    assert cut.startswith("Begin.")
    assert cut.endswith("The end.")
    assert "characters left out" in cut
    # It was refused by the model for its size, which is no failure to tell.
    assert "session.error" not in watch.types
    assert [event.is_error for event in watch.logged if event.type == "span.model_request_end"] == [True, False, False]


@pytest.mark.requirement("EVT-122")
async def test_too_many_compactions_in_a_row_end_the_turn_and_a_new_message_begins_afresh(server: Stack) -> None:
    endless = True

    def reply(request: Request) -> Reply:
        if asks_for_summary(request):
            return LONG * 6 if endless else "Short."  # a summary larger than the context
        return "ok"

    session = await server.session(reply)
    async with server.watching(session) as watch:
        await server.say(session, LONG * 6)
        idle = await watch.idle()
        assert idle.stop_reason.type == "retries_exhausted"
        endless = False
        await server.say(session, "And now?")
        assert (await watch.idle(2)).stop_reason.type == "end_turn"
    (error,) = [event.error for event in watch.logged if event.type == "session.error"]
    assert (error.type, error.retry_status.type) == ("compaction_limit_reached_error", "exhausted")
    first_turn = watch.types[: watch.types.index("session.status_idle")]
    assert first_turn.count(COMPACTED) == limits.COMPACTIONS_IN_A_ROW_MAX


@pytest.mark.requirement("EVT-122")
async def test_an_endpoint_that_finds_every_request_too_long_ends_the_turn(server: Stack) -> None:
    endless = True
    session = await server.session(lambda _request: fail(400, "prompt is too long") if endless else "ok")
    async with server.watching(session) as watch:
        await server.say(session, "Hello.")
        assert (await watch.idle()).stop_reason.type == "retries_exhausted"
        assert len(server.requests(session)) == 1 + limits.COMPACTIONS_IN_A_ROW_MAX
        endless = False
        await server.say(session, "And now?")
        assert (await watch.idle(2)).stop_reason.type == "end_turn"
    (error,) = [event.error for event in watch.logged if event.type == "session.error"]
    assert (error.type, error.retry_status.type) == ("compaction_limit_reached_error", "exhausted")
    assert compactions(watch) == 0


USELESS = {
    "a call": tool_use("bash", command="true"),
    "nothing": [stop_reason("end_turn")],
    "refused": [text("I cannot"), refuse()],
    "cut off": [text("The user wanted"), stop_reason("max_tokens")],
}


@pytest.mark.requirement("EVT-171")
@pytest.mark.parametrize("useless", USELESS.values(), ids=USELESS)
async def test_a_summary_of_no_use_is_asked_for_again_in_plain_words(server: Stack, useless: Reply) -> None:
    def reply(request: Request) -> Reply:
        if asks_for_summary(request):
            return "The summary." if request.last_user_text.startswith(BRIEFLY) else useless
        return LONG

    session = await server.session(reply, tools=TOOLSET)
    async with server.watching(session) as watch:
        for number in (1, 2):
            await server.say(session, LONG)
            await watch.idle(number)
    assert compactions(watch) == 1
    asked = [request for request in server.requests(session) if asks_for_summary(request)]
    assert [bool(request.tools) for request in asked] == [True, False]
    assert "The summary." in server.requests(session)[-1].user_texts[0]
    assert "agent.tool_use" not in watch.types


@pytest.mark.requirement("EVT-171")
async def test_of_the_brief_try_a_summary_that_was_cut_off_is_better_than_none(server: Stack) -> None:
    half = [text("The user wanted"), stop_reason("max_tokens")]
    session = await server.session(summarising(half))
    async with server.watching(session) as watch:
        for number in (1, 2):
            await server.say(session, LONG)
            assert (await watch.idle(number)).stop_reason.type == "end_turn"
    assert compactions(watch) == 1
    assert len([request for request in server.requests(session) if asks_for_summary(request)]) == 2


@pytest.mark.requirement("EVT-171")
async def test_a_summary_that_is_always_refused_ends_the_turn(server: Stack) -> None:
    session = await server.session(summarising([text("I cannot"), refuse()]))
    async with server.watching(session) as watch:
        await server.say(session, LONG)
        await watch.idle()
        await server.say(session, LONG)
        assert (await watch.idle(2)).stop_reason.type == "retries_exhausted"
    (error,) = [event.error for event in watch.logged if event.type == "session.error"]
    assert error.type == "compaction_limit_reached_error"
    assert compactions(watch) == 0


async def test_a_failing_summary_is_retried_like_any_request(server: Stack) -> None:
    def reply(request: Request) -> Reply:
        if asks_for_summary(request):
            return fail(529) if request.attempt == 1 else "The summary."
        return LONG

    session = await server.session(reply)
    async with server.watching(session) as watch:
        for number in (1, 2):
            await server.say(session, LONG)
            await watch.idle(number)
    assert compactions(watch) == 1
    assert watch.types.count("session.status_rescheduled") == 1
    (error,) = [event.error for event in watch.logged if event.type == "session.error"]
    assert (error.type, error.retry_status.type) == ("model_overloaded_error", "retrying")


async def test_an_interrupt_ends_a_compaction_and_the_next_turn_makes_it(server: Stack) -> None:
    def reply(request: Request) -> Reply:
        if asks_for_summary(request):
            return [text("The"), stall(60)] if request.count("interrupted summary") == 1 else "The summary."
        return LONG

    session = await server.session(reply)
    async with server.watching(session) as watch:
        await server.say(session, LONG)
        await watch.idle()
        await server.say(session, LONG)
        await watch.until("span.model_request_start", count=2)
        await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
        assert (await watch.idle(2)).stop_reason.type == "end_turn"
        assert compactions(watch) == 0
        await server.say(session, LONG)
        await watch.idle(3)
    assert compactions(watch) == 1


async def test_thinking_before_a_compaction_is_not_sent_behind_it(server: Stack) -> None:
    from managed_agents.scripted_model import thinking

    def reply(request: Request) -> Reply:
        return "The summary." if asks_for_summary(request) else [thinking("Hm."), text(LONG)]

    # A model that binds thinking to what came before it: the scripted one refuses a block behind other messages.
    session = await server.session(reply, model="claude-opus-5-5")
    async with server.watching(session) as watch:
        for number in range(1, 6):
            await server.say(session, LONG)
            await watch.idle(number)
    assert compactions(watch) >= 1
    assert "session.error" not in watch.types


async def test_a_new_owner_reads_from_the_checkpoint_and_knows_the_same(server: Stack) -> None:
    def reply(request: Request) -> Reply:
        if asks_for_summary(request):
            return "The summary."
        return [text(LONG), tool_use("bash", command="echo hi")] if request.round % 3 == 0 else LONG

    session = await server.session(reply, tools=TOOLSET)
    async with server.watching(session) as watch:
        for number in range(1, 6):
            await server.say(session, LONG)
            await watch.idle(number)
    assert compactions(watch) >= 2
    async with server.db.autocommit() as tx:
        log = await read.after(tx, session.id, 0, limit=READ_ROWS)
    checkpoint = max(event.seq for event in log if event.type == COMPACTED)
    # As it was at every moment since the checkpoint: the owner that saw everything, and one that comes new.
    brief = Brief(session.agent.to_dict(), rules_of(CONTEXT_TOKENS, 64_000, {}))
    for upto in range(checkpoint, len(log) + 1):
        cached, cold = (Context(session.id, 0, None, Transcript) for _ in range(2))
        cached.extend(log[:upto])
        cold.begin(log[checkpoint - 1 : upto])
        assert cold.turn == cached.turn
        assert cold.transcript == cached.transcript
        assert cold.transcript.request(brief) == cached.transcript.request(brief)
    loaded = Context(session.id, 0, None, Transcript)
    await loaded.load(server.db)
    assert (loaded.turn, loaded.transcript) == (cached.turn, cached.transcript)
