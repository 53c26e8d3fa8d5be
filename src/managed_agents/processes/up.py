"""`managed-agents up`: one supervisor for everything on one machine.

It starts embedded Postgres when no database URL is given, brings the schema up to date, starts the scripted model when
no model is configured, then an api and a worker process, and keeps them running. Standard library only, and run by
`exec` after the command line was understood: it stays for as long as the server does and should weigh nothing.

Invariant: nothing outlives it. Children watch a pipe that closes on any death of this process, Postgres has its lease.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, NoReturn

from managed_agents.db import embedded
from managed_agents.processes import parent

STOP_SECONDS_MAX = 15.0
PREPARE_SECONDS_MAX = 300.0
READY_SECONDS_MAX = 60.0
MODEL_START_SECONDS_MAX = 20.0
BACKOFF_FIRST_SECONDS = 0.1
BACKOFF_MAX_SECONDS = 10.0
HEALTHY_SECONDS = 20.0  # a child that lived this long starts again without delay
EARLY_DEATHS_MAX = 8  # of one child, none of them after a healthy life: it will not come up
POSTGRES_TRIES_MAX = 5
TICK_SECONDS = 1.0
READY_TICK_SECONDS = 0.05

REAL_API_KEY = "ANTHROPIC_API_KEY"


class CannotStart(Exception):
    """The server cannot start; the message says what to do."""


class Child:
    """One supervised process and what is known of its lives."""

    def __init__(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.restarts = 0
        self.status: int | None = None  # of the life before this one
        self._arguments = arguments
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: IO[bytes] | None = None
        self._started_at = 0.0
        self._start_at = 0.0
        self._early_deaths = 0

    @property
    def pid(self) -> int | None:
        """The pid of the life at hand, None between two."""
        return self._process.pid if self._process is not None else None

    @property
    def wait_seconds(self) -> float | None:
        """How long until `look` has something to do by itself; None when a signal will tell."""
        return max(0.0, self._start_at - time.monotonic()) if self._process is None else None

    def start(self) -> None:
        """Begin a life."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "managed_agents.cli.main", *self._arguments],
            stdin=subprocess.PIPE,
            env={**self._environment, parent.VARIABLE: "1"},
            start_new_session=True,  # Ctrl-C reaches only us, and we tell them
        )
        self._pipe = self._process.stdin
        self._started_at = time.monotonic()

    def look(self) -> bool:
        """Notice a death, and start again when it is time. Return whether anything changed.

        Raises:
            CannotStart: its settings are wrong, or it keeps dying young.
        """
        if self._process is None:
            if time.monotonic() < self._start_at:
                return False
            self.restarts += 1
            self.start()
            return True
        status = self._process.poll()
        if status is None:
            return False
        healthy = time.monotonic() - self._started_at >= HEALTHY_SECONDS
        self._early_deaths = 0 if healthy else self._early_deaths + 1
        self._forget()
        if status == parent.CANNOT_START_STATUS:
            raise CannotStart(f"the {self.name} process cannot start with these settings; its message is above")
        if self._early_deaths > EARLY_DEATHS_MAX:
            raise CannotStart(f"the {self.name} process ends again and again ({_reason(status)}); its output is above")
        delay = min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** max(0, self._early_deaths - 1))
        self._start_at = time.monotonic() + delay
        say(f"the {self.name} process ended ({_reason(status)}); starting it again in {delay:.1f} s")
        return True

    def signal(self, number: int) -> None:
        """Send a signal to the life at hand."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def ended(self) -> bool:
        """Tell whether there is no life at hand any more."""
        if self._process is not None and self._process.poll() is not None:
            self._forget()
        return self._process is None

    def _forget(self) -> None:
        if self._process is not None:
            self.status = self._process.returncode
        if self._pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                self._pipe.close()
        self._process = self._pipe = None


class Supervisor:
    """Owns everything `up` starts."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._data_dir = Path(environment["MANAGED_AGENTS_DATA_DIR"])
        self._host = environment["MANAGED_AGENTS_HOST"]
        self._port = int(environment["MANAGED_AGENTS_PORT"])
        self._model = ""
        self._postgres: embedded.EmbeddedPostgres | None = None
        self._children: list[Child] = []
        self._signals = 0
        self._recorded = True
        self._wakeup, wakeup_writer = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup_writer.setblocking(False)
        self._wakeup_writer = wakeup_writer

    @property
    def base_url(self) -> str:
        """Where clients on this machine reach the API."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self._host, self._host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    def run(self) -> int:
        """Run until told to stop. Return the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        parent.watch()
        try:
            with self._only_one():
                self._start()
                self._watch()
        except (CannotStart, embedded.EmbeddedPostgresError) as error:
            if self._signals == 0:
                say(str(error))
                return 1
        finally:
            self._stop()
        return 0

    # Starting

    def _start(self) -> None:
        self._take_port()
        self._environment["MANAGED_AGENTS_API_KEY"] = self._first_key()
        if not self._environment.get("MANAGED_AGENTS_DATABASE_URL"):
            say("starting Postgres")
            self._postgres = embedded.start_blocking(self._data_dir, cancelled=self._is_stopping)
            self._environment["MANAGED_AGENTS_DATABASE_URL"] = self._postgres.url
        say("bringing the database up to date")
        self._prepare()
        self._choose_model()
        metrics = {k: v for k, v in self._environment.items() if k != "MANAGED_AGENTS_METRICS_PORT"}
        # When this ends, nobody is left to hand sessions over to: they go on at the next start.
        undrained = {**self._environment, "MANAGED_AGENTS_DRAIN_SECONDS": "0"}
        self._children += [Child("api", ["api"], metrics), Child("worker", ["worker"], undrained)]
        for child in self._children:
            if child.pid is None:
                child.start()
        self._record(ready=False)

    def _take_port(self) -> None:
        """Fail early and clearly when somebody listens there; choose a port when asked for any."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            with socket.create_server((self._host, self._port), family=family) as listener:
                self._port = listener.getsockname()[1]
        except OSError as error:
            raise CannotStart(
                f"cannot listen on {self._host}:{self._port}: {error.strerror}. Another server runs there? "
                "Choose another port with --port or MANAGED_AGENTS_PORT (0 for any)."
            ) from None
        self._environment["MANAGED_AGENTS_PORT"] = str(self._port)

    def _first_key(self) -> str:
        """The configured key, or one made once and kept in `DATA_DIR/api_key`."""
        if given := self._environment.get("MANAGED_AGENTS_API_KEY"):
            return given
        path = self._data_dir / "api_key"
        if not path.exists():
            draft = path.with_name(".api_key.new")
            draft.unlink(missing_ok=True)
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                # 32 bytes; `secrets` would import OpenSSL
                file.write(f"sk-ma-{base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip('=')}\n")
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
        return path.read_text().strip()

    def _prepare(self) -> None:
        """Migrations, master key and first key, in a child: they need libraries that we do without."""
        child = Child("migrate", ["migrate"], self._environment)
        child.start()
        deadline = time.monotonic() + PREPARE_SECONDS_MAX
        while not child.ended():
            self._sleep(TICK_SECONDS)
            if self._is_stopping() or time.monotonic() > deadline:
                child.signal(signal.SIGTERM)
                raise CannotStart("bringing the database up to date did not finish")
        if child.status != 0:
            raise CannotStart("the database could not be brought up to date; the reason is above")

    def _choose_model(self) -> None:
        if url := self._environment.get("MANAGED_AGENTS_MODEL_BASE_URL"):
            self._model = f"Messages API at {url}"
        elif self._environment.get(REAL_API_KEY) or self._environment.get("MANAGED_AGENTS_MODEL_API_KEY"):
            self._model = "Claude, through the Claude API"
        else:
            self._start_scripted_model()

    def _start_scripted_model(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        script = self._environment.get("MANAGED_AGENTS_SCRIPT", "")
        arguments = ["scripted-model", "--host", "127.0.0.1", "--port", str(port)]
        child = Child("scripted model", arguments + (["--script", script] if script else []), self._environment)
        child.start()
        self._children.append(child)
        deadline = time.monotonic() + MODEL_START_SECONDS_MAX
        while not _listens(port):
            if child.ended() or time.monotonic() > deadline:
                raise CannotStart("the scripted model did not start; its output is above")
            self._sleep(READY_TICK_SECONDS)
            if self._is_stopping():
                raise CannotStart("stopped")
        self._environment["MANAGED_AGENTS_MODEL_BASE_URL"] = f"http://127.0.0.1:{port}"
        self._environment["MANAGED_AGENTS_MODEL_API_KEY"] = "scripted"
        self._model = (
            f"no model is configured, so a SCRIPTED MODEL answers ({script or 'its built-in script'}). "
            "Set ANTHROPIC_API_KEY for Claude, or MANAGED_AGENTS_MODEL_BASE_URL."
        )

    @contextlib.contextmanager
    def _only_one(self) -> Generator[None]:
        """One `up` per data directory."""
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._data_dir / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise CannotStart(
                f"`managed-agents up` runs already with {self._data_dir} ({_running(self._data_dir)}). "
                "Stop it, or choose another MANAGED_AGENTS_DATA_DIR."
            ) from None
        try:
            yield
        finally:
            (self._data_dir / "up.json").unlink(missing_ok=True)
            os.close(lock)

    # Running

    def _watch(self) -> None:
        ready, ready_by = False, time.monotonic() + READY_SECONDS_MAX
        while not self._is_stopping():
            if self._postgres is not None and not self._postgres.is_watched():
                self._revive(self._postgres)
            if [child for child in self._children if child.look()] or not self._recorded:
                self._record(ready=ready)
            if not ready:
                if self._answers_ready():
                    ready = True
                    self._record(ready=True)
                    self._announce()
                elif time.monotonic() > ready_by:
                    say(f"{self.base_url}/readyz does not answer yet; still trying")
                    ready_by = time.monotonic() + READY_SECONDS_MAX
            waits = [w for child in self._children if (w := child.wait_seconds) is not None]
            self._sleep(min([TICK_SECONDS if ready else READY_TICK_SECONDS, *waits]))

    def _revive(self, postgres: embedded.EmbeddedPostgres) -> None:
        """Start a Postgres that crashed again; give up when it will not."""
        for attempt in range(POSTGRES_TRIES_MAX):
            say("Postgres ended; starting it again")
            try:
                postgres.revive(self._is_stopping)
            except embedded.EmbeddedPostgresError as error:
                if self._is_stopping() or attempt + 1 == POSTGRES_TRIES_MAX:
                    raise
                say(str(error))
                self._sleep(TICK_SECONDS)
            else:
                return

    def _answers_ready(self) -> bool:
        """Ask for /readyz, by hand: the HTTP client of the standard library is a third of this process's memory."""
        host = self.base_url.removeprefix("http://").rpartition(":")[0].strip("[]")
        try:
            with socket.create_connection((host, self._port), timeout=2) as connection:
                connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return connection.recv(64).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def _record(self, *, ready: bool) -> None:
        """Say in `DATA_DIR/up.json` what runs where, for the demo and for people. Where the disk is full, later: that is no
        reason to stop what runs.
        """
        path = self._data_dir / "up.json"
        state = {
            "pid": os.getpid(),
            "base_url": self.base_url,
            "ready": ready,
            "children": {c.name.replace(" ", "_"): {"pid": c.pid, "restarts": c.restarts} for c in self._children},
        }
        draft = path.with_name(".up.json.new")
        try:
            draft.write_text(json.dumps(state, indent=1) + "\n")
            draft.rename(path)
        except OSError as error:
            if self._recorded:
                say(f"{path} cannot be written, it is tried again: {error.strerror}")
            self._recorded = False
        else:
            self._recorded = True

    def _announce(self) -> None:
        key = self._environment["MANAGED_AGENTS_API_KEY"]
        print(
            f"""
Ready.
  base URL  {self.base_url}
  API key   {key}
  model     {self._model}
  data      {self._data_dir}

curl {self.base_url}/v1/agents -H "x-api-key: {key}" \\
  -H "anthropic-version: 2023-06-01" -H "anthropic-beta: managed-agents-2026-04-01"

from anthropic import Anthropic
client = Anthropic(base_url="{self.base_url}", api_key="{key}")
agent = client.beta.agents.create(name="first", model="claude-opus-4-8", tools=[{{"type": "agent_toolset_20260401"}}])

Ctrl-C stops everything.
""",
            flush=True,
        )

    # Stopping

    def _stop(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for child in self._children:
            child.signal(signal.SIGTERM)
        asked, deadline = self._signals, time.monotonic() + STOP_SECONDS_MAX
        while [child for child in self._children if not child.ended()]:
            if time.monotonic() > deadline or self._signals > max(1, asked):
                for child in self._children:
                    if not child.ended():
                        say(f"the {child.name} process did not stop in time; killing it")
                        child.signal(signal.SIGKILL)
            self._sleep(READY_TICK_SECONDS)
        if self._postgres is not None:
            self._postgres.release()
            with contextlib.suppress(embedded.EmbeddedPostgresError):  # its watchdog goes on stopping it without us
                self._postgres.wait_stopped(STOP_SECONDS_MAX)
        if self._children:
            say("stopped")

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._signals += 1

    def _is_stopping(self) -> bool:
        return self._signals > 0

    def _sleep(self, seconds: float) -> None:
        """Sleep until a signal comes, a dead child's included."""
        readable, _, _ = select.select([self._wakeup], [], [], seconds)
        if readable:
            with contextlib.suppress(BlockingIOError):
                self._wakeup.recv(4096)


def say(text: str) -> None:
    """Tell the operator something, where that can be: on a full disk it cannot, and what is supervised goes on."""
    with contextlib.suppress(OSError):
        print(f"managed-agents: {text}", file=sys.stderr, flush=True)


def _reason(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        connection.settimeout(1)
        return connection.connect_ex(("127.0.0.1", port)) == 0


def _running(data_dir: Path) -> str:
    try:
        state = json.loads((data_dir / "up.json").read_text())
        return f"pid {state['pid']}, {state['base_url']}"
    except (FileNotFoundError, ValueError):
        return "still starting"


def replace_this_process() -> NoReturn:
    """Become the supervisor, with the settings in the environment, and leave the command line's memory behind."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "managed_agents.processes.up"])


if __name__ == "__main__":
    sys.exit(Supervisor(dict(os.environ)).run())
