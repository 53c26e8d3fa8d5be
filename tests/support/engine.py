"""A Docker engine of one test's own: a daemon that may be killed, with a containerd, a bridge and all its state apart.

Nothing is shared with the engine that other tests use: neither sockets, directories and containerd's namespace nor a bridge, made
ahead because a daemon that is told to have none deletes the other one's. What it holds is kept between runs (`.state/engine`), so
that the sandbox image is copied over only once.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from anyio import to_thread

IMAGE = "managed-agents-sandbox:latest"
BRIDGE = "ma-test0"
SUBNET = "10.213.77.1/24"
CGROUP = "ma-test-engine"
START_SECONDS_MAX = 60.0
END_SECONDS_MAX = 60.0
COMMAND_SECONDS_MAX = 300.0
POLL_SECONDS = 0.05
ROOT = Path(__file__).parents[2] / ".state" / "engine"


@dataclass
class OwnEngine:
    """`start` and `end` may follow each other as often as wanted."""

    directory: Path
    """Of what lives only as long as the daemon; short, because of sockets."""
    data_root: Path = ROOT
    _daemon: "subprocess.Popen[bytes] | None" = field(default=None)

    @property
    def host(self) -> str:
        """For DOCKER_HOST."""
        return f"unix://{self.directory}/docker.sock"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def command(self, *words: str, check: bool = True) -> list[str]:
        """Lines that `docker WORDS` prints."""
        done = subprocess.run(
            ("docker", "-H", self.host, *words), capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, check=False
        )
        assert done.returncode == 0 or not check, f"docker {' '.join(words)}: {done.stderr}"
        return done.stdout.splitlines()

    def start_blocking(self) -> None:
        """Start the daemon and wait until it answers."""
        assert self._daemon is None
        command = ["dockerd", "--host", self.host, "--data-root", str(self.data_root), "--exec-root", str(self.directory / "x")]
        command += ["--pidfile", str(self.directory / "pid"), "--bridge", BRIDGE, "--cgroup-parent", f"/{CGROUP}"]
        command += ["--containerd-namespace", CGROUP, "--containerd-plugins-namespace", f"{CGROUP}-plugins"]
        command += ["--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--userland-proxy=false"]
        # After a kill -9 the file names a process that is gone, or by now somebody else.
        (self.directory / "pid").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while not any(self.command("info", "--format", "{{.ServerVersion}}", check=False)):
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            assert self._daemon.poll() is None, f"the engine ended:\n{tail}"
            assert time.monotonic() < deadline, f"the engine does not answer:\n{tail}"
            time.sleep(POLL_SECONDS)

    def end_blocking(self, how: signal.Signals) -> None:
        """Signal the daemon and wait for its end. Repeating is safe."""
        if self._daemon is not None:
            containerd = int((self.directory / "x/containerd/containerd.pid").read_text())
            self._daemon.send_signal(how)
            self._daemon.wait(END_SECONDS_MAX)
            self._daemon = None
            # The kernel kills it when its parent dies.
            _wait_gone([containerd])

    async def start(self) -> None:
        await to_thread.run_sync(self.start_blocking)

    async def end(self, how: signal.Signals) -> None:
        """Without live-restore, SIGTERM ends the containers too; SIGKILL leaves shims and containers."""
        await to_thread.run_sync(self.end_blocking, how)

    def kill_below(self) -> None:
        """Kill -9 the daemon's containerd, every shim and what is in the containers."""
        killed = self.processes()
        for pid in killed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _wait_gone(killed)

    def processes(self) -> list[int]:
        """The daemon, its containerd, the shims, and everything in a container."""
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._is_ours(path)]

    def _is_ours(self, process: Path) -> bool:
        try:
            if f"/{CGROUP}/" in (process / "cgroup").read_text():
                return True
            words = (process / "cmdline").read_text().split("\0")
            return any(str(self.directory) in word for word in words) and _comm(int(process.name)) in {
                "dockerd",
                "containerd",
                "containerd-shim",
                "runc",
            }
        except (OSError, ValueError):
            return False

    def holds(self) -> dict[str, int]:
        """How much there is of everything that we may leave behind.

        Not of layers: one that is no container's and no image's is lost by an engine that is ended while it makes a container.
        """
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        places = (str(self.directory), str(self.data_root))
        return {
            "containers": len(self.command("ps", "-aq")),
            "volumes": len(self.command("volume", "ls", "-q")),
            "images": len(self.command("images", "-aq")),
            "networks": len(self.command("network", "ls", "-q")),
            "mounts": sum(any(place in line for place in places) for line in mounts),
            "processes": len(self.processes()),
        }

    def _remove_containers(self) -> None:
        if left := self.command("ps", "-aq"):
            self.command("rm", "-f", "-v", *left)

    def _fetch_image(self) -> None:
        """Copy the sandbox image from the machine's engine, unless it is here."""
        wanted = subprocess.run(
            ("docker", "image", "inspect", "-f", "{{.Id}}", IMAGE), capture_output=True, text=True, timeout=60, check=True
        ).stdout.split()
        if self.command("image", "inspect", "-f", "{{.Id}}", IMAGE, check=False) == wanted:
            return
        with subprocess.Popen(("docker", "save", IMAGE), stdout=subprocess.PIPE) as saved:
            loading = ("docker", "-H", self.host, "load", "-q")
            subprocess.run(loading, stdin=saved.stdout, stdout=subprocess.DEVNULL, timeout=COMMAND_SECONDS_MAX, check=True)
        self.command("image", "prune", "-f")


def _wait_gone(pids: list[int]) -> None:
    """Wait until they are reaped, too: a daemon that starts takes a zombie of its containerd for a living one."""
    deadline = time.monotonic() + END_SECONDS_MAX
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "killed processes are not reaped"
        time.sleep(POLL_SECONDS)


def _comm(pid: int) -> str:
    # The kernel keeps fifteen characters.
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    return "containerd-shim" if name.startswith("containerd-shim") else name


@contextmanager
def _bridge() -> Iterator[None]:
    _ip("link", "del", BRIDGE, check=False)
    _ip("link", "add", BRIDGE, "type", "bridge")
    try:
        _ip("addr", "add", SUBNET, "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        yield
    finally:
        _ip("link", "del", BRIDGE)


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(("ip", *words), capture_output=True, timeout=30, check=check)


@contextmanager
def own_engine() -> Iterator[OwnEngine]:
    """One that runs and holds the sandbox image, and afterwards nothing of it but what is on the disk.

    One at a time on a machine.
    """
    ROOT.mkdir(parents=True, exist_ok=True, mode=0o711)
    with (ROOT.parent / "engine.lock").open("w") as lock, _only(lock), _bridge():
        directory = Path(tempfile.mkdtemp(prefix="ma-eng-", dir="/tmp"))
        made = OwnEngine(directory)
        try:
            made.start_blocking()
            made._remove_containers()
            made._fetch_image()
            yield made
        finally:
            made.end_blocking(signal.SIGTERM)
            made.kill_below()
            for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
                if (place := line.split()[1]).startswith((str(directory), str(made.data_root))):
                    subprocess.run(("umount", "--lazy", place), timeout=30, check=True)
            shutil.rmtree(directory)


@contextmanager
def _only(lock: "object") -> Iterator[None]:
    fcntl.flock(lock, fcntl.LOCK_EX)  # type: ignore[arg-type]
    yield
