"""Requests of the environments endpoints (spec: EnvironmentCreateParams, EnvironmentUpdateParams)."""

from typing import Annotated, Literal

from pydantic import Field

from managed_agents.core import limits
from managed_agents.web.models import Flag, QueryModel, RequestModel

NAME_CHARS_MAX = 256  # assumed: as for agents
DESCRIPTION_CHARS_MAX = 2048  # assumed: as for agents
PACKAGES_MAX = 1000  # assumed
ALLOWED_HOSTS_MAX = 1000  # assumed

Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]
Description = Annotated[str, Field(max_length=DESCRIPTION_CHARS_MAX)]
PackageList = Annotated[list[str], Field(max_length=PACKAGES_MAX)]


class Unrestricted(RequestModel):
    type: Literal["unrestricted"]


class Limited(RequestModel):
    """Null keeps what is stored, or takes the default on create."""

    type: Literal["limited"]
    allow_mcp_servers: bool | None = None
    allow_package_managers: bool | None = None
    allowed_hosts: Annotated[list[str], Field(max_length=ALLOWED_HOSTS_MAX)] | None = None


Networking = Annotated[Unrestricted | Limited, Field(discriminator="type")]


class Packages(RequestModel):
    """In each manager's own pin syntax. Null keeps what is stored."""

    type: Literal["packages"] | None = None
    apt: PackageList | None = None
    cargo: PackageList | None = None
    gem: PackageList | None = None
    go: PackageList | None = None
    npm: PackageList | None = None
    pip: PackageList | None = None


class CloudConfig(RequestModel):
    type: Literal["cloud"]
    networking: Networking | None = None
    packages: Packages | None = None


class SelfHostedConfig(RequestModel):
    type: Literal["self_hosted"]


Config = Annotated[CloudConfig | SelfHostedConfig, Field(discriminator="type")]


class CreateEnvironment(RequestModel):
    name: Name
    config: Config | None = None
    description: Description | None = None
    metadata: dict[str, str] = {}
    scope: Literal["organization", "account"] | None = None


class UpdateEnvironment(RequestModel):
    """Omitted keeps. Null keeps too, save for `description`, which it clears."""

    name: Name | None = None
    config: Config | None = None
    description: Description | None = None
    metadata: dict[str, str | None] = {}
    scope: Literal["organization", "account"] | None = None


class ListEnvironmentsQuery(QueryModel):
    limit: Annotated[int, Field(ge=1, le=limits.PAGE_LIMIT_MAX)] = limits.PAGE_LIMIT_DEFAULT
    page: str | None = None
    include_archived: Flag = False
