"""Build and check sandbox images: `python -m managed_agents.sandbox.image build [--variant full]`.

From a Dockerfile's public base where an image registry can be reached, else from the distribution's own packages. Two variants:
slim for quick starts, full for what a cloud sandbox has (docker/sandbox/reference.toml). An image carries a label with the hash
of everything it is built from: a second run sees it and skips.
"""

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anyio
import click

from managed_agents.sandbox import full_image
from managed_agents.sandbox.distribution import (
    BUILD_SECONDS,
    CONTENT_LABEL,
    EXCLUDED,
    ImageBuildFailed,
    Progress,
    bootstrap,
    existing_key,
    hook,
    label,
    run,
    run_visibly,
    suite,
)
from managed_agents.sandbox.full_image import ROUTE_LABEL
from managed_agents.sandbox.image_reference import Column, failures, load

IMAGE = "managed-agents-sandbox:latest"
BASE_IMAGE = "python:3.13-slim-bookworm"
PULL_SECONDS = 120.0
CHECK_SECONDS = 900.0

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

Source = Literal["auto", "registry", "distribution"]
Variant = Literal["slim", "full"]


@dataclass(frozen=True)
class Recipe:
    """What differs between the variants."""

    image: str
    base: str
    dockerfile: str
    seconds: float


RECIPES: dict[Variant, Recipe] = {
    "slim": Recipe(IMAGE, BASE_IMAGE, "Dockerfile", BUILD_SECONDS),
    "full": Recipe(full_image.IMAGE, full_image.BASE_IMAGE, "Dockerfile.full", full_image.BUILD_SECONDS),
}


def dockerfile_directory() -> Path:
    """Where the Dockerfiles and lists are: in the source tree, three directories above the package."""
    return Path(__file__).resolve().parents[3] / "docker" / "sandbox"


def content_key(variant: Variant = "slim") -> str:
    """Return the hash of everything that decides what the image contains."""
    if variant == "full":
        return full_image.content_key(dockerfile_directory())
    digest = hashlib.sha256(repr((BASE_IMAGE, PACKAGES, EXCLUDED, hook())).encode())
    if (dockerfile := dockerfile_directory() / "Dockerfile").exists():
        digest.update(dockerfile.read_bytes())
    return digest.hexdigest()[:24]


def _registry_reachable(base: str, progress: Progress) -> bool:
    """Say whether the base image is here or can be pulled."""
    if run(["docker", "image", "inspect", base], 30).returncode == 0:
        return True
    progress(f"pulling {base}")
    try:
        pulled = run(["docker", "pull", "-q", base], PULL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return pulled.returncode == 0


def _build_from_registry(recipe: Recipe, image: str, key: str, progress: Progress) -> None:
    directory = dockerfile_directory()
    labels = ["--label", f"{CONTENT_LABEL}={key}", "--label", f"{ROUTE_LABEL}=registry"]
    progress(f"building from {recipe.dockerfile}")
    command = ["docker", "build", "-t", image, "-f", str(directory / recipe.dockerfile), *labels, str(directory)]
    if run_visibly(command, recipe.seconds, {}) != 0:
        raise ImageBuildFailed(f"`docker build docker/sandbox` ({recipe.dockerfile}) failed; its output is above")


def build(image: str | None = None, *, variant: Variant = "slim", source: Source = "auto", progress: Progress) -> bool:
    """Make sure the image is in the engine and current. Returns False when there was nothing to do."""
    recipe = RECIPES[variant]
    name = image or recipe.image
    if variant == "full" and not (dockerfile_directory() / recipe.dockerfile).exists():
        raise ImageBuildFailed("the lists of the full image are in docker/sandbox of a checkout: run this from one")
    key = content_key(variant)
    if existing_key(name) == key:
        progress(f"{name} is there and current")
        return False
    if run(["docker", "version"], 30).returncode != 0:
        raise ImageBuildFailed("no Docker engine answers")
    if source == "registry" or (source == "auto" and _registry_reachable(recipe.base, progress)):
        _build_from_registry(recipe, name, key, progress)
    elif variant == "full":
        full_image.build_from_distribution(name, key, dockerfile_directory(), progress)
    else:
        progress(f"building from packages of {suite()} (about a minute)")
        bootstrap(name, key, PACKAGES)
    progress(f"{name} is built")
    return True


def column(image: str, variant: Variant) -> Column:
    """Return which column of the reference an image is held to."""
    if variant == "slim":
        return "slim"
    return "registry" if label(image, ROUTE_LABEL) == "registry" else "distribution"


@click.group()
def main() -> None:
    """Sandbox images."""


_image = click.option("--image", help="Another name than the variant's own.")
_variant = click.option("--variant", type=click.Choice(["slim", "full"]), default="slim", show_default=True)


def _say(line: str) -> None:
    click.echo(f"sandbox image: {line}", err=True)


@main.command("build")
@_image
@_variant
@click.option("--source", type=click.Choice(["auto", "registry", "distribution"]), default="auto", show_default=True)
def build_command(image: str | None, variant: Variant, source: Source) -> None:
    """Build the image unless the engine has the current one."""
    try:
        build(image, variant=variant, source=source, progress=_say)
    except ImageBuildFailed as error:
        raise click.ClickException(str(error)) from error


@main.command("check")
@_image
@_variant
def check_command(image: str | None, variant: Variant) -> None:
    """Run the reference's commands in a sandbox of the image, as sessions have it."""
    name = image or RECIPES[variant].image
    rows = load(dockerfile_directory() / "reference.toml")

    async def checked() -> list[str]:
        with anyio.fail_after(CHECK_SECONDS):
            return await failures(name, rows, column(name, variant), progress=_say)

    if failed := anyio.run(checked):
        raise click.ClickException("\n".join([f"{name} is not what it should be:", *failed]))
    _say(f"{name} shows what the reference says")


if __name__ == "__main__":
    main()
