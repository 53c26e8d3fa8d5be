"""Build the server image where no image registry can be reached: `.venv/bin/python deploy/build.py`.

The same Dockerfile, on a base made of the distribution's packages through this machine's apt sources, and with wheels that
this machine's pip fetches: the build itself needs no network. With a registry, `docker build -f deploy/Dockerfile .` does.
"""

import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import click

from managed_agents.sandbox.distribution import BUILD_SECONDS, CONTENT_LABEL, ImageBuildFailed, apt_sources, existing_key

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "deploy" / "wheels"
IMAGE = "managed-agents:latest"
BASE = "managed-agents-base:latest"
PACKAGES = ("ca-certificates", "e2fsprogs", "mount", "passwd", "python3", "python3-venv")


def run(*command: str | Path) -> None:
    """Run a command with its output visible."""
    words = [str(word) for word in command]
    if subprocess.run(words, stdin=subprocess.DEVNULL, timeout=BUILD_SECONDS, check=False).returncode != 0:
        raise ImageBuildFailed(f"`{' '.join(words[:4])} …` failed; its output is above")


def base() -> None:
    """Make the base image unless the engine has it."""
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    key = hashlib.sha256(repr((suite, PACKAGES)).encode()).hexdigest()[:24]
    if existing_key(BASE) == key:
        return
    if shutil.which("mmdebstrap") is None:
        raise ImageBuildFailed("mmdebstrap is missing: apt-get install mmdebstrap")
    archive = WHEELS.with_name("base.tar")
    try:
        run("mmdebstrap", "--variant=apt", f"--include={','.join(PACKAGES)}", suite, archive, *apt_sources(suite))
        run("docker", "import", f"--change=LABEL {CONTENT_LABEL}={key}", archive, BASE)
    finally:
        archive.unlink(missing_ok=True)


def wheels() -> None:
    """Fetch what the lock names, for the distribution's Python; the hashes are checked here and again by the build."""
    for python in ("/usr/bin/python3", sys.executable):
        if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
            break
    else:
        raise ImageBuildFailed("pip is missing: apt-get install python3-pip")
    run(python, "-m", "pip", "download", "-q", "--require-hashes", "--no-deps", "-r", ROOT / "requirements.lock", "-d", WHEELS)


@click.command()
@click.option("--image", default=IMAGE, show_default=True)
def build(image: str) -> None:
    """Build the server image from distribution packages and the lock."""
    try:
        base()
        wheels()
        arguments = ("--build-arg", f"BASE={BASE}", "--build-arg", "PIP_NO_INDEX=1")
        run("docker", "build", "--force-rm", "-f", ROOT / "deploy" / "Dockerfile", "-t", image, *arguments, ROOT)
    except ImageBuildFailed as error:
        raise click.ClickException(str(error)) from None
    finally:
        shutil.rmtree(WHEELS, ignore_errors=True)


if __name__ == "__main__":
    build()
