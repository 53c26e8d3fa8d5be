"""The transcript: the same log always gives the same request."""

import json
from typing import Any

import orjson
import pytest

from managed_agents.eventlog import events as ev
from managed_agents.eventlog.events import NewEvent
from managed_agents.harness.prompt import Brief, ModelRules, rules_of
from managed_agents.harness.transcript import REMOVED, Transcript
from tests.unit.harness.logs import queued, stored
from tests.unit.harness.test_decide import THREAD, TOOLSET, answered, bash

RULES = ModelRules(200_000, 1000, efforts=("low", "medium", "high", "xhigh", "max"))
MESSAGE = queued("user.message", "sevt_m").taken_up()
AGENT: dict[str, Any] = {
    "name": "a",
    "system": "Be kind.",
    "model": {"id": "claude-opus-5", "effort": {"type": "low"}, "speed": "standard"},
    "tools": TOOLSET,
}


def messages_of(events: list[NewEvent]) -> list[dict[str, Any]]:
    transcript = Transcript()
    for event in stored(events):
        transcript.apply(event)
    return transcript.for_request()


@pytest.mark.requirement("EVT-038")
def test_results_stand_in_the_order_of_their_calls_and_before_what_the_user_said_meanwhile() -> None:
    events = [queued("user.message", "sevt_1", "go").taken_up()]
    thinking = {"type": "thinking", "thinking": "", "signature": "c2ln"}
    events += answered("x", thinking, bash("toolu_1"), bash("toolu_2"), stop="tool_use")
    first, second = (event.id for event in events if event.type == "agent.tool_use")
    events += [
        ev.tool_result(THREAD, second, [{"type": "text", "text": "2"}], is_error=False),
        ev.tool_result(THREAD, first, [{"type": "text", "text": "1"}], is_error=True),
        queued("user.message", "sevt_2", "and hurry").taken_up(),
    ]
    messages = messages_of(events)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"][0] == thinking
    kinds = [(block["type"], block.get("tool_use_id")) for block in messages[2]["content"]]
    assert kinds == [("tool_result", "toolu_1"), ("tool_result", "toolu_2"), ("text", None)]


@pytest.mark.requirement("EVT-046")
def test_flushed_and_failed_things_are_not_told_to_the_model() -> None:
    events = [
        queued("user.message", "sevt_1", "never seen").taken_up(for_model=False),
        queued("user.message", "sevt_2", "seen").taken_up(),
        ev.span_end(THREAD, "x", ev.SpanUsage(), is_error=True),
    ]
    assert messages_of(events) == [{"role": "user", "content": [{"type": "text", "text": "seen"}]}]


def test_an_empty_answer_leaves_no_assistant_turn_and_the_users_words_join() -> None:
    events = [queued("user.message", "sevt_1", "one").taken_up(), *answered("x", {"type": "text", "text": " "})]
    events.append(queued("user.message", "sevt_2", "two").taken_up())
    assert [block["text"] for block in messages_of(events)[0]["content"]] == ["one", "two"]


def test_the_same_log_gives_the_same_bytes_however_it_was_read() -> None:
    events = [queued("user.message", "sevt_1", "go").taken_up(), *answered("x", bash(), stop="tool_use")]
    events.append(ev.tool_result(THREAD, events[1].id, [], is_error=False))
    rows = stored(events)

    def request(upto: int) -> bytes:
        transcript = Transcript()
        for row in rows[:upto]:
            transcript.apply(row)
        transcript.for_request()  # asking in between changes nothing
        for row in rows[upto:]:
            transcript.apply(row)
        return orjson.dumps(transcript.request(Brief(AGENT, RULES)))

    assert len({request(upto) for upto in range(len(rows) + 1)}) == 1


def test_only_enabled_tools_are_offered_and_the_outputs_directory_is_named_with_them() -> None:
    off = {"name": "bash", "type": "bash", "enabled": False, "permission_policy": {"type": "always_allow"}}
    agent = {**AGENT, "tools": [{**TOOLSET[0], "configs": [off]}]}
    request = Transcript().request(Brief(agent, RULES, ["/mnt/session/uploads/a.csv"]))
    assert [tool["name"] for tool in request["tools"]] == ["edit", "glob", "grep", "read", "write", "web_fetch", "web_search"]
    (system,) = request["system"]
    assert "/mnt/session/outputs/" in system["text"]
    assert "/mnt/session/uploads/a.csv" in system["text"]
    plain = Transcript().request(Brief({**AGENT, "tools": []}, RULES))
    assert plain["system"][0]["text"] == "Be kind."
    assert "tools" not in plain


@pytest.mark.requirement("AGT-047")
def test_effort_speed_and_geo_are_passed_on_where_the_model_takes_them() -> None:
    fast = {"id": "m", "effort": {"type": "max"}, "speed": "fast", "inference_geo": "us"}
    request = Transcript().request(Brief({**AGENT, "model": fast}, ModelRules(200_000, 10, efforts=("low", "high"))))
    # The nearest level that the model has.
    assert (request["output_config"], request["speed"], request["inference_geo"]) == ({"effort": "high"}, "fast", "us")
    plain = Transcript().request(Brief(AGENT, ModelRules(200_000, 10)))
    assert not {"output_config", "speed", "inference_geo", "thinking"} & set(plain)


def test_thinking_is_asked_for_wherever_it_could_be_off() -> None:
    """A model that takes no budgets may still think only when told to: its capabilities say that it may be told."""

    def capabilities(*kinds: str) -> dict[str, Any]:
        return {"thinking": {"types": {kind: {"supported": kind in kinds} for kind in ("adaptive", "enabled", "disabled")}}}

    def asked(*kinds: str, max_tokens: int = 32_000) -> object:
        rules = rules_of(200_000, max_tokens, capabilities(*kinds))
        return Transcript().request(Brief(AGENT, rules)).get("thinking")

    assert asked("adaptive") is None  # always on, the field is to be left out
    assert asked("adaptive", "disabled") == {"type": "adaptive"}
    assert asked("adaptive", "enabled", "disabled") == {"type": "adaptive"}
    assert asked("enabled", "disabled") == {"type": "enabled", "budget_tokens": 2048}
    assert asked("enabled", max_tokens=1500) is None
    assert "thinking" not in Transcript().request(Brief(AGENT, rules_of(200_000, 32_000, {})))


def test_thinking_stays_unaltered_and_is_left_out_when_another_model_is_asked_or_it_was_never_signed() -> None:
    signed = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    unsigned = {"type": "thinking", "thinking": "cut off", "signature": ""}
    words = {"type": "text", "text": "Yes."}
    transcript = Transcript()
    for event in stored([MESSAGE, *answered("x", signed, words, unsigned, asked="one"), MESSAGE]):
        transcript.apply(event)
    assert transcript.for_request("one")[1]["content"] == [signed, words]
    assert transcript.for_request("two")[1]["content"] == [words]


def test_what_was_cut_off_is_continued_by_a_user_turn_and_stays_in_place() -> None:
    events = [MESSAGE, *answered("x", {"type": "text", "text": "Once upon"}, stop="max_tokens")]
    before = messages_of(events)
    assert [message["role"] for message in before] == ["user", "assistant", "user"]
    after = messages_of([*events, *answered("y", {"type": "text", "text": " a time"})])
    assert after[:3] == before
    # Server tools go on from the assistant's own turn.
    paused = [{"type": "text", "text": "I search."}, {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}]
    assert messages_of([MESSAGE, *answered("x", *paused, stop="pause_turn")])[-1] == {"role": "assistant", "content": paused}


def test_what_was_refused_is_not_sent_again() -> None:
    events = [MESSAGE, *answered("x", bash(), stop="tool_use")]
    (call,) = (event.id for event in events if event.type == "agent.tool_use")
    events.append(ev.tool_result(THREAD, call, [{"type": "text", "text": "poison"}], is_error=False))
    events += answered("y", {"type": "text", "text": "I"}, bash("toolu_2"), stop="refusal")
    assert [event.type for event in events].count("agent.tool_use") == 1  # what a refused response calls never runs
    events.append(queued("user.message", "sevt_2", "something else").taken_up())
    assert "poison" not in str(messages_of(events))
    assert [block["type"] for block in messages_of(events)[-1]["content"]] == ["tool_result", "text"]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA" * 10_000}}
FETCHED = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}


def said(*blocks: dict[str, Any]) -> NewEvent:
    return ev.new_event("user.message", THREAD, {"content": blocks})


def rejected() -> NewEvent:
    return ev.span_end(THREAD, "x", ev.SpanUsage(), is_error=True, private={"rejected": True})


@pytest.mark.requirement("EVT-170")
def test_what_is_no_text_is_not_sent_again_once_the_endpoint_rejected_it() -> None:
    """As in a result of a tool, so in what the user said; what was answered before stays."""
    first = said(IMAGE, {"type": "text", "text": "Look."})
    events = [first, *answered("x", bash(), stop="tool_use")]
    (call,) = (event.id for event in events if event.type == "agent.tool_use")
    events += [ev.tool_result(THREAD, call, [{"type": "text", "text": "here"}, IMAGE], is_error=False), said(IMAGE)]
    before = messages_of(events)
    after = messages_of([*events, rejected(), MESSAGE])
    assert after[:2] == before[:2]
    note = {"type": "text", "text": REMOVED}
    assert after[2]["content"][0]["content"] == [{"type": "text", "text": "here"}, note]
    assert after[2]["content"][1:] == [note, {"type": "text", "text": "hello"}]


@pytest.mark.requirement("EVT-170")
def test_what_the_endpoint_cannot_fetch_any_more_is_not_sent_again_nor_thinking_that_is_bound_to_it() -> None:
    signed, words = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}, {"type": "text", "text": "Yes."}
    events = [MESSAGE, *answered("x", signed, words), said(FETCHED, IMAGE), *answered("y", signed, words), MESSAGE]
    after = messages_of([*events, rejected()])
    assert [message["content"] for message in after[1:4]] == [
        [signed, words],
        [{"type": "text", "text": REMOVED}, IMAGE],
        [words],
    ]


@pytest.mark.requirement("EVT-170")
def test_text_is_taken_out_only_when_it_is_rejected_again() -> None:
    events = [
        MESSAGE,
        *answered("x", {"type": "text", "text": "Yes."}),
        said({"type": "text", "text": "odd"}),
        rejected(),
        MESSAGE,
    ]
    assert "odd" in str(messages_of(events))
    assert "odd" not in str(messages_of([*events, rejected(), MESSAGE]))
    between = answered("y", {"type": "text", "text": "Fine."})
    assert "odd" in str(messages_of([*events, *between, MESSAGE, rejected(), MESSAGE]))


def test_what_was_rejected_does_not_fill_the_context() -> None:
    transcript = Transcript()
    brief = Brief(AGENT, ModelRules(10_000, 1000))
    page = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "A" * 200_000}}
    rows = stored([MESSAGE, *answered("x", {"type": "text", "text": "Yes."}), said(page), rejected()])
    full: list[bool] = []
    for row in rows:
        transcript.apply(row)
        full.append(transcript.is_full(brief))
    assert full[-2:] == [True, False]


def test_marks_stand_at_the_end_of_the_system_prompt_and_of_the_last_two_user_turns() -> None:
    events = [MESSAGE, *answered("x", bash(), stop="tool_use")]
    (call,) = (event.id for event in events if event.type == "agent.tool_use")
    events.append(ev.tool_result(THREAD, call, [{"type": "text", "text": "1"}], is_error=False))
    transcript = Transcript()
    for event in stored(events):
        transcript.apply(event)
    request = transcript.request(Brief(AGENT, RULES))
    marked = [message["content"][-1].pop("cache_control", None) for message in request["messages"]]
    assert marked == [{"type": "ephemeral"}, None, {"type": "ephemeral"}]
    assert request["system"][-1]["cache_control"] == {"type": "ephemeral"}
    assert "cache_control" not in orjson.dumps(transcript.for_request()).decode()  # the transcript itself has none


def test_a_compaction_leaves_the_summary_and_what_is_not_answered_yet() -> None:
    kept = {"type": "text", "text": "and hurry"}
    events = [MESSAGE, *answered("x", {"type": "text", "text": "Yes."})]
    checkpoint = {"summary": "All said.", "kept": [kept], "system": [{"type": "text", "text": "Be brief."}]}
    events.append(ev.new_event("agent.thread_context_compacted", THREAD, private=checkpoint))
    message, instructed = messages_of(events)
    assert (message["role"], instructed["role"]) == ("user", "system")
    assert message["content"][0]["text"].endswith("All said.")
    assert message["content"][1] == kept


@pytest.mark.parametrize(
    "usage",
    [
        None,
        "many",
        [],
        {"input_tokens": "7"},
        {"input_tokens": {}, "output_tokens": None},
        {"input_tokens": True},
        {"input_tokens": -(10**9), "output_tokens": 10**30},
        {"input_tokens": 1e300},
    ],
)
def test_usage_that_makes_no_sense_is_not_counted(usage: Any) -> None:
    """As a log may hold it that an older version wrote."""
    *asked, end = answered("x", {"type": "text", "text": "Hello."})
    private = {**orjson.loads(end.private or b"{}")}
    private["response"] = {**private["response"], "usage": usage}
    transcript = Transcript()
    for event in stored([MESSAGE, *asked, end._replace(private=json.dumps(private).encode())]):
        transcript.apply(event)
    assert [message["role"] for message in transcript.for_request()] == ["user", "assistant"]
    assert not transcript.is_full(Brief(AGENT, RULES))
