"""What a snapshot carries into another sandbox, on every backend; and that a forged one reaches nothing."""

import io
import os
import tarfile
from collections.abc import AsyncIterator

import anyio
import pytest

from managed_agents.sandbox.backend import BadArchive, Sandbox
from tests.integration.sandbox.contract import Bench, new_call, text

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

FILL = """
mkdir -p project/deep ~/.local/bin && echo content > project/deep/file && chmod 640 project/deep/file
ln -s deep/file project/link; ln project/deep/file project/hard; truncate -s 150M project/sparse; truncate -s 50G project/holes
mkdir project/closed && echo x > project/closed/inner && chmod 555 project/closed
printf '#!/bin/sh\\necho installed\\n' > ~/.local/bin/mytool && chmod +x ~/.local/bin/mytool
mkdir -p project/empty; mkfifo project/pipe; echo secret > project/none; chmod 000 project/none
cd project/deep; export COLOUR='dark "blue"'; plain=1; declare -A table=([k]=v); greet() { echo "hello $1"; }
shopt -s expand_aliases; alias ll='echo listed'; set -o pipefail
"""
LOOK = """
pwd | sed 's,.*/workspace/,,'; echo "$COLOUR $plain ${table[k]}"; greet you; ll; set -o | grep pipefail; env | grep -c COLOUR
mytool; cat ../link ../hard; stat -c '%a %h' file; stat -c '%a %s' ../closed ../sparse; ls -d ../empty; cat ../closed/inner
"""


async def take(sandbox: Sandbox) -> bytes:
    with anyio.fail_after(60):
        return b"".join([chunk async for chunk in sandbox.snapshot()])


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for offset in range(0, len(data), 50_000):
        yield data[offset : offset + 50_000]


@pytest.mark.requirement("ENV-053")
async def test_files_tools_and_the_shell_go_from_one_sandbox_to_the_next(bench: Bench) -> None:
    first = await bench.backend().provision(bench.spec(disk_bytes=200 * 1024 * 1024))
    assert not (await first.execute(new_call("bash", command=FILL))).is_error
    await first.execute(new_call("bash", command="head -c 3000000 /dev/urandom | tee ../random | sha256sum > ../sum"))
    before = text(await first.execute(new_call("bash", command=LOOK)))
    taken = await take(first)
    await first.destroy()
    second = await bench.backend().provision(bench.spec(first.id, generation=2))
    with anyio.fail_after(60):
        await second.restore(pieces(taken))
    after = text(await second.execute(new_call("bash", command=LOOK)))
    assert after == before
    assert "hello you" in after
    assert "installed" in after
    assert not (await second.execute(new_call("bash", command="sha256sum < ../random | cmp - ../sum"))).is_error
    if os.geteuid() == 0:
        owner = text(await second.execute(new_call("bash", command="stat -c %u ..; id -u"))).split()
        assert owner[0] == owner[1]
    await second.destroy()


async def test_a_stop_keeps_the_shell(bench: Bench) -> None:
    sandbox = await bench.backend().provision(bench.spec())
    await sandbox.execute(new_call("bash", command="mkdir here; cd here; export KEPT=yes"))
    await sandbox.stop()
    again = await bench.backend().attach(sandbox.id)
    assert text(await again.execute(new_call("bash", command="basename $PWD; echo $KEPT"))) == "here\nyes\n"
    # A restart is one: neither this shell nor one after the next stop finds anything.
    await again.execute(new_call("bash", restart=True))
    assert text(await again.execute(new_call("bash", command="basename $PWD; echo $KEPT"))) == "workspace\n\n"
    await again.stop()
    third = await bench.backend().attach(sandbox.id)
    assert text(await third.execute(new_call("bash", command="basename $PWD; echo $KEPT"))) == "workspace\n\n"
    await third.destroy()


async def test_a_snapshot_is_taken_while_files_change_and_a_command_runs(bench: Bench) -> None:
    sandbox = await bench.backend().provision(bench.spec())
    command = "while [ ! -e end ]; do head -c 200000 /dev/urandom > grows; : > grows; rm -f grows; done"
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(sandbox.execute, new_call("bash", command=command, timeout_ms=60_000))
            for _ in range(3):
                with tarfile.open(fileobj=io.BytesIO(await take(sandbox))) as archive:
                    archive.getmembers()
            await sandbox.execute(new_call("write", file_path="end", content=""))
    await sandbox.destroy()


async def test_a_forged_snapshot_reaches_nothing(bench: Bench, sandbox: Sandbox) -> None:
    def forged(*members: tuple[str, str]) -> bytes:
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w:gz") as archive:
            for name, link in members:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
                archive.addfile(info)
        return made.getvalue()

    bad = [
        forged(("workspace/../../etc/x", "")),
        forged(("/etc/x", "")),
        forged(("uploads/x", "")),
        forged(("workspace/a", ""))[:40],
        b"no archive at all",
    ]
    for data in bad:
        with anyio.fail_after(30), pytest.raises(BadArchive):
            await sandbox.restore(pieces(data))
    # Through a link it writes what commands may write anyway, and nothing else.
    if os.geteuid() == 0:
        with anyio.fail_after(30), pytest.raises(Exception, match=r"Permission denied|Read-only"):
            await sandbox.restore(pieces(forged(("workspace/out", "/etc"), ("workspace/out/forged", ""))))
    assert text(await sandbox.execute(new_call("bash", command="ls /etc/forged 2>&1; echo alive"))).endswith("alive\n")


@pytest.fixture
async def sandbox(bench: Bench) -> AsyncIterator[Sandbox]:
    made = await bench.backend().provision(bench.spec())
    yield made
    await made.destroy()
