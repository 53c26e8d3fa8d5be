"""The embedded server's parent: starts it, and stops it when the last holder of the lease is gone.

Run as a script with `python -I -S`, so the standard library is all there is: DIRECTORY SOCKETS UID COMMAND...

It holds `watchdog.lock` for its whole life and blocks in an exclusive `flock` of `lease`, which the kernel grants when
the last shared holder released it or died. A server whose previous watchdog was killed is adopted by its pid, which is
trusted only while the server answers for it (its working directory is our data directory).
"""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

FAST_STOP_SECONDS = 60.0  # after that an immediate stop: the next start recovers from the log
ADOPTED_POLL_SECONDS = 0.5
ALONE_SECONDS = 2.0


def recorded_pid(data: Path) -> int | None:
    """The pid in `postmaster.pid`, if there is such a file."""
    try:
        return int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None


def is_our_server(pid: int, data: Path) -> bool:
    """Tell whether `pid` is a live postmaster of `data`: not a zombie, not a stranger under a reused pid."""
    proc = Path("/proc") / str(pid)
    if Path("/proc/self/stat").exists():
        try:
            if (proc / "stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}:
                return False
            return os.path.samefile(proc / "cwd", data)
        except OSError:
            return False
    listed = subprocess.run(
        ["ps", "-o", "stat=,command=", "-p", str(pid)], capture_output=True, text=True, timeout=10, check=False
    )
    state, _, command = listed.stdout.strip().partition(" ")
    return not state.startswith("Z") and str(data) in command


def forget_stale_pid(data: Path) -> None:
    """Make a stale `postmaster.pid` name us: a server ignores its parent's pid there.

    Removing the file would also remove the shared memory key by which a new server sees that backends of the old one
    are still alive.
    """
    path = data / "postmaster.pid"
    lines = path.read_text().split("\n")
    lines[0] = str(os.getpid())
    path.write_text("\n".join(lines))


def main() -> int:
    directory, sockets, uid, command = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    data = directory / "data"
    alive = os.open(directory / "watchdog.lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + ALONE_SECONDS
    while True:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            # Somebody looks whether we live, which takes a moment, or there is one already.
            if time.monotonic() > deadline:
                return 0
            time.sleep(0.005)
    for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        # Only the lease decides. A handler, unlike SIG_IGN, is not inherited by the server.
        signal.signal(ignored, lambda _number, _frame: None)

    server: subprocess.Popen[bytes] | None = None
    pid = recorded_pid(data)
    if pid is None or not is_our_server(pid, data):
        if pid is not None:
            forget_stale_pid(data)
        # Guards nothing that `postmaster.pid` does not, and may name a zombie or a stranger as well.
        (sockets / ".s.PGSQL.5432.lock").unlink(missing_ok=True)
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            cwd=data if uid == -1 else "/",
            umask=0o077,
            user=uid if uid != -1 else None,
            group=uid if uid != -1 else None,
            extra_groups=[] if uid != -1 else None,
        )
        pid = server.pid

    threading.Thread(target=stop_after_lease, args=(directory, pid), daemon=True).start()
    if server is not None:
        return 0 if server.wait() == 0 else 1
    while is_our_server(pid, data):
        time.sleep(ADOPTED_POLL_SECONDS)
    return 0


def stop_after_lease(directory: Path, pid: int) -> None:
    """Block until nobody holds the lease, then stop the server: fast first, immediately after a while."""
    lease = os.open(directory / "lease", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lease, fcntl.LOCK_EX)
    try:
        os.kill(pid, signal.SIGINT)
        time.sleep(FAST_STOP_SECONDS)  # the process ends with the server; this thread does not live that long
        os.kill(pid, signal.SIGQUIT)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(main())
