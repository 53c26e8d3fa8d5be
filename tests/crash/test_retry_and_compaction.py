"""Workers die while a failed request waits for its next try, and while a history is compacted: the log ends as undisturbed.

Retries are no part of the comparison: a try that a crash swallowed may have been the one that failed.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from anthropic import AsyncAnthropic

from managed_agents.harness.compaction import INSTRUCTION
from managed_agents.scripted_model import Reply, Request, fail, text, tool_use
from tests.crash import script
from tests.crash.conftest import Finished
from tests.support.cluster import Cluster, make_session, say
from tests.support.following import Event, following
from tests.support.invariants import normalised

pytestmark = pytest.mark.anyio

CONTEXT_TOKENS = 12_000
COMPACTED = "agent.thread_context_compacted"
LONG_OUTPUT = f"{script.RUN}; yes 0123456789abcdef | head -n 1500"


@dataclass(frozen=True)
class Scenario:
    """What the model does, and how often a worker passes each point; `chosen` are run always."""

    reply: Callable[[Request], Reply]
    points: dict[str, int]
    chosen: set[tuple[str, int]]


def failing_once(request: Request) -> Reply:
    if request.round == 0:
        return fail(529) if request.attempt == 1 else [text("On it."), tool_use("bash", command=script.RUN)]
    return "All done."


def growing(request: Request) -> Reply:
    """One result that fills the context, a summary, and a look at what was done before it."""
    if request.last_user_text.endswith(INSTRUCTION):
        return "The command has run."
    if "The command has run." in request.user_texts[0]:
        return tool_use("bash", command=f"cat /workspace/{script.SIDE}") if request.round == 0 else "All done."
    return [text("On it."), tool_use("bash", command=LONG_OUTPUT)]


SCENARIOS = {
    "retry": Scenario(
        failing_once,
        {
            "worker.claimed": 2,
            "turn.loaded": 2,
            "turn.request_logged": 3,
            "turn.response_arrived": 2,
            "turn.response_logged": 2,
            "turn.outcome_logged": 1,
            "turn.before_idle": 1,
            "append.before_commit": 8,
            "batch.committed": 8,
        },
        {("worker.claimed", 2), ("turn.request_logged", 2), ("append.before_commit", 2), ("batch.committed", 2)},
    ),
    "compaction": Scenario(
        growing,
        {
            "turn.request_logged": 4,
            "turn.response_arrived": 4,
            "turn.response_logged": 4,
            "turn.outcome_logged": 2,
            "turn.before_idle": 1,
            "append.before_commit": 11,
            "batch.committed": 11,
        },
        {("turn.request_logged", 2), ("turn.response_arrived", 2), ("turn.response_logged", 2), ("turn.outcome_logged", 2)},
    ),
}


def cases() -> list[Any]:
    return [
        pytest.param(name, point, nth, id=f"{name}-{point}-{nth}", marks=[] if (point, nth) in it.chosen else pytest.mark.full)
        for name, it in SCENARIOS.items()
        for point, times in it.points.items()
        for nth in range(1, times + 1)
    ]


def without_retries(events: list[Event]) -> list[Event]:
    """Without what tells of a retry: its error, the reschedule, and the pair that opens the next running period."""
    kept: list[Event] = []
    again = False
    for event in events:
        kind = event["type"]
        if kind.endswith("status_rescheduled"):
            again = True
        elif again and kind.endswith("status_running"):
            again = kind == "session.status_running"
        elif kind != "session.error" or event["error"]["retry_status"]["type"] != "retrying":
            kept.append(event)
    return kept


@pytest.fixture(scope="module")
def expected_of() -> dict[str, list[Event]]:
    """The normalised histories of undisturbed work, by scenario, once somebody needed them."""
    return {}


@pytest.mark.parametrize(("name", "point", "nth"), cases())
async def test_a_worker_that_dies_leaves_the_log_of_undisturbed_work(
    cluster: Cluster,
    client: AsyncAnthropic,
    finished: Finished,
    expected_of: dict[str, list[Event]],
    name: str,
    point: str,
    nth: int,
) -> None:
    scenario = SCENARIOS[name]
    cluster.model.reply = scenario.reply
    cluster.model.limit_context(CONTEXT_TOKENS)
    await cluster.api()
    if name not in expected_of:
        worker = cluster.worker()
        session_id = await make_session(client)
        async with following(client, session_id) as follower:
            await say(client, session_id, "work")
            undisturbed = await follower.idle()
        expected_of[name] = normalised(without_retries(undisturbed))
        types = [event["type"] for event in undisturbed]
        assert (types.count("session.status_rescheduled"), types.count(COMPACTED)) == (name == "retry", name == "compaction")
        await worker.kill()
    doomed = cluster.worker(f"{point}:kill:{nth}")
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        # Other words than before: to the model it is another request, with tries of its own.
        await say(client, session_id, f"work on {session_id}")
        assert await doomed.ended(seconds=60.0) == -signal.SIGKILL, "the point was not reached"
        cluster.worker()
        seen = await follower.idle()
    listed = await finished(session_id)
    assert seen == listed
    for event in listed:
        if event["type"] == "user.message":
            event["content"][0]["text"] = "work"
    assert normalised(without_retries(listed)) == expected_of[name]
    # Of this session, and perhaps of the undisturbed one before it.
    sides = [side.read_text() for side in cluster.in_workspaces(script.SIDE)]
    assert sides
    assert set(sides) == {"ran\n"}
