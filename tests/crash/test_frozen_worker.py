"""A worker that is stopped for longer than its lease and then goes on: it may not write another word."""

import signal

import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text

from managed_agents.db.engine import Database
from tests.crash import script
from tests.crash.conftest import Claimed, Finished, Undisturbed, Working
from tests.support.cluster import Cluster, make_session, say
from tests.support.following import following
from tests.support.invariants import normalised
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


async def registered(db: Database, pid: int, *, but: str) -> bool:
    """Whether the process has registered as another worker than `but`."""
    async with db.transaction() as tx:
        found = await tx.execute(text("SELECT 1 FROM workers WHERE pid = :pid AND id <> :but"), {"pid": pid, "but": but})
        return found.first() is not None


@pytest.mark.requirement("SES-083")
async def test_a_worker_frozen_during_a_model_stream_writes_nothing_when_it_goes_on(
    cluster: Cluster,
    client: AsyncAnthropic,
    db: Database,
    undisturbed: Undisturbed,
    claimed: Claimed,
    finished: Finished,
) -> None:
    await cluster.api()
    expected = await undisturbed()
    # The answer is complete in the frozen worker's socket when it wakes up: it has something to write.
    cluster.model.reply = script.stalling_once(script.work, in_round=1, seconds=1.0)
    frozen = cluster.worker()
    session_id = await make_session(client)
    async with following(client, session_id) as follower:
        await say(client, session_id, "work")
        await cluster.model.requests(2)
        owner = await claimed(session_id, None)
        frozen.signal(signal.SIGSTOP)
        cluster.worker()
        await follower.idle()
        before = await finished(session_id)
        assert await cluster.model.recorder.wait(4, "finished", 10)
        frozen.signal(signal.SIGCONT)
        # It has noticed once it lives under another id.
        await until(lambda: registered(db, frozen.pid, but=owner))
        assert await finished(session_id) == before
    assert normalised(before) == expected


@pytest.mark.requirement("SES-081")
async def test_a_worker_frozen_during_a_tool_call_neither_repeats_it_nor_logs_its_result_again(
    cluster: Cluster, client: AsyncAnthropic, db: Database, claimed: Claimed, working: Working, finished: Finished
) -> None:
    async with working() as work:
        work.worker.signal(signal.SIGSTOP)
        cluster.worker()
        await claimed(work.session_id, work.owner)
        work.side.with_name(script.GO).touch()
        await work.follower.idle()
        before = await finished(work.session_id)
        work.worker.signal(signal.SIGCONT)
        await until(lambda: registered(db, work.worker.pid, but=work.owner))
        assert await finished(work.session_id) == before
        # It is a worker like any other again.
        cluster.nodes[-1].signal(signal.SIGKILL)
        await say(client, work.session_id, "once more")
        await work.follower.idle(2)
    await finished(work.session_id)
    assert work.side.read_text() == "ran\nran\n"
