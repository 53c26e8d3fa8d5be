"""A log leads to the same requests, byte for byte: those of recorded sessions, and those that a server has just sent.

So a refactoring cannot silently change what models see.
"""

import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from managed_agents.harness.brain import StandardHarness
from managed_agents.harness.compaction import INSTRUCTION
from managed_agents.harness.prompt import Brief, rules_of
from managed_agents.harness.tools import definitions
from managed_agents.harness.tools.web import NO_PROVIDER
from managed_agents.scripted_model import Reply, Request, fail, refuse, stop_reason, text, thinking, tool_use
from managed_agents.scripted_model.catalog import find_model
from tests.replay.conftest import CONTEXT_TOKENS
from tests.replay.logs import HERE, Recording, log_of, rebuilt
from tests.support.stack import TOOLSET, Stack, message

pytestmark = pytest.mark.anyio

LONG = "All work and no play makes Jack a dull boy. " * 50


def working(request: Request) -> Reply:
    match (request.turn, request.round):
        case (1, 0):
            calls = [tool_use("bash", command="echo b; sleep 0.1"), tool_use("glob", pattern="*.none")]
            return [thinking("Two looks."), text("I look."), *calls, tool_use("no_such_tool", a=1)]
        case (2, 0):
            return fail(500) if request.attempt == 1 else [text("Half of it"), stop_reason("max_tokens")]
        case (2, 1):
            return [text("and the rest."), stop_reason("pause_turn")]
        case (3, 0):
            return [text("No."), refuse("cyber")]
        case _:
            return [thinking("Well."), text("Done.")]


def growing(request: Request) -> Reply:
    if request.last_user_text.endswith(INSTRUCTION):
        return "The summary." if request.turn > 1 else tool_use("bash", command="true")
    return [thinking("Long."), text(LONG)] if request.round else [text(LONG), tool_use("bash", command="echo hi")]


async def talk(server: Stack, session: Any) -> None:
    """Four turns, one of them with a system message."""
    await server.turn(session, "first")
    await server.turn(session, "second")
    await server.turn(session, "third")
    async with server.watching(session) as watch:
        instruction = {"type": "system.message", "content": [{"type": "text", "text": "Be brief."}]}
        await server.client.beta.sessions.events.send(session.id, events=[message("fourth"), instruction])
        await watch.idle()


async def one_turn(server: Stack, session: Any) -> None:
    await server.turn(session, "first")


SESSIONS: dict[str, tuple[str, Callable[[Request], Reply], Callable[[Stack, Any], Awaitable[None]]]] = {
    "work": ("claude-opus-5", working, talk),
    "budgeted-thinking": (
        "claude-opus-4-5",
        lambda request: working(request) if request.turn < 3 else "ok",
        lambda s, x: s.turn(x),
    ),
    "compaction": ("claude-opus-5-5", growing, talk),
}


async def record(server: Stack, name: str) -> Recording:
    """Run a session and keep what the model got."""
    model, reply, talking = SESSIONS[name]
    before = server.recorder.total
    session = await server.session(reply, tools=TOOLSET, model=model)
    await talking(server, session)
    row = find_model(model).listing()
    rules = rules_of(CONTEXT_TOKENS, row["max_tokens"], row["capabilities"])
    requests = [record.raw for record in server.recorder.since(before)]
    agent = session.agent.to_dict()
    # As a worker without a search provider sees it.
    agent["tools"] = definitions.available(agent["tools"], {"web_search": NO_PROVIDER})
    return Recording(Brief(agent, rules), await log_of(server.db, session.id), requests)


@pytest.mark.parametrize("name", SESSIONS)
async def test_a_log_rebuilds_what_was_sent(server: Stack, name: str) -> None:
    recording = await record(server, name)
    assert list(rebuilt(StandardHarness(), recording.brief, recording.log)) == recording.requests
    if os.environ.get("MANAGED_AGENTS_RECORD"):
        HERE.mkdir(exist_ok=True)
        (HERE / f"{name}.jsonl").write_bytes(recording.dump())


@pytest.mark.parametrize("name", SESSIONS)
def test_a_recorded_log_still_leads_to_the_requests_of_its_day(name: str) -> None:
    recording = Recording.load(name)
    assert len(recording.requests) >= 2
    assert list(rebuilt(StandardHarness(), recording.brief, recording.log)) == recording.requests
