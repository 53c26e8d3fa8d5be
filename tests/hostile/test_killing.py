"""Commands that kill: the shell, the tools' process, the runner, pid 1. The session goes on, or is told what happened."""

import pytest

from tests.hostile.conftest import Run, Say
from tests.integration.sandbox.contract import text

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


async def test_the_shell_may_be_killed(run: Run) -> None:
    for how in ("kill -9 $$", "exec false", "kill -STOP $$", "exit 3"):
        outcome = await run("bash", command=how, timeout_ms=1000)
        assert outcome.is_error
        assert "restarted" in text(outcome)


async def test_what_commands_may_not_kill(say: Say) -> None:
    said = await say("kill -9 1; kill -9 $(pgrep -f 'runner import main' | head -1); kill -STOP 1; echo done")
    assert said.count("Operation not permitted") == 3


async def test_killing_everything_ends_only_the_commands(say: Say) -> None:
    await say("kill -9 -1")
    assert await say("echo alive") == "alive\n"


async def test_the_tools_process_may_be_killed(run: Run, say: Say) -> None:
    """Stopping it costs ten seconds of waiting: the contract suite does that with a shorter deadline."""
    for _ in range(3):
        await say("pkill -KILL -f zygote; true")
        assert not (await run("write", file_path="t", content="x")).is_error


async def test_the_shell_cannot_forge_its_report(say: Say, run: Run) -> None:
    # It holds the pipes of the driver: what it writes there is its own status, nothing of the runner's.
    said = await say(
        "ls -l /proc/$$/fd | grep -c pipe; for f in 3 4 5 6 7 8 9; do printf 'B0\\0' >/proc/$$/fd/$f; done 2>/dev/null"
    )
    assert said
    await run("bash", restart=True)
