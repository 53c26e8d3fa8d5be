"""Whatever a request is made of, it is answered or refused: the checks themselves never fail."""

import copy
from contextlib import suppress
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from managed_agents.scripted_model import Script
from managed_agents.scripted_model.app import ScriptedModel
from managed_agents.scripted_model.checks import Refused

MODEL = ScriptedModel(Script("echo", lambda _: "ok"))
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "bash", "input": {"command": "ls"}, **CACHED}
INNER = [
    {"type": "text", "text": "a"},
    {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
    {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "a"}]},
    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}, "title": "t"},
]
REQUEST: dict[str, Any] = {
    "model": "claude-opus-4-8",
    "max_tokens": 2000,
    "stream": True,
    "system": [{"type": "text", "text": "s", **CACHED}],
    "tools": [{"name": "bash", "input_schema": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
    "output_config": {"effort": "low"},
    "cache_control": {"type": "ephemeral"},
    "metadata": {"user_id": "u"},
    "stop_sequences": ["x"],
    "temperature": 1,
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, USE]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": INNER, "is_error": False}]},
        {"role": "system", "content": "c"},
    ],
}
JUNK = st.sampled_from(
    [
        *(None, True, 0, -1, 10**19, 1.5, "", " ", "\x00", "text", "thinking", "tool_use", "tool_result", "user", "assistant"),
        *([], {}, [[]], [{}], [None], {"type": []}, {"type": "text"}, USE),
        {"type": "thinking", "thinking": "", "signature": "AA=="},
    ]
)


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, inner in items for path in paths(inner, (*prefix, key)))]


PATHS = paths(REQUEST)[1:]


def changed(body: Any, path: tuple[Any, ...], junk: Any, remove: bool) -> None:
    """Replace or remove what is at `path`, unless an earlier change took it away."""
    for depth, key in enumerate(path):
        there = isinstance(body, dict) and key in body if isinstance(key, str) else isinstance(body, list) and key < len(body)
        if not there:
            return
        if depth < len(path) - 1:
            body = body[key]
    if remove:
        del body[path[-1]]
    else:
        body[path[-1]] = junk


def test_the_request_itself_is_answered() -> None:
    played, streams = MODEL.play(orjson.dumps(REQUEST), {}, "req_1")
    assert streams
    assert played.message["stop_reason"] == "end_turn"


@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), JUNK, st.booleans()), min_size=1, max_size=3))
def test_changed_requests_are_answered_or_refused(changes: list[tuple[tuple[Any, ...], Any, bool]]) -> None:
    body = copy.deepcopy(REQUEST)
    for path, junk, remove in changes:
        changed(body, path, copy.deepcopy(junk), remove)
    with suppress(Refused):
        played, _ = MODEL.play(orjson.dumps(body), {}, "req_1")
        assert orjson.dumps(played.message)
