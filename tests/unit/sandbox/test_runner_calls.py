"""What the runner does at the moments that only a fast client can hit."""

import asyncio
from pathlib import Path

import pytest

from managed_agents.sandbox.runner.calls import CANCELLED, Calls
from managed_agents.sandbox.runner.config import Config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("state", "workspace", "spill"):
        (tmp_path / name).mkdir()
    return Config(
        socket=str(tmp_path / "socket"),
        state=str(tmp_path / "state"),
        uid=None,
        workspace=str(tmp_path / "workspace"),
        spill=str(tmp_path / "spill"),
        environment={"PATH": "/usr/bin:/bin"},
        own_pid_namespace=False,
    )


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("name", ["bash", "grep"])
def test_a_call_cancelled_at_any_step_of_its_start_ends_with_an_outcome(config: Config, name: str, steps: int) -> None:
    async def run() -> None:
        calls = Calls(config)
        call = calls.begin("t", name, {"command": "sleep 300", "pattern": "x"}, 60)
        for _ in range(steps):
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(calls.cancel("t"), calls.cancel("t")), 20)
        assert call.done.is_set()
        outcome = calls.journal.outcome("t")
        assert outcome.is_error
        assert CANCELLED.encode() in outcome.content
        await calls.close()

    asyncio.run(run())


@pytest.mark.parametrize("steps", range(6))
def test_a_save_that_meets_a_command_does_not_wait_for_its_end(config: Config, steps: int) -> None:
    async def run() -> None:
        calls = Calls(config)
        call = calls.begin("t", "bash", {"command": "sleep 300"}, 300)
        for _ in range(steps):
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await calls.save_shell()
        assert not call.done.is_set()
        await asyncio.wait_for(calls.cancel("t"), 20)
        assert call.done.is_set()
        await calls.close()

    asyncio.run(run())
