"""Queries of the files endpoints (spec: FileListParams; `after_id` and `before_id` are from older
clients).
"""

from typing import Annotated

from pydantic import Field

from managed_agents.core import limits
from managed_agents.web.models import QueryModel, RequestModel

EXPIRES_SECONDS_MIN = 3600  # spec: FileUploadParams.expires_in_seconds
EXPIRES_SECONDS_MAX = 7_776_000


class UploadForm(RequestModel):
    """`POST /v1/files`, a multipart form beside its part `file`, whose bytes are never held as a field."""

    expires_in_seconds: Annotated[int, Field(ge=EXPIRES_SECONDS_MIN, le=EXPIRES_SECONDS_MAX)] | None = None


class ListFilesQuery(QueryModel):
    limit: Annotated[int, Field(ge=1, le=limits.FILES_PAGE_LIMIT_MAX)] = limits.PAGE_LIMIT_DEFAULT
    page: str | None = None
    ids: list[str] | None = None
    scope_id: str | None = None
    after_id: str | None = None
    before_id: str | None = None
