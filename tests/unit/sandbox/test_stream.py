"""The socket to a runner, when its reader is cancelled in the instant that data arrives."""

import socket
from pathlib import Path

import anyio
import pytest

from managed_agents.sandbox.stream import UnixStream

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": True})


async def test_bytes_go_both_ways_until_the_end() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stream = UnixStream(ours)
    theirs.sendall(b"hello")
    assert await stream.receive(3) == b"hel"
    assert await stream.receive() == b"lo"
    await stream.send(b"there")
    assert theirs.recv(10) == b"there"
    theirs.close()
    with pytest.raises(anyio.EndOfStream):
        await stream.receive()
    with pytest.raises(anyio.BrokenResourceError):
        await stream.send(b"more")
    await stream.aclose()


async def test_a_reader_cancelled_as_data_arrives_is_no_error_of_the_loop() -> None:
    for _ in range(50):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        stream = UnixStream(ours)
        async with anyio.create_task_group() as group:
            group.start_soon(stream.receive)
            await anyio.wait_all_tasks_blocked()
            theirs.sendall(b"x")
            group.cancel_scope.cancel()
        await stream.aclose()
        theirs.close()


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        await UnixStream.connect(tmp_path / "nobody")
