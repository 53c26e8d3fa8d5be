"""`managed-agents demo`: the monthly dependency audit, end to end, through the official SDK.

Everything it does, any client can do: upload a file, create an environment and an agent, start a session with the file
mounted, follow its stream, download what the agent left, read the log again. It fails unless the audit succeeded.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from anthropic import Anthropic, APIError
from rich.console import Console
from rich.markdown import Markdown
from rich.panel import Panel

from managed_agents.cli import demo_pack
from managed_agents.cli.demo_trace import Trace
from managed_agents.cli.flags import CONTEXT_SETTINGS, read_settings, variable
from managed_agents.processes import parent

MODEL = "claude-opus-4-8"
START_SECONDS_MAX = 180.0
AUDIT_SECONDS_MAX = 900.0
OUTPUT_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 40.0
QUIET_SECONDS_MAX = 60.0  # the server beats every ten: a stream silent for longer is dead
BROKEN_SECONDS_MAX = 60.0
POLL_SECONDS = 0.1
BETA = "managed-agents-2026-04-01"

SYSTEM = (
    "You audit the dependencies of small Python projects. Work in /workspace with the tools you have; there is no "
    "network. Change as little as possible and only claim what a command printed."
)
TASK = """\
The project of the monthly dependency audit is at /mnt/session/uploads/project.tar.gz. Unpack it in /workspace; its \
README says how to install and test it, offline, from its wheelhouse.

1. Install what is pinned, list which pinned dependencies are outdated, and run the tests.
2. Bump the outdated pins in requirements.txt, install again, run the tests again. Take a bump back if the tests fail.
3. Write a report in Markdown to /mnt/session/outputs/report.md: what was outdated, old and new version, test results \
before and after. Then sum it up in one sentence."""


class DemoFailed(Exception):
    """The audit did not succeed; the message says where it ended."""


@dataclass(frozen=True)
class Server:
    """A running server, and how to kill its worker where that is ours to do."""

    base_url: str
    api_key: str
    data_dir: Path | None
    why_gone: Callable[[], str | None] = lambda: None
    """Why the server does not run any more; None while it does, or when it is not ours."""


@click.command(
    context_settings=CONTEXT_SETTINGS,
    epilog="\b\nExamples:\n  managed-agents demo\n  managed-agents demo --crash\n"
    "  managed-agents demo --base-url http://127.0.0.1:8484 --api-key sk-ma-…",
)
@click.option("--base-url", help="A running server; without it the demo starts its own, and stops it at the end.")
@click.option("--api-key", envvar=variable("api_key"), help="Key of the running server. [MANAGED_AGENTS_API_KEY]")
@click.option("--data-dir", help="Where the demo's own server keeps its data; `demo` below the usual place when absent.")
@click.option("--model", default=MODEL, show_default=True, help="Model of the agent.")
@click.option("--crash", is_flag=True, help="Kill the worker (SIGKILL) while a command runs; the session finishes anyway.")
@click.option("--keep", is_flag=True, help="Leave the demo's own server running until Ctrl-C.")
def demo(base_url: str | None, api_key: str | None, data_dir: str | None, model: str, crash: bool, keep: bool) -> None:
    """Watch an agent audit a project's dependencies in a real container.

    With ANTHROPIC_API_KEY set it runs on Claude, without on the scripted model.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    try:
        if base_url is not None:
            if api_key is None:
                raise click.UsageError("--base-url needs --api-key")
            running = Server(base_url, api_key, Path(data_dir).absolute() if data_dir else None)
            audit(running, console, model=model, crash=crash)
            return
        with own_server(console, data_dir) as server:
            audit(server, console, model=model, crash=crash)
            if keep:
                console.print("\nThe server keeps running. Ctrl-C stops it.")
                signal.sigwait({signal.SIGINT, signal.SIGTERM})
    except DemoFailed as failure:
        console.print(f"\n[bold red]The demo failed:[/] {failure}", markup=True)
        sys.exit(1)
    except APIError as error:
        console.print(f"\n[bold red]The demo failed:[/] the server answered: {error}", markup=True)
        sys.exit(1)


# The server


@contextmanager
def own_server(console: Console, data_dir: str | None) -> Generator[Server]:
    """Run `up` as our child, on a free port, until the block ends."""
    place = Path(data_dir).absolute() if data_dir else read_settings({}).data_dir / "demo"
    place.mkdir(mode=0o755, parents=True, exist_ok=True)
    log_path = place / "up.log"
    environment = {**os.environ, parent.VARIABLE: "1", variable("data_dir"): str(place), variable("port"): "0"}
    environment.setdefault(variable("script"), str(demo_pack.SCRIPT))
    console.print(f"[dim]Starting a server (data in {place}, log in up.log there) …[/]")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "managed_agents.cli.main", "up"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C ends the demo, and that ends it in order
        )
    try:
        state = _wait_ready(process, place, log_path)
        key = os.environ.get(variable("api_key")) or (place / "api_key").read_text().strip()

        def why_gone() -> str | None:
            status = process.poll()
            return None if status is None else f"the server ended (status {status}):\n{_tail(log_path)}"

        yield Server(state["base_url"], key, place, why_gone)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", place: Path, log_path: Path) -> dict[str, Any]:
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        state = up_state(place)
        if state is not None and state["pid"] == process.pid and state["ready"]:
            return state
        if process.poll() is not None:
            break
        time.sleep(POLL_SECONDS)
    raise DemoFailed(f"the server did not start:\n{_tail(log_path)}")


def _tail(log_path: Path) -> str:
    return "\n".join(line[:400] for line in log_path.read_text(errors="replace").splitlines()[-15:])


def up_state(place: Path) -> dict[str, Any] | None:
    """What the supervisor of `place` says it runs; None when it runs nothing."""
    try:
        return json.loads((place / "up.json").read_text())
    except FileNotFoundError:
        return None


def kill_worker(place: Path) -> int:
    """SIGKILL the worker of the server in `place` and return its pid."""
    state = up_state(place)
    pid = state["children"]["worker"]["pid"] if state is not None else None
    if pid is None:
        raise DemoFailed(f"there is no worker to kill in {place}")
    os.kill(pid, signal.SIGKILL)
    return pid


# The audit


def audit(server: Server, console: Console, *, model: str, crash: bool) -> None:
    """Run one audit and show it.

    Raises:
        DemoFailed: it did not end with a report on a successful audit.
    """
    if crash and server.data_dir is None:
        raise click.UsageError("--crash with --base-url needs --data-dir, where `up` says which process the worker is")
    client = Anthropic(base_url=server.base_url, api_key=server.api_key, max_retries=3)
    console.print(f"[dim]Server {server.base_url}; the client is the official `anthropic` SDK.[/]")

    upload = client.beta.files.upload(file=("project.tar.gz", demo_pack.project(), "application/gzip"))
    console.print(f"[dim]file[/]         {upload.id}  project.tar.gz, {upload.size_bytes} bytes")
    environment = client.beta.environments.create(
        name=f"audit-{time.time_ns():x}", config={"type": "cloud", "networking": {"type": "unrestricted"}}
    )
    console.print(f"[dim]environment[/]  {environment.id}")
    agent = client.beta.agents.create(
        name="dependency auditor", model=model, system=SYSTEM, tools=[{"type": "agent_toolset_20260401"}]
    )
    console.print(f"[dim]agent[/]        {agent.id} v{agent.version}, {model}")
    session = client.beta.sessions.create(
        agent=agent.id,
        environment_id=environment.id,
        title="Monthly dependency audit",
        resources=[{"type": "file", "file_id": upload.id, "mount_path": "/project.tar.gz"}],
    )
    console.print(f"[dim]session[/]      {session.id}\n")

    place = server.data_dir

    def kill() -> int:
        assert place is not None
        return kill_worker(place)

    trace = Trace(console, kill=kill if crash else None)
    follow(client, server, session.id, trace)
    if trace.failure is not None:
        raise DemoFailed(trace.failure)
    if crash and not trace.killed:
        raise DemoFailed("the audit ended before a command ran long enough for the worker to be killed under it")
    show_report(client, session.id, console)
    show_usage(client, session.id, console)
    show_log(client, server, session.id, console, trace)


def follow(client: Anthropic, server: Server, session_id: str, trace: Trace) -> None:
    """Send the task and show events until the session rests; a broken stream is opened again, without gaps."""
    deadline = time.monotonic() + AUDIT_SECONDS_MAX
    sent = False
    broken_since: float | None = None
    while not trace.resting:
        if time.monotonic() > deadline:
            raise DemoFailed(f"the audit did not end within {AUDIT_SECONDS_MAX:.0f} s")
        try:
            with client.beta.sessions.events.stream(session_id, timeout=QUIET_SECONDS_MAX) as stream:
                if not sent:
                    client.beta.sessions.events.send(
                        session_id,
                        events=[{"type": "user.message", "content": [{"type": "text", "text": TASK}]}],
                    )
                    sent = True
                # What happened while no stream was open is in the log; the trace shows each event once.
                for event in client.beta.sessions.events.list(session_id, limit=1000):
                    trace.show(event)
                for event in stream:
                    broken_since = None
                    trace.show(event)
                    if trace.resting or time.monotonic() > deadline:
                        break
        except (APIError, OSError) as error:
            if (reason := server.why_gone()) is not None:
                raise DemoFailed(reason) from None
            if broken_since is None:
                broken_since = time.monotonic()
                trace.note(f"the stream broke ({type(error).__name__}); opening it again")
            if time.monotonic() - broken_since > BROKEN_SECONDS_MAX:
                raise DemoFailed(f"the server could not be reached any more: {error}") from None
        time.sleep(POLL_SECONDS)


def show_report(client: Anthropic, session_id: str, console: Console) -> None:
    """Download the report through the Files API; fail unless it tells of a successful audit."""
    found = _until(OUTPUT_SECONDS_MAX, lambda: _output(client, session_id, "report.md"))
    if found is None:
        raise DemoFailed("the agent left no /mnt/session/outputs/report.md")
    report = client.beta.files.download(found).read().decode()
    console.print(Panel(Markdown(report), title=f"report.md ({found})", border_style="green"))
    missing = [word for word in ("textkit", "1.2.0", "1.4.0") if word not in report]
    if missing:
        raise DemoFailed(f"the report does not mention {', '.join(missing)}")


def _output(client: Anthropic, session_id: str, filename: str) -> str | None:
    """Id of the newest downloadable file of that name which the session made."""
    for file in client.beta.files.list(scope_id=session_id, betas=[BETA]):
        if file.downloadable and file.filename == filename:
            return file.id
    return None


def show_usage(client: Anthropic, session_id: str, console: Console) -> None:
    """Print what the session used."""
    usage = client.beta.sessions.retrieve(session_id).usage
    console.print(
        f"[dim]usage[/]        {usage.input_tokens or 0} input, {usage.output_tokens or 0} output, "
        f"{usage.cache_read_input_tokens or 0} cached input tokens; {usage.active_seconds or 0:.1f} s active"
    )


def show_log(client: Anthropic, server: Server, session_id: str, console: Console, trace: Trace) -> None:
    """Read the log again, compare it with what was streamed, and say how to do so with curl."""
    log = [event.id for event in client.beta.sessions.events.list(session_id, limit=1000)]
    if log != [event_id for event_id in trace.logged if event_id in set(log)] or len(set(log)) != len(log):
        raise DemoFailed("the log and what was streamed differ")
    console.print(f"[dim]log[/]          {len(log)} events, the same that were streamed. Read it again with:\n")
    console.print(
        f"curl '{server.base_url}/v1/sessions/{session_id}/events?limit=1000' -H 'x-api-key: {server.api_key}' \\\n"
        f"  -H 'anthropic-version: 2023-06-01' -H 'anthropic-beta: {BETA}'",
        soft_wrap=True,
    )
    if server.data_dir is not None:
        console.print(
            f"[dim](when this server is gone: managed-agents up --data-dir {server.data_dir}; it says its address)[/]",
            soft_wrap=True,
        )


def _until(seconds: float, look: Callable[[], str | None]) -> str | None:
    deadline = time.monotonic() + seconds
    while True:
        if (found := look()) is not None or time.monotonic() > deadline:
            return found
        time.sleep(POLL_SECONDS)
