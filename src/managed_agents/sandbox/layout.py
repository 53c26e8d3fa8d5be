"""Where a sandbox keeps things: directories on the host, paths inside, the commands' environment, the
runner's code.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from managed_agents.sandbox.backend import Limits
from managed_agents.sandbox.runner.config import Config

UIDS = 1000
BOOT = "import sys; sys.path.insert(0, '{0}'); from runner import main; main.main()"
ROOT_OWNED = ["/mnt/session/uploads", "/mnt/session/skills", "/mnt/memory"]
SPILL = "/mnt/session/tool_outputs"
EGRESS_SOCKET = "egress.sock"
PROXY_PORT = 3128
"""Inside a sandbox with a network namespace of its own."""
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Places:
    """Host directories of one sandbox generation."""

    home: Path
    """Everything durable: disk, state, metadata."""
    run: Path
    """The socket's directory, mounted into the sandbox."""

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def socket(self) -> Path:
        return self.run / "runner.sock"

    @property
    def egress(self) -> Path:
        """The directory of the gateway's socket, which any uid inside may enter."""
        return self.run / "egress"


def key(id: str, generation: int) -> str:  # noqa: A002 - the seam's word
    """Return the name of a sandbox generation in paths and engines."""
    return f"{id}.{generation}"


def places(data_dir: Path, run_dir: Path, id: str, generation: int) -> Places:  # noqa: A002
    """Return where a sandbox generation lives."""
    return Places(data_dir / "sandboxes" / key(id, generation), run_dir / key(id, generation))


def environment(home: str, extra: Mapping[str, str], image: Sequence[str] = ()) -> dict[str, str]:
    """Return the commands' environment, built from nothing but what the `image` sets (`NAME=value`). Package managers install
    below `home`, whose programs come first on PATH.
    """
    given = dict(variable.split("=", 1) for variable in image if "=" in variable)
    searched = dict.fromkeys([*given.pop("PATH", "").split(":"), *_SYSTEM_PATH.split(":")])
    own = (".local/bin", ".npm-global/bin", ".cargo/bin", "go/bin", ".gem/bin")
    return {
        **given,
        "HOME": home,
        "USER": "agent",
        "LOGNAME": "agent",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "PAGER": "cat",
        "GIT_PAGER": "cat",
        "PATH": ":".join([*(f"{home}/{part}" for part in own), *(place for place in searched if place)]),
        # The root file system is read-only: pip falls back to the user's prefix and must be allowed to use
        # it.
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "NPM_CONFIG_PREFIX": f"{home}/.npm-global",
        "GEM_HOME": f"{home}/.gem",
        "GOPATH": f"{home}/go",
        **extra,
    }


def proxy_environment(port: int) -> dict[str, str]:
    """Return what makes programs go through the proxy: the usual variables, and settings of those that ignore them."""
    url = f"http://127.0.0.1:{port}"
    local = "localhost,127.0.0.1,::1"
    java = f"-Dhttp.proxyHost=127.0.0.1 -Dhttp.proxyPort={port} -Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort={port}"
    usual = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "ALL_PROXY": url, "NO_PROXY": local}
    return {
        **usual,
        **{name.lower(): value for name, value in usual.items()},
        "PIP_PROXY": url,
        "NPM_CONFIG_PROXY": url,
        "NPM_CONFIG_HTTPS_PROXY": url,
        "NPM_CONFIG_NOPROXY": local,
        "YARN_HTTP_PROXY": url,
        "YARN_HTTPS_PROXY": url,
        "NODE_USE_ENV_PROXY": "1",
        "CARGO_HTTP_PROXY": url,
        "CARGO_NET_GIT_FETCH_WITH_CLI": "true",
        "JAVA_TOOL_OPTIONS": f"{java} -Dhttp.nonProxyHosts=localhost|127.*|[::1]",
    }


def certificate_environment(path: str) -> dict[str, str]:
    """Return what makes programs trust the authorities in the file `path`."""
    names = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "NODE_EXTRA_CA_CERTS", "NPM_CONFIG_CAFILE")
    more = ("GIT_SSL_CAINFO", "CARGO_HTTP_CAINFO", "AWS_CA_BUNDLE", "DENO_CERT")
    return dict.fromkeys((*names, *more), path)


def java_bundle(bundle: Path) -> Path:
    """Where the authorities of `bundle` are for Java, which reads another format."""
    return bundle.with_suffix(".p12")


def java_options(path: str) -> str:
    """What makes Java trust the authorities in the file `path`; the password is the one that its own store has."""
    return f"-Djavax.net.ssl.trustStore={path} -Djavax.net.ssl.trustStorePassword=changeit"


def install_runner(data_dir: Path) -> Path:
    """Copy the runner's code below `data_dir`, named by content, and return the directory to mount.

    A copy, because sandboxes outlive upgrades of this package.
    """
    source = Path(__file__).parent / "runner"
    files = sorted(source.glob("*.py"))
    digest = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()[:16]
    target = data_dir / "runner" / digest
    if not target.exists():
        partial = target.with_name(f"{digest}.{os.getpid()}.part")
        try:
            _copy_runner(files, partial)
        except OSError:
            # On a full disk, most likely: a half copy would be in the way of the next one.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            partial.rename(target)
        except OSError:
            # Another process was first; its copy is the same.
            shutil.rmtree(partial)
    return target


def _copy_runner(files: Sequence[Path], partial: Path) -> None:
    (partial / "runner").mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, partial / "runner" / file.name)
    for path in (partial.parent, partial, partial / "runner"):
        path.chmod(0o755)
    for path in (partial / "runner").iterdir():
        path.chmod(0o644)


def make_tree(root: Path, uid: int | None) -> None:
    """Make a session disk's directories: what commands own, and what only uid 0 may change."""
    for name, own, mode in (
        ("workspace", True, 0o755),
        ("home", True, 0o755),
        ("tmp", False, 0o1777),
        ("memory", False, 0o755),
        ("session", False, 0o755),
        ("session/uploads", False, 0o755),
        ("session/skills", False, 0o755),
        ("session/outputs", True, 0o755),
        ("session/tool_outputs", True, 0o755),
    ):
        path = root / name
        path.mkdir(exist_ok=True)
        path.chmod(mode)
        if own and uid is not None:
            os.chown(path, uid, uid)


def runner_config(
    *,
    socket: str,
    state: str,
    uid: int | None,
    environment: dict[str, str],
    quota_bytes: int | None = None,
    own_tmp: bool = True,
    egress_socket: str | None = None,
    limits: Limits | None = None,
    own_cgroup: bool = False,
    own_disk: bool = False,
) -> Config:
    """Return the configuration with the paths every backend has in common."""
    roots = ["/workspace", environment["HOME"], "/mnt/session", "/mnt/memory"]
    return Config(
        socket=socket,
        state=state,
        uid=uid,
        workspace="/workspace",
        spill=SPILL,
        environment=environment,
        own_pid_namespace=True,
        root_owned=list(ROOT_OWNED),
        quota_bytes=quota_bytes,
        quota_roots=[*roots, *(["/tmp"] if own_tmp else [])],
        # What root owns is put there again from where it came.
        snapshot={
            "workspace": "/workspace",
            "home": environment["HOME"],
            "outputs": "/mnt/session/outputs",
            "tool_outputs": SPILL,
        },
        limits=asdict(limits or Limits()),
        own_cgroup=own_cgroup,
        own_disk=own_disk,
        egress_socket=egress_socket,
        proxy_port=None if egress_socket is None else PROXY_PORT,
    )


def interpreter() -> str:
    """Return a Python that any uid of this machine can run: a virtual environment in root's home is none."""
    for candidate in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.access(candidate, os.X_OK):
            return candidate
    return sys.executable
