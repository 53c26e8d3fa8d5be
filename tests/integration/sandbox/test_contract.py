"""Life of a sandbox: who asks again attaches, who is late is refused, and the end leaves nothing."""

import hashlib
import io
import os
import signal
import tarfile
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

from managed_agents.sandbox.backend import (
    Call,
    CallUnknown,
    FileChanging,
    PathNotFound,
    Sandbox,
    SandboxBusy,
    SandboxError,
    SandboxGone,
    SandboxKey,
    StaleEpoch,
)
from managed_agents.sandbox.runner.journal import INTERRUPTED
from tests.integration.sandbox.contract import ISOLATED, Bench, new_call, only, text

pytestmark = [pytest.mark.anyio, pytest.mark.docker]
Run = Callable[..., Any]


@pytest.fixture
async def sandbox(bench: Bench) -> AsyncIterator[Sandbox]:
    """A sandbox of the test's own."""
    made = await bench.backend().provision(bench.spec())
    yield made
    await made.destroy()


async def test_a_new_owner_attaches_and_nothing_runs_twice(bench: Bench, sandbox: Sandbox) -> None:
    call = Call("t", 1, "bash", {"command": "echo ran >> log; until [ -e go ]; do sleep 0.02; done; cat log"}, 60)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(sandbox.execute, call)
            while "log" not in text(await sandbox.execute(new_call("glob", pattern="*"))):
                pass
            group.cancel_scope.cancel()  # the first owner dies
        second = await bench.backend().attach(sandbox.id)
        outcomes: list[str] = []

        async def again() -> None:
            outcomes.append(text(await second.execute(Call("t", 2, "bash", call.input, 60))))

        async def collect() -> None:
            outcomes.append(text(await second.collect("t", 2)))

        async with anyio.create_task_group() as group:
            group.start_soon(again)
            group.start_soon(collect)
            await second.execute(Call("go", 2, "write", {"file_path": "go", "content": ""}, 60))
        assert outcomes == ["ran\n", "ran\n"]
        # Kept until acknowledged, then unknown, and still not run again.
        assert text(await second.execute(Call("t", 2, "bash", call.input, 60))) == "ran\n"
        await second.ack("t")
        await second.ack("t")
        with pytest.raises(CallUnknown):
            await second.collect("t", 2)
        with pytest.raises(CallUnknown):
            await second.execute(Call("t", 2, "bash", call.input, 60))
        await second.aclose()


async def test_what_is_halted_does_not_run_and_starts_again_with_its_files(bench: Bench, sandbox: Sandbox) -> None:
    await sandbox.execute(new_call("bash", command="echo kept > file"))
    backend = bench.backend()
    for _ in range(2):  # it runs; it does not
        assert await backend.halt(sandbox.id)
        assert [found.running for found in await backend.list() if found.id == sandbox.id] == [False]
    assert not [mount for mount in bench.traces()["mounts"] if sandbox.id in mount and "/root" not in mount]
    assert not await backend.halt("sbx_of_nobody")
    again = await backend.attach(sandbox.id)
    assert text(await again.execute(new_call("bash", command="cat file"))) == "kept\n"
    await again.aclose()


async def test_a_lower_epoch_is_refused(sandbox: Sandbox) -> None:
    await sandbox.execute(Call("a", 5, "bash", {"command": "true"}, 60))
    with pytest.raises(StaleEpoch):
        await sandbox.execute(Call("b", 4, "bash", {"command": "touch stale"}, 60))
    with pytest.raises(StaleEpoch):
        await sandbox.collect("a", 4)
    with pytest.raises(StaleEpoch):
        await sandbox.cancel("a", 4)
    assert text(await sandbox.execute(Call("c", 5, "glob", {"pattern": "stale"}, 60))) == "No files found"


async def test_cancel_ends_a_running_call(bench: Bench, sandbox: Sandbox) -> None:
    call = Call("slow", 1, "bash", {"command": "echo started > mark; sleep 300"}, 60)
    got: list[Any] = []

    async def execute() -> None:
        got.append(await sandbox.execute(call))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(execute)
            while "mark" not in text(await sandbox.execute(Call(new_call("x").tool_use_id, 1, "glob", {"pattern": "m*"}))):
                pass
            await sandbox.cancel("slow", 1)
            await sandbox.ack("slow")  # it has ended
    assert got[0].is_error
    assert text(got[0]) == "Tool execution was interrupted."
    assert text(await sandbox.execute(Call("n", 1, "bash", {"command": "echo alive"}, 60))) == "alive\n"
    await sandbox.cancel("n", 1)  # as it was
    assert text(await sandbox.execute(Call("n", 1, "bash", {"command": "echo alive"}, 60))) == "alive\n"


async def test_a_call_cancelled_before_it_came_never_runs(bench: Bench, sandbox: Sandbox) -> None:
    with anyio.fail_after(30):
        with pytest.raises(CallUnknown):
            await sandbox.cancel("late", 1)
        with pytest.raises(CallUnknown):
            await sandbox.execute(Call("late", 1, "bash", {"command": "touch late"}, 60))
        assert "late" not in text(await sandbox.execute(Call("look", 1, "bash", {"command": "ls"}, 60)))


@pytest.mark.requirement("ENV-037")
async def test_stop_keeps_files_outcomes_and_the_epoch(bench: Bench, sandbox: Sandbox) -> None:
    kept = Call("kept", 3, "bash", {"command": "echo durable > f; cat f"}, 60)
    await sandbox.execute(kept)
    running = Call("running", 3, "bash", {"command": "echo x >> runs; sleep 300"}, 600)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(_until_gone, sandbox, running)
            while "runs" not in text(await sandbox.execute(Call(new_call("x").tool_use_id, 3, "glob", {"pattern": "r*"}))):
                pass
            await sandbox.stop()
        assert [found.running for found in await bench.backend().list() if found.id == sandbox.id] == [False]
        again = await bench.backend().attach(sandbox.id)
        assert text(await again.collect("kept", 3)) == "durable\n"
        assert text(await again.execute(kept)) == "durable\n"
        interrupted = await again.execute(running)
        assert interrupted.is_error
        assert text(interrupted) == INTERRUPTED
        assert text(await again.execute(Call("wc", 3, "bash", {"command": "wc -l < runs; cat f"}, 60))) == "1\ndurable\n"
        with pytest.raises(StaleEpoch):
            await again.collect("kept", 2)
        await again.aclose()


async def _until_gone(sandbox: Sandbox, call: Call) -> None:
    with pytest.raises(SandboxGone):
        await sandbox.execute(call)


@pytest.mark.requirement("ENV-036")
async def test_a_dead_sandbox_is_gone(bench: Bench) -> None:
    sandbox = await bench.backend().provision(bench.spec())
    await sandbox.destroy()
    with anyio.fail_after(20):
        with pytest.raises(SandboxGone):
            await sandbox.execute(new_call("bash", command="true"))
        with pytest.raises(SandboxGone):
            await bench.backend().attach(sandbox.id)
    await sandbox.destroy()


async def test_provisioning_twice_attaches(bench: Bench, sandbox: Sandbox) -> None:
    await sandbox.execute(new_call("write", file_path="here", content=""))
    second = await bench.backend().provision(bench.spec(sandbox.id))
    assert "here" in text(await second.execute(new_call("glob", pattern="here")))
    await second.aclose()


async def test_attach_takes_the_highest_generation(bench: Bench, sandbox: Sandbox) -> None:
    second = await bench.backend().provision(bench.spec(sandbox.id, generation=2))
    attached = await bench.backend().attach(sandbox.id)
    assert attached.generation == 2
    await attached.aclose()

    async def all_but_the_second() -> set[SandboxKey]:
        return {(found.id, found.generation) for found in await bench.backend().list()} - {(sandbox.id, 2)}

    assert await bench.backend().collect_orphans(all_but_the_second) == [(sandbox.id, 2)]
    await second.aclose()


async def test_one_that_cannot_be_removed_keeps_no_other_from_it(bench: Bench) -> None:
    directory = bench.directory / "data" / "sandboxes"
    directory.mkdir(parents=True, exist_ok=True)
    stray, orphan = directory / "aaa.1", directory / "zzz.1"
    stray.touch()  # no directory: nothing that a sandbox would leave, and nothing that can be removed like one
    orphan.mkdir()

    async def others() -> set[SandboxKey]:
        return {(found.id, found.generation) for found in await bench.backend().list()} | {("sbx_shared", 1)}

    try:
        assert await bench.backend().collect_orphans(others) == [("zzz", 1)]
    finally:
        stray.unlink()
    assert not orphan.exists()


async def test_a_half_made_sandbox_is_made_anew(bench: Bench) -> None:
    spec = bench.spec()
    home = bench.directory / "data" / "sandboxes" / f"{spec.id}.1"
    home.mkdir(parents=True)
    (home / "disk.img").write_bytes(b"half")
    sandbox = await bench.backend().provision(spec)
    assert text(await sandbox.execute(new_call("bash", command="echo ok"))) == "ok\n"
    await sandbox.destroy()


async def test_put_and_get(sandbox: Sandbox) -> None:
    data = os.urandom(9 * 1024 * 1024 + 7)

    async def pieces() -> AsyncIterator[bytes]:
        for offset in range(0, len(data), 700_000):
            yield data[offset : offset + 700_000]

    with anyio.fail_after(60):
        await sandbox.put("/workspace/deep/er/data.bin", pieces(), "agent", 0o600)
        got = b"".join([chunk async for chunk in sandbox.get("/workspace/deep/er/data.bin")])
        assert got == data
        owner = text(await sandbox.execute(new_call("bash", command="stat -c '%a %u' deep/er/data.bin; id -u")))
        assert owner.split()[:1] == ["600"]
        assert owner.split()[1] == owner.split()[2]
        [entry] = await sandbox.listing("/workspace/deep")
        assert (entry.path, entry.size) == ("er/data.bin", len(data))
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
        with pytest.raises(PathNotFound):
            _ = [chunk async for chunk in sandbox.get("/workspace/none")]
        assert await sandbox.listing("/mnt/session/outputs") == []


async def test_what_is_taken_is_as_it_was_at_one_moment(sandbox: Sandbox) -> None:
    async def took(path: str, *, changing: bool = False) -> bytes:
        return b"".join([chunk async for chunk in sandbox.take("/mnt/session/outputs", path, changing=changing)])

    await sandbox.put("/mnt/session/outputs/in/a.txt", b"a" * 3_000_000, "agent")
    await sandbox.put("/workspace/secret.txt", b"no", "agent")
    script = 'cd "$1" && ln -s ../../../workspace/secret.txt link && ln -s ../../../workspace dir && mkfifo pipe && '
    script += "truncate -s 1T huge"
    place = text(
        await sandbox.execute(new_call("bash", command="cd /mnt/session/outputs 2>/dev/null || cd ../session/outputs; pwd"))
    )
    made = await sandbox.execute(new_call("bash", command=f"f() {{ {script}; }}; f {place.strip()}"))
    assert not made.is_error
    with anyio.fail_after(60):
        assert await took("in/a.txt") == b"a" * 3_000_000
        for path in ("link", "dir/secret.txt", "pipe", "../../../workspace/secret.txt", "in", "in//a.txt", "none"):
            with pytest.raises(SandboxError):
                await took(path)
        listed = {entry.path: entry for entry in await sandbox.listing("/mnt/session/outputs")}
        assert set(listed) == {"in/a.txt", "huge"}
        assert (listed["huge"].sha256, listed["huge"].size) == ("", 1 << 40)
        (again,) = [entry for entry in await sandbox.listing("/mnt/session/outputs", digests=False) if entry.path == "in/a.txt"]
        assert (again.sha256, again.signature) == ("", listed["in/a.txt"].signature)
        # Written to while it is read: the reader is held back by the window, so the writer is surely faster.
        reading = sandbox.take("/mnt/session/outputs", "huge")
        await anext(reading)
        await sandbox.execute(new_call("bash", command=f"truncate -s 8M {place.strip()}/huge"))
        with pytest.raises(FileChanging):
            _ = [chunk async for chunk in reading]


@pytest.mark.requirement("ENV-034")
@only(*ISOLATED)
async def test_uploads_are_read_only_for_commands(sandbox: Sandbox) -> None:
    await sandbox.put("/mnt/session/uploads/a/b.txt", b"given", "root", 0o444)
    # In a mapped local sandbox bash sees the machine's paths: its workspace lies beside `session`.
    script = """
        cd /mnt/session/uploads 2>/dev/null || cd ../session/uploads
        cat a/b.txt; echo x > a/b.txt; rm -f a/b.txt; mv a c; touch new; cat a/b.txt
    """
    shown = text(await sandbox.execute(new_call("bash", command=script)))
    assert shown.startswith("given")
    assert "Permission denied" in shown
    for path in ("/workspace/x", "/mnt/session/uploads/../../../workspace/x", "/etc/x", "relative"):
        with pytest.raises(SandboxError):
            await sandbox.put(path, b"", "root")


async def test_uploads_can_be_removed(sandbox: Sandbox) -> None:
    for name in ("gone.txt", "kept.txt"):
        await sandbox.put(f"/mnt/session/uploads/r/{name}", b"given", "root", 0o444)
    for _ in range(2):
        await sandbox.remove("/mnt/session/uploads/r/gone.txt")
    await sandbox.remove("/mnt/session/uploads/never/was.txt")
    assert "kept.txt" in [entry.path for entry in await sandbox.listing("/mnt/session/uploads/r")]
    assert "gone.txt" not in [entry.path for entry in await sandbox.listing("/mnt/session/uploads/r")]
    await sandbox.put("/workspace/mine.txt", b"", "agent")
    for path in ("/workspace/mine.txt", "/mnt/session/uploads/../../../workspace/mine.txt", "/mnt/session/uploads/r"):
        with pytest.raises(SandboxError):
            await sandbox.remove(path)
    assert [entry.path for entry in await sandbox.listing("/workspace")] == ["mine.txt"]


async def test_an_upload_can_lie_where_a_removed_ones_directory_was(bench: Bench, sandbox: Sandbox) -> None:
    uploads = "/mnt/session/uploads"
    for path in ("a/b/c.txt", "a/d.txt"):
        await sandbox.put(f"{uploads}/{path}", b"given", "root", 0o444)
    with pytest.raises(SandboxError):
        await sandbox.put(f"{uploads}/a", b"", "root", 0o444)  # of which nothing is left
    await sandbox.remove(f"{uploads}/a/b/c.txt")
    await sandbox.put(f"{uploads}/a/b", b"file", "root", 0o444)
    for _ in range(2):
        await sandbox.remove(f"{uploads}/a/b")
    await sandbox.remove(f"{uploads}/a/d.txt")
    await sandbox.put(f"{uploads}/a", b"file", "root", 0o444)
    assert [entry.path for entry in await sandbox.listing(uploads)] == ["a"]
    if bench.kind != "local-mapped":  # where commands see the host's paths
        assert text(await sandbox.execute(new_call("bash", command=f"ls -A {uploads}"))) == "a\n"


async def test_an_upload_may_have_as_long_a_name_as_there_is(sandbox: Sandbox) -> None:
    name = "名" * 84 + ".md"
    assert len(name.encode()) == 255
    await sandbox.put(f"/mnt/session/uploads/{name}", b"root's", "root", 0o444)
    await sandbox.put(f"/workspace/{name}", b"own", "agent")
    for directory, content in (("/mnt/session/uploads", b"root's"), ("/workspace", b"own")):
        assert b"".join([chunk async for chunk in sandbox.get(f"{directory}/{name}")]) == content


async def test_snapshot_holds_the_files(sandbox: Sandbox) -> None:
    await sandbox.execute(new_call("write", file_path="in/side.txt", content="text"))
    await sandbox.execute(new_call("bash", command="mkfifo pipe; ln -s /etc/passwd link"))
    raw = b"".join([chunk async for chunk in sandbox.snapshot()])
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        names = archive.getnames()
    assert any(name.endswith("workspace/in/side.txt") for name in names)


async def test_too_many_unacknowledged_outcomes_make_it_busy(bench: Bench, sandbox: Sandbox) -> None:
    with anyio.fail_after(100):
        for number in range(1000):
            await sandbox.execute(Call(f"u{number}", 1, "bash", {"command": ":"}, 60))
        with pytest.raises(SandboxBusy):
            await sandbox.execute(Call("one more", 1, "bash", {"command": ":"}, 60))
        await sandbox.ack("u0")
        await sandbox.execute(Call("one more", 1, "bash", {"command": ":"}, 60))


# Mapped there is no pid namespace, and without root the runner has the commands' own uid.
@only("docker", "docker-volume", *(("local",) if os.geteuid() == 0 else ()))
async def test_commands_that_kill_all_they_can_do_no_harm(sandbox: Sandbox) -> None:
    with anyio.fail_after(30):
        await sandbox.execute(new_call("bash", command="kill -9 -1"))
        assert text(await sandbox.execute(new_call("bash", command="echo alive"))) == "alive\n"
        assert (await sandbox.execute(new_call("glob", pattern="*"))).is_error is False
        await sandbox.execute(new_call("bash", command="pkill -STOP -u $(id -u) python3; true"))
        assert not (await sandbox.execute(Call("stuck", 1, "glob", {"pattern": "*"}, 4.0))).is_error


@only("docker", "docker-volume", *(("local",) if os.geteuid() == 0 else ()))
async def test_calls_at_the_same_time_survive_the_end_of_the_process_that_serves_them(sandbox: Sandbox) -> None:
    async def look(number: int) -> None:
        assert not (await sandbox.execute(new_call("glob", pattern=f"*{number}"))).is_error

    with anyio.fail_after(60):
        for _ in range(5):
            await sandbox.execute(new_call("bash", command="kill -9 -1"))
            async with anyio.create_task_group() as group:
                for number in range(6):
                    group.start_soon(look, number)


async def test_what_a_command_inherits(bench: Bench, sandbox: Sandbox) -> None:
    script = "env; id; grep -E 'CapEff|CapPrm|CapAmb' /proc/self/status; cat /proc/self/oom_score_adj"
    shown = text(await sandbox.execute(new_call("bash", command=script)))
    assert "GIVEN=yes" in shown
    assert "MANAGED_AGENTS" not in shown
    if os.geteuid() == 0:
        assert "uid=64" in shown
        assert shown.count("0000000000000000") == 3
        assert "\n500\n" in shown


@only(*ISOLATED)
async def test_the_runner_is_out_of_reach(sandbox: Sandbox) -> None:
    await sandbox.execute(Call("secret", 1, "bash", {"command": "echo kept-outcome"}, 60))
    script = """
        for pid in $(pgrep -f 'runner import main'); do
          cat /proc/$pid/environ /proc/$pid/mem 2>&1; ls /proc/$pid/fd 2>&1
        done
        ls -la /run/managed-agents/state /run/managed-agents/socket 2>&1
        echo END
    """
    shown = text(await sandbox.execute(new_call("bash", command=script)))
    assert shown.count("Permission denied") >= 2
    assert "kept-outcome" not in shown


async def test_a_worker_killed_with_sigkill_changes_nothing(bench: Bench, sandbox: Sandbox) -> None:
    """The first owner is a process of its own, killed while its call runs."""
    backend = bench.backend()
    pid = os.fork()
    if pid == 0:

        async def own() -> None:
            mine = await bench.backend().attach(sandbox.id)
            await mine.execute(Call("k", 1, "bash", {"command": "echo x >> runs; until [ -e go ]; do sleep 0.02; done; wc -l < runs"}, 60))  # noqa: E501  # fmt: skip

        try:
            import asyncio

            asyncio.set_event_loop(None)
            asyncio.Runner().run(own())
        finally:
            os._exit(0)
    with anyio.fail_after(30):
        while "runs" not in text(await sandbox.execute(new_call("glob", pattern="runs"))):
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)  # noqa: ASYNC222 - it is dead
        second = await backend.attach(sandbox.id)
        async with anyio.create_task_group() as group:
            group.start_soon(second.execute, Call("go", 2, "write", {"file_path": "go", "content": ""}, 60))
            assert text(await second.collect("k", 2)).strip() == "1"
        await second.aclose()
