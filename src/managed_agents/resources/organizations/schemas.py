"""Requests of the workspaces endpoints (spec: WorkspaceCreateParams, WorkspaceUpdateParams, WorkspaceListParams)."""

from typing import Annotated, Any

from pydantic import Field

from managed_agents.core import limits
from managed_agents.web.models import Flag, RequestModel
from managed_agents.web.object_pages import ObjectPageQuery

NAME_CHARS_MAX = 256  # assumed: as for agents

Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]
Color = Annotated[str, Field(pattern=r"^#[0-9A-Fa-f]{6}$")]


class CreateWorkspace(RequestModel):
    name: Name
    display_color: Color | None = None
    tags: dict[str, str] | None = None
    # `served.py` says what of these is taken.
    data_residency: dict[str, Any] | None = None
    external_key_id: str | None = None
    user_profile_id: str | None = None


class UpdateWorkspace(RequestModel):
    """Omitted keeps, and so does null; in `tags` null deletes a tag."""

    name: Name | None = None
    display_color: Color | None = None
    tags: dict[str, str | None] | None = None
    data_residency: dict[str, Any] | None = None
    external_key_id: str | None = None
    user_profile_id: str | None = None


class ListWorkspacesQuery(ObjectPageQuery):
    ids: Annotated[list[str] | None, Field(max_length=limits.WORKSPACE_IDS_MAX)] = None
    include_archived: Flag = False
    include_default: Flag = False
