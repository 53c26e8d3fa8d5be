"""Sessions that wait for their client: workers die before, while and after it answers; the log is that of undisturbed work."""

import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from anthropic import APIConnectionError, AsyncAnthropic

from managed_agents.scripted_model import Reply, Request, text, tool_use
from tests.crash import script
from tests.crash.conftest import Finished
from tests.support.cluster import Cluster, history, make_session, say
from tests.support.following import Event, Follower, following
from tests.support.invariants import normalised

pytestmark = pytest.mark.anyio

CUSTOM: dict[str, Any] = {"type": "custom", "name": "weather", "description": "Weather.", "input_schema": {"type": "object"}}
SIDE = f"/workspace/{script.SIDE}"


def toolset(default: str, **policies: str) -> dict[str, Any]:
    configs = [{"name": name, "permission_policy": {"type": policy}} for name, policy in policies.items()]
    return {
        "type": "agent_toolset_20260401",
        "default_config": {"permission_policy": {"type": default}},
        "configs": configs,
    }


@dataclass(frozen=True)
class Scenario:
    """What the model does, what the client answers to each wait, and how often a worker passes each point.

    `answers` gets the calls that are waited for and the number of the wait, from 1. `chosen` are run always.
    """

    tools: list[Any]
    reply: Callable[[Request], Reply]
    answers: Callable[[list[Event], int], list[Any]]
    idles: int
    points: dict[str, int]
    chosen: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])


def confirming(request: Request) -> Reply:
    if request.round == 0:
        return [tool_use("bash", command=script.RUN), tool_use("write", file_path=f"/workspace/{script.NOTES}", content="x")]
    return tool_use("bash", command=f"cat {SIDE}") if request.round == 1 else "All done."


def confirm(calls: list[Event], wait: int) -> list[Any]:
    """Allows the first call, denies the second."""
    deny = {"result": "deny", "deny_message": "enough"}
    return [
        {"type": "user.tool_confirmation", "tool_use_id": call["id"], **({"result": "allow"} if wait == 1 else deny)}
        for call in calls
    ]


def asking_for_weather(request: Request) -> Reply:
    if request.round > 0:
        return "All done."
    cities = [tool_use("weather", city=city) for city in ("Bonn", "Ulm")]
    return [text("On it."), tool_use("bash", command=script.RUN), *cities]


def tell_weather(calls: list[Event], _wait: int) -> list[Any]:
    """Answers one call at a time, the last one first."""
    call = calls[-1]
    content = [{"type": "text", "text": f"sunny in {call['input']['city']}"}]
    return [{"type": "user.custom_tool_result", "custom_tool_use_id": call["id"], "content": content}]


def turning_around(request: Request) -> Reply:
    if request.turn == 1:
        return tool_use("bash", command="echo never >> /workspace/never")
    return tool_use("glob", pattern="/workspace/*") if request.round == 0 else "Turned."


def turn_around(_calls: list[Event], _wait: int) -> list[Any]:
    return [{"type": "user.interrupt"}, {"type": "user.message", "content": [{"type": "text", "text": "no, look"}]}]


def judging(request: Request) -> Reply:
    if request.judging is not None:
        return "DENY" if "rm " in str(request.judging.input) else "ALLOW"
    if request.round == 0:
        return [tool_use("bash", command=script.RUN), tool_use("bash", command="rm -rf /")]
    return "All done."


SCENARIOS = {
    "confirmation": Scenario(
        [toolset("always_allow", bash="always_ask")],
        confirming,
        confirm,
        3,
        {
            "worker.claimed": 3,
            "turn.loaded": 3,
            "turn.answers_logged": 2,
            "turn.request_logged": 3,
            "turn.response_logged": 3,
            "turn.outcome_arrived": 2,
            "turn.outcome_logged": 3,
            "turn.before_idle": 3,
            "append.before_commit": 14,
            "batch.committed": 14,
        },
        {("turn.answers_logged", 1), ("turn.answers_logged", 2), ("turn.before_idle", 1), ("turn.outcome_arrived", 2)},
    ),
    "custom tool": Scenario(
        [CUSTOM, toolset("always_allow")],
        asking_for_weather,
        tell_weather,
        3,
        {
            "worker.claimed": 3,
            "turn.loaded": 3,
            "turn.request_logged": 2,
            "turn.response_logged": 2,
            "turn.outcome_logged": 1,
            "turn.before_idle": 3,
            "append.before_commit": 8,
            "batch.committed": 8,
        },
        {("turn.response_logged", 1), ("turn.before_idle", 2), ("turn.loaded", 3)},
    ),
    "interrupt": Scenario(
        [toolset("always_allow", bash="always_ask")],
        turning_around,
        turn_around,
        3,
        {
            "worker.claimed": 2,
            "turn.loaded": 2,
            "turn.closed": 1,
            "turn.request_logged": 3,
            "turn.before_idle": 2,
            "append.before_commit": 9,
            "batch.committed": 9,
        },
        {("turn.closed", 1), ("append.before_commit", 4)},
    ),
    "auto": Scenario(
        [toolset("auto")],
        judging,
        lambda _calls, _wait: [],
        1,
        {"turn.calls_judged": 1, "turn.response_arrived": 2, "turn.response_logged": 2, "turn.outcome_logged": 2},
        {("turn.calls_judged", 1)},
    ),
}
POINTS = {point for scenario in SCENARIOS.values() for point in scenario.points}
Perform = Callable[[str], Awaitable[list[Event]]]


def cases() -> list[Any]:
    return [
        pytest.param(name, point, nth, id=f"{name}-{point}-{nth}", marks=[] if (point, nth) in it.chosen else pytest.mark.full)
        for name, it in SCENARIOS.items()
        for point, times in it.points.items()
        for nth in range(1, times + 1)
    ]


@pytest.fixture(scope="module")
def expected_of() -> dict[str, list[Event]]:
    """The normalised histories of undisturbed work, by scenario, once somebody needed them."""
    return {}


def waited_for(events: list[Event]) -> list[Event]:
    """The calls that the newest idle event names."""
    idle = [event for event in events if event["type"] == "session.status_idle"][-1]
    return [event for event in events if event["id"] in idle["stop_reason"].get("event_ids", [])]


async def go_through(scenario: Scenario, client: AsyncAnthropic, session_id: str, follower: Follower) -> list[Event]:
    """Say the first word and answer every wait; returns what was seen."""
    await say(client, session_id, "work")
    for wait in range(1, scenario.idles):
        if calls := waited_for(await follower.idle(wait)):
            await client.beta.sessions.events.send(session_id, events=scenario.answers(calls, wait))
    return await follower.idle(scenario.idles)


@pytest.mark.requirement("EVT-071")
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
    await cluster.api()
    if name not in expected_of:
        worker = cluster.worker()
        session_id = await make_session(client, tools=scenario.tools)
        async with following(client, session_id) as follower:
            expected_of[name] = normalised(await go_through(scenario, client, session_id, follower))
        await worker.kill()
    doomed = cluster.worker(f"{point}:kill:{nth}")
    session_id = await make_session(client, tools=scenario.tools)
    async with following(client, session_id) as follower:
        seen: list[Event] = []

        async def replace() -> None:
            assert await doomed.ended(seconds=60.0) == -signal.SIGKILL, "the point was not reached"
            cluster.worker()

        async with anyio.create_task_group() as group:
            group.start_soon(replace)
            seen = await go_through(scenario, client, session_id, follower)
    listed = await finished(session_id)
    assert seen == listed
    assert normalised(listed) == expected_of[name]
    # Of this session, and perhaps of the undisturbed one before it.
    assert {side.read_text() for side in cluster.in_workspaces(script.SIDE)} <= {"ran\n"}
    assert not cluster.in_workspaces("never")


@pytest.mark.requirement("EVT-082")
@pytest.mark.parametrize("point", ["append.before_commit", "hints.before"])
async def test_an_answer_is_taken_once_though_the_api_dies_before_it_says_so(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished, point: str
) -> None:
    scenario = SCENARIOS["confirmation"]
    cluster.model.reply = lambda request: tool_use("bash", command=script.RUN) if request.round == 0 else "All done."
    first = await cluster.api()
    cluster.worker()
    session_id = await make_session(client, tools=scenario.tools)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        answers = scenario.answers(waited_for(await follower.idle()), 1)
        await first.kill()
        armed = await cluster.api(f"{point}:kill")
        with pytest.raises(APIConnectionError):
            await client.beta.sessions.events.send(session_id, events=answers)
        assert await armed.ended() == -signal.SIGKILL
        await cluster.api()
        # What a careful client does: look whether it arrived before sending it again.
        if not any(event["type"] == "user.tool_confirmation" for event in await history(client, session_id)):
            await client.beta.sessions.events.send(session_id, events=answers)
        await follower.idle(2)
    listed = await finished(session_id)
    types = [event["type"] for event in listed]
    assert types.count("user.tool_confirmation") == types.count("agent.tool_result") == 1
    assert types.count("session.status_running") == types.count("session.status_idle") == 2
    assert {side.read_text() for side in cluster.in_workspaces(script.SIDE)} == {"ran\n"}


@pytest.mark.requirement("EVT-082")
async def test_a_session_waits_through_the_death_of_every_process(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    cluster.model.reply = confirming
    scenario = SCENARIOS["confirmation"]
    api, worker = await cluster.api(), cluster.worker()
    session_id = await make_session(client, tools=scenario.tools)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        calls = waited_for(await follower.idle())
        await worker.kill()
        await api.kill()
        await cluster.api()
        await client.beta.sessions.events.send(session_id, events=scenario.answers(calls, 1))
        assert (await client.beta.sessions.retrieve(session_id)).status == "running"
        cluster.worker()
        await client.beta.sessions.events.send(session_id, events=scenario.answers(waited_for(await follower.idle(2)), 2))
        await follower.idle(3)
    await finished(session_id)
    assert {side.read_text() for side in cluster.in_workspaces(script.SIDE)} == {"ran\n"}
