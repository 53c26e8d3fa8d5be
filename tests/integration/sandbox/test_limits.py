"""Bounds that the docker backend enforces."""

from collections.abc import AsyncIterator

import anyio
import pytest

from managed_agents.sandbox import disk
from managed_agents.sandbox.backend import LimitHit, Sandbox
from tests.integration.sandbox.contract import KINDS, MIB, SIZED, Bench, new_call, only, text

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.fixture(scope="module")
async def small(bench: Bench) -> AsyncIterator[Sandbox]:
    sandbox = await bench.backend().provision(bench.spec(memory_bytes=96 * MIB, disk_bytes=64 * MIB, pids=48))
    yield sandbox
    await sandbox.destroy()


@only("docker", "docker-volume")
async def test_memory_is_bounded_and_the_runner_survives(small: Sandbox) -> None:
    with anyio.fail_after(60):
        hog = await small.execute(new_call("bash", command="python3 -c 'x = bytearray(300_000_000)'"))
        assert hog.is_error
        own = await small.execute(new_call("bash", command="x=$(head -c 300000000 /dev/zero | tr '\\0' x)"))
        assert own.is_error
        assert text(await small.execute(new_call("bash", command="echo alive"))) == "alive\n"


@only("docker", "docker-volume")
async def test_a_fork_bomb_ends(small: Sandbox) -> None:
    with anyio.fail_after(60):
        bomb = ":(){ :|:& };:; sleep 1"
        await small.execute(new_call("bash", command=bomb, timeout_ms=2000))
        await small.execute(new_call("bash", command="for i in $(seq 200); do setsid sleep 300 & done", timeout_ms=3000))
        await small.execute(new_call("bash", restart=True))
        assert not (await small.execute(new_call("glob", pattern="*"))).is_error
        assert text(await small.execute(new_call("bash", command="echo alive"))) == "alive\n"
        # What sleeps still takes most of the bound; the next test needs it.
        await small.execute(new_call("bash", command="kill -9 -1"))


if disk.supported():

    @only("docker")
    async def test_disk_is_bounded(small: Sandbox) -> None:
        with anyio.fail_after(60):
            full = await small.execute(new_call("bash", command="cat /dev/zero > /tmp/fill"))
            assert "No space left" in text(full)
            assert "No space left" in text(await small.execute(new_call("write", file_path="x", content="y" * 100_000)))
            with pytest.raises(LimitHit) as hit:
                await small.put("/workspace/big", b"z" * 5_000_000, "agent")
            assert hit.value.which == "disk"
            spilled = await small.execute(new_call("bash", command="seq 1 200000"))
            assert "could not be kept" in text(spilled)
            assert spilled.spill_path is None
            await small.execute(new_call("bash", command="rm /tmp/fill"))


@only(*(kind for kind in KINDS if kind not in SIZED))  # where no sized disk is, the runner measures
async def test_a_quota_ends_what_fills_the_disk_and_leaves_room_for_deleting(bench: Bench) -> None:
    sandbox = await bench.backend().provision(bench.spec(disk_bytes=24 * MIB))
    with anyio.fail_after(90):
        await sandbox.execute(new_call("bash", command="cd /workspace; head -c 20000000 /dev/zero > kept"))
        full = await sandbox.execute(new_call("bash", command="while :; do head -c 9000000 /dev/zero >> fill; sleep 0.1; done"))
        assert full.is_error
        assert "Disk quota exceeded" in text(full)
        refused = await sandbox.execute(new_call("write", file_path="x", content="y"))
        assert refused.is_error
        assert text(refused).startswith("write: Disk quota exceeded: the session's files take ")
        with pytest.raises(LimitHit) as hit:
            await sandbox.put("/workspace/big", b"z", "agent")
        assert hit.value.which == "disk"
        # What is over the bound may run as long as it does not add to it.
        assert text(await sandbox.execute(new_call("bash", command="sleep 3; rm fill; ls"))) == "kept\n"
        assert not (await sandbox.execute(new_call("write", file_path="x", content="y"))).is_error
    await sandbox.destroy()


@pytest.mark.requirement("ENV-043")
@only("docker", "docker-volume")
async def test_there_is_no_network_and_no_way_to_more(small: Sandbox) -> None:
    script = """
        ls /sys/class/net; touch /etc/x /usr/x 2>&1
        curl -sS --max-time 2 http://172.17.0.1/ 2>&1; getent hosts localhost.example || echo nodns
        unshare -U true 2>&1; unshare -m true 2>&1
        python3 - <<'END'
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
calls = {'io_uring_setup': 425, 'keyctl': 250, 'bpf': 321, 'mount': 165, 'userfaultfd': 323}
for name, number in calls.items():
    print(name, libc.syscall(number, 0, 0, 0, 0, 0), ctypes.get_errno())
END
    """
    shown = text(await small.execute(new_call("bash", command=script)))
    assert shown.startswith("lo\n")
    assert shown.count("Read-only file system") == 2
    assert "nodns" in shown
    assert shown.count("Operation not permitted") >= 2
    for name in ("io_uring_setup", "keyctl", "bpf", "mount", "userfaultfd"):
        assert f"{name} -1 1\n" in shown


@pytest.mark.requirement("ENV-906")
@only("docker", "docker-volume")
async def test_ordinary_work_is_possible(bench: Bench) -> None:
    sandbox = await bench.backend().provision(bench.spec())
    script = "python3 -m venv /tmp/v && git init -q r && cd r && node -e 'console.log(1+1)' && touch a && "
    script += "git add a && git -c user.name=a -c user.email=a@b commit -qm x && whoami && pytest --version"
    with anyio.fail_after(90):
        outcome = await sandbox.execute(new_call("bash", command=script))
    assert not outcome.is_error
    assert "agent" in text(outcome)
    await sandbox.destroy()
