"""The full sandbox image by the distribution's packages: what docker/sandbox/full lists, in two steps.

First a base of packages alone, kept under a name and key of its own; then a container of it in which install.sh fetches what
language registries have, committed as the image. So a registry that fails costs the second step only. What this machine is told
of its indexes and proxies, and its certificate authorities, are there while it installs and not in the image. Race: two builds
of one checkout; a lock on the lists' directory makes the second wait for the first and find its result.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from managed_agents.sandbox import distribution
from managed_agents.sandbox.distribution import CONTENT_LABEL, ImageBuildFailed, Progress

IMAGE = "managed-agents-sandbox:full"
BASE_IMAGE = "ubuntu:24.04"
BASE_OF_PACKAGES = "managed-agents-sandbox:full-base"
ROUTE_LABEL = "managed-agents.route"
BUILD_SECONDS = 5400.0
PARTS = ("python_libraries", "nodes", "gos", "databases", "distribution_browser")
"""Of install.sh. The others (Pythons, Rust, Rubies, Playwright's browser) fetch from places that are no package registry."""
ENVIRONMENT = {"PLAYWRIGHT_BROWSERS_PATH": "/opt/pw-browsers"}
"""Reaches the commands of sandboxes."""
_CONTAINER = "managed-agents-image-full"
_INSIDE = "/run/managed-agents"
_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_PASSED_ON = re.compile(
    r"PIP_((EXTRA_)?INDEX_URL|TRUSTED_HOST|PROXY|(DEFAULT_)?TIMEOUT|RETRIES)"
    r"|NPM_CONFIG_(REGISTRY|PROXY|HTTPS_PROXY|NOPROXY)|(HTTPS?|ALL|NO)_PROXY",
    re.IGNORECASE,
)


def lists(directory: Path) -> list[Path]:
    """Return the files that decide what the image contains."""
    return [directory / "Dockerfile.full", *sorted((directory / "full").iterdir())]


def content_key(directory: Path) -> str:
    """Return the hash of everything that decides what the image contains."""
    digest = hashlib.sha256(repr((BASE_IMAGE, PARTS, ENVIRONMENT, distribution.EXCLUDED, distribution.hook())).encode())
    for path in lists(directory):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def choices(directory: Path) -> list[list[str]]:
    """Return the distribution's packages, each with what may stand in for it."""
    lines = [line.partition("#")[0] for line in (directory / "full" / "debian.txt").read_text().splitlines()]
    return [[name.strip() for name in line.split("|")] for line in lines if line.strip()]


def build_from_distribution(image: str, key: str, directory: Path, progress: Progress) -> None:
    """Make both steps, the first only when its result is not there. Raises: ImageBuildFailed."""
    with _alone(directory / "full", progress):
        if distribution.existing_key(image) == key:
            return
        packages = distribution.available(choices(directory))
        content = repr((distribution.suite(), packages, distribution.EXCLUDED, distribution.hook()))
        base_key = hashlib.sha256(content.encode()).hexdigest()[:24]
        if distribution.existing_key(BASE_OF_PACKAGES) == base_key:
            progress(f"1 of 2: {BASE_OF_PACKAGES} is there and current")
        else:
            progress(f"1 of 2: {len(packages)} packages of {distribution.suite()} and what they need (minutes)")
            distribution.bootstrap(BASE_OF_PACKAGES, base_key, packages, seconds=BUILD_SECONDS)
        progress(f"2 of 2: from the language registries: {', '.join(PARTS)}")
        distribution.run(["docker", "rm", "-f", _CONTAINER], 60)  # of a build that died
        try:
            _install(image, key, directory)
        finally:
            distribution.run(["docker", "rm", "-f", _CONTAINER], 60)


@contextmanager
def _alone(directory: Path, progress: Progress) -> Generator[None]:
    """Hold the directory's lock, which ends with its holder; holders are bounded in time."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another build is under way: waiting for it")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _install(image: str, key: str, directory: Path) -> None:
    mounts = [f"{directory / 'full'}:{_INSIDE}:ro"]
    settings = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
    if (bundle := os.environ.get("SSL_CERT_FILE") or (_BUNDLE if Path(_BUNDLE).exists() else None)) is not None:
        mounts.append(f"{bundle}:{_BUNDLE}:ro")
        settings |= {"PIP_CERT": _BUNDLE, "SSL_CERT_FILE": _BUNDLE, "NODE_EXTRA_CA_CERTS": _BUNDLE}
    binds = [word for mount in mounts for word in ("-v", mount)]
    starting = ["docker", "run", "-d", "--init", "--name", _CONTAINER, "--label", "managed-agents.part=image", *binds]
    _do([*starting, BASE_OF_PACKAGES, "sleep", "infinity"], 120, "starting a container")
    # Given to the command, because a commit keeps what the container has; by name, so that no list of processes shows a value.
    given = [word for name in settings for word in ("-e", name)]
    running = ["docker", "exec", *given, _CONTAINER, "sh", f"{_INSIDE}/install.sh", *PARTS]
    _do(running, BUILD_SECONDS, "docker/sandbox/full/install.sh", settings)
    changes = [
        f"LABEL {CONTENT_LABEL}={key} {ROUTE_LABEL}=distribution",
        *(f"ENV {name}={value}" for name, value in ENVIRONMENT.items()),
        'CMD ["/bin/bash"]',
    ]
    _do(["docker", "commit", *(f"--change={change}" for change in changes), _CONTAINER, image], 600, "docker commit")


def _do(command: list[str], seconds: float, what: str, environment: Mapping[str, str] | None = None) -> None:
    if distribution.run_visibly(command, seconds, environment or {}) != 0:
        raise ImageBuildFailed(f"{what} failed; its output is above")
