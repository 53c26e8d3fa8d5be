"""The `local` backend: a directory and plain processes, for development. No isolation is promised.

The same runner, detached, so that it survives the worker. Where the machine allows (root, or user
namespaces) it gets a mount and a pid namespace of its own: /workspace and /mnt are the sandbox's, the rest
is the machine's own, and the end of the runner ends everything it started. Elsewhere ("mapped") the file
tools rewrite absolute paths below /workspace and /mnt, `bash` starts in the workspace's real directory, and
what a command left behind is the user's to find.
"""

import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread

from managed_agents.sandbox import disk, layout, uids
from managed_agents.sandbox.backend import (
    Capability,
    Known,
    Labelled,
    Limits,
    Packages,
    PackagesFailed,
    SandboxError,
    SandboxGone,
    SandboxKey,
    SandboxSpec,
    remove_each,
)
from managed_agents.sandbox.client import RunnerClient
from managed_agents.sandbox.docker import split_key
from managed_agents.sandbox.handle import RunnerSandbox
from managed_agents.sandbox.packages import installs

START_SECONDS = 30.0
END_SECONDS = 10.0
POLL_SECONDS = 0.02
UNBOUNDED = ("memory_bytes", "cpus", "pids", "open_files")
"""The `Limits` that this backend does not hold anybody to: that takes control groups, or a user of one's own."""
HOME = "/agent"
CODE = "/.managed-agents"

Isolation = Literal["auto", "namespaces", "none"]

# Runs as the first process of the new pid namespace and stays it, to reap what the runner's commands
# orphan. $1 is the sandbox's directory, $2 the runner's code; the rest is the runner's command line.
_NAMESPACE = r"""
dir=$1 code=$2; shift 2
root=$dir/root
mkdir -p "$root"
mount -t tmpfs -o size=4m,mode=755 none "$root"
mirror() {
  for entry in "$1"/*; do
    name=${entry##*/}
    case "$1/$name" in /proc|/mnt|/workspace|/mnt/session|/mnt/memory) continue;; esac
    if [ -L "$entry" ]; then cp -P "$entry" "$root$1/$name"
    elif [ -d "$entry" ]; then mkdir "$root$1/$name"; mount --rbind "$entry" "$root$1/$name"
    fi
  done
}
mirror ""
mkdir -p "$root/proc" "$root/workspace" "$root/mnt/session" "$root/mnt/memory"
mkdir -p "$root/agent" "$root/.managed-agents"
mirror /mnt
mount -t proc proc "$root/proc"
mount --bind "$dir/workspace" "$root/workspace"
mount --bind "$dir/session" "$root/mnt/session"
mount --bind "$dir/memory" "$root/mnt/memory"
mount --bind "$dir/home" "$root/agent"
mount --bind "$code" "$root/.managed-agents"
chroot "$root" "$@" &
trap 'kill $!' TERM
wait $!
wait $!
"""


class LocalBackend:
    """Sandboxes as directories and processes of this machine."""

    def __init__(self, *, data_dir: Path, run_dir: Path, uid_base: int = 64000, isolation: Isolation = "auto") -> None:
        self._data_dir, self._run_dir, self._uid_base = data_dir, run_dir, uid_base
        self._isolation: Isolation = isolation

    @property
    def capabilities(self) -> frozenset[Capability]:
        return frozenset()

    async def aclose(self) -> None:
        return None

    def _places(self, id: str, generation: int) -> layout.Places:  # noqa: A002
        return layout.places(self._data_dir, self._run_dir, id, generation)

    def _handle(self, id: str, generation: int) -> RunnerSandbox:  # noqa: A002
        places = self._places(id, generation)
        return RunnerSandbox(id, generation, RunnerClient(places.socket), _ProcessHost(self, places))

    async def prepare(self, image: str, packages: Packages) -> str:
        if installs(packages):
            raise PackagesFailed(
                "The packages of the environment cannot be installed: this server's `local` sandbox has no image of its own. "
                "It needs the `docker` backend."
            )
        return image

    async def collect_images(self) -> None:
        """There are none."""

    async def provision(self, spec: SandboxSpec) -> RunnerSandbox:
        places = self._places(spec.id, spec.generation)
        handle = self._handle(spec.id, spec.generation)
        if not (places.home / "ready").exists():
            await self.remove(places)
            places.home.mkdir(parents=True, mode=0o711)
            disk.check_room(places.home)
            places.state.mkdir(mode=0o700)
            uid = self._take_uid(places)
            layout.make_tree(places.home, uid)
            record = {"env": dict(spec.env), "uid": uid, "session_id": spec.session_id, "limits": dataclasses.asdict(spec.limits)}
            (places.home / "sandbox.json").write_text(json.dumps(record))
            (places.home / "ready").touch()
        await self._start(places)
        return handle

    def _take_uid(self, places: layout.Places) -> int | None:
        """Return a uid no other sandbox here has: they share the machine's processes and files."""
        return self._uid_base + uids.take(self._data_dir, places.home) if os.geteuid() == 0 else None

    async def _namespaces(self) -> Sequence[str] | None:
        """Return the command that makes namespaces here; None when there is none."""
        if self._isolation == "none" or shutil.which("unshare") is None:
            return None
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        if os.geteuid() != 0:
            command += ["--user", "--map-root-user"]
        with anyio.fail_after(END_SECONDS):
            tried = await anyio.run_process([*command, "mount", "-t", "tmpfs", "none", "/mnt"], check=False)
        if tried.returncode == 0:
            return command
        if self._isolation == "namespaces":
            raise SandboxError(f"no namespaces here: {tried.stderr.decode(errors='replace').strip()}")
        return None

    async def _start(self, places: layout.Places) -> None:
        """Start the runner unless it lives, and wait until it takes calls."""
        if not alive(places):
            places.run.mkdir(parents=True, exist_ok=True)
            places.run.chmod(0o2770)
            record: dict[str, Any] = json.loads((places.home / "sandbox.json").read_text())
            code = layout.install_runner(self._data_dir)
            namespaces = await self._namespaces()
            if namespaces is not None:
                (places.home / "namespaces").touch()
            await self._launch(places, self._command(places, record, code, namespaces))
        id, generation = split_key(places.home.name) or ("", 0)  # noqa: A001
        handle = self._handle(id, generation)
        await handle.hello()
        await handle.aclose()

    def _command(
        self, places: layout.Places, record: dict[str, Any], code: Path, namespaces: Sequence[str] | None
    ) -> Sequence[str]:
        home = HOME if namespaces else str(places.home / "home")
        limits = (
            Limits(**record["limits"]) if "limits" in record else Limits(disk_bytes=record.get("disk_bytes", Limits().disk_bytes))
        )
        config = layout.runner_config(
            socket=str(places.socket),
            state=str(places.state),
            uid=record["uid"],
            environment=layout.environment(home, record["env"]),
            quota_bytes=limits.disk_bytes,
            limits=limits,
            own_tmp=False,
        )
        python = [layout.interpreter(), "-I", "-S", "-B", "-c"]
        if namespaces is None:
            mapped = {
                "/workspace": str(places.home / "workspace"),
                "/mnt/session": str(places.home / "session"),
                "/mnt/memory": str(places.home / "memory"),
            }
            config = dataclasses.replace(
                config,
                mapped=mapped,
                own_pid_namespace=False,
                workspace=mapped["/workspace"],
                spill=f"{mapped['/mnt/session']}/tool_outputs",
                snapshot={
                    "workspace": mapped["/workspace"],
                    "home": home,
                    "outputs": f"{mapped['/mnt/session']}/outputs",
                    "tool_outputs": f"{mapped['/mnt/session']}/tool_outputs",
                },
            )
            return [*python, layout.BOOT.format(code), config.to_json()]
        # A set-user-id program would otherwise give commands root on this machine.
        sealed = ["setpriv", "--no-new-privs"] if shutil.which("setpriv") else []
        inner = ["sh", "-ec", _NAMESPACE, "sh", str(places.home), str(code)]
        return [*namespaces, *inner, *sealed, *python, layout.BOOT.format(CODE), config.to_json()]

    async def _launch(self, places: layout.Places, command: Sequence[str]) -> None:
        """Start detached: a session of its own, nobody's child, its pid written down by itself."""
        log, pid = shlex.quote(str(places.home / "log")), shlex.quote(str(places.home / "pid"))
        # Without its pid written down nobody could end it, so it would not begin. In place: on a full disk that takes no room.
        own = f"printf '%-20d\\n' $$ 1<> {pid} && exec {shlex.join(command)}"
        script = f"cd / && setsid sh -c {shlex.quote(own)} </dev/null >{log} 2>&1 &"
        with anyio.move_on_after(START_SECONDS):
            await anyio.run_process(["sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            await _until(lambda: alive(places) and places.socket.exists())
            return
        words = (places.home / "log").read_text(errors="replace")[-2000:].strip()
        raise SandboxError(f"the runner did not start in {START_SECONDS:.0f} s: {words}")

    async def attach(self, id: str) -> RunnerSandbox:  # noqa: A002
        generations = [found.generation for found in await self.list() if found.id == id]
        if not generations:
            raise SandboxGone(f"no sandbox {id}")
        await self._start(self._places(id, max(generations)))
        return self._handle(id, max(generations))

    async def pause(self, id: str) -> None:  # noqa: A002
        raise SandboxError("a local sandbox cannot be paused")

    async def resume(self, id: str) -> None:  # noqa: A002
        """None is ever paused."""

    async def halt(self, id: str) -> bool:  # noqa: A002
        found = [each for each in await self.list() if each.id == id]
        for each in found:
            await self.end(self._places(each.id, each.generation))
        return bool(found)

    async def list(self) -> Sequence[Labelled]:
        found: list[Labelled] = []
        root = self._data_dir / "sandboxes"
        for path in sorted(root.iterdir()) if root.exists() else []:
            if (split := split_key(path.name)) is not None and (path / "ready").exists():
                record: dict[str, Any] = json.loads((path / "sandbox.json").read_text())
                running = alive(self._places(*split))
                found.append(Labelled(*split, session_id=record["session_id"], running=running))
        return found

    async def end(self, places: layout.Places) -> None:
        """Kill the runner and, with namespaces, everything it started."""
        if alive(places):
            # The first asks the runner to end its commands; the second is for one that does not.
            # With namespaces, killing the first process ends all others, and it takes no other signal.
            together = (places.home / "namespaces").exists()
            for number in (signal.SIGKILL,) if together else (signal.SIGTERM, signal.SIGKILL):
                os.kill(int((places.home / "pid").read_text()), number)
                with anyio.move_on_after(END_SECONDS / 2):
                    await _until(lambda: not alive(places))
                    return
            raise SandboxError(f"the runner of {places.home.name} does not end")

    async def remove(self, places: layout.Places) -> None:
        """End and remove everything. Repeating is safe."""
        await self.end(places)
        for path in (places.home, places.run):
            if path.exists():
                await anyio.to_thread.run_sync(shutil.rmtree, path)

    async def collect_orphans(self, known: Known) -> Sequence[SandboxKey]:
        found: set[tuple[str, int]] = set()
        for parent in (self._data_dir / "sandboxes", self._run_dir):
            if parent.exists():
                found |= {split for path in parent.iterdir() if (split := split_key(path.name)) is not None}

        async def remove(id: str, generation: int) -> None:  # noqa: A002
            await self.remove(self._places(id, generation))

        return await remove_each(sorted(found - await known()), remove)


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for something another process does. The caller bounds it."""
    while not condition():
        await anyio.sleep(POLL_SECONDS)


def alive(places: layout.Places) -> bool:
    """Say whether the runner lives: it holds a lock for life, which no reused pid can fake."""
    path = places.state / "alive"
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class _ProcessHost:
    """`Host` of a runner that is a plain process."""

    def __init__(self, backend: LocalBackend, places: layout.Places) -> None:
        self._backend, self._places = backend, places

    async def death(self) -> str | None:
        return None if alive(self._places) else "the runner's process is gone"

    async def stop(self) -> None:
        await self._backend.end(self._places)

    async def destroy(self) -> None:
        await self._backend.remove(self._places)
