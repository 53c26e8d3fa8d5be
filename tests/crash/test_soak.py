"""Soak: many sessions with many calls each, over three workers of which one is killed every few seconds; all of them finish.

The sizes are settings of the environment; `make test` runs a small one. In the middle every connection to Postgres is ended.
With a Postgres of its own that one is stopped, or killed, and started again every few seconds instead.
"""

import os
import random
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from anthropic import AsyncAnthropic
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.db.engine import Database
from managed_agents.scripted_model import Reply, Request, tool_use
from tests.crash.conftest import Finished
from tests.support.cluster import Cluster, make_session, say
from tests.support.postgres import OwnPostgres
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

WORKERS = 3
RESTART_EVERY_SECONDS = (5.0, 15.0)
_LEFT = text("SELECT count(*) FROM sessions WHERE owner IS NOT NULL OR input_seq > handled_seq OR due_at IS NOT NULL")
_CUT = text(
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name <> 'test'"
)


@dataclass(frozen=True)
class Size:
    """How much, and how long it may take."""

    sessions: int
    calls: int
    kill_every_seconds: tuple[float, float]
    seconds_max: float


SMALL = Size(12, 4, (1.0, 1.5), 90)


def full(sandbox: str, sessions: int) -> Size:
    """The size of a full soak; MANAGED_AGENTS_SOAK_LOCAL and MANAGED_AGENTS_SOAK_DOCKER change the number of sessions."""
    wanted = int(os.environ.get(f"MANAGED_AGENTS_SOAK_{sandbox.upper()}", sessions))
    return Size(wanted, 30, (3.0, 8.0), 3000)


def counting(calls: int) -> Any:
    """Each call adds a line; the last one counts them."""

    def reply(request: Request) -> Reply:
        if request.round < calls - 1:
            return tool_use("bash", command=f"echo {request.round} >> /workspace/side")
        return tool_use("bash", command="cat /workspace/side") if request.round == calls - 1 else "All done."

    return reply


async def soak(
    cluster: Cluster,
    client: AsyncAnthropic,
    db: Database,
    finished: Finished,
    size: Size,
    postgres: OwnPostgres | None = None,
) -> dict[str, Any]:
    """Run it; returns figures. `postgres` is restarted again and again, every second time after a kill -9."""
    chance = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    cluster.model.reply = counting(size.calls)
    await cluster.api()
    workers = [cluster.worker() for _ in range(WORKERS)]
    session_ids = [await make_session(client) for _ in range(size.sessions)]
    started = time.monotonic()
    kills = restarts = cut = 0
    for session_id in session_ids:
        await say(client, session_id, "work")

    async def kill() -> None:
        nonlocal kills
        while True:
            await anyio.sleep(chance.uniform(*size.kill_every_seconds))
            victim = chance.randrange(WORKERS)
            await workers[victim].kill()
            workers[victim] = cluster.worker()
            kills += 1

    async def restart(own: OwnPostgres) -> None:
        nonlocal restarts
        while True:
            await anyio.sleep(chance.uniform(*RESTART_EVERY_SECONDS))
            with anyio.CancelScope(shield=True):
                await (own.crash() if restarts % 2 else own.stop())
                await own.start()
            restarts += 1

    async def left() -> int:
        try:
            async with db.autocommit() as tx:
                return (await tx.execute(_LEFT)).scalar_one()
        except (SQLAlchemyError, OSError):
            if postgres is None:
                raise
            return size.sessions

    async with anyio.create_task_group() as group:
        group.start_soon(kill)
        if postgres is not None:
            group.start_soon(restart, postgres)
        await until(lambda: _at_most(left(), size.sessions // 2), seconds=size.seconds_max)
        if postgres is None:
            async with db.autocommit() as tx:
                cut = (await tx.execute(_CUT)).scalar_one()
        await until(lambda: _at_most(left(), 0), seconds=size.seconds_max)
        group.cancel_scope.cancel()
    seconds = time.monotonic() - started
    again = unreached = 0
    for session_id in session_ids:
        listed = await finished(session_id)
        results = [event for event in listed if event["type"] == "agent.tool_result"]
        assert len(results) == size.calls
        assert results[-1]["content"][0]["text"].split() == [str(number) for number in range(size.calls - 1)]
        told = [event["error"] for event in listed if event["type"] == "session.error"]
        # The scripted model shares the machine with all of this, and may be slow to answer the phone.
        assert not [error for error in told if not error["message"].startswith("No connection to the model endpoint")], told
        unreached += len(told)
        again += sum(event["type"] == "span.model_request_end" and event["is_error"] for event in listed)
    return {
        "sessions": size.sessions,
        "calls": size.sessions * size.calls,
        "seconds": round(seconds, 1),
        "calls per second": round(size.sessions * size.calls / seconds, 1),
        "workers killed": kills,
        "connections cut": cut,
        "restarts of Postgres": restarts,
        "model requests asked again": again,
        "model not reached at first": unreached,
        "peak MiB of this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


async def _at_most(count: Any, most: int) -> bool:
    return await count <= most


async def test_a_small_soak(cluster: Cluster, client: AsyncAnthropic, db: Database, finished: Finished) -> None:
    print(await soak(cluster, client, db, finished, SMALL))


@pytest.mark.full
@pytest.mark.timeout(3600)
async def test_five_hundred_sessions_of_thirty_calls(
    cluster: Cluster, client: AsyncAnthropic, db: Database, finished: Finished
) -> None:
    report("local", await soak(cluster, client, db, finished, full("local", 500)))


@pytest.mark.full
@pytest.mark.docker
@pytest.mark.timeout(3600)
async def test_fifty_sessions_in_containers(cluster: Cluster, client: AsyncAnthropic, db: Database, finished: Finished) -> None:
    cluster.settings |= {"MANAGED_AGENTS_SANDBOX": "docker", "MANAGED_AGENTS_SANDBOX_MEMORY_BYTES": str(256 * 1024**2)}
    report("docker", await soak(cluster, client, db, finished, full("docker", 50)))


def report(sandbox: str, figures: dict[str, Any]) -> None:
    path = Path(".state") / f"soak-{sandbox}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(f"{name}: {value}" for name, value in figures.items()) + "\n")
    print(path.read_text())
