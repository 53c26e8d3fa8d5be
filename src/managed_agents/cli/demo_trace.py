"""The live trace: one line or a few for each event, each event once, in the order of the log."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

OUTPUT_LINES_MAX = 14
LINE_CHARS_MAX = 150
KILL_AT_CALL = 2  # the first call is over before anybody could look
KILL_AFTER_SECONDS = 0.5  # the call is in the log before it runs: give it time to start


class Trace:
    """Shows events and remembers what the demo has to know of them."""

    def __init__(self, console: Console, *, kill: Callable[[], int] | None = None) -> None:
        self.resting = False
        self.failure: str | None = None
        self.killed = False
        self.logged: list[str] = []
        self._console = console
        self._kill = kill
        self._taken_over = False
        self._started = time.monotonic()
        self._calls: dict[str, tuple[Any, int]] = {}
        self._shown: set[str] = set()

    def note(self, text: str, style: str = "yellow") -> None:
        """Say something that is not an event."""
        self._line("demo", text, style)

    def show(self, event: Any) -> None:
        """Show one event; repetitions, and events that only announce themselves, are passed over."""
        event_id = getattr(event, "id", None)
        if event_id is None or getattr(event, "processed_at", None) is None or event_id in self._shown:
            return
        self._shown.add(event_id)
        self.logged.append(event_id)
        match event.type:
            case "user.message":
                self._line("user", _text(event.content), "bold")
            case "agent.thinking":
                self._line("thinking", "…", "dim")
            case "agent.message":
                self._line("agent", _text(event.content), "bold cyan")
            case "agent.tool_use":
                self._call(event)
            case "agent.tool_result":
                self._result(event)
            case "session.status_running":
                self._line("status", "running", "green")
            case "session.status_idle":
                self._idle(event)
            case "session.status_rescheduled":
                self._line("status", "rescheduled", "yellow")
            case "session.status_terminated":
                self._line("status", "terminated", "red")
                self.resting, self.failure = True, self.failure or "the session was terminated"
            case "session.error":
                self._line("error", f"{event.error.type}: {event.error.message}", "red")
            case "span.model_request_end":
                usage = event.model_usage
                cached = usage.cache_read_input_tokens + usage.cache_creation_input_tokens
                self._line(
                    "model", f"{usage.input_tokens + cached} tokens in ({cached} cached), {usage.output_tokens} out", "dim"
                )
            case _:
                return

    def _idle(self, event: Any) -> None:
        reason = event.stop_reason.type
        self._line("status", f"idle, {reason}", "green" if reason == "end_turn" else "red")
        self.resting = True
        if reason != "end_turn":
            self.failure = f"the session stopped with {reason}"

    def _call(self, event: Any) -> None:
        self._calls[event.id] = (event.processed_at, len(self._calls) + 1)
        told = event.input.get("command") or event.input.get("file_path") or event.input.get("pattern") or ""
        self._line(event.name, str(told), "magenta")
        if self._kill is not None and not self.killed and event.name == "bash" and len(self._calls) >= KILL_AT_CALL:
            self.killed = True
            time.sleep(KILL_AFTER_SECONDS)
            pid = self._kill()
            self.note(
                f"KILLED the worker (pid {pid}, SIGKILL) while this command runs. Another worker takes the session "
                "over; the command goes on in its sandbox and is not run a second time.",
                "bold red",
            )

    def _result(self, event: Any) -> None:
        started, _ = self._calls.get(event.tool_use_id, (event.processed_at, 0))
        seconds = (event.processed_at - started).total_seconds()
        lines = _text(event.content or []).splitlines()
        if len(lines) > OUTPUT_LINES_MAX:
            lines = [
                *lines[: OUTPUT_LINES_MAX // 2],
                f"… {len(lines) - OUTPUT_LINES_MAX} lines …",
                *lines[-OUTPUT_LINES_MAX // 2 :],
            ]
        shown = "\n".join(line[:LINE_CHARS_MAX] for line in lines) or "(no output)"
        verdict = "error" if event.is_error else "ok"
        self._line(f"  {verdict}", f"{shown}\n({seconds:.2f} s)", "red" if event.is_error else "dim")
        if self.killed and not self._taken_over:
            self._taken_over = True
            self.note("another worker took the session over and collected that result", "bold green")

    def _line(self, kind: str, text: str, style: str) -> None:
        at = f"{time.monotonic() - self._started:6.2f}s"
        first, *rest = text.splitlines() or [""]
        body = "\n".join([first, *(" " * 21 + line for line in rest)])
        self._console.print(f"[dim]{at}[/]  [{style}]{escape(kind):11}[/]  {escape(body)}", soft_wrap=True)


def _text(content: Any) -> str:
    return "\n".join(block.text for block in content if block.type == "text")
