"""An environment's configuration as stored and shown, and how an update merges into it. Pure."""

import re
from typing import Final, Literal, NotRequired, TypedDict

from managed_agents.core.errors import InvalidRequest
from managed_agents.resources.environments.schemas import (
    CloudConfig,
    Limited,
    Networking,
    Packages,
    SelfHostedConfig,
)

MANAGERS: Final = ("apt", "cargo", "gem", "go", "npm", "pip")


class ResolvedNetworking(TypedDict):
    type: Literal["unrestricted", "limited"]
    allow_mcp_servers: NotRequired[bool]
    allow_package_managers: NotRequired[bool]
    allowed_hosts: NotRequired[list[str]]


class ResolvedPackages(TypedDict):
    type: Literal["packages"]
    apt: list[str]
    cargo: list[str]
    gem: list[str]
    go: list[str]
    npm: list[str]
    pip: list[str]


class EnvironmentConfig(TypedDict):
    """spec: BetaCloudConfig."""

    type: Literal["cloud"]
    networking: ResolvedNetworking
    packages: ResolvedPackages


PACKAGE_CHARS_MAX = 512  # assumed
HOST_CHARS_MAX = 253 + len("*.")
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*")

LIMITED: ResolvedNetworking = {
    "type": "limited",
    "allow_mcp_servers": False,
    "allow_package_managers": False,
    "allowed_hosts": [],
}
DEFAULT: EnvironmentConfig = {
    "type": "cloud",
    "networking": {"type": "unrestricted"},
    "packages": {"type": "packages", "apt": [], "cargo": [], "gem": [], "go": [], "npm": [], "pip": []},
}


def check_type_kept(given: CloudConfig | SelfHostedConfig | None) -> None:
    """Raise `InvalidRequest` when an update would turn an environment into one of the other type."""
    if isinstance(given, SelfHostedConfig):
        raise InvalidRequest("config.type: cannot be changed after creation", error_code="invalid_config_type_change")


def merge(stored: EnvironmentConfig, given: CloudConfig | SelfHostedConfig | None) -> EnvironmentConfig:
    """Apply what was sent; what was left out, or null, stays as stored.

    Raises `InvalidRequest` for a host that is none, and for packages that the network would keep out.
    """
    if given is None:
        return stored
    assert isinstance(given, CloudConfig), "refused before"
    merged: EnvironmentConfig = {
        "type": "cloud",
        "networking": _merge_networking(stored["networking"], given.networking),
        "packages": _merge_packages(stored["packages"], given.packages),
    }
    networking, packages = merged["networking"], merged["packages"]
    # spec: BetaPackagesParams, whatever hosts are listed by hand
    closed = networking["type"] == "limited" and not networking.get("allow_package_managers")
    if closed and any(packages[manager] for manager in MANAGERS):
        raise InvalidRequest("config.packages: requires networking.allow_package_managers to be true under limited networking")
    return merged


def _merge_networking(stored: ResolvedNetworking, given: Networking | None) -> ResolvedNetworking:
    if given is None:
        return stored
    if not isinstance(given, Limited):
        return {"type": "unrestricted"}
    # Coming from unrestricted, there is nothing to keep.
    kept = stored if stored["type"] == "limited" else LIMITED
    result = kept.copy()
    if given.allow_mcp_servers is not None:
        result["allow_mcp_servers"] = given.allow_mcp_servers
    if given.allow_package_managers is not None:
        result["allow_package_managers"] = given.allow_package_managers
    if given.allowed_hosts is not None:
        for index, host in enumerate(given.allowed_hosts):
            _check_host(host, f"config.networking.allowed_hosts.{index}")
        result["allowed_hosts"] = list(given.allowed_hosts)
    return result


def _check_host(host: str, path: str) -> None:
    """A name stands for itself, `*.` before it for everything below it and not for the name; nothing else goes with it."""
    if len(host) > HOST_CHARS_MAX or _HOST.fullmatch(host) is None:
        raise InvalidRequest(f"{path}: Input should be a host name or *.name, without scheme, port or path")


def _merge_packages(stored: ResolvedPackages, given: Packages | None) -> ResolvedPackages:
    result = stored.copy()
    for manager in MANAGERS:
        sent: list[str] | None = getattr(given, manager, None)
        if sent is not None:
            for index, name in enumerate(sent):
                _check_package(name, f"config.packages.{manager}.{index}")
            result[manager] = list(sent)
    return result


def _check_package(name: str, path: str) -> None:
    """A name or a pin, for the tool to judge; never one of its options."""
    if not name.strip() or name.startswith("-") or not name.isprintable():
        raise InvalidRequest(f"{path}: Input should be a package in its manager's own syntax")
    if len(name) > PACKAGE_CHARS_MAX:
        raise InvalidRequest(f"{path}: at most {PACKAGE_CHARS_MAX} characters are allowed")
