"""Images with an environment's packages: installed once per content, shared by every session that asks for the same.

A container of the base image runs one tool after the other and is committed. What packages bring may run anything at
installation, as root of that container: it gets the engine's default capabilities but those for the network, bounds on memory,
processors, processes, disk and time, the operator's index settings, and nothing of ours. The engine bounds no disk: what was
written is looked at every two seconds, and a container that has too much is killed. Invariant: an image bears its name only
when every install succeeded. Races: several workers of a host want the same image, or one dies installing. A lock on a file per
content lets one install; whoever gets it removes what a dead one left. When an image was last wanted is that file's time.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shlex
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiodocker
import aiohttp
import anyio

from managed_agents.core import limits
from managed_agents.sandbox.backend import Packages, PackagesFailed, SandboxError

logger = logging.getLogger(__name__)

REPOSITORY = "managed-agents-packages"
MANAGERS = ("apt", "cargo", "gem", "go", "npm", "pip")  # in the order of installation
KEPT_SECONDS = 7 * 24 * 3600.0
SETTLED_SECONDS = 600.0  # an image that was wanted just now is about to become a sandbox
LOOK_SECONDS = 0.2
DISK_LOOK_SECONDS = 2.0
ENGINE_SECONDS = 120.0
LINES_TOLD = 20
LINE_CHARS_MAX = 500
MEMORY_BYTES = 4 * 1024**3
PIDS = 1024
CA_FILE = "/run/managed-agents-extra-ca.pem"
BYTES_LABEL = "managed-agents.packages-bytes"  # what an image has beyond its base
SETTINGS_FILE = "/run/managed-agents-settings.sh"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

_TOOLS = {
    "apt": (
        "apt-get",
        "export DEBIAN_FRONTEND=noninteractive; apt-get update -q && apt-get install -q -y --no-install-recommends -- {} "
        "&& apt-get clean && rm -rf /var/lib/apt/lists/*",
    ),
    "cargo": ("cargo", "cargo install --locked --root /usr/local -- {}"),
    "gem": ("gem", "gem install --no-document {}"),
    "go": ("go", 'for item in {}; do GOBIN=/usr/local/bin GOPATH=/tmp/go go install -- "$item" || exit; done; rm -rf /tmp/go'),
    "npm": ("npm", "npm install --global --prefix /usr/local --no-fund --no-audit -- {}"),
    "pip": (
        "python3",
        "export PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off; "
        "python3 -m pip install --break-system-packages --no-cache-dir -- {}",
    ),
}
# The tools look for certificates in different places; each is told of one bundle with the operator's added.
_CERTIFICATES = f"""
if [ -r {CA_FILE} ]; then
  cat /etc/ssl/certs/ca-certificates.crt {CA_FILE} > /run/bundle.pem 2>/dev/null
  for name in SSL_CERT_FILE PIP_CERT CURL_CA_BUNDLE REQUESTS_CA_BUNDLE CARGO_HTTP_CAINFO GIT_SSL_CAINFO; do
    export $name=/run/bundle.pem
  done
  export NODE_EXTRA_CA_CERTS={CA_FILE}
  printf 'Acquire::https::CAInfo "/run/bundle.pem";\\n' > /run/apt.conf; export APT_CONFIG=/run/apt.conf
fi
"""


@dataclass(frozen=True)
class InstallSettings:
    """What operators say of installs."""

    network: str = "none"
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Index URLs, proxies. Not kept in the image."""
    extra_ca: Path | None = None
    seconds_max: float = limits.PACKAGES_SECONDS_MAX
    cpus: float = 2.0
    disk_bytes: int = limits.PACKAGES_DISK_BYTES
    """Of one install."""
    images_bytes: int = limits.PACKAGES_IMAGES_BYTES
    """Of all images together, what they have beyond their base."""


def installs(packages: Packages) -> bool:
    """Say whether there is anything to install."""
    return any(packages.get(manager) for manager in MANAGERS)


def script(packages: Packages) -> str:
    """Return the shell text that installs everything, in order; it says which tool is at work."""
    parts = [f". {SETTINGS_FILE}\n", _CERTIFICATES]
    for manager in MANAGERS:
        if names := packages.get(manager):
            program, install = _TOOLS[manager]
            arguments = " ".join(shlex.quote(name) for name in names)
            parts.append(
                f"echo {MARK}{manager}\n"
                f"command -v {program} >/dev/null || {{ echo '{program} is not in the sandbox image'; exit 127; }}\n"
                f"( {install.format(arguments)} ) || exit\n"
            )
    return "".join(parts)


MARK = "managed-agents installs: "


class _Said:
    """The last lines that each tool said."""

    def __init__(self, key: str, *, offline: bool) -> None:
        self._key, self._offline = key, offline
        self.manager = "packages"
        self.lines: deque[str] = deque(maxlen=LINES_TOLD)
        self._rest = ""

    def feed(self, data: str) -> None:
        *lines, self._rest = (self._rest + data).split("\n")
        self._rest = self._rest[-LINE_CHARS_MAX:]
        for line in lines:
            shown = _ESCAPES.sub("", line.rpartition("\r")[2] or line.strip("\r")).rstrip()[:LINE_CHARS_MAX]
            if shown.startswith(MARK):
                self.manager = shown.removeprefix(MARK)
                self.lines.clear()
            elif shown:
                self.lines.append(shown)
            if shown:
                logger.info("packages %s: %s: %s", self._key, self.manager, shown)

    def failure(self, why: str) -> PackagesFailed:
        """What the session is told."""
        if self._rest:
            self.feed("\n")
        last = "\n".join(self.lines)
        hint = " Installs have no network here: the operator sets MANAGED_AGENTS_PACKAGES_NETWORK." if self._offline else ""
        return PackagesFailed(
            f"The packages of the environment could not be installed: {self.manager} {why}.{hint} It said:\n{last}"
        )


class PackageImages:
    """Derived images of one installation on one engine."""

    def __init__(self, client: Any, *, installation: str, directory: Path, settings: InstallSettings) -> None:
        """`client`: the engine's, whose annotations are partial."""
        self._client = client
        self._installation = installation
        self._directory = directory
        self._settings = settings

    async def ready(self, base: str, packages: Packages) -> str:
        """Return the image of `base` with the packages, installing them when no image has them yet.

        Raises: PackagesFailed, SandboxError.
        """
        async with _engine("look up an image"):
            found = await self._client.images.inspect(base)
        key = self._key(str(found["Id"]), packages)
        self._directory.mkdir(parents=True, exist_ok=True)
        async with self._locked(key):
            name = f"{REPOSITORY}:{key}"
            if not await self._exists(name):
                await self._install(base, name, key, packages)
            return name

    def _key(self, base_id: str, packages: Packages) -> str:
        wanted = {manager: list(packages[manager]) for manager in MANAGERS if packages.get(manager)}
        content = json.dumps([self._installation, base_id, script({}), wanted], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    @asynccontextmanager
    async def _locked(self, key: str) -> AsyncGenerator[None]:
        """Hold the lock of one content; its file's time says when the image was last wanted."""
        fd = os.open(self._directory / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _try_lock(fd):
                await anyio.sleep(LOOK_SECONDS)
            os.utime(fd)
            yield
        finally:
            os.close(fd)

    async def _exists(self, name: str) -> bool:
        async with _engine("look up an image"):
            try:
                await self._client.images.inspect(name)
            except aiodocker.DockerError as error:
                if error.status == 404:
                    return False
                raise
            return True

    def _container_name(self, key: str) -> str:
        return f"ma-{self._installation}-packages-{key}"

    async def _install(self, base: str, name: str, key: str, packages: Packages) -> None:
        said = _Said(key, offline=self._settings.network == "none")
        await self._remove_container(key)
        begun = time.monotonic()
        given = self._directory.with_name(f"packages-{key}.sh")
        logger.info("packages %s: installing %s", key, {manager: list(names) for manager, names in packages.items()})
        try:
            _write_settings(given, self._settings.environment)
            async with _engine("create a container"):
                container = await self._client.containers.create(
                    self._container(base, packages, given), name=self._container_name(key)
                )
            status = await self._run(container, said)
            size = await self._written(container)
            if size > self._settings.disk_bytes:  # also what was written between two looks
                bound = f"{self._settings.disk_bytes} is the bound (MANAGED_AGENTS_PACKAGES_DISK_BYTES)"
                raise said.failure(f"wrote {size} bytes to disk, and {bound}")
            if status != 0:
                raise said.failure(f"failed with status {status}")
            labels = {**self._labels(key), BYTES_LABEL: str(size)}
            async with _engine("commit an image"):
                await container.commit(repository=REPOSITORY, tag=key, config={"Labels": labels, "Env": [], "Cmd": None})
        finally:
            given.unlink(missing_ok=True)
            with anyio.CancelScope(shield=True):
                await self._remove_container(key)
        logger.info("packages %s: installed in %.1f s", key, time.monotonic() - begun)

    async def _run(self, container: Any, said: _Said) -> int:
        """Run the installs; what they say goes to the log as it comes."""
        status, failure = 0, None
        try:
            with anyio.fail_after(self._settings.seconds_max):
                async with anyio.create_task_group() as group:
                    try:
                        await container.start()
                        group.start_soon(self._watch_disk, container)
                        async for piece in container.log(stdout=True, stderr=True, follow=True):
                            said.feed(piece)
                        status = int((await container.wait())["StatusCode"])
                    except (aiodocker.DockerError, aiohttp.ClientError, OSError) as error:
                        failure = error
                    group.cancel_scope.cancel()
        except TimeoutError as error:
            raise said.failure(f"took more than {self._settings.seconds_max:.0f} s") from error
        if failure is not None:
            raise SandboxError(f"the engine failed to install packages: {failure}") from failure
        return status

    async def _watch_disk(self, container: Any) -> None:
        """End a container that has written too much; whoever waits for it finds out why it ended."""
        while True:
            await anyio.sleep(DISK_LOOK_SECONDS)
            try:
                if await self._written(container) > self._settings.disk_bytes:
                    async with _engine("kill a container"):
                        await container.kill()
            except SandboxError as error:
                logger.warning("what packages write to disk is not known now: %s", error)

    async def _written(self, container: Any) -> int:
        async with _engine("look at a container"):
            return int((await container.show(size=1)).get("SizeRw") or 0)

    def _labels(self, key: str) -> dict[str, str]:
        return {
            "managed-agents.installation": self._installation,
            "managed-agents.part": "packages",
            "managed-agents.packages": key,
        }

    def _container(self, base: str, packages: Packages, given: Path) -> dict[str, Any]:
        settings = self._settings
        binds = [f"{given}:{SETTINGS_FILE}:ro"]
        if settings.extra_ca is not None:
            binds.append(f"{settings.extra_ca}:{CA_FILE}:ro")
        return {
            "Image": base,
            "Entrypoint": [],
            "Cmd": ["/bin/sh", "-c", script(packages)],
            "Env": [],
            "User": "0:0",
            "WorkingDir": "/",
            "Labels": {**self._labels(""), "managed-agents.sandbox": "packages", "managed-agents.generation": "0"},
            "HostConfig": {
                "Binds": binds,
                "NetworkMode": settings.network,
                "CapDrop": ["NET_RAW", "NET_BIND_SERVICE", "MKNOD", "AUDIT_WRITE"],
                "SecurityOpt": ["no-new-privileges"],
                "Tmpfs": {"/run": "size=64m", "/tmp": "exec,size=2g"},
                "Init": True,
                "Memory": MEMORY_BYTES,
                "MemorySwap": MEMORY_BYTES,
                "NanoCpus": int(min(settings.cpus, os.cpu_count() or 1) * 1e9),
                "PidsLimit": PIDS,
                "LogConfig": {"Type": "json-file", "Config": {"max-size": "4m", "max-file": "1"}},
            },
        }

    async def _remove_container(self, key: str) -> None:
        async with _engine("remove a container"):
            try:
                container = await self._client.containers.get(self._container_name(key))
                await container.delete(force=True, v=True)
            except aiodocker.DockerError as error:
                if error.status not in (404, 409):  # gone, or going
                    raise

    async def collect(self, *, kept_seconds: float = KEPT_SECONDS, settled_seconds: float = SETTLED_SECONDS) -> list[str]:
        """Remove images that no container uses, and containers of installs that died.

        Those not wanted for `kept_seconds` go, and where all together are too large the longest unwanted ones, except such as
        were wanted within `settled_seconds`.
        """
        paths = sorted(self._directory.glob("*")) if self._directory.exists() else []
        removed = [path.name for path in paths if await self._collect(path, kept_seconds)]
        sizes = await self._sizes() if paths else {}
        excess = sum(sizes.values()) - self._settings.images_bytes
        for path in sorted(paths, key=lambda path: path.stat().st_mtime):
            if excess <= 0:
                break
            if path.name in sizes and await self._collect(path, settled_seconds):
                excess -= sizes[path.name]
                removed.append(path.name)
        return removed

    async def _collect(self, path: Path, unwanted_seconds: float) -> bool:
        """Clear up after one content. Returns whether its image was removed, which was not wanted for so long."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not _try_lock(fd):
                return False  # an install is under way
            await self._remove_container(path.name)
            self._directory.with_name(f"packages-{path.name}.sh").unlink(missing_ok=True)
            return time.time() - os.fstat(fd).st_mtime > unwanted_seconds and await self._remove_image(path.name)
        finally:
            os.close(fd)

    async def _sizes(self) -> dict[str, int]:
        """What each image has beyond its base, by content. Those of older releases do not say, and go by their age alone."""
        labels = [f"{name}={value}" for name, value in self._labels("").items() if value]
        async with _engine("list images"):
            found = await self._client.images.list(filters={"label": labels})
        told: list[dict[str, str]] = [image["Labels"] for image in found if image.get("Labels")]
        return {
            each["managed-agents.packages"]: int(each.get(BYTES_LABEL, 0)) for each in told if "managed-agents.packages" in each
        }

    async def _remove_image(self, key: str) -> bool:
        """The lock's file stays: someone may be waiting for it. Removed with the image is its content only."""
        async with _engine("remove an image"):
            try:
                await self._client.images.delete(f"{REPOSITORY}:{key}")
            except aiodocker.DockerError as error:
                if error.status == 404:
                    return False
                if error.status == 409:
                    return False  # a sandbox was made from it
                raise
        logger.info("packages %s: image removed, it was not wanted lately", key)
        return True


def _write_settings(path: Path, environment: Mapping[str, str]) -> None:
    """A file for the shell, because a commit keeps a container's variables, and sandboxes have what their image has."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def _engine(what: str) -> AsyncGenerator[None]:
    try:
        with anyio.fail_after(ENGINE_SECONDS):
            yield
    except aiodocker.DockerError as error:
        raise SandboxError(f"the engine failed to {what}: {error.message}") from error
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise SandboxError(f"the engine does not answer ({what}): {type(error).__name__}: {error}") from error
