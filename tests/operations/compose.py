"""deploy/compose.yaml as a compose program reads it, and as this machine's engine can run it without one."""

import json
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from tests.docs.pages import ROOT
from tests.integration.boot.waiting import until

DEPLOY = ROOT / "deploy"
COMMAND_SECONDS_MAX = 120.0
READY_SECONDS_MAX = 120.0
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


class Unset(Exception):
    """A variable that must be set is not."""


def load(variables: Mapping[str, str], name: str = "compose.yaml") -> dict[str, Any]:
    """The file with its variables filled in."""

    def value(match: re.Match[str]) -> str:
        if given := variables.get(match[1]):
            return given
        if match[2] != "-":
            raise Unset(match[1])
        return match[3]

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(each) for key, each in node.items()}
        if isinstance(node, list):
            return [filled(each) for each in node]
        return _VARIABLE.sub(value, node) if isinstance(node, str) else node

    # After parsing, as compose does it: what a variable brings is text, also when that is empty.
    return filled(yaml.safe_load((DEPLOY / name).read_text()))


def with_sized_disks(file: dict[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """Lay compose.sized-disks.yaml over the file as compose does: lists grow, a mount replaces that of its target."""
    worker = file["services"]["worker"]
    over = load(variables, "compose.sized-disks.yaml")["services"]["worker"]
    volumes = {volume.split(":")[1]: volume for volume in worker["volumes"]}
    for volume in over.pop("volumes"):
        long = isinstance(volume, dict)
        target = volume["target"] if long else volume.split(":")[1]
        volumes[target] = f"{volume['source']}:{target}:{volume['bind']['propagation']}" if long else volume
    grown = {name: worker.get(name, []) + value for name, value in over.items() if isinstance(value, list)}
    merged = {**worker, **over, **grown, "volumes": list(volumes.values())}
    return {**file, "services": {**file["services"], "worker": merged}}


def names_of_variables() -> set[str]:
    """Every variable of the file."""
    return {match[1] for match in _VARIABLE.finditer((DEPLOY / "compose.yaml").read_text())}


def docker(*arguments: str) -> str:
    """Run the docker program and return what it prints."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX)
    assert done.returncode == 0, f"docker {shlex.join(arguments)}:\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


@dataclass
class Project:
    """The containers of one file."""

    name: str
    file: dict[str, Any]

    @property
    def label(self) -> str:
        return f"managed-agents.test={self.name}"

    def container(self, service: str) -> str:
        """Name of a service's container."""
        return f"{self.name}-{service}"

    def up(self, *services: str) -> None:
        """Start services and what they depend on, each when its dependencies are as it wants them."""
        if not docker("network", "ls", "-q", "--filter", f"label={self.label}"):
            docker("network", "create", "--label", self.label, self.name)
        for service in services:
            wanted = self.file["services"][service]
            for other, how in wanted.get("depends_on", {}).items():
                self.up_once(other)
                self._wait(other, how["condition"])
            docker("run", "-d", "--name", self.container(service), *self._flags(service, wanted))

    def up_once(self, service: str) -> None:
        """Start a service unless it was started."""
        if not docker("ps", "-aq", "--filter", f"name=^{self.container(service)}$"):
            self.up(service)

    def healthy(self, service: str) -> None:
        """Wait until its health check succeeds."""
        self._wait(service, "service_healthy")

    def state(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container."""
        return json.loads(docker("inspect", "-f", "{{json .State}}", self.container(service)))

    def logs(self) -> str:
        """The ends of all logs."""
        every = docker("ps", "-a", "--filter", f"label={self.label}", "--format", "{{.Names}}").split()
        told = (
            subprocess.run(["docker", "logs", "--tail", "30", each], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for each in every
        )
        return "\n".join(f"--- {each}\n{done.stdout.decode()}" for each, done in zip(every, told, strict=True))

    def down(self) -> None:
        """Remove everything."""
        if containers := docker("ps", "-aq", "--filter", f"label={self.label}").split():
            docker("rm", "-f", "-v", *containers)
        for volume in self.file["volumes"]:
            docker("volume", "rm", "-f", f"{self.name}-{volume}")
        if networks := docker("network", "ls", "-q", "--filter", f"label={self.label}").split():
            docker("network", "rm", *networks)

    def _wait(self, service: str, condition: str) -> None:
        def reached() -> bool:
            state = self.state(service)
            if condition == "service_completed_successfully":
                assert state["ExitCode"] == 0, f"{service} failed:\n{self.logs()}"
                return state["Status"] == "exited"
            assert state["Status"] == "running", f"{service} ended:\n{self.logs()}"
            return state["Health"]["Status"] == "healthy"

        until(reached, f"{service} to be {condition}", READY_SECONDS_MAX)

    def _flags(self, service: str, wanted: dict[str, Any]) -> list[str]:
        taken = dict(wanted)
        health = taken.pop("healthcheck", None)
        command = taken.pop("command", [])
        image = taken.pop("image")
        flags = ["--label", self.label, "--network", self.name, "--network-alias", service]
        for name in ("depends_on", "restart", "profiles"):
            taken.pop(name, None)
        for name, value in taken.pop("environment", {}).items():
            flags += ["-e", f"{name}={value}"]
        for volume in taken.pop("volumes", []):
            flags += ["-v", volume if volume.startswith("/") else f"{self.name}-{volume}"]
        flags += ["--user", taken.pop("user")] if "user" in taken else []
        flags += ["--stop-timeout", taken.pop("stop_grace_period").removesuffix("s")]
        for name in ("init", "read_only"):
            flags += [f"--{name.replace('_', '-')}"] if taken.pop(name, False) else []
        for name, flag in (("hostname", "--hostname"), ("shm_size", "--shm-size")):
            flags += [flag, str(taken.pop(name))] if name in taken else []
        lists = ("tmpfs", "cap_add", "cap_drop", "security_opt", "group_add", "device_cgroup_rules", "ports")
        for name in lists:
            flag = {"device_cgroup_rules": "--device-cgroup-rule", "ports": "-p"}.get(name, f"--{name.replace('_', '-')}")
            flags += [part for value in taken.pop(name, []) for part in (flag, str(value))]
        assert not taken, f"{service}: {sorted(taken)} would not be run as it stands"
        return flags + _health(health) + [image, *map(str, command)]


def _health(check: dict[str, Any] | None) -> list[str]:
    if check is None:
        return []
    kind, *words = check["test"]
    flags = ["--health-cmd", words[0] if kind == "CMD-SHELL" else shlex.join(words), "--health-retries", str(check["retries"])]
    for name in ("timeout", "start_period"):
        flags += [f"--health-{name.replace('_', '-')}", check[name]] if name in check else []
    return [*flags, "--health-interval", "1s"]  # theirs is for years of running
