"""The hosts that package managers use, read from their own configuration inside the sandbox image.

So an operator's mirrors are covered, and no registry's name stands here. A short-lived container without network asks each
manager that is there; nothing that ran in a session is asked. The answer is kept for as long as the image stays the same.
"""

import re
from typing import Any
from urllib.parse import urlsplit

import aiodocker
import aiohttp
import anyio

from managed_agents.sandbox.backend import SandboxError

PROBE = "probe"
PROBE_SECONDS_MAX = 60.0
OUTPUT_CHARS_MAX = 256 * 1024
HOSTS_MAX = 200

# Each prints URLs or host names in whatever form it has; what is none is not taken. A manager that is missing says nothing.
_PROBE = r"""
export HOME=/tmp/probe PIP_DISABLE_PIP_VERSION_CHECK=1
exec 2>/dev/null
python3 - <<'END'
from pip._internal.models.index import PyPI
print("url", PyPI.simple_url)
print("host", PyPI.file_storage_domain)
END
pip config list | sed -n "s/.*='\\(.*\\)'$/\\1/p" | tr ' ' '\n' | sed 's/^/url /'
apt-get indextargets --format 'url $(SITE)' 'Created-By: Packages'
npm config get registry | sed 's/^/url /'
yarn config get registry | sed 's/^/url /'
go env GOPROXY | tr ',|' '\n\n' | sed 's/^/url /'
go env GOSUMDB | sed 's/ .*//;s/^/host /'
gem sources | grep '^http' | sed 's/^/url /'
cat /usr/local/cargo/config.toml /etc/cargo/config.toml | sed -n 's/.*"\\(sparse+\\)\\{0,1\\}\\(https*:[^"]*\\)".*/url \\2/p'
true
"""
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


class PackageHosts:
    """Asks an image once. The containers bear the name of the `installation`, whose collector removes what a crash left."""

    def __init__(self, image: str, *, installation: str) -> None:
        self._image = image
        self._labels = {"managed-agents.installation": installation, "managed-agents.part": PROBE}
        self._kept: tuple[str, list[str]] | None = None
        self._asking = anyio.Lock()

    async def hosts(self) -> list[str]:
        """Raises: SandboxError."""
        async with self._asking:
            docker: Any = None
            try:
                with anyio.fail_after(PROBE_SECONDS_MAX):
                    docker = aiodocker.Docker()
                    image_id: str = (await docker.images.inspect(self._image))["Id"]
                    if self._kept is None or self._kept[0] != image_id:
                        self._kept = (image_id, hosts_in(await _output(docker, image_id, self._labels)))
                    return self._kept[1]
            except aiodocker.DockerError as error:
                raise SandboxError(f"the engine failed to look into {self._image}: {error.message}") from error
            except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
                raise SandboxError(f"the engine does not answer: {type(error).__name__}: {error}") from error
            finally:
                if docker is not None:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                        await docker.close()


async def _output(docker: Any, image_id: str, labels: dict[str, str]) -> str:
    container = await docker.containers.create(
        {
            "Image": image_id,
            "Cmd": ["/bin/sh", "-c", _PROBE],
            "Entrypoint": [],
            "Labels": labels,
            "HostConfig": {"NetworkMode": "none", "CapDrop": ["ALL"], "ReadonlyRootfs": True, "Tmpfs": {"/tmp": "size=16m"}},
        }
    )
    try:
        await container.start()
        await container.wait()
        lines: list[str] = await container.log(stdout=True)
        return "".join(lines)[:OUTPUT_CHARS_MAX]
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(30):
            await container.delete(force=True)


def hosts_in(output: str) -> list[str]:
    """Read what the probe printed."""
    found: dict[str, None] = {}
    for line in output.splitlines():
        kind, _, value = line.strip().partition(" ")
        host = (_host_of(value) if kind == "url" else value if kind == "host" else "").lower()
        if _NAME.fullmatch(host):
            found[host] = None
    return list(found)[:HOSTS_MAX]


def _host_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        return (parts.hostname or "") if parts.scheme in ("http", "https") else ""
    except ValueError:
        return ""
