"""The gateway: a socket for each sandbox of this host, and everything that comes out of it judged.

The socket is the identity: its directory is mounted into one sandbox generation and into nothing else, so there is no address
to forge and nothing to authenticate. Which sandboxes there are is read off the run directory, again and again: no message
announces one, and after a crash nothing has to be told again.

Race: a sandbox made anew under the same key has a directory of its own; a socket that is not ours any more is replaced.
"""

import fcntl
import logging
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import anyio.abc

from managed_agents.egress.access_log import AccessLog
from managed_agents.egress.connect import Connector
from managed_agents.egress.door import Door
from managed_agents.egress.policy import EgressPolicy
from managed_agents.egress.visit import Credentials, Shared

LOOK_SECONDS = 0.2
LOCK_SECONDS = 1.0
BACKLOG = 128
DESCRIPTORS_EACH = 6  # of a tunnel: two sockets, and a pipe each way (`wire.splice`)
DIRECTORY = "egress"
SOCKET = "egress.sock"
SOCKET_PATH_BYTES_MAX = 107

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What sandboxes may use."""

    connections: int = 256  # of one sandbox at once
    connections_in_all: int = 4000  # beyond it a sandbox gets but a few
    connections_at_most: int = 5400
    bytes: int = 100 * 1024**3  # of one session in its life, both directions

    def within(self, descriptors: int) -> "Bounds":
        """The same, as far as half of the process's descriptors go: the other half is for whatever else it does."""
        at_most = max(1, min(self.connections_at_most, descriptors // 2 // DESCRIPTORS_EACH))
        return replace(
            self, connections_at_most=at_most, connections_in_all=max(1, min(self.connections_in_all, at_most * 3 // 4))
        )


class Gateway:
    """Keeps a door for each sandbox."""

    def __init__(
        self,
        run_dir: Path,
        policies: EgressPolicy,
        log: AccessLog,
        *,
        connector: Connector,
        credentials: Credentials | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        """Without `credentials` no policy may have bindings."""
        self._run_dir = run_dir
        bounds = bounds or Bounds()
        numbers = (bounds.connections, bounds.connections_in_all, bounds.connections_at_most, bounds.bytes)
        self._shared = Shared(policies, log, connector, credentials, *numbers)
        self._open: dict[Path, tuple[int, Door]] = {}

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve every sandbox until cancelled. Waits while another process of this host does."""
        task_status.started()
        async with self._only_one(), anyio.create_task_group() as group:
            logger.info("egress gateway serves", extra={"run_dir": str(self._run_dir)})
            try:
                while True:
                    self._look(group)
                    await anyio.sleep(LOOK_SECONDS)
            finally:
                for path, (inode, door) in list(self._open.items()):
                    door.close()
                    _unlink(path, inode)
                self._open.clear()
                group.cancel_scope.cancel()

    @asynccontextmanager
    async def _only_one(self) -> AsyncGenerator[None]:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._run_dir / ".egress.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                await anyio.sleep(LOCK_SECONDS)
            yield
        finally:
            os.close(lock)

    def _look(self, group: anyio.abc.TaskGroup) -> None:
        """Bring doors in line with directories."""
        try:
            names = [entry.name for entry in os.scandir(self._run_dir)]
        except FileNotFoundError:
            names = []
        wanted = {self._run_dir / name / DIRECTORY / SOCKET: name for name in names if not name.startswith(".")}
        for path in [path for path, (inode, _) in self._open.items() if path not in wanted or _inode(path) != inode]:
            self._open.pop(path)[1].close()
        for path, name in wanted.items():
            sandbox_id, dot, generation = name.rpartition(".")
            if path not in self._open and dot and generation.isdigit() and path.parent.is_dir():
                self._add(group, path, sandbox_id, int(generation))

    def _add(self, group: anyio.abc.TaskGroup, path: Path, sandbox_id: str, generation: int) -> None:
        try:
            listener = _listen(path)
            inode = _inode(path)
        except OSError as error:
            logger.warning("no egress for %s.%d: %s", sandbox_id, generation, error)
            return
        if inode is None:
            listener.close()  # the sandbox was removed just now
            return
        door = Door(self._shared, listener, sandbox_id, generation)
        self._open[path] = (inode, door)
        group.start_soon(door.serve)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _unlink(path: Path, inode: int) -> None:
    if _inode(path) == inode:
        with suppress(OSError):
            path.unlink()


def _listen(path: Path) -> socket.socket:
    """Raises: OSError."""
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise OSError(f"{path} is too long for a socket; set a shorter MANAGED_AGENTS_RUN_DIR")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # of a gateway that died
        listener.bind(str(path))
        # Any uid of the sandbox may come: the directory above keeps everybody else out.
        path.chmod(0o666)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
