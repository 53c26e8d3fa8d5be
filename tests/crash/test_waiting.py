"""Sessions that wait for their client while processes die around its answers. Workers: tests/crash/matrix."""

import signal
from typing import Any

import pytest
from anthropic import APIConnectionError, AsyncAnthropic

from managed_agents.scripted_model import Reply, Request, tool_use
from tests.crash import script
from tests.crash.conftest import Finished
from tests.support.cluster import Cluster, history, make_session, say
from tests.support.following import Event, following

pytestmark = pytest.mark.anyio

SIDE = f"/workspace/{script.SIDE}"


def toolset(default: str, **policies: str) -> dict[str, Any]:
    configs = [{"name": name, "permission_policy": {"type": policy}} for name, policy in policies.items()]
    return {
        "type": "agent_toolset_20260401",
        "default_config": {"permission_policy": {"type": default}},
        "configs": configs,
    }


ASKING = [toolset("always_allow", bash="always_ask")]


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


def waited_for(events: list[Event]) -> list[Event]:
    """The calls that the newest idle event names."""
    idle = [event for event in events if event["type"] == "session.status_idle"][-1]
    return [event for event in events if event["id"] in idle["stop_reason"].get("event_ids", [])]


@pytest.mark.requirement("EVT-082")
@pytest.mark.parametrize("point", ["append.before_known", "hints.before"])
async def test_an_answer_is_taken_once_though_the_api_dies_before_it_says_so(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished, point: str
) -> None:
    cluster.model.reply = lambda request: tool_use("bash", command=script.RUN) if request.round == 0 else "All done."
    first = await cluster.api()
    cluster.worker()
    session_id = await make_session(client, tools=ASKING)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        answers = confirm(waited_for(await follower.idle()), 1)
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
    api, worker = await cluster.api(), cluster.worker()
    session_id = await make_session(client, tools=ASKING)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        calls = waited_for(await follower.idle())
        await worker.kill()
        await api.kill()
        await cluster.api()
        await client.beta.sessions.events.send(session_id, events=confirm(calls, 1))
        assert (await client.beta.sessions.retrieve(session_id)).status == "running"
        cluster.worker()
        await client.beta.sessions.events.send(session_id, events=confirm(waited_for(await follower.idle(2)), 2))
        await follower.idle(3)
    await finished(session_id)
    assert {side.read_text() for side in cluster.in_workspaces(script.SIDE)} == {"ran\n"}
