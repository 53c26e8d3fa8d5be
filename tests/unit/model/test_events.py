"""The fold and the parser, where a network would only get in the way."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from managed_agents.model.events import MessageFinished, MessageFold, ProtocolBroken
from managed_agents.model.sse import SseParser

STREAM = b'event: a\ndata: {"x": 1}\n\n: comment\n\nevent: ping\r\ndata: {}\r\n\r\ndata: 1\ndata: 2\nid: 9\n\nevent: b\n\n'
EVENTS = [(b"a", b'{"x": 1}'), (b"ping", b"{}"), (b"", b"1\n2")]


@given(st.lists(st.integers(min_value=0, max_value=len(STREAM))))
def test_events_do_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    parser = SseParser()
    edges = [0, *sorted(cuts), len(STREAM)]
    found = [event for a, b in pairwise(edges) for event in parser.feed(STREAM[a:b])]
    assert found == EVENTS


def fold(*events: dict[str, Any]) -> MessageFinished:
    start = {
        "type": "message_start",
        "message": {"id": "msg_1", "model": "m", "usage": {"input_tokens": 3, "x": 1}},
    }
    folding, last = MessageFold(None), None
    for event in (start, *events, {"type": "message_stop"}):
        last = folding.fold(event)
    assert isinstance(last, MessageFinished)
    return last


def block(index: int, content: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": content},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def test_unknown_blocks_fields_and_events_survive() -> None:
    strange = {"type": "encrypted_something", "data": "…", "nested": {"a": [1]}}
    finished = fold(
        *block(0, strange),
        {"type": "brand_new_event"},
        *block(
            1,
            {"type": "text", "text": "", "new": True, "citations": None},
            {"type": "text_delta", "text": "a"},
            {"type": "citations_delta", "citation": {"c": 1}},
        ),
        *block(
            2,
            {"type": "compaction", "content": None},
            {"type": "compaction_delta", "content": "summary", "encrypted_content": "e"},
        ),
        *block(
            3,
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            {"type": "input_json_delta", "partial_json": '{"q":1}'},
        ),
        {
            "type": "message_delta",
            "delta": {"stop_reason": "pause_turn"},
            "usage": {"output_tokens": 4, "input_tokens": None},
        },
    )
    assert finished.content == [
        strange,
        {"type": "text", "text": "a", "new": True, "citations": [{"c": 1}]},
        {"type": "compaction", "content": "summary", "encrypted_content": "e"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"q": 1}},
    ]
    assert finished.usage == {"input_tokens": 3, "x": 1, "output_tokens": 4}
    assert finished.stop_reason == "pause_turn"


@pytest.mark.requirement("EVT-098")
def test_a_call_that_was_cut_off_before_its_input_has_a_bad_one() -> None:
    def bad(stop_reason: str, *blocks: list[dict[str, Any]]) -> dict[int, str]:
        end = {"type": "message_delta", "delta": {"stop_reason": stop_reason}}
        finished = fold(*(event for block in blocks for event in block), end)
        return {index: found.raw for index, found in finished.bad_inputs.items()}

    def call(index: int, *pieces: str, given: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
        return block(index, {"type": "tool_use", "id": f"toolu_{index}", "name": "glob", "input": given or {}}, *deltas)

    assert bad("max_tokens", call(0)) == {0: ""}
    assert bad("model_context_window_exceeded", call(0, "")) == {0: ""}
    # Only of the last block nothing may be missing: a call without input is one.
    assert bad("max_tokens", call(0), call(1, "{}")) == {}
    assert bad("max_tokens", call(0, given={"pattern": "*"})) == {}
    assert bad("max_tokens", call(0), block(1, {"type": "text", "text": "and"})) == {}
    assert bad("tool_use", call(0)) == {}


@pytest.mark.parametrize(
    "events",
    [
        [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}}],
        [{"type": "content_block_start", "index": 1, "content_block": {"type": "text"}}],
        block(0, {"type": "text", "text": ""}, {"type": "unknown_delta", "x": 1}),
        block(0, {"type": "text", "text": ""})[:1],
        [{"no": "type"}],
        [{"type": "content_block_start", "index": 0}],
    ],
)
def test_streams_that_would_lose_something_are_broken(events: list[dict[str, Any]]) -> None:
    with pytest.raises(ProtocolBroken):
        fold(*events)


def test_nothing_comes_before_the_start() -> None:
    with pytest.raises(ProtocolBroken):
        MessageFold(None).fold({"type": "message_stop"})


@pytest.mark.requirement("EVT-151")
def test_counts_that_cannot_be_true_are_left_out() -> None:
    finished = fold(
        {
            "type": "message_delta",
            "delta": {"stop_reason": "refusal", "stop_details": "nope"},
            "usage": {
                "input_tokens": "ten",
                "output_tokens": 10**30,
                "cache_read_input_tokens": -1,
                "cache_creation": "none",
                "server_tool_use": {"web_search_requests": [], "web_fetch_requests": 2},
                "service_tier": "standard",
            },
        }
    )
    assert finished.usage == {"x": 1, "server_tool_use": {"web_fetch_requests": 2}, "service_tier": "standard"}
    assert finished.stop_details is None


@pytest.mark.requirement("EVT-151")
@pytest.mark.parametrize("delta", [{"stop_reason": 7}, {"stop_reason": ["end_turn"]}, {"model": 5}])
def test_what_is_no_name_breaks_the_protocol(delta: dict[str, Any]) -> None:
    with pytest.raises(ProtocolBroken):
        fold({"type": "message_delta", "delta": delta})


def test_a_text_block_that_opens_without_text_breaks_the_protocol() -> None:
    with pytest.raises(ProtocolBroken):
        fold(*block(0, {"type": "text", "text": 5}))
