"""Commands that use up what there is: each meets its bound, is told which, and leaves the sandbox usable."""

import pytest

from managed_agents.sandbox import disk
from managed_agents.sandbox.backend import Sandbox, SandboxError
from tests.hostile.conftest import Run, Say
from tests.integration.sandbox.contract import text

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.mark.requirement("ENV-080")
@pytest.mark.parametrize(
    "bomb",
    [
        ":(){ :|:& };:; sleep 0.5",
        "python3 -c 'import os\nwhile True: os.fork()'",
        "for i in $(seq 100); do setsid nohup sleep 1000 >/dev/null & done; sleep 0.2; false",
    ],
    ids=["shell", "fork", "detached"],
)
async def test_a_fork_bomb_meets_the_process_limit(run: Run, bomb: str) -> None:
    outcome = await run("bash", command=bomb, timeout_ms=1500)
    assert "Process limit reached: the sandbox may have 64 processes and threads." in text(outcome)
    await run("bash", restart=True)
    # What still sleeps takes most of the bound. File tools end it when they need a process.
    assert not (await run("write", file_path="after-bomb", content="x")).is_error
    await run("bash", command="kill -9 -1")


async def test_threads_count_as_processes(say: Say) -> None:
    script = "import threading, time\nfor i in range(200): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    said = await say(f"python3 -c '{script}'")
    assert "can't start new thread" in said
    assert "Process limit reached" in said


@pytest.mark.parametrize(
    "hog",
    [
        "python3 -c 'x = bytearray(400_000_000)'",
        "x=$(head -c 400000000 /dev/zero | tr '\\0' x)",
        "node -e 'a = []; while (1) a.push(Buffer.alloc(1e7, 1))'",
    ],
    ids=["program", "shell", "node"],
)
async def test_memory_meets_its_limit(run: Run, hog: str) -> None:
    outcome = await run("bash", command=hog)
    assert outcome.is_error
    assert "Memory limit reached: the sandbox has 128 MiB. A process was killed." in text(outcome)


async def test_memory_of_background_processes_is_freed_for_the_next_call(run: Run, say: Say) -> None:
    await say(
        "for i in 1 2 3; do (setsid python3 -c 'x = bytearray(60_000_000); import time; time.sleep(1000)' &) ; done; sleep 0.5"
    )
    assert not (await run("write", file_path="after-memory", content="x")).is_error
    await run("bash", command="kill -9 -1")


async def test_a_file_tool_that_needs_too_much_memory_is_told_so(run: Run, say: Say) -> None:
    await say("truncate -s 300M /workspace/huge.txt")
    outcome = await run("grep", pattern="a{1000}", path="/workspace/huge.txt")
    read = await run("read", file_path="/workspace/huge.txt")
    for answer in (outcome, read):
        assert len(text(answer)) < 2000
    await say("rm -f /workspace/huge.txt")


if disk.supported():

    async def test_the_disk_meets_its_limit(run: Run, say: Say, attacker: Sandbox) -> None:
        full = await run("bash", command="cat /dev/zero > /tmp/fill")
        assert "No space left on device" in text(full)
        assert "Disk full: the session's disk has 64 MiB. Delete files before writing more." in text(full)
        refused = await run("write", file_path="x", content="y" * 300_000)
        assert refused.is_error
        assert "Disk full: the session's disk has 64 MiB." in text(refused)
        with pytest.raises(SandboxError):
            await attacker.put("/workspace/big", b"z" * 2_000_000, "agent")
        # A shell that must write (a here document) says what is wrong, and removing needs no room.
        assert "Disk full" not in await say("rm /tmp/fill; echo removed")

    async def test_many_small_files_meet_the_limit(run: Run, say: Say) -> None:
        made = await run(
            "bash",
            command="mkdir -p /tmp/many && cd /tmp/many && python3 -c '\nfor i in range(10**7): open(str(i), \"w\").close()'",
        )
        assert "Disk full" in text(made)
        await say("cd /workspace; rm -r /tmp/many")


async def test_open_files_meet_their_limit(run: Run) -> None:
    outcome = await run("bash", command="python3 -c 'kept = [open(\"/dev/null\") for _ in range(1000)]'")
    assert "Open files limit reached: a process may have 256 open." in text(outcome)
    raised = await run("bash", command="ulimit -n 100000 && echo more")
    assert raised.is_error
    assert "more" not in text(raised).split()


async def test_endless_output_is_cut_and_the_command_ends_at_its_time(run: Run) -> None:
    outcome = await run("bash", command="yes", timeout_ms=700)
    said = text(outcome)
    assert outcome.is_error
    assert len(said) < 70_000
    assert "the first 2097152 bytes are in " in said
    assert said.endswith("Command timed out after 0.7 s. It was killed and the shell restarted.")


async def test_binary_output_is_made_text(run: Run) -> None:
    for command in ("head -c 50000 /dev/urandom", "head -c 300000 /dev/urandom", "printf '\\0\\377\\376\\033[2J\\r\\n'"):
        outcome = await run("bash", command=command)
        assert not outcome.is_error
        text(outcome).encode()  # no lone surrogates


async def test_output_of_a_process_left_behind_does_not_hold_the_next_call(say: Say) -> None:
    await say("setsid yes left-behind & until pgrep -x yes >/dev/null; do :; done")
    assert "mine\n" in await say("pkill yes; echo mine")
