"""The transcript: the same log always gives the same request."""

from typing import Any

import orjson
import pytest

from managed_agents.eventlog import events as ev
from managed_agents.eventlog.events import NewEvent
from managed_agents.harness.transcript import Transcript, build_request
from tests.unit.harness.logs import queued, stored
from tests.unit.harness.test_decide import THREAD, TOOLSET, answered, bash

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
        return orjson.dumps(build_request(AGENT, transcript, max_tokens=1000, takes_effort=True, uploads=()))

    assert len({request(upto) for upto in range(len(rows) + 1)}) == 1


def test_only_enabled_tools_are_offered_and_the_outputs_directory_is_named_with_them() -> None:
    off = {"name": "bash", "type": "bash", "enabled": False, "permission_policy": {"type": "always_allow"}}
    agent = {**AGENT, "tools": [{**TOOLSET[0], "configs": [off]}]}
    request = build_request(agent, Transcript(), max_tokens=10, takes_effort=False, uploads=["/mnt/session/uploads/a.csv"])
    assert [tool["name"] for tool in request["tools"]] == ["edit", "glob", "grep", "read", "write"]
    assert "/mnt/session/outputs/" in request["system"]
    assert "/mnt/session/uploads/a.csv" in request["system"]
    plain = build_request({**AGENT, "tools": []}, Transcript(), max_tokens=10, takes_effort=False, uploads=())
    assert plain["system"] == "Be kind."
    assert "tools" not in plain


@pytest.mark.requirement("AGT-047")
def test_effort_speed_and_geo_are_passed_on_where_the_model_takes_them() -> None:
    fast = {"id": "m", "effort": {"type": "max"}, "speed": "fast", "inference_geo": "us"}
    request = build_request({**AGENT, "model": fast}, Transcript(), max_tokens=10, takes_effort=True, uploads=())
    assert (request["output_config"], request["speed"], request["inference_geo"]) == ({"effort": "max"}, "fast", "us")
    plain = build_request(AGENT, Transcript(), max_tokens=10, takes_effort=False, uploads=())
    assert not {"output_config", "speed", "inference_geo"} & set(plain)
