"""How a process ends: SIGTERM or SIGINT asks it to, a second one or the end of its grace makes it."""

import contextlib
import gc
import logging
import resource
import signal
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

import anyio
import uvicorn
from anyio import CancelScope
from anyio.abc import TaskStatus
from starlette.types import ASGIApp

from managed_agents.core import limits
from managed_agents.processes.http import connection

logger = logging.getLogger(__name__)

HTTP_DRAIN_SECONDS = 5
GARBAGE_THRESHOLDS = (20_000, 20, 50)
STOP_SECONDS_MAX = 12.0
SAME_REQUEST_SECONDS = 1.0
OPEN_FILES_MAX = 1_048_576  # what is higher costs programs that walk over all possible descriptors seconds


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to the process, not to one of its servers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, *, host: str, port: int, connections_max: int) -> AsyncGenerator[None]:
    """Serve `app` while the block runs; then stop accepting, let requests finish for a while, and close.

    Raises:
        OSError: the address cannot be listened on.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="none",
        http=connection(connections_max),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(limits.KEEP_ALIVE_SECONDS),
        timeout_graceful_shutdown=HTTP_DRAIN_SECONDS,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=config.backlog)
    server = _Server(config)

    async def serve(*, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await server.serve(sockets=[listener])

    async with anyio.create_task_group() as group:
        await group.start(serve)
        try:
            yield
        finally:
            server.should_exit = True


def settle_memory() -> None:
    """Leave what start-up has made out of garbage collection, and look for cycles less often.

    Walking the libraries' hundred thousand objects again and again was a fifth of a busy process's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)


def raise_open_files() -> int:
    """Let this process have as many files and sockets open as the system allows it, and return how many that are.

    The usual soft limit of 1024 is one that `select` needs, which nothing here uses; a worker's sandboxes reach it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


async def until_signalled(
    work: Callable[[], Awaitable[None]], drain: Callable[[], Awaitable[None]], *, drain_seconds: float = 0.0
) -> None:
    """Run `work` until it ends or a signal arrives; then `drain`, which takes at most `drain_seconds`, and cancel `work`.

    A second signal ends the process on the spot, and so does a `work` that takes longer than its grace to end.
    """
    settle_memory()
    raise_open_files()
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with anyio.create_task_group() as group:
            scope = CancelScope()

            async def drain_and_end() -> None:
                await drain()
                scope.cancel()

            async def watch() -> None:
                async for number in signals:
                    logger.info("stopping", extra={"signal": signal.Signals(number).name})
                    group.start_soon(drain_and_end)
                    break
                # A service manager and the supervisor may both ask: only a later signal is impatience.
                with anyio.move_on_after(SAME_REQUEST_SECONDS):
                    async for _ in signals:
                        continue
                with anyio.move_on_after(drain_seconds + STOP_SECONDS_MAX):
                    async for _ in signals:
                        break
                logger.error("did not stop in time")
                signal.raise_signal(signal.SIGKILL)

            group.start_soon(watch)
            with scope:
                await work()
            group.cancel_scope.cancel()
