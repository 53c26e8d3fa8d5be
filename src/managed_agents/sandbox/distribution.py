"""Images made of the distribution's packages through this machine's apt sources, with no image registry.

An operator's mirror is used and no address stands here. Invariant: an image carries its content label only when everything in it
was installed.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CONTENT_LABEL = "managed-agents.content"
BUILD_SECONDS = 1800.0
UIDS = range(64000, 65000)
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_DIRECTORIES = (
    "workspace",
    "home/agent",
    "mnt/session",
    "mnt/memory",
    "opt/managed-agents",
    "run/managed-agents",
)

Progress = Callable[[str], None]


class ImageBuildFailed(Exception):
    """The image could not be built; the message says what to do."""


def run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a program for what it says."""
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def run_visibly(command: list[str], seconds: float, environment: Mapping[str, str]) -> int:
    """Run a program with its output on ours, and return its status. Raises: ImageBuildFailed when it takes too long."""
    try:
        given = {**os.environ, **environment}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=seconds, check=False, env=given)
    except subprocess.TimeoutExpired as error:
        raise ImageBuildFailed(f"`{' '.join(command[:2])}` took more than {seconds:.0f} s") from error
    return done.returncode


def label(image: str, name: str) -> str | None:
    """Return a label of `image`, None when the engine has no such image or it has no such label."""
    found = run(["docker", "image", "inspect", "-f", f'{{{{index .Config.Labels "{name}"}}}}', image], 30)
    return found.stdout.strip() or None if found.returncode == 0 else None


def existing_key(image: str) -> str | None:
    """Return the content key of `image` in the engine, or None when there is no such image of ours."""
    return label(image, CONTENT_LABEL)


def suite() -> str:
    """Return the name of this machine's release."""
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip('"')
    raise ImageBuildFailed("no VERSION_CODENAME in /etc/os-release: this is neither Debian nor Ubuntu")


def apt_sources(suite: str) -> list[str]:
    """Return this machine's apt sources of `suite` (and its updates and security) as one-line entries."""
    form = "$(SITE)|$(RELEASE)|$(COMPONENT)"
    listed = run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"], 60)
    if listed.returncode != 0:
        raise ImageBuildFailed(f"apt-get indextargets failed: {listed.stderr.strip()}")
    components: dict[tuple[str, str], list[str]] = {}
    for line in listed.stdout.splitlines():
        site, release, component = line.split("|")
        if release.rstrip("/") in (suite, f"{suite}-updates", f"{suite}-security"):
            components.setdefault((site, release), []).append(component)
    # mmdebstrap finds the distribution's keyring itself.
    return [f"deb {site} {release} {' '.join(dict.fromkeys(names))}" for (site, release), names in components.items()]


def available(choices: Sequence[Sequence[str]]) -> list[str]:
    """Return the first of each choice that this machine's apt has. Raises: ImageBuildFailed naming one that it lacks."""
    every = sorted({name for names in choices for name in names})
    told = run(["apt-cache", "policy", *every], 60).stdout
    known = set(re.findall(r"^(\S+):\n.*\n  Candidate: (?!\(none\))", told, re.MULTILINE))
    picked: list[str] = []
    for names in choices:
        found = next((name for name in names if name in known), None)
        if found is None:
            raise ImageBuildFailed(f"apt does not know {' or '.join(names)}: run `apt-get update`, or it is not in {suite()}")
        picked.append(found)
    return picked


def hook() -> str:
    """Shell text for mmdebstrap: directories that get mounted over, and names for the commands' uids."""
    return (
        f'cd "$1" && mkdir -p {" ".join(_DIRECTORIES)} && i={UIDS.start} && while [ $i -lt {UIDS.stop} ]; do '
        'echo "agent:x:$i:$i::/home/agent:/bin/bash" >> etc/passwd; echo "agent:x:$i:" >> etc/group; '
        "i=$((i+1)); done"
    )


def bootstrap(image: str, key: str, packages: Sequence[str], *, seconds: float = BUILD_SECONDS) -> None:
    """Make `image` of the release's packages alone. Raises: ImageBuildFailed."""
    if shutil.which("mmdebstrap") is None:
        raise ImageBuildFailed("no image registry can be reached and mmdebstrap is missing: apt-get install mmdebstrap")
    release = suite()
    command = ["mmdebstrap", "--variant=apt", f"--include={','.join(packages)}", f"--customize-hook={hook()}"]
    command += [f"--dpkgopt=path-exclude={path}" for path in EXCLUDED]
    command += [release, "-", *apt_sources(release)]
    changes = [f"LABEL {CONTENT_LABEL}={key}", 'CMD ["/bin/bash"]']
    importing = ["docker", "import", *(f"--change={change}" for change in changes), "-", image]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as strap:
        try:
            imported = subprocess.run(importing, stdin=strap.stdout, timeout=seconds, check=False, stdout=sys.stderr)
            strapped = strap.wait(timeout=60)
        except subprocess.TimeoutExpired as error:
            strap.terminate()
            raise ImageBuildFailed(f"mmdebstrap took more than {seconds:.0f} s") from error
    if strapped != 0:
        # A truncated tar may have been imported under our label: it must not count as built.
        run(["docker", "image", "rm", image], 60)
        raise ImageBuildFailed("mmdebstrap failed; its output is above")
    if imported.returncode != 0:
        raise ImageBuildFailed("`docker import` failed; its output is above")
