"""The persistent shell behind `bash`.

One bash reads NUL-terminated commands from a descriptor of its own, evaluates each with stdin from
/dev/null, and reports the status on another. A call ends with that report, or with the shell's death; never
with the end of its output, because a background process may hold the pipe for hours. Commands do not
inherit the two descriptors.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import signal
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from . import shell_state
from .config import Config

_DRIVER = r"""
echo 500 2>/dev/null >/proc/self/oom_score_adj
cd -- "$1" || cd /
__load=$2
set --
builtin eval "$__load"
builtin unset __load
while IFS= builtin read -r -d '' -u "$__commands" __command; do
  builtin printf B >&"$__status"
  builtin eval 'builtin eval "$__command"' \
    "</dev/null >&$__output 2>&1 $__commands<&- $__status>&- $__output>&-"
  builtin printf '%s\0' "$?" >&"$__status"
done
"""
BASH = "/bin/bash" if os.path.exists("/bin/bash") else "bash"
READ_BYTES = 64 * 1024
END_SECONDS = 5.0
SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status, or what happened to the shell instead.

    `over_quota`: it was killed for filling the disk. `begun` is False when the shell was dead or dying before: the command
    did not run.
    """

    status: int | None
    timed_out: bool = False
    over_quota: bool = False
    shell_ended: bool = False
    begun: bool = True


class Shell:
    """At most one command at a time; the caller sees to that."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self._commands = self._status = self._output = -1
        self._sink: Callable[[bytes], None] | None = None
        self._reading = False
        self._late = bytearray()
        self._begun = False
        self._first = True

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the shell. Raises: OSError when no process can be made."""
        uid = self._config.uid
        commands_read, self._commands = os.pipe()
        self._status, status_write = os.pipe()
        self._output, output_write = os.pipe()
        theirs = (commands_read, status_write, output_write)
        numbers = f"__commands={commands_read} __status={status_write} __output={output_write}"
        try:
            self._process = await asyncio.create_subprocess_exec(
                BASH,
                "--noprofile",
                "--norc",
                "-c",
                f"{numbers}\n{_DRIVER}",
                "bash",
                self._config.workspace,
                shell_state.loading(self._config) if self._first else shell_state.forgetting(self._config),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                pass_fds=theirs,
                env=self._config.environment,
                cwd="/",
                start_new_session=True,
                umask=0o022,
                user=uid,
                group=uid,
                extra_groups=None if uid is None else [],
            )
        except OSError:
            self._close()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self._first = False
        for fd in (self._commands, self._status, self._output):
            os.set_blocking(fd, False)
        self._late.clear()
        self.resume()

    def resume(self) -> None:
        """Take output from the shell again."""
        if self._output >= 0 and not self._reading:
            self._reading = True
            asyncio.get_running_loop().add_reader(self._output, self._readable)

    def pause(self) -> None:
        """Leave output in the pipe: the one who keeps it is behind."""
        if self._reading:
            self._reading = False
            asyncio.get_running_loop().remove_reader(self._output)

    def _readable(self, size: int = READ_BYTES) -> int:
        try:
            data = os.read(self._output, size)
        except BlockingIOError:
            return 0
        if not data:
            self.pause()
        elif self._sink is not None:
            self._sink(data)
        elif len(self._late) < READ_BYTES:
            # Between calls background processes must not block on a full pipe; the next call shows what
            # they said.
            self._late += data
        return len(data)

    def _drain(self) -> None:
        """Take what the pipe holds now. A background process that keeps writing must not keep us here."""
        pending = array.array("i", [0])
        fcntl.ioctl(self._output, termios.FIONREAD, pending)
        left = pending[0]
        while left > 0 and (taken := self._readable(min(left, READ_BYTES))):
            left -= taken

    async def run(self, command: str, seconds: float, sink: Callable[[bytes], None]) -> Ended:
        """Run one command; its output goes to `sink` as it comes.

        Raises: OSError when no shell can be started. When cancelled the shell is killed with its process
        group.
        """
        if not self.running:
            await self.close()
            await self.start()
        ended = await self._run(command, seconds, sink)
        if not ended.begun:
            await self.start()
            ended = await self._run(command, seconds, sink)
        return ended

    async def save(self) -> None:
        """Have the shell write down its state, when there is one."""
        if not self.running:
            return
        said = bytearray()
        await self._run(shell_state.saving(self._config), SAVE_SECONDS, said.extend)
        self._late += said[:READ_BYTES]  # of background processes: the next call shows it

    async def _run(self, command: str, seconds: float, sink: Callable[[bytes], None]) -> Ended:
        if self._late:
            sink(bytes(self._late))
            self._late.clear()
        self._sink = sink
        ended: Ended | None = None
        try:
            ended = await self._evaluate(command, seconds)
            if not ended.shell_ended:
                self._drain()
            return ended
        finally:
            if ended is None or ended.status is None or ended.shell_ended:
                await self.close()
            self._sink = None

    async def _evaluate(self, command: str, seconds: float) -> Ended:
        assert self._process is not None
        self._begun = False
        exited = asyncio.ensure_future(self._process.wait())
        reported = asyncio.ensure_future(self._report(command.encode(errors="surrogateescape") + b"\0"))
        both = (reported, exited)
        try:
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if reported.done() and (status := reported.result()) is not None:
                return Ended(status)
            if reported.done() or exited.done():
                await exited
                self._drain()
                reported.cancel()
                return Ended(exited.result(), shell_ended=True, begun=self._begun or self._said_begun())
            return Ended(None, timed_out=True)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _ready(self, fd: int, write: bool) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)

        def fire() -> None:
            if not ready.done():
                ready.set_result(None)

        add(fd, fire)
        try:
            await ready
        finally:
            remove(fd)

    async def _report(self, command: bytes) -> int | None:
        """Hand the command to the shell and return the status it reports; None when it went away."""
        view = memoryview(command)
        while view:
            try:
                view = view[os.write(self._commands, view) :]
            except BlockingIOError:
                await self._ready(self._commands, write=True)
            except BrokenPipeError:
                break
        raw = b""
        while not raw.endswith(b"\0"):
            await self._ready(self._status, write=False)
            chunk = os.read(self._status, 64)
            if not chunk or len(raw) > 64:
                # Its end is reported by the process itself.
                assert self._process is not None
                await self._process.wait()
                return None
            raw += chunk
            self._begun = self._begun or raw.startswith(b"B")
        digits = raw[1:-1]
        return int(digits) if digits.isdigit() and len(digits) <= 3 else 255

    def _said_begun(self) -> bool:
        """Look at a report that came together with the shell's end."""
        try:
            return os.read(self._status, 64).startswith(b"B")
        except BlockingIOError:
            return False  # someone else still holds the other end

    async def restart(self) -> None:
        """Kill the shell; the next one begins with nothing of it."""
        self._first = False
        await self.close()

    async def close(self) -> None:
        """Kill the shell with its process group and forget it."""
        process, self._process = self._process, None
        # A shell that ended by itself leaves its background processes running, as a terminal does.
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):  # it ended this instant
                os.killpg(process.pid, signal.SIGKILL)
            waiting = asyncio.ensure_future(process.wait())
            await asyncio.wait([waiting], timeout=END_SECONDS)
        self._close()

    def _close(self) -> None:
        self.pause()
        for fd in (self._commands, self._status, self._output):
            if fd >= 0:
                os.close(fd)
        self._commands = self._status = self._output = -1
