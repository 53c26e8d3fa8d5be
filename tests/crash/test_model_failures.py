"""A model that fails: tried again, visibly, until it answers or the tries are used up."""

import anyio
import pytest
from anthropic import AsyncAnthropic
from pydantic import SecretStr

from managed_agents.core import limits
from managed_agents.core.settings import Settings
from managed_agents.processes import worker as process
from managed_agents.scripted_model import Reply, Request, fail, stall
from tests.crash.conftest import Finished
from tests.support.cluster import Cluster, make_session, say
from tests.support.following import Event, following

LAST_TRY_SECONDS = 3.0
pytestmark = pytest.mark.anyio


def types(events: list[Event]) -> list[str]:
    return [event["type"] for event in events]


def overloaded_twice(request: Request) -> Reply:
    return fail(529) if request.attempt <= 2 else "Here I am."


def overloaded(request: Request) -> Reply:
    if request.last_user_text.endswith("are you there?"):
        return "Here I am."
    # Silent before the last failure, so that a message can come while nothing can take it up any more.
    last = request.attempt == limits.MODEL_TRIES_MAX
    return [stall(LAST_TRY_SECONDS), fail(529)] if last else fail(529)


@pytest.mark.requirement("SES-039")
async def test_a_model_overloaded_twice_is_rescheduled_twice_told_once_and_then_answers(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    cluster.model.reply = overloaded_twice
    await cluster.api()
    cluster.worker()
    session_id = await make_session(client, tools=False)
    async with following(client, session_id) as follower:
        await say(client, session_id, "hello?")
        await follower.has("session.status_rescheduled")
        assert (await client.beta.sessions.retrieve(session_id)).status in ("rescheduling", "running")
        seen = await follower.idle()
    listed = await finished(session_id)
    assert seen == listed
    failed = ["span.model_request_start", "span.model_request_end"]
    rescheduled = ["session.status_rescheduled", "session.thread_status_rescheduled"]
    running = ["session.status_running", "session.thread_status_running"]
    assert types(listed) == [
        *running,
        "user.message",
        *failed,
        "session.error",
        *rescheduled,
        *running,
        *failed,
        *rescheduled,
        *running,
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
    ]
    (error,) = [event["error"] for event in listed if event["type"] == "session.error"]
    assert error["type"] == "model_overloaded_error"
    assert error["retry_status"] == {"type": "retrying"}


@pytest.mark.requirement("OBS-045")
async def test_a_worker_killed_while_a_retry_is_due_is_not_missed(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished
) -> None:
    cluster.model.reply = overloaded_twice
    await cluster.api()
    worker = cluster.worker()
    session_id = await make_session(client, tools=False)
    async with following(client, session_id) as follower:
        await say(client, session_id, "hello?")
        await follower.has("session.status_rescheduled")
        await worker.kill()
        cluster.worker()
        await follower.idle()
    listed = await finished(session_id)
    assert types(listed).count("agent.message") == 1
    assert types(listed).count("session.error") == 1


@pytest.mark.requirement("EVT-045", "EVT-046")
async def test_a_model_that_stays_overloaded_exhausts_the_tries_and_flushes_what_waits(
    cluster: Cluster, client: AsyncAnthropic, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MODEL_BACKOFF_FIRST_SECONDS", 0.05)
    cluster.model.reply = overloaded
    await cluster.api()
    settings = Settings(
        data_dir=cluster.data_dir,
        database_url=SecretStr(cluster.database_url),
        sandbox="local",
        model_base_url=cluster.model.base_url,
        model_api_key=SecretStr("scripted"),
    )
    session_id = await make_session(client, tools=False)
    async with following(client, session_id) as follower, anyio.create_task_group() as group:
        await say(client, session_id, "hello?")
        group.start_soon(process.run, settings)
        await cluster.model.requests(limits.MODEL_TRIES_MAX)
        await say(client, session_id, "you must be there")
        await follower.idle()
        await say(client, session_id, "are you there?")
        seen = await follower.idle(2)
        group.cancel_scope.cancel()
    listed = await finished(session_id)
    assert seen == listed
    idles = [event for event in listed if event["type"] == "session.status_idle"]
    assert [event["stop_reason"]["type"] for event in idles] == ["retries_exhausted", "end_turn"]
    first_turn = listed[: listed.index(idles[0]) + 1]
    assert types(first_turn).count("span.model_request_start") == limits.MODEL_TRIES_MAX
    errors = [event["error"]["retry_status"]["type"] for event in listed if event["type"] == "session.error"]
    assert errors == ["retrying", "exhausted"]
    assert types(first_turn)[-6:] == [
        "span.model_request_end",
        "session.error",
        "user.message",
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
    ]
    # What was flushed is history, but the model never reads it.
    last_request = cluster.model.recorder.since(limits.MODEL_TRIES_MAX)[-1].raw
    assert b"hello?" in last_request
    assert b"are you there?" in last_request
    assert b"you must be there" not in last_request
