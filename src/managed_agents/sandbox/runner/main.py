"""Start: `python3 -I -S -B -c "import sys; sys.path.insert(0, DIR); from runner import main; main.main()"
CONFIG`.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import sys

from .config import Config
from .egress import Forwarder
from .server import Connection, Runner


async def serve(config: Config) -> None:
    """Listen until told to stop."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = Runner(config)
    connections: set[asyncio.Future[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(Connection(reader, writer, runner).serve())
        connections.add(task)
        task.add_done_callback(connections.discard)

    runner.calls.children.start()
    gc.collect()
    gc.freeze()
    server = await asyncio.start_unix_server(connected, config.socket, backlog=128)
    # The directory is what keeps commands out; its group is the worker's.
    os.chmod(config.socket, 0o660)
    forwarder = asyncio.ensure_future(Forwarder(config).run())
    await stop.wait()
    server.close()
    forwarder.cancel()
    for task in list(connections):
        task.cancel()
    await runner.calls.close()


def main() -> None:
    """Run with the configuration given as the last argument."""
    os.umask(0o022)
    config = Config.from_json(sys.argv[-1])
    os.makedirs(config.state, mode=0o700, exist_ok=True)
    # Held until this process ends, so that others can tell whether it lives. Its children do not inherit it.
    with open(os.path.join(config.state, "alive"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(config.socket):
            os.unlink(config.socket)  # of an earlier run of this sandbox
        asyncio.run(serve(config))
