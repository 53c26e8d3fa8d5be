"""Who sends a request: an API key, acting in the one workspace it belongs to."""

from dataclasses import dataclass
from enum import IntEnum

from managed_agents.core.ids import ApiKeyId, OrganizationId, WorkspaceId


class Scope(IntEnum):
    """What a key may do; each scope includes the ones below it."""

    VIEWER = 1
    DEVELOPER = 2
    ADMIN = 3

    @classmethod
    def named(cls, name: str) -> "Scope":
        """Return the scope called `name` (lower case). Raises KeyError."""
        return cls[name.upper()]


@dataclass(frozen=True, slots=True)
class Actor:
    """An authenticated key. Every query of a request is scoped by `workspace_id`."""

    organization_id: OrganizationId
    workspace_id: WorkspaceId
    key_id: ApiKeyId
    scope: Scope
