"""Build the sandbox image: `python -m managed_agents.sandbox.image build`.

From the Dockerfile's public base where an image registry can be reached, else from the distribution's own
packages through this machine's apt sources (so an operator's mirror is used and no address stands here).
The image carries a label with the hash of everything it is built from: a second run sees it and skips.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import click

IMAGE = "managed-agents-sandbox:latest"
BASE_IMAGE = "python:3.13-slim-bookworm"
CONTENT_LABEL = "managed-agents.content"
PULL_SECONDS = 120.0
BUILD_SECONDS = 1800.0
UIDS = range(64000, 65000)

# What the Dockerfile installs, in the distribution's names.
PACKAGES = (
    "bash",
    "ca-certificates",
    "coreutils",
    "curl",
    "diffutils",
    "file",
    "findutils",
    "git",
    "grep",
    "gzip",
    "jq",
    "less",
    "make",
    "nodejs",
    "patch",
    "procps",
    "python-is-python3",
    "python3",
    "python3-packaging",
    "python3-pip",
    "python3-pytest",
    "python3-venv",
    "ripgrep",
    "sed",
    "tar",
    "unzip",
    "xz-utils",
    "zip",
)
_EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_DIRECTORIES = (
    "workspace",
    "home/agent",
    "mnt/session",
    "mnt/memory",
    "opt/managed-agents",
    "run/managed-agents",
)

Progress = Callable[[str], None]
Source = Literal["auto", "registry", "distribution"]


class ImageBuildFailed(Exception):
    """The image could not be built; the message says what to do."""


def dockerfile_directory() -> Path:
    """Where the Dockerfile is: in the source tree, three directories above the package."""
    return Path(__file__).resolve().parents[3] / "docker" / "sandbox"


def content_key() -> str:
    """Return the hash of everything that decides what the image contains."""
    digest = hashlib.sha256(repr((BASE_IMAGE, PACKAGES, _EXCLUDED, _hook())).encode())
    if (dockerfile := dockerfile_directory() / "Dockerfile").exists():
        digest.update(dockerfile.read_bytes())
    return digest.hexdigest()[:24]


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def existing_key(image: str = IMAGE) -> str | None:
    """Return the content key of `image` in the engine, or None when there is no such image of ours."""
    found = _run(["docker", "image", "inspect", "-f", f'{{{{index .Config.Labels "{CONTENT_LABEL}"}}}}', image], 30)
    return found.stdout.strip() or None if found.returncode == 0 else None


def _registry_reachable(progress: Progress) -> bool:
    """Say whether the base image is here or can be pulled."""
    if _run(["docker", "image", "inspect", BASE_IMAGE], 30).returncode == 0:
        return True
    progress(f"pulling {BASE_IMAGE}")
    try:
        pulled = _run(["docker", "pull", "-q", BASE_IMAGE], PULL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return pulled.returncode == 0


def _build_from_registry(image: str, key: str, progress: Progress) -> None:
    command = [
        "docker",
        "build",
        "-t",
        image,
        "--label",
        f"{CONTENT_LABEL}={key}",
        str(dockerfile_directory()),
    ]
    progress("building from the Dockerfile")
    if subprocess.run(command, timeout=BUILD_SECONDS, check=False, stdout=sys.stderr).returncode != 0:
        raise ImageBuildFailed("`docker build docker/sandbox` failed; its output is above")


def _suite() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip('"')
    raise ImageBuildFailed("no VERSION_CODENAME in /etc/os-release: this is neither Debian nor Ubuntu")


def apt_sources(suite: str) -> list[str]:
    """Return this machine's apt sources of `suite` (and its updates and security) as one-line entries."""
    form = "$(SITE)|$(RELEASE)|$(COMPONENT)"
    listed = _run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"], 60)
    if listed.returncode != 0:
        raise ImageBuildFailed(f"apt-get indextargets failed: {listed.stderr.strip()}")
    components: dict[tuple[str, str], list[str]] = {}
    for line in listed.stdout.splitlines():
        site, release, component = line.split("|")
        if release.rstrip("/") in (suite, f"{suite}-updates", f"{suite}-security"):
            components.setdefault((site, release), []).append(component)
    # mmdebstrap finds the distribution's keyring itself.
    return [f"deb {site} {release} {' '.join(dict.fromkeys(names))}" for (site, release), names in components.items()]


def _hook() -> str:
    """Shell text for mmdebstrap: directories that get mounted over, and names for the commands' uids."""
    return (
        f'cd "$1" && mkdir -p {" ".join(_DIRECTORIES)} && i={UIDS.start} && while [ $i -lt {UIDS.stop} ]; do '
        'echo "agent:x:$i:$i::/home/agent:/bin/bash" >> etc/passwd; echo "agent:x:$i:" >> etc/group; '
        "i=$((i+1)); done"
    )


def _build_from_distribution(image: str, key: str, progress: Progress) -> None:
    if shutil.which("mmdebstrap") is None:
        raise ImageBuildFailed("no image registry can be reached and mmdebstrap is missing: apt-get install mmdebstrap")
    suite = _suite()
    progress(f"building from packages of {suite} (about a minute)")
    command = [
        "mmdebstrap",
        "--variant=apt",
        f"--include={','.join(PACKAGES)}",
        f"--customize-hook={_hook()}",
    ]
    command += [f"--dpkgopt=path-exclude={path}" for path in _EXCLUDED]
    command += [suite, "-", *apt_sources(suite)]
    changes = [f"LABEL {CONTENT_LABEL}={key}", 'CMD ["/bin/bash"]']
    importing = ["docker", "import", *(f"--change={change}" for change in changes), "-", image]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as strap:
        imported = subprocess.run(importing, stdin=strap.stdout, timeout=BUILD_SECONDS, check=False, stdout=sys.stderr)
        strapped = strap.wait(timeout=60)
    if strapped != 0:
        # A truncated tar may have been imported under our label: it must not count as built.
        _run(["docker", "image", "rm", image], 60)
        raise ImageBuildFailed("mmdebstrap failed; its output is above")
    if imported.returncode != 0:
        raise ImageBuildFailed("`docker import` failed; its output is above")


def build(image: str = IMAGE, *, source: Source = "auto", progress: Progress) -> bool:
    """Make sure `image` is in the engine and current. Returns False when there was nothing to do."""
    key = content_key()
    if existing_key(image) == key:
        progress(f"{image} is there and current")
        return False
    if _run(["docker", "version"], 30).returncode != 0:
        raise ImageBuildFailed("no Docker engine answers")
    if source == "registry" or (source == "auto" and _registry_reachable(progress)):
        _build_from_registry(image, key, progress)
    else:
        _build_from_distribution(image, key, progress)
    progress(f"{image} is built")
    return True


@click.group()
def main() -> None:
    """Sandbox image."""


@main.command("build")
@click.option("--image", default=IMAGE, show_default=True)
@click.option("--source", type=click.Choice(["auto", "registry", "distribution"]), default="auto", show_default=True)
def build_command(image: str, source: Source) -> None:
    """Build the image unless the engine has the current one."""
    try:
        build(image, source=source, progress=lambda line: click.echo(f"sandbox image: {line}", err=True))
    except ImageBuildFailed as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
