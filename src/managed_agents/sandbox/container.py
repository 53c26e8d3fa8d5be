"""What a container of a sandbox is created from, and what its labels say of it. Pure.

The engine's labels are the list of sandboxes.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiodocker.containers import DockerContainer

from managed_agents.sandbox import layout, seccomp
from managed_agents.sandbox.backend import Labelled, SandboxSpec
from managed_agents.sandbox.package_hosts import PROBE

LABEL = "managed-agents"
SOCKET_DIRECTORY = "/run/managed-agents/socket"
EGRESS_DIRECTORY = "/run/managed-agents/egress"
CA_BUNDLE = "/run/managed-agents/ca.pem"
CA_BUNDLE_JAVA = "/run/managed-agents/ca.p12"
STATE_DIRECTORY = "/run/managed-agents/state"
CODE_DIRECTORY = "/opt/managed-agents"
HOME = "/home/agent"
LOG_BYTES_MAX = "1m"

# Directory on the session disk to path in the sandbox.
MOUNTS = {
    "workspace": "/workspace",
    "home": HOME,
    "tmp": "/tmp",
    "session": "/mnt/session",
    "memory": "/mnt/memory",
}


def labels_of(spec: SandboxSpec, installation: str) -> dict[str, str]:
    """Labels of everything in the engine that belongs to the sandbox."""
    labels = {
        f"{LABEL}.installation": installation,
        f"{LABEL}.sandbox": spec.id,
        f"{LABEL}.generation": str(spec.generation),
    }
    return labels | ({f"{LABEL}.session": spec.session_id} if spec.session_id is not None else {})


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the engine finds what it mounts: each of `MOUNTS`, the runner's state and code; `mode` is that of the former."""

    mounts: Mapping[str, str]
    state: str
    code: Path
    mode: str


def binds_of(spec: SandboxSpec, places: layout.Places, sources: Sources) -> list[str]:
    """Mounts of the container."""
    return [
        *(f"{sources.mounts[name]}:{target}:{sources.mode}" for name, target in MOUNTS.items()),
        f"{sources.state}:{STATE_DIRECTORY}:{sources.mode}",
        f"{places.run}:{SOCKET_DIRECTORY}:rw",
        f"{sources.code}:{CODE_DIRECTORY}:ro",
        *([f"{places.egress}:{EGRESS_DIRECTORY}:ro"] if spec.network == "gateway" else []),
        *_certificates(spec),
    ]


def command_of(spec: SandboxSpec, uid: int, image_env: Sequence[str], *, sized: bool) -> list[str]:
    """The runner as the main process; `sized`: the session's disk is a file system of its own."""
    config = layout.runner_config(
        socket=f"{SOCKET_DIRECTORY}/runner.sock",
        state=STATE_DIRECTORY,
        uid=uid,
        environment=layout.environment(HOME, {**_network_environment(spec), **spec.env}, image_env),
        quota_bytes=None if sized else spec.limits.disk_bytes,
        limits=spec.limits,
        own_cgroup=True,
        own_disk=sized,
        egress_socket=f"{EGRESS_DIRECTORY}/{layout.EGRESS_SOCKET}" if spec.network == "gateway" else None,
    )
    boot = layout.BOOT.format(CODE_DIRECTORY)
    return ["python3", "-I", "-S", "-B", "-c", boot, config.to_json()]


def container_of(
    spec: SandboxSpec, command: Sequence[str], *, labels: Mapping[str, str], binds: Sequence[str], runtime: str | None
) -> dict[str, Any]:
    """What the engine is asked to create: hardened, without a network, bounded."""
    limits = spec.limits
    return {
        "Image": spec.image,
        "Cmd": list(command),
        "Entrypoint": [],
        "Env": [],
        "User": "0:0",
        "WorkingDir": "/",
        "Hostname": "sandbox",
        "Labels": dict(labels),
        "HostConfig": {
            "Binds": list(binds),
            "NetworkMode": "none",
            "CapDrop": ["ALL"],
            "CapAdd": ["SETUID", "SETGID", "KILL"],
            "SecurityOpt": ["no-new-privileges", f"seccomp={json.dumps(seccomp.profile())}"],
            "ReadonlyRootfs": True,
            "Init": True,
            "IpcMode": "private",
            "Memory": limits.memory_bytes,
            "MemorySwap": limits.memory_bytes,
            "NanoCpus": int(min(limits.cpus, os.cpu_count() or 1) * 1e9),
            "PidsLimit": limits.pids,
            "GroupAdd": [str(os.getegid())] if os.geteuid() != 0 else [],
            "Ulimits": [
                {"Name": "core", "Soft": 0, "Hard": 0},
                {"Name": "nofile", "Soft": limits.open_files, "Hard": limits.open_files},
            ],
            "LogConfig": {"Type": "json-file", "Config": {"max-size": LOG_BYTES_MAX, "max-file": "1"}},
            **({"Runtime": runtime} if runtime is not None else {}),
        },
    }


def _network_environment(spec: SandboxSpec) -> dict[str, str]:
    proxy = layout.proxy_environment(layout.PROXY_PORT) if spec.network == "gateway" else {}
    if spec.ca_bundle is None:
        return proxy
    java = f"{proxy.get('JAVA_TOOL_OPTIONS', '')} {layout.java_options(CA_BUNDLE_JAVA)}".strip()
    return proxy | layout.certificate_environment(CA_BUNDLE) | {"JAVA_TOOL_OPTIONS": java}


def _certificates(spec: SandboxSpec) -> list[str]:
    if spec.ca_bundle is None:
        return []
    return [f"{spec.ca_bundle}:{CA_BUNDLE}:ro", f"{layout.java_bundle(spec.ca_bundle)}:{CA_BUNDLE_JAVA}:ro"]


def is_sandbox(labels: Mapping[str, str]) -> bool:
    """Leave out what holds a sandbox's volumes, installs of packages and probes. Every container also bears the labels of its
    image.
    """
    return labels.get(f"{LABEL}.part") not in ("volumes", PROBE) and labels.get(f"{LABEL}.sandbox") != "packages"


def labelled_of(container: DockerContainer) -> Labelled:
    """What a container's labels and state say."""
    labels: Mapping[str, str] = container["Labels"]
    return Labelled(
        labels[f"{LABEL}.sandbox"],
        int(labels[f"{LABEL}.generation"]),
        labels.get(f"{LABEL}.session"),
        container["State"] in ("running", "paused"),
        container["State"] == "paused",
    )
