"""One cluster for all cases, and the three ways to run a worker: undisturbed, to be failed, to be killed.

The api is a process; the worker of the exceptions is the worker process's own `run()` in the test's event loop: an exception at a
fault point goes up through all of it, as any bug below the supervisor of turns would, and everything on its way is closed.
"""

import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anthropic import AsyncAnthropic
from pydantic import SecretStr
from sqlalchemy import text

from managed_agents.core import faults
from managed_agents.core.faults import FaultInjected
from managed_agents.core.settings import Settings
from managed_agents.db.engine import Database
from managed_agents.db.listener import WORK_CHANNEL
from managed_agents.processes import worker
from tests.support.cluster import Cluster, history, make_session
from tests.support.following import Event, Follower, following
from tests.support.invariants import check_history, check_rows
from tests.support.waiting import until

DEATH_SECONDS_MAX = 40.0
_RESTS = text("SELECT owner IS NULL AND handled_seq = input_seq AS rests FROM sessions WHERE id = :id")
_JUMP = text("UPDATE sessions SET due_at = clock_timestamp() WHERE id = :id AND owner IS NULL AND due_at > clock_timestamp()")
_RING = text("SELECT pg_notify(:channel, :payload)")


@dataclass
class Run:
    """One session of one case, as its client sees it."""

    rig: "Rig"
    session_id: str
    follower: Follower

    async def send(self, events: Sequence[Any]) -> None:
        await self.rig.client.beta.sessions.events.send(self.session_id, events=events)

    async def say(self, words: str) -> None:
        await self.send([{"type": "user.message", "content": [{"type": "text", "text": words}]}])

    async def waited_for(self, wait: int) -> list[Event]:
        """The calls that the session waits for when it has become idle so many times."""
        events = await self.follower.idle(wait)
        idle = [event for event in events if event["type"] == "session.status_idle"][wait - 1]
        return [event for event in events if event["id"] in idle["stop_reason"].get("event_ids", [])]

    def sandboxes(self) -> list[Path]:
        """Where the sandboxes are that the session has or had. One that is being made is not written down in full yet."""
        homes = [marker.parent for marker in self.rig.cluster.data_dir.glob("sandboxes/*/ready")]
        return [home for home in homes if json.loads((home / "sandbox.json").read_text())["session_id"] == self.session_id]

    def files(self, name: str) -> list[Path]:
        """Files of this name in the workspaces that the session has or had."""
        return [path for home in self.sandboxes() for path in home.glob(f"workspace/{name}")]

    def remove_sandboxes(self) -> None:
        """Kill and remove what the session had: there are more cases than a host gives places."""
        for home in self.sandboxes():
            with suppress(ProcessLookupError, FileNotFoundError):
                os.kill(int((home / "pid").read_text()), signal.SIGKILL)
            shutil.rmtree(home, ignore_errors=True)

    async def appeared(self, name: str) -> Path:
        return (await until(lambda: self.files(name)))[0]

    async def jump_to_retry(self) -> None:
        """Let the time of a scheduled retry come."""
        async with self.rig.db.autocommit() as tx:
            if (await tx.execute(_JUMP, {"id": self.session_id})).rowcount:
                await tx.execute(_RING, {"channel": WORK_CHANNEL, "payload": json.dumps([self.session_id])})


@dataclass
class Rig:
    """What all cases share."""

    cluster: Cluster
    client: AsyncAnthropic
    db: Database
    expected: dict[str, list[Event]] = field(default_factory=dict[str, list[Event]])
    reached: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])

    # Scenario, point, passage, and how the worker ended.
    passed: set[tuple[str, str, int, str]] = field(default_factory=set[tuple[str, str, int, str]])

    @asynccontextmanager
    async def run(self, tools: list[Any], **fields: Any) -> AsyncIterator[Run]:
        """A new session that is followed during the block."""
        session_id = await make_session(self.client, tools=tools, **fields)
        async with following(self.client, session_id) as follower:
            yield Run(self, session_id, follower)

    async def finished(self, run: Run) -> list[Event]:
        """Checks the session at rest from every side; returns its history."""

        async def rests() -> bool:
            async with self.db.autocommit() as tx:
                return (await tx.execute(_RESTS, {"id": run.session_id})).scalar_one()

        await until(rests)
        listed = await history(self.client, run.session_id)
        check_history(listed)
        await check_rows(self.db, run.session_id, listed)
        assert run.follower.events == listed
        return listed

    # Workers

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[None]:
        """A worker in this process during the block."""
        ending = anyio.CancelScope()
        async with anyio.create_task_group() as group:
            group.start_soon(partial(worker.run, self._settings(), until=_until(ending)))
            yield
            ending.cancel()

    async def fail_a_worker(self, point: str, nth: int) -> None:
        """Run a worker in this process until the fault point's exception has ended it."""
        faults.arm(point, "raise", nth=nth)
        try:
            with anyio.fail_after(DEATH_SECONDS_MAX):
                await worker.run(self._settings(), until=_until(anyio.CancelScope()))
        except BaseException as error:
            if not _injected(error):
                raise
        finally:
            faults.disarm()

    async def kill_a_worker(self, point: str, nth: int) -> None:
        """Run a worker process until the fault point has killed it."""
        doomed = self.cluster.worker(f"{point}:kill:{nth}")
        assert await doomed.ended(seconds=DEATH_SECONDS_MAX) == -signal.SIGKILL

    async def disturbed(self, drive: Callable[[], Awaitable[None]], end_a_worker: Callable[[], Awaitable[None]]) -> None:
        """The client does its part while one worker ends and another one goes on."""
        async with anyio.create_task_group() as group:
            driven = anyio.Event()

            async def client() -> None:
                await drive()
                driven.set()

            group.start_soon(client)
            await end_a_worker()
            async with self.worker():
                await driven.wait()

    def _settings(self) -> Settings:
        values: dict[str, Any] = {name.removeprefix("MANAGED_AGENTS_").lower(): v for name, v in self.cluster.settings.items()}
        values["database_url"] = SecretStr(values["database_url"])
        return Settings(**values)


def _until(ending: anyio.CancelScope) -> worker.Until:
    """What a signal does to a worker's own process: cancel its work, and let it clean up."""

    async def until(work: Callable[[], Awaitable[None]], drain: Callable[[], Awaitable[None]], *, drain_seconds: float) -> None:
        with ending:
            await work()

    return until


def _injected(error: BaseException) -> bool:
    """Whether nothing but the fault point's exception is in it."""
    if isinstance(error, BaseExceptionGroup):
        return all(_injected(inner) for inner in error.exceptions)
    return isinstance(error, FaultInjected)
