"""Every registered fault point: die there, let another process go on, and get the log of undisturbed work."""

import importlib
import pkgutil
import signal

import pytest
from anthropic import APIConnectionError, AsyncAnthropic

import managed_agents
from managed_agents.core import faults
from tests.crash import script, test_waiting
from tests.crash.conftest import Finished, Undisturbed
from tests.support.cluster import Cluster, history, make_session, say
from tests.support.following import following
from tests.support.invariants import normalised

pytestmark = pytest.mark.anyio

# How often a worker passes each point while it does the work of `script.work`.
WORKER = {
    "worker.claimed": 1,
    "turn.loaded": 1,
    "turn.request_logged": 3,
    "turn.response_arrived": 3,
    "turn.response_logged": 3,
    "turn.outcome_arrived": 3,
    "turn.outcome_logged": 3,
    "turn.before_idle": 1,
    "hands.bound": 1,
    "hands.created": 1,
    "append.before_write": 9,
    "append.before_commit": 9,
    "batch.committed": 9,
    "hints.before": 9,
}
# What an api passes while it accepts a message, and whether the message is durable there.
API = {"append.before_write": False, "append.before_commit": False, "hints.before": True}
# In every run; the others take long.
CHOSEN = {
    ("turn.request_logged", 1),
    ("turn.response_logged", 1),
    ("turn.outcome_logged", 1),
    ("append.before_commit", 2),
    ("batch.committed", 4),
    ("hints.before", 9),
}


ELSEWHERE = {"idempotency.committed"}  # test_idempotency


def cases() -> list[object]:
    return [
        pytest.param(point, nth, id=f"{point}-{nth}", marks=[] if (point, nth) in CHOSEN else pytest.mark.full)
        for point, times in WORKER.items()
        for nth in range(1, times + 1)
    ]


def test_every_registered_fault_point_is_reached_here() -> None:
    for module in pkgutil.walk_packages(managed_agents.__path__, "managed_agents."):
        if not module.name.endswith((".runner.main", ".zygote")):
            importlib.import_module(module.name)
    assert set(faults.REGISTERED) == set(WORKER) | set(API) | test_waiting.POINTS | ELSEWHERE


@pytest.mark.requirement("SES-080")
@pytest.mark.parametrize(("point", "nth"), cases())
async def test_a_worker_that_dies_at_any_fault_point_leaves_the_log_of_undisturbed_work(
    cluster: Cluster, client: AsyncAnthropic, undisturbed: Undisturbed, finished: Finished, point: str, nth: int
) -> None:
    await cluster.api()
    expected = await undisturbed()
    worker = cluster.worker(f"{point}:kill:{nth}")
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        assert await worker.ended() == -signal.SIGKILL, "the point was not reached"
        cluster.worker()
        seen = await follower.idle()
    listed = await finished(session_id)
    assert seen == listed
    assert normalised(listed) == expected
    # Of this session, and perhaps of the undisturbed one before it.
    sides = [side.read_text() for side in cluster.in_workspaces(script.SIDE)]
    assert sides
    assert set(sides) == {"ran\n"}


@pytest.mark.requirement("SES-082")
@pytest.mark.parametrize("point", API)
async def test_a_message_is_accepted_once_though_the_api_dies_before_it_answers(
    cluster: Cluster, client: AsyncAnthropic, undisturbed: Undisturbed, finished: Finished, point: str
) -> None:
    first = await cluster.api()
    expected = await undisturbed()
    cluster.worker()
    session_id = await make_session(client)
    await first.kill()
    armed = await cluster.api(f"{point}:kill")
    with pytest.raises(APIConnectionError):
        await say(client, session_id, "work")
    assert await armed.ended() == -signal.SIGKILL
    await cluster.api()
    async with following(client, session_id) as follower:
        # What a careful client does: look whether it arrived before sending it again.
        accepted = [event for event in await history(client, session_id) if event["type"] == "user.message"]
        assert len(accepted) == API[point]
        if not accepted:
            await say(client, session_id, "work")
        seen = await follower.idle()
    listed = await finished(session_id)
    assert seen == listed
    assert normalised(listed) == expected
