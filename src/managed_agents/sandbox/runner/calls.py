"""Tool calls: begun once, attached to by whoever asks again, cancelled, kept until acknowledged.

Invariant: between begin and acknowledge a tool use id runs once, however often and by whomever it is asked
for. An acknowledged id is remembered (bounded) and refused, for a frozen owner that wakes up late.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import signal
from collections import OrderedDict
from typing import Any, cast

from . import frames
from .bounds import Bounds
from .children import ChildFailed, Children
from .config import Config
from .journal import FULL, Journal, Outcome, error_outcome
from .output import KEPT_BYTES_MAX, Output
from .quota import Quota
from .shell import Ended, Shell
from .toolerror import reason
from .zygote import TOOLS

BASH_SECONDS_DEFAULT = 120.0
BASH_SECONDS_MAX = 600.0
ACKNOWLEDGED_MAX = 10_000
SAVE_TURN_SECONDS = 1.0
CANCEL_SECONDS_MAX = 8.0  # killing a shell is bounded below this, and who asks waits a little longer
CANCELLED = "Tool execution was interrupted."
WRITING = ("write", "edit")
BLOCK_TYPES = ("text", "image", "document")


class Refused(Exception):
    """The request cannot be served; `code` is part of the protocol."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Call:
    """One call under way or finished."""

    def __init__(self, tool_use_id: str) -> None:
        self.tool_use_id = tool_use_id
        self.done = asyncio.Event()
        self.task: asyncio.Future[None] | None = None
        self.started = False
        self.cancelled = False


class Calls:
    """All calls of the sandbox."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.journal = Journal(config.state)
        self.children = Children(config)
        self.quota = Quota(config, self.children)
        self.bounds = Bounds(config)
        self._shell = Shell(config)
        self._bash_turn = asyncio.Lock()
        self._saving: asyncio.Future[None] | None = None
        self._calls: dict[str, Call] = {}
        self._acknowledged: OrderedDict[str, None] = OrderedDict()
        for tool_use_id in self.journal.load():
            call = self._calls[tool_use_id] = Call(tool_use_id)
            call.done.set()

    def check_epoch(self, epoch: object) -> None:
        """Obey `epoch` unless a higher one was seen."""
        if not isinstance(epoch, int):
            raise Refused("bad_request", "epoch is required")
        if epoch < self.journal.epoch:
            raise Refused("stale_epoch", f"epoch {epoch} is lower than {self.journal.epoch}")
        if epoch > self.journal.epoch:
            self.journal.raise_epoch(epoch)

    def find(self, tool_use_id: str) -> Call:
        """Return a known call."""
        call = self._calls.get(tool_use_id)
        if call is None:
            raise Refused("unknown", f"no call {tool_use_id}")
        return call

    def begin(self, tool_use_id: str, name: str, arguments: dict[str, Any], seconds: float) -> Call:
        """Start a call, or return the one already known under this id."""
        if tool_use_id in self._calls:
            return self._calls[tool_use_id]
        if tool_use_id in self._acknowledged:
            raise Refused("acknowledged", f"the outcome of {tool_use_id} was acknowledged")
        if self.journal.full:
            raise Refused("busy", "too many outcomes wait to be acknowledged")
        try:
            self.journal.begin(tool_use_id)
        except OSError as error:
            full = error.errno in FULL
            why = "the disk of the sandbox's host is full" if full else f"the journal cannot be written: {reason(error)}"
            raise Refused("busy", why) from error
        call = self._calls[tool_use_id] = Call(tool_use_id)
        call.task = asyncio.ensure_future(self._supervise(call, name, arguments, seconds))
        return call

    async def cancel(self, tool_use_id: str) -> None:
        """End a running call and wait, bounded, until it has ended; a finished one stays as it is.

        One that never came is refused from now on: its request may still be on its way, over another connection.
        """
        call = self._calls.get(tool_use_id)
        if call is None:
            self._remember(tool_use_id)
            raise Refused("unknown", f"no call {tool_use_id}")
        if call.task is None or call.done.is_set():
            return
        if not call.cancelled:
            call.cancelled = True
            # A task that is cancelled before its first step never runs at all: nobody would write its outcome.
            if call.started:
                call.task.cancel()
        await asyncio.wait([call.task], timeout=CANCEL_SECONDS_MAX)

    def acknowledge(self, tool_use_id: str) -> None:
        """Forget a finished call. Repeating is safe."""
        call = self._calls.get(tool_use_id)
        if call is None:
            return
        if not call.done.is_set():
            raise Refused("running", f"{tool_use_id} is still running")
        del self._calls[tool_use_id]
        self.journal.forget(tool_use_id)
        self._remember(tool_use_id)

    def _remember(self, tool_use_id: str) -> None:
        """Refuse to begin this call, whenever its request comes."""
        self._acknowledged[tool_use_id] = None
        while len(self._acknowledged) > ACKNOWLEDGED_MAX:
            self._acknowledged.popitem(last=False)

    async def _supervise(self, call: Call, name: str, arguments: dict[str, Any], seconds: float) -> None:
        call.started = True
        seconds = min(seconds, self._config.limits.get("call_seconds", seconds))
        try:
            outcome = error_outcome(CANCELLED) if call.cancelled else await self._run(call, name, arguments, seconds)
        except asyncio.CancelledError:
            if not call.cancelled:
                raise  # the runner ends; the journal still says `running`
            outcome = error_outcome(CANCELLED)
        except Exception as error:  # noqa: BLE001 - a supervisor: a call always ends with an outcome
            outcome = error_outcome(f"{name}: the sandbox failed: {type(error).__name__}: {error}")
        self.journal.finish(call.tool_use_id, outcome)
        call.done.set()

    async def _run(self, call: Call, name: str, arguments: dict[str, Any], seconds: float) -> Outcome:
        if name == "bash":
            async with self._bash_turn:
                return await self._bash(call, arguments, seconds)
        if name not in TOOLS:
            return error_outcome(f"{name}: no such tool")
        before = self.bounds.read()
        outcome = await self._file_tool(name, arguments, seconds)
        lost = name in WRITING and await self.bounds.lost()
        if (outcome.is_error or lost) and (hit := self.bounds.hit(before, lost=lost)):
            return error_outcome("\n".join([*_texts(outcome.content), *hit]))
        return outcome

    # bash

    async def _bash(self, call: Call, arguments: dict[str, Any], seconds: float) -> Outcome:
        command, restart = arguments.get("command"), arguments.get("restart")
        timeout_ms = arguments.get("timeout_ms") or 0
        if restart:
            await self._shell.restart()
            if not command:
                return _text("bash session restarted", False)
        if not isinstance(command, str) or not command:
            return error_outcome("bash: command is required and must be a string")
        if "\0" in command:
            return error_outcome("bash: command contains a NUL character")
        if not isinstance(timeout_ms, (int, float)) or timeout_ms < 0:
            return error_outcome("bash: timeout_ms must be a positive number")
        limit = min(timeout_ms / 1000 or BASH_SECONDS_DEFAULT, BASH_SECONDS_MAX, seconds)
        digest = hashlib.sha256(call.tool_use_id.encode()).hexdigest()[:16]
        path = f"{self._config.spill}/bash-{digest}.txt"
        kept = int(self._config.limits.get("output_bytes", KEPT_BYTES_MAX))
        output = Output(self.children, path, limit + 60, self._shell.pause, self._shell.resume, kept)
        before = self.bounds.read()
        try:
            ended = await self._in_shell(command, limit, output)
            text, spill_path = await output.finish()
        except asyncio.CancelledError:
            output.abandon()
            raise
        lost = await self.bounds.lost()
        hit = self.bounds.hit(before, output.tail, failed=ended.status != 0, lost=lost)
        note = "\n".join(filter(None, [self.quota.words if ended.over_quota else _note(ended, limit), *hit]))
        if note:
            text = f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}{note}"
        content = json.dumps([{"type": "text", "text": text}]).encode()
        return Outcome(content, lost or ended.status != 0, spill_path)

    async def _in_shell(self, command: str, seconds: float, output: Output) -> Ended:
        try:
            return await self._within_quota(command, seconds, output)
        except BlockingIOError:
            # No process can be made: a fork bomb, or what one left.
            self._purge()
            return await self._within_quota(command, seconds, output)

    async def _within_quota(self, command: str, seconds: float, output: Output) -> Ended:
        if self.quota.bytes_max is None:
            return await self._shell.run(command, seconds, output.feed)
        running = asyncio.ensure_future(self._shell.run(command, seconds, output.feed))
        exceeded = asyncio.ensure_future(self.quota.exceeded())
        try:
            await asyncio.wait([running, exceeded], return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                return running.result()
            return Ended(None, over_quota=True)
        finally:
            running.cancel()
            exceeded.cancel()
            # Cancelled, the shell kills what it runs: not before that is another command begun.
            await asyncio.gather(running, exceeded, return_exceptions=True)
            self.quota.look()

    def _purge(self) -> None:
        """End every process of the commands at once, faster than they can fork."""
        if self._config.own_pid_namespace:
            # Spares only this process and the namespace's first.
            os.kill(-1, signal.SIGKILL)
        self.children.stop()

    # the file tools

    async def _file_tool(self, name: str, arguments: dict[str, Any], seconds: float) -> Outcome:
        body = json.dumps(arguments).encode()
        try:
            if name in WRITING:
                await self.quota.check()
            answered = await self._ask(name, body, seconds)
        except (ChildFailed, OSError) as error:
            if not _no_processes(error):
                return error_outcome(f"{name}: {reason(error) if isinstance(error, OSError) else error}")
            self._purge()
            try:
                answered = await self._ask(name, body, seconds)
            except (ChildFailed, OSError) as again:
                return error_outcome(f"{name}: {again}")
        if answered is None:
            # Whatever held it up may hold up the next one.
            self.children.stop()
            return error_outcome(f"{name}: timed out after {seconds:.0f} s")
        header, content = answered
        if not _valid(content):
            return error_outcome(f"{name}: the tool's process was tampered with")
        return Outcome(content, bool(header.get("is_error")))

    async def _ask(self, name: str, body: bytes, seconds: float) -> tuple[frames.Header, bytes] | None:
        async with self.children.open({"op": "tool", "name": name, "seconds": seconds}) as channel:
            await channel.send({"op": "data"}, body)
            answer = asyncio.ensure_future(channel.receive_message())
            try:
                await asyncio.wait([answer], timeout=seconds)
                return answer.result() if answer.done() else None
            finally:
                answer.cancel()

    async def save_shell(self) -> None:
        """Have the shell write down its state. While a command runs in it, what was written before must do.

        Who asked may go away: cutting the shell off in the midst would kill it.
        """
        if not self._bash_turn.locked():
            self._saving = asyncio.ensure_future(self._save_shell())
            await asyncio.shield(self._saving)

    async def _save_shell(self) -> None:
        try:
            # A command may have come first in this instant.
            async with asyncio.timeout(SAVE_TURN_SECONDS):
                await self._bash_turn.acquire()
        except TimeoutError:
            return
        try:
            await self._shell.save()
        finally:
            self._bash_turn.release()

    async def close(self) -> None:
        """Kill what runs."""
        await self.save_shell()
        tasks = [call.task for call in self._calls.values() if call.task is not None and not call.done.is_set()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.quota.close()
        await self._shell.close()
        self.children.stop()


def _no_processes(error: Exception) -> bool:
    if isinstance(error, ChildFailed):
        return error.code == "limit_pids"
    return isinstance(error, OSError) and error.errno == errno.EAGAIN


def _valid(content: bytes) -> bool:
    """Check what an untrusted child says is content."""
    try:
        blocks = json.loads(content)
    except ValueError:
        return False
    if not isinstance(blocks, list) or not blocks:
        return False
    return all(
        isinstance(block, dict) and cast("dict[str, object]", block).get("type") in BLOCK_TYPES
        for block in cast("list[object]", blocks)
    )


def _texts(content: bytes) -> list[str]:
    return [str(block.get("text")) for block in json.loads(content) if block["type"] == "text"]


def _text(text: str, is_error: bool) -> Outcome:
    return Outcome(json.dumps([{"type": "text", "text": text}]).encode(), is_error)


def _note(ended: Ended, seconds: float) -> str:
    if ended.timed_out:
        return f"Command timed out after {seconds:g} s. It was killed and the shell restarted."
    if not ended.shell_ended:
        return f"Exit code {ended.status}" if ended.status else ""
    if ended.status is not None and ended.status < 0:
        return f"The shell was killed by signal {-ended.status} and restarted."
    return f"Exit code {ended.status}. The shell ended and was restarted." if ended.status else ""
