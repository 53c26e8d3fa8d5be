"""A Postgres of one test's own, which is really stopped, killed and started again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from anyio import to_thread

from managed_agents.db import embedded
from managed_agents.db.embedded import EmbeddedPostgres
from tests.support.waiting import until


class OwnPostgres:
    """Durable, unlike the one that other tests share: what was committed outlives a kill -9."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server: EmbeddedPostgres | None = None

    def start_blocking(self) -> str:
        """Start it; returns its URL, which is always the same. Repeating is safe."""
        if self._server is None:
            self._server = embedded.start_blocking(self._directory)
        return self._server.url

    def stop_blocking(self) -> None:
        """Stop it as `pg_ctl -m fast stop` does: every connection is told, and its socket is gone. Repeating is safe."""
        if self._server is not None:
            self._server.release()
            self._server.wait_stopped()
            self._server = None

    async def start(self) -> str:
        """`start_blocking`; after `crash` the server recovers from its log."""
        return await to_thread.run_sync(self.start_blocking)

    async def stop(self) -> None:
        """See `stop_blocking`."""
        await to_thread.run_sync(self.stop_blocking)

    async def crash(self) -> None:
        """Kill -9 the postmaster: nothing is written, nobody is told, and its socket stays without a listener."""
        server = self._server
        assert server is not None
        embedded.kill_server(self._directory / "postgres")
        await until(lambda: not server.is_watched())
        server.release()
        self._server = None


@contextmanager
def own_postgres() -> Iterator[OwnPostgres]:
    """One below a directory of its own; not started yet, and stopped afterwards."""
    with TemporaryDirectory(prefix="ma-own-pg-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        made = OwnPostgres(Path(directory))
        try:
            yield made
        finally:
            made.stop_blocking()
