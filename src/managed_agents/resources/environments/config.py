"""An environment's configuration as stored and shown, and how an update merges into it. Pure."""

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
    """Apply what was sent; what was left out, or null, stays as stored."""
    if given is None:
        return stored
    assert isinstance(given, CloudConfig), "refused before"
    return {
        "type": "cloud",
        "networking": _merge_networking(stored["networking"], given.networking),
        "packages": _merge_packages(stored["packages"], given.packages),
    }


def _merge_networking(stored: ResolvedNetworking, given: Networking | None) -> ResolvedNetworking:
    if given is None:
        return stored
    assert not isinstance(given, Limited), "refused before"
    return {"type": given.type}


def _merge_packages(stored: ResolvedPackages, given: Packages | None) -> ResolvedPackages:
    result = stored.copy()
    for manager in MANAGERS:
        sent: list[str] | None = getattr(given, manager, None)
        if sent is not None:
            result[manager] = list(sent)
    return result
