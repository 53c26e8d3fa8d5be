"""What a command prints: a bounded head and tail in memory, everything up to a bound on disk, a preview for
the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .children import ChildFailed, Children

MODEL_BYTES_MAX = 100 * 1024  # spec: SDK reference implementation
MODEL_CHARS_MAX = 100_000  # spec: above this the model gets a preview and a path
KEPT_BYTES_MAX = 64 * 1024 * 1024
PREVIEW_HEAD_BYTES = 48 * 1024
PREVIEW_TAIL_BYTES = 16 * 1024
PENDING_BYTES_MAX = 1024 * 1024
_CHUNK = 256 * 1024


class Output:
    """Collects one command's output. `pause` and `resume` hold back the command while the disk is behind."""

    def __init__(
        self,
        children: Children,
        path: str,
        seconds: float,
        pause: Callable[[], None],
        resume: Callable[[], None],
        kept_bytes_max: int = KEPT_BYTES_MAX,
    ) -> None:
        self._children, self._path, self._seconds = children, path, seconds
        self._pause, self._resume = pause, resume
        self._kept_bytes_max = kept_bytes_max
        self._head = bytearray()
        self._tail = bytearray()
        self._pending = bytearray()
        self._total = self._kept = 0
        self._more = asyncio.Event()
        self._complete = False
        self._spilling: asyncio.Future[None] | None = None
        self._spill_error: str | None = None

    @property
    def tail(self) -> bytes:
        """The end of what came so far."""
        return bytes(self._tail)

    def feed(self, data: bytes) -> None:
        """Take bytes from the command."""
        self._total += len(data)
        room = MODEL_BYTES_MAX - len(self._head)
        if room > 0:
            self._head += data[:room]
        self._tail += data[-PREVIEW_TAIL_BYTES:]
        del self._tail[:-PREVIEW_TAIL_BYTES]
        if self._spilling is not None:
            self._keep(data)
        elif self._total > MODEL_BYTES_MAX:
            self._start(bytes(self._head[: self._total - len(data)]) + data)

    def _start(self, so_far: bytes) -> None:
        self._keep(so_far)
        self._spilling = asyncio.ensure_future(self._spill())

    def _keep(self, data: bytes) -> None:
        data = data[: self._kept_bytes_max - self._kept]
        if not data or self._spill_error is not None:
            return
        self._kept += len(data)
        self._pending += data
        self._more.set()
        if len(self._pending) > PENDING_BYTES_MAX:
            self._pause()

    async def _spill(self) -> None:
        header = {"op": "append", "path": self._path, "seconds": self._seconds}
        try:
            async with self._children.open(header) as channel:
                while not (self._complete and not self._pending):
                    if not self._pending:
                        self._more.clear()
                        await self._more.wait()
                        continue
                    chunk = bytes(self._pending[:_CHUNK])
                    del self._pending[: len(chunk)]
                    await channel.send({"op": "data", "more": True}, chunk)
                    if len(self._pending) <= PENDING_BYTES_MAX // 2:
                        self._resume()
                await channel.send({"op": "data"})
                await channel.receive()
        except (ChildFailed, OSError) as error:
            # The command goes on; the model is told that only the preview is left.
            self._spill_error = str(error)
            self._pending.clear()
            self._resume()

    async def finish(self) -> tuple[str, str | None]:
        """Return the text for the model and the path of the full output where it was kept."""
        text = self._head.decode(errors="replace")
        if self._spilling is None and len(text) <= MODEL_CHARS_MAX:
            return text, None
        if self._spilling is None:
            self._start(bytes(self._head))
        assert self._spilling is not None
        self._complete = True
        self._more.set()
        await self._spilling
        return self._preview(), self._path if self._spill_error is None else None

    def abandon(self) -> None:
        """Stop keeping output: the call was cancelled."""
        if self._spilling is not None:
            self._spilling.cancel()

    def _preview(self) -> str:
        head = self._head[:PREVIEW_HEAD_BYTES].decode(errors="replace")
        tail = self._tail.decode(errors="replace")
        if self._spill_error is not None:
            where = f"the full output could not be kept ({self._spill_error})"
        elif self._kept < self._total:
            where = f"the first {self._kept} bytes are in {self._path}, more is not kept of a call"
        else:
            where = f"the full output is in {self._path}"
        return f"{head}\n\n[output of {self._total} bytes shortened; {where}]\n\n{tail}"
