"""Damaged requests against create, send and update: an answer is always a 2xx, or a 4xx in the envelope."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.stack import Stack, message

pytestmark = pytest.mark.anyio

# The same examples in every run, a few seconds in all; raise it to search.
EXAMPLES = 150
RULES = settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))

CREATE: dict[str, Any] = {
    "agent": {"type": "agent_with_overrides", "id": "AGENT", "version": 1, "model": "claude-opus-5", "tools": []},
    "environment_id": "ENVIRONMENT",
    "title": "t",
    "metadata": {"a": "b"},
    "resources": [{"type": "file", "file_id": "FILE", "mount_path": "/x/y"}],
    "vault_ids": [],
    "initial_events": [message("hello")],
}
SEND: dict[str, Any] = {
    "events": [
        {
            "type": "user.message",
            "content": [
                {"type": "text", "text": "x"},
                {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "d"}, "title": "t"},
                {"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}},
            ],
        },
        {"type": "user.interrupt", "session_thread_id": "sthr_01x"},
    ]
}
UPDATE: dict[str, Any] = {"title": "x", "metadata": {"a": None, "b": "c"}}

ODD_TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", " ", "\x00", "\ud800", "x" * 600, "user.message", "text", "sesn_01x", "agent", "\u202e"]),
)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ODD_TEXT, st.just(2**70))
ANY = st.recursive(
    SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ODD_TEXT, inner, max_size=3)), max_leaves=8
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) in a document."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


@st.composite
def damaged(draw: Any, valid: dict[str, Any]) -> Any:
    """A valid request in which one to three places were changed, or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ANY)
    document: Any = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        places = _places(document)
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                holder[key] = draw(ANY)
            case "remove":
                del holder[key]
            case _ if isinstance(holder, dict):
                holder[draw(ODD_TEXT)] = draw(ANY)
            case _:
                holder.append(draw(ANY))
    return document


_made: dict[int, tuple[Any, dict[str, str]]] = {}


async def answered(server: Stack, path: str, document: Any) -> None:
    """Send `document` and check that the answer has one of the two forms there are."""
    if id(server) not in _made:
        session, file = await server.session(lambda _request: "ok"), await server.upload()
        _made[id(server)] = session, {"AGENT": session.agent.id, "ENVIRONMENT": server.environment_id, "FILE": file.id}
    session, names = _made[id(server)]
    body = json.dumps(document)
    for placeholder, name in names.items():
        body = body.replace(f'"{placeholder}"', f'"{name}"')
    answer = await server.raw("POST", path.format(id=session.id), content=body.encode())
    assert 200 <= answer.status_code < 500, (body, answer.text)
    said = answer.json()
    if answer.status_code >= 400:
        assert (said["type"], said["request_id"]) == ("error", answer.headers["request-id"]), body
        assert said["error"]["message"], body


@pytest.mark.requirement("CNV-076")
@given(document=damaged(CREATE))
@RULES
async def test_create(server: Stack, document: Any) -> None:
    await answered(server, "/v1/sessions", document)


@pytest.mark.requirement("CNV-076")
@given(document=damaged(SEND))
@RULES
async def test_send(server: Stack, document: Any) -> None:
    await answered(server, "/v1/sessions/{id}/events", document)


@pytest.mark.requirement("CNV-076")
@given(document=damaged(UPDATE))
@RULES
async def test_update(server: Stack, document: Any) -> None:
    await answered(server, "/v1/sessions/{id}", document)


@pytest.mark.requirement("CNV-076")
async def test_the_server_is_well_afterwards(server: Stack) -> None:
    session = await server.session(["still there"])
    watch = await server.turn(session)
    assert watch.logged[4].content[0].text == "still there"
