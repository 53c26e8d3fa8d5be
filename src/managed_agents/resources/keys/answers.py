"""Answers that the SDK has no type for, as the API's document describes them. Nothing is validated with these."""

from typing import Literal

from pydantic import BaseModel

Status = Literal["active", "inactive", "expired", "archived"]


class WorkspaceScope(BaseModel):
    type: Literal["workspace"]
    workspace_id: str


class NewKey(BaseModel):
    """An API key with its secret."""

    id: str
    type: Literal["api_key"]
    name: str
    status: Status
    partial_key_hint: str
    scope: WorkspaceScope
    access_scope: Literal["viewer", "developer", "admin"]
    principal: None
    created_by: None
    created_at: str
    expires_at: str | None
    last_used_at: str | None
    secret: str


class EnvironmentKey(BaseModel):
    id: str
    type: Literal["environment_key"]
    environment_id: str
    name: str
    status: Status
    partial_key_hint: str
    created_at: str
    expires_at: str | None
    last_used_at: str | None


class NewEnvironmentKey(EnvironmentKey):
    """An environment key with its secret."""

    secret: str
