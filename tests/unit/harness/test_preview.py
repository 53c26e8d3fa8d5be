"""The events that a preview announces are the events that the response becomes: same ids, same texts."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from managed_agents.eventlog.previews import START, Chunk
from managed_agents.harness.preview import UNDECIDED_CHUNKS_MAX, Preview
from managed_agents.harness.response import Response, events_of
from managed_agents.model.events import BlockStarted, TextDelta

BLOCKS = st.lists(
    st.one_of(
        st.lists(st.sampled_from(["", " ", "\n", "a", "word ", "é✓"]), max_size=4).map(lambda parts: ("text", parts)),
        st.sampled_from([("thinking", []), ("redacted_thinking", []), ("tool_use", []), ("server_tool_use", [])]),
    ),
    max_size=8,
)


def previewed(blocks: list[tuple[str, list[str]]], sent: list[Chunk], *, wanted: bool | None = True) -> Preview:
    preview = Preview("s", "t", 3, lambda chunk: sent.append(chunk) or True)
    if wanted is not None:
        preview.decide(wanted)
    for index, (kind, parts) in enumerate(blocks):
        # Some endpoints put the first words into the block's start.
        first = parts[0] if parts and index % 2 else ""
        preview.take(BlockStarted(index, {"type": kind, "text": first}))
        for part in parts[1:] if first else parts:
            preview.take(TextDelta(index, part))
    return preview


def content_of(blocks: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    return [
        {"type": kind, "text": "".join(parts), "id": f"toolu_{index}", "name": "bash", "input": {}}
        for index, (kind, parts) in enumerate(blocks)
    ]


@given(BLOCKS, st.booleans())
def test_previews_announce_what_follows(blocks: list[tuple[str, list[str]]], late: bool) -> None:
    sent: list[Chunk] = []
    preview = previewed(blocks, sent, wanted=None if late else True)
    if late:
        assert sent == []
        preview.decide(True)
    response = Response(content_of(blocks), {}, "m", "end_turn", None, None, {})
    events = events_of(response, "t", "start", [], event_ids=preview.event_ids)
    announced: dict[str, Any] = {}
    for chunk in sent:
        assert (chunk.session_id, chunk.thread_id, chunk.span_seq) == ("s", "t", 3)
        if chunk.block == START:
            assert chunk.event_id not in announced
            announced[chunk.event_id] = (chunk.text, [])
        else:
            texts = announced[chunk.event_id][1]
            texts += [""] * (chunk.block + 1 - len(texts))
            assert chunk.offset == len(texts[chunk.block])
            texts[chunk.block] += chunk.text
    final = {
        event.id: (event.type, [block["text"] for block in _json(event).get("content", ())])
        for event in events
        if event.type in ("agent.message", "agent.thinking")
    }
    assert announced == final


def _json(event: Any) -> dict[str, Any]:
    import orjson

    return orjson.loads(event.payload)


def test_what_nobody_wants_is_not_sent() -> None:
    sent: list[Chunk] = []
    preview = previewed([("text", ["a", "b"])], sent, wanted=False)
    preview.take(TextDelta(0, "c"))
    assert sent == []


def test_waiting_for_the_answer_is_bounded() -> None:
    sent: list[Chunk] = []
    preview = previewed([("text", ["x"] * 2 * UNDECIDED_CHUNKS_MAX)], sent, wanted=None)
    preview.decide(True)
    preview.take(TextDelta(0, "more"))
    assert len(sent) == UNDECIDED_CHUNKS_MAX


def test_after_a_shed_chunk_nothing_more_is_sent_for_the_event() -> None:
    sent: list[Chunk] = []
    preview = Preview("s", "t", 3, lambda chunk: len(sent) < 2 and (sent.append(chunk) or True))
    preview.decide(True)
    preview.take(BlockStarted(0, {"type": "text", "text": ""}))
    for word in ("one", "two", "three"):
        preview.take(TextDelta(0, word))
    sent.pop()
    preview.take(TextDelta(0, "four"))
    assert len(sent) == 1
