"""Symbolic links and races against the file tools: what they write is never more than the commands' own uid may write."""

import io
import tarfile
from collections.abc import AsyncIterator
from contextlib import suppress

import anyio
import pytest

from managed_agents.sandbox.backend import Sandbox, SandboxError
from tests.hostile.conftest import Run, Say
from tests.integration.sandbox.contract import new_call, text

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

ROOTS_OWN = ("/etc/passwd", "/run/managed-agents/state/epoch", "/opt/managed-agents/runner/main.py", "/mnt/session/uploads/given")


@pytest.fixture(scope="package", autouse=True)
async def given(attacker: Sandbox) -> None:
    await attacker.put("/mnt/session/uploads/given", b"given", "root", 0o444)


@pytest.mark.parametrize("target", ROOTS_OWN)
async def test_links_lead_nowhere_the_commands_may_not_write(run: Run, say: Say, target: str) -> None:
    await say(f"rm -rf link dir; ln -s {target} link; ln -s $(dirname {target}) dir")
    for path in ("link", f"dir/{target.rpartition('/')[2]}", f"/proc/self/root{target}", f"/proc/1/root{target}", target):
        assert (await run("write", file_path=path, content="overwritten")).is_error, path
        assert (await run("edit", file_path=path, old_string="given", new_string="overwritten")).is_error, path
    assert "overwritten" not in await say(f"cat {target} link 2>&1")
    await say("rm -rf link dir")


async def test_what_only_the_runner_may_read_is_not_read(run: Run, say: Say, attacker: Sandbox) -> None:
    await say("ln -sfn /run/managed-agents/state s; ln -sfn /run/managed-agents/socket k")
    for path in ("s/epoch", "/run/managed-agents/state/epoch", "/proc/1/environ", "/etc/shadow"):
        assert (await run("read", file_path=path)).is_error
    assert "epoch" not in text(await run("glob", pattern="*", path="/workspace/s"))
    for path in ("/workspace/s/epoch", "/etc/shadow"):
        with pytest.raises(SandboxError):
            _ = [chunk async for chunk in attacker.get(path)]
    await say("rm s k")


async def test_a_directory_swapped_for_a_link_while_writing_changes_nothing(run: Run, attacker: Sandbox, say: Say) -> None:
    """One command swaps a directory for links as fast as it can; file tools, puts, harvest and snapshots work in it meanwhile."""
    await say(
        "mkdir -p real outputs; ln -sfn /mnt/session/uploads l1; ln -sfn /run/managed-agents/state l2; ln -sfn /etc l3; "
        "cat > swap.py <<'END'\nimport os, time\nend = time.monotonic() + 4\nwhile time.monotonic() < end:\n"
        "  for kind in ('l1', 'l2', 'l3'):\n    for name, it in (('d', 'real'), ('d', kind)):\n"
        "      try:\n        os.symlink(os.readlink(it) if it != 'real' else 'real', 't'); os.rename('t', 'd')\n"
        "      except OSError: pass\nEND\nsetsid python3 swap.py & sleep 0.1"
    )
    with anyio.move_on_after(2.5):
        while True:
            for name in ("given", "epoch", "passwd"):
                await run("write", file_path=f"d/{name}", content="raced")
                try:
                    await attacker.put(f"/workspace/d/{name}", b"raced", "agent")
                except SandboxError:
                    continue  # the swap was seen
    assert "raced" not in await say("cat /mnt/session/uploads/given /etc/passwd; cat /opt/managed-agents/runner/main.py")
    call = new_call("bash", command="true")
    await attacker.execute(call)
    await attacker.ack(call.tool_use_id)


async def test_uploads_are_put_into_directories_that_commands_cannot_swap(say: Say, attacker: Sandbox) -> None:
    said = await say("(cd /mnt/session; mv uploads u; ln -s /etc uploads/x; rmdir skills; cd /; mv /mnt/session /mnt/s) 2>&1")
    assert said.count("denied") + said.count("Read-only") + said.count("busy") >= 4
    for path in (
        "/mnt/session/uploads/../outputs/x",
        "/mnt/session/outputs/x",
        "/workspace/x",
        "/mnt/session/uploads/../../../etc/x",
    ):
        with pytest.raises(SandboxError):
            await attacker.put(path, b"x", "root")


async def test_special_files_do_not_hold_up_tools(run: Run, say: Say, attacker: Sandbox) -> None:
    await say("mkfifo /mnt/session/outputs/fifo fifo; ln -s /dev/zero zero; ln -s /dev/stdin in; ln -s loop loop")
    for name in ("fifo", "zero", "in", "loop"):
        assert (await run("read", file_path=f"/workspace/{name}")).is_error, name
    assert await attacker.listing("/mnt/session/outputs") == []
    with anyio.fail_after(20):
        assert b"".join([chunk async for chunk in attacker.snapshot()])
    await say("rm -f /mnt/session/outputs/fifo fifo zero in loop")


async def test_outputs_that_are_links_are_not_harvested(say: Say, attacker: Sandbox) -> None:
    await say("cd /mnt/session/outputs; ln -s /etc/passwd p; ln -s /run/managed-agents d; echo x > f; cd /workspace")
    assert [entry.path for entry in await attacker.listing("/mnt/session/outputs")] == ["f"]
    await say("rm /mnt/session/outputs/*")


async def test_an_archive_restored_writes_nothing_outside(attacker: Sandbox, say: Say) -> None:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for name, link in (("workspace/out", "/etc"), ("workspace/up", "/mnt/session/uploads")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)
        for name in ("workspace/out/passwd", "workspace/up/given", "workspace/../../etc/x", "/etc/y", "other/z"):
            member = tarfile.TarInfo(name)
            member.size = 9
            archive.addfile(member, io.BytesIO(b"unpacked!"))
    with suppress(SandboxError):  # refused as a whole, or the members that lead outside left out
        await attacker.restore(_once(raw.getvalue()))
    assert "unpacked!" not in await say("cat /etc/passwd /mnt/session/uploads/given; ls /etc/x /etc/y 2>&1; true")
    await say("rm -f /workspace/out /workspace/up")


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_commands_make_no_file_of_another_owner_and_no_device(say: Say) -> None:
    await say("cd /workspace; touch mine; chmod 4755 mine; chown 0:0 mine; mknod dev c 1 3")
    said = await say("stat -c '%u %a' mine; cp /usr/bin/id ./id; chmod u+s id; ./id -u; test -e dev && echo made")
    uid = said.split()[0]
    assert int(uid) >= 64000
    assert said.split()[2] == uid
    assert "made" not in said
    await say("rm -f mine id")
