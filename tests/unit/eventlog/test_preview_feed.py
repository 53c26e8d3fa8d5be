"""A stream's share of previews keeps its promises whatever is lost, doubled or late."""

import random

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from managed_agents.eventlog.preview_feed import PENDING_BYTES_MAX, PreviewFeed
from managed_agents.eventlog.previews import START, Chunk, payloads, unpacked

BOTH = frozenset({"agent.message", "agent.thinking"})
TEXTS = ("Good morning, everyone", "and good night")


def chunk(event_id: str, index: int, offset: int, text: str, *, span_seq: int = 5, thread_id: str = "t") -> Chunk:
    return Chunk("s", thread_id, span_seq, event_id, index, offset, text)


def start(event_id: str, kind: str = "agent.message", **where: int) -> Chunk:
    return chunk(event_id, START, 0, kind, **where)  # pyright: ignore[reportArgumentType]


def whole(event_id: str, size: int) -> list[Chunk]:
    """A start and every delta of a message of two texts."""
    cut = [
        chunk(event_id, index, at, text[at : at + size]) for index, text in enumerate(TEXTS) for at in range(0, len(text), size)
    ]
    return [start(event_id), *cut]


def shown(frames: list[bytes]) -> list[dict[str, object]]:
    return [orjson.loads(frame.partition(b"data: ")[2]) for frame in frames]


def fed(feed: PreviewFeed, chunks: list[Chunk], cursor: int = 10) -> list[dict[str, object]]:
    for each in chunks:
        feed.offer(each, each.frame())
    return shown(feed.take(cursor))


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    lost=st.floats(0, 0.5),
    doubled=st.floats(0, 0.3),
    swapped=st.floats(0, 0.3),
)
def test_what_is_shown_is_a_prefix_behind_one_start(size: int, seed: int, lost: float, doubled: float, swapped: float) -> None:
    chance = random.Random(seed)
    sent: list[Chunk] = []
    for each in whole("a", size):
        if chance.random() >= lost:
            sent += [each] * (2 if chance.random() < doubled else 1)
    for at in range(len(sent) - 1):
        if chance.random() < swapped:
            sent[at], sent[at + 1] = sent[at + 1], sent[at]
    texts: list[str] = []
    starts = 0
    for event in fed(PreviewFeed(BOTH, "t", 0), sent):
        if event["type"] == "event_start":
            starts += 1
            continue
        assert starts == 1
        delta = event["delta"]
        assert isinstance(delta, dict)
        assert delta["index"] in (len(texts), len(texts) - 1)
        texts[delta["index"] :] = ["".join(texts[delta["index"] :]) + delta["content"]["text"]]
    assert starts <= 1
    assert all(whole_text.startswith(text) for whole_text, text in zip(TEXTS, texts, strict=False))
    if lost == doubled == swapped == 0:
        assert texts == list(TEXTS)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_everything_is_shown_when_nothing_goes_wrong(size: int) -> None:
    assert len(fed(PreviewFeed(BOTH, "t", 0), whole("a", size))) == len(whole("a", size))


def test_nothing_follows_the_event_itself() -> None:
    feed = PreviewFeed(BOTH, "t", 0)
    chunks = whole("a", 4)
    for each in chunks[:3]:
        feed.offer(each, each.frame())
    feed.finish("a")
    assert feed.take(10) == []
    assert fed(feed, chunks) == []
    assert len(fed(feed, whole("b", 4))) == len(chunks)  # another event of the same request


def test_nothing_follows_the_end_of_the_request() -> None:
    feed = PreviewFeed(BOTH, "t", 0)
    assert len(fed(feed, whole("a", 4)[:3])) == 3
    feed.end_request(8)
    assert fed(feed, whole("a", 4)) == []
    later = [each._replace(span_seq=9) for each in whole("b", 4)]
    assert len(fed(feed, later)) == len(later)


def test_nothing_comes_before_the_start_of_the_request() -> None:
    feed = PreviewFeed(BOTH, "t", 0)
    assert fed(feed, whole("a", 4), cursor=4) == []
    assert len(feed.take(5)) == len(whole("a", 4))


def test_a_stream_opened_in_mid_request_gets_none_of_it() -> None:
    assert fed(PreviewFeed(BOTH, "t", 5), whole("a", 4)) == []


def test_other_types_and_threads_are_not_shown() -> None:
    feed = PreviewFeed(frozenset({"agent.thinking"}), "t", 0)
    assert fed(feed, whole("a", 4)) == []
    assert [event["type"] for event in fed(feed, [start("b", "agent.thinking")])] == ["event_start"]
    assert fed(feed, [start("c", "agent.thinking")._replace(thread_id="other")]) == []


def test_a_reader_that_is_behind_gets_less() -> None:
    feed = PreviewFeed(BOTH, "t", 0)
    size, count = 1000, 2 * PENDING_BYTES_MAX // 1000
    got = fed(feed, [start("a"), *(chunk("a", 0, at * size, "x" * size) for at in range(count))])
    assert 100 < len(got) < count
    assert fed(feed, [chunk("a", 0, count * size, "y")]) == []


@given(st.lists(st.text(max_size=1000), max_size=30))
def test_notifications_are_small_and_lossless(texts: list[str]) -> None:
    chunks = [chunk(f"sevt_{n}", 0, 0, text) for n, text in enumerate(texts)]
    packed = payloads(chunks)
    assert all(len(each.encode()) <= 7500 and "\x00" not in each for each in packed)
    assert [each for payload in packed for each in unpacked(orjson.loads(payload))] == chunks
