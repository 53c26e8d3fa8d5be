"""Requests of the rate limits endpoints (spec: RateLimitListParams, RateLimitUpdateParams)."""

from typing import Annotated, Literal

from pydantic import Field

from managed_agents.core import limits
from managed_agents.web.models import Flag, QueryModel, RequestModel

GroupType = Literal["batch", "files", "model_group", "skills", "token_count", "web_search"]
# spec: WorkspaceRateLimitType in the SDK
LimiterType = Literal[
    "fast_itpmca",
    "fast_otpm",
    "input_tokens_per_minute",
    "input_tokens_per_minute_cache_aware",
    "output_tokens_per_minute",
    "requests_per_minute",
    "tokens_per_day",
    "tokens_per_minute",
    "tool_uses_per_second",
]


class _ListQuery(QueryModel):
    group_type: GroupType | None = None
    limit: Annotated[int, Field(ge=1, le=limits.ADMIN_PAGE_LIMIT_MAX)] | None = None
    page: str | None = None


class ListRateLimitsQuery(_ListQuery):
    model: str | None = None


class ListWorkspaceRateLimitsQuery(_ListQuery):
    include_inherited: Flag = False


class LimitValue(RequestModel):
    """Null clears the override."""

    type: LimiterType
    value: Annotated[int, Field(ge=0, le=limits.RATE_LIMIT_VALUE_MAX)] | None


class UpdateWorkspaceRateLimit(RequestModel):
    limits: Annotated[list[LimitValue], Field(max_length=100)]
