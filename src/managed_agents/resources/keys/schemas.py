"""Requests of the keys endpoints (spec: APIKeyUpdateParams, APIKeyListParams; the create calls are ours)."""

from typing import Annotated, Literal

from pydantic import Field

from managed_agents.web.models import Instant, RequestModel
from managed_agents.web.object_pages import ObjectPageQuery

NAME_CHARS_MAX = 256

Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]


class CreateKey(RequestModel):
    """`workspace_id`: where the administrator acts, when absent."""

    name: Name
    workspace_id: str | None = None
    access_scope: Literal["viewer", "developer", "admin"] = "developer"
    expires_at: Instant | None = None


class CreateEnvironmentKey(RequestModel):
    name: Name
    expires_at: Instant | None = None


class UpdateKey(RequestModel):
    """Omitted keeps, and so does null."""

    name: Name | None = None
    status: Literal["active", "inactive", "archived"] | None = None


class ListKeysQuery(ObjectPageQuery):
    status: Literal["active", "inactive", "expired", "archived"] | None = None
    workspace_id: str | None = None
    created_by_user_id: str | None = None
