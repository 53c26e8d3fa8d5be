"""What the tests of this folder share: a backend in a directory of its own, calls, texts."""

import itertools
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from managed_agents.sandbox import disk
from managed_agents.sandbox.backend import Call, Limits, Outcome, SandboxBackend, SandboxSpec
from managed_agents.sandbox.docker import DockerBackend
from managed_agents.sandbox.local import LocalBackend

IMAGE = "managed-agents-sandbox:latest"
MIB = 1024 * 1024


@dataclass
class Bench:
    """A backend in a directory of its own, and what tests ask of it."""

    kind: str
    directory: Path
    installation: str
    backends: list[SandboxBackend] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)

    def backend(self) -> SandboxBackend:
        """A worker's view: each has its own connections, as after a crash of the one before."""
        data_dir, run_dir = self.directory / "data", self.directory / "run"
        made: SandboxBackend
        if self.kind.startswith("docker"):
            made = DockerBackend(
                installation=self.installation,
                data_dir=data_dir,
                run_dir=run_dir,
                disk_mode="volume" if self.kind == "docker-volume" else "auto",
            )
        else:
            mapped = self.kind == "local-mapped"
            made = LocalBackend(data_dir=data_dir, run_dir=run_dir, isolation="none" if mapped else "auto")
        self.backends.append(made)
        return made

    def spec(self, id: str | None = None, generation: int = 1, **limits: Any) -> SandboxSpec:  # noqa: A002
        sizes = {"memory_bytes": 512 * MIB, "disk_bytes": 96 * MIB, "cpus": 1.0, "pids": 128, **limits}
        name = id or f"sbx_{next(self.numbers)}"
        return SandboxSpec(name, generation, IMAGE, Limits(**sizes), env={"GIVEN": "yes"}, session_id="sesn_of_tests")

    @property
    def contained(self) -> bool:
        return self.kind.startswith("docker")

    def traces(self) -> dict[str, list[str]]:
        """What is left on the host: containers, volumes, mounts, loop devices, directories."""

        def lines(*command: str) -> list[str]:
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
            return found.stdout.split("\n")[:-1]

        label = f"label=managed-agents.installation={self.installation}"
        directory = str(self.directory)
        docker = ("docker", "ps", "-aq", "--filter", label) if self.contained else ("true",)
        volumes = ("docker", "volume", "ls", "-q", "--filter", label) if self.contained else ("true",)
        return {
            "containers": lines(*docker),
            "volumes": lines(*volumes),
            "mounts": [line for line in Path("/proc/self/mounts").read_text().split("\n") if directory in line],
            "loops": [line for line in lines("/usr/sbin/losetup", "-a") if directory in line],
            "directories": [str(path) for name in ("data/sandboxes", "run") for path in (self.directory / name).glob("*")],
        }


KINDS = ("docker", "docker-volume", "local", "local-mapped")
# An unprivileged local sandbox does not isolate the runner from the commands.
ISOLATED = KINDS if os.geteuid() == 0 else ("docker", "docker-volume")
# Without root there is no sized disk, and "docker" falls back to volumes.
SIZED = ("docker",) if disk.supported() else ()


def only(*kinds: str) -> pytest.MarkDecorator:
    """Run a test with these kinds of backend: the others declare not to promise what it shows."""
    return pytest.mark.parametrize("bench", kinds, indirect=True, scope="module")


_ids = itertools.count()


def new_call(name: str, **arguments: Any) -> Call:
    """A call with a fresh id."""
    return Call(f"sevt_{next(_ids)}", 1, name, arguments, 60.0)


def text(outcome: Outcome) -> str:
    """The text of an outcome of one text block."""
    [block] = outcome.content
    assert block["type"] == "text"
    return block["text"]
