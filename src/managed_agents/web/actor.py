"""Who sends a request: a key, acting in one workspace."""

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum

from managed_agents.core.ids import ApiKeyId, EnvironmentId, OrganizationId, WorkspaceId


class Scope(IntEnum):
    """What a key may do; each scope includes the ones below it."""

    VIEWER = 1
    DEVELOPER = 2
    ADMIN = 3

    @classmethod
    def named(cls, name: str) -> "Scope":
        """Return the scope called `name` (lower case). Raises KeyError."""
        return cls[name.upper()]


class RateKind(StrEnum):
    """What rate limits count apart."""

    CREATE = "create"
    READ = "read"


@dataclass(frozen=True, slots=True)
class Reach:
    """What an administrator may administer: all workspaces of an organisation, or one."""

    organization_id: OrganizationId
    workspace_id: WorkspaceId | None


@dataclass(frozen=True, slots=True)
class Actor:
    """An authenticated key. Every query of a request is scoped by `workspace_id`.

    `environment_id` is set for an environment key: it may do nothing but serve that environment's sessions.
    `creates_per_minute` and `reads_per_minute` are the workspace's own rate limits, where it has any.
    """

    organization_id: OrganizationId
    workspace_id: WorkspaceId
    key_id: ApiKeyId
    scope: Scope
    environment_id: EnvironmentId | None = None
    # An admin key of the default workspace administers the organisation and may act in each of its workspaces.
    of_default_workspace: bool = False
    creates_per_minute: int | None = None
    reads_per_minute: int | None = None
    key_expires_at: datetime | None = None

    @property
    def administers_organization(self) -> bool:
        """Whether this is an organisation administrator's key."""
        return self.scope is Scope.ADMIN and self.of_default_workspace and self.environment_id is None

    @property
    def reach(self) -> Reach:
        """What an administrator's key may administer."""
        return Reach(self.organization_id, None if self.administers_organization else self.workspace_id)

    def own_limit(self, kind: RateKind) -> int | None:
        """Return the workspace's own limit, None when it has only its organisation's."""
        return self.creates_per_minute if kind is RateKind.CREATE else self.reads_per_minute
