"""Requests of the agents endpoints, and references to agents in other requests.

Shapes of what is not served yet are open here and refused by `served`, so that the refusal can name what it
refuses.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, ModelWrapValidatorHandler, PrivateAttr, Tag, model_validator

from managed_agents.core import limits
from managed_agents.web.models import Flag, Instant, QueryModel, RequestModel

NAME_CHARS_MAX = 256
DESCRIPTION_CHARS_MAX = 2048
SYSTEM_CHARS_MAX = 100_000
MODEL_ID_CHARS_MAX = 256
ROLE_ARN_CHARS_MAX = 2048
TOOLS_MAX = 256  # spec: over all toolsets, so no list of toolsets is longer
TOOLS_BYTES_MAX = 1024 * 1024  # assumed: a page has up to 100 agents, and every session a copy of its agent
VERSION_MAX = 2**31 - 1  # what the column holds

EffortLevel = Literal["low", "medium", "high", "xhigh", "max"]
SandboxToolName = Literal["bash", "read", "write", "edit", "glob", "grep"]
WebToolName = Literal["web_fetch", "web_search"]
PolicyType = Literal["always_allow", "always_ask", "auto"]

Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]
Description = Annotated[str, Field(max_length=DESCRIPTION_CHARS_MAX)]
System = Annotated[str, Field(max_length=SYSTEM_CHARS_MAX)]
ModelId = Annotated[str, Field(min_length=1, max_length=MODEL_ID_CHARS_MAX)]
Version = Annotated[int, Field(ge=1, le=VERSION_MAX)]


def _text_or_object(value: object) -> str | None:
    if isinstance(value, str):
        return "text"
    return "object" if isinstance(value, (dict, RequestModel)) else None


TextOrObject = Discriminator(
    _text_or_object,
    custom_error_type="text_or_object",
    custom_error_message="Input should be a string or an object",
)


class Effort(RequestModel):
    type: EffortLevel


class ModelConfig(RequestModel):
    """spec: BetaManagedAgentsModelConfigParams."""

    id: ModelId
    effort: Annotated[Annotated[EffortLevel, Tag("text")] | Annotated[Effort, Tag("object")], TextOrObject] | None = None
    inference_geo: Literal["us", "global"] | None = None
    speed: Literal["standard", "fast"] | None = None


ModelParam = Annotated[Annotated[ModelId, Tag("text")] | Annotated[ModelConfig, Tag("object")], TextOrObject]


class PermissionPolicy(RequestModel):
    type: PolicyType


class DefaultConfig(RequestModel):
    enabled: bool | None = None
    permission_policy: PermissionPolicy | None = None


class SandboxToolConfig(RequestModel):
    """Override for one tool that runs in the sandbox."""

    name: SandboxToolName
    type: SandboxToolName | None = None
    enabled: bool | None = None
    permission_policy: PermissionPolicy | None = None


class ToolReference(RequestModel):
    type: Literal["tool_reference"]
    name: Annotated[str, Field(min_length=1, max_length=128)]


class UrlSourceType(RequestModel):
    type: Literal["all", "none"]


class UrlSourceTools(RequestModel):
    """spec: BetaManagedAgentsWebFetchURLSourceOnlyParam, …ExceptParam."""

    type: Literal["only", "except"]
    tools: Annotated[list[ToolReference], Field(min_length=1, max_length=128)]


UrlSource = Annotated[
    Annotated[Literal["all", "none"], Tag("text")]
    | Annotated[Annotated[UrlSourceType | UrlSourceTools, Field(discriminator="type")], Tag("object")],
    TextOrObject,
]
UserInputSource = Annotated[
    Annotated[Literal["all", "none"], Tag("text")] | Annotated[UrlSourceType, Tag("object")], TextOrObject
]


class UrlSources(RequestModel):
    """spec: BetaManagedAgentsWebFetchURLSourcesParams."""

    user_input: UserInputSource | None = None
    client_tool_results: UrlSource | None = None
    server_tool_results: UrlSource | None = None


class UserLocation(RequestModel):
    """spec: BetaManagedAgentsUserLocationParam."""

    type: Literal["approximate"]
    city: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    region: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    country: str | None = None
    timezone: str | None = None


class WebFetchConfig(RequestModel):
    """Override for `web_fetch`. spec: BetaManagedAgentsWebFetchToolConfigParams."""

    name: Literal["web_fetch"]
    type: WebToolName | None = None
    enabled: bool | None = None
    permission_policy: PermissionPolicy | None = None
    allowed_domains: list[str] | None = None
    blocked_domains: list[str] | None = None
    max_content_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    url_sources: UrlSources | None = None


class WebSearchConfig(RequestModel):
    """Override for `web_search`. spec: BetaManagedAgentsWebSearchToolConfigParams."""

    name: Literal["web_search"]
    type: WebToolName | None = None
    enabled: bool | None = None
    permission_policy: PermissionPolicy | None = None
    allowed_domains: list[str] | None = None
    blocked_domains: list[str] | None = None
    user_location: UserLocation | None = None


ToolConfig = Annotated[SandboxToolConfig | WebFetchConfig | WebSearchConfig, Field(discriminator="name")]


class AgentToolset(RequestModel):
    """spec: BetaManagedAgentsAgentToolset20260401Params."""

    type: Literal["agent_toolset_20260401"]
    configs: list[ToolConfig] = []
    default_config: DefaultConfig | None = None


class UnservedTool(RequestModel):
    """A kind of tool that exists in the API and not here yet."""

    model_config = ConfigDict(extra="allow")

    type: Literal["mcp_toolset"]


class InputSchema(RequestModel):
    """A JSON Schema of an object; other keywords are passed on to the model as they are."""

    model_config = ConfigDict(extra="allow")

    type: Literal["object"]
    properties: dict[str, Any] | None = None
    required: list[str] | None = None
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(value)
        made._sent = value
        return made

    @property
    def as_sent(self) -> dict[str, Any]:
        """The schema with its keys in the order in which they were sent, which is part of what the model reads."""
        return self._sent


class CustomTool(RequestModel):
    """A tool that the client runs. spec: BetaManagedAgentsCustomToolParams."""

    type: Literal["custom"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    description: Annotated[str, Field(min_length=1)]
    input_schema: InputSchema


Tool = Annotated[AgentToolset | CustomTool | UnservedTool, Field(discriminator="type")]
Tools = Annotated[list[Tool], Field(max_length=TOOLS_MAX)]


class ServiceAccount(RequestModel):
    type: Literal["service_account"]


class AwsRole(RequestModel):
    type: Literal["aws_role"]
    role_arn: Annotated[str, Field(min_length=1, max_length=ROLE_ARN_CHARS_MAX)]


ExecutionIdentity = Annotated[ServiceAccount | AwsRole, Field(discriminator="type")]


class CreateAgent(RequestModel):
    """spec: AgentCreateParams."""

    name: Name
    model: ModelParam
    description: Description | None = None
    execution_identity: ExecutionIdentity | None = None
    mcp_servers: list[Any] = []
    metadata: dict[str, str] = {}
    multiagent: dict[str, Any] | None = None
    skills: list[Any] = []
    system: System | None = None
    tools: Tools = []


class UpdateAgent(RequestModel):
    """spec: AgentUpdateParams. Which fields were sent is told by `model_fields_set`; null clears."""

    name: Name = ""
    model: ModelParam = ""
    description: Description | None = None
    execution_identity: ExecutionIdentity | None = None
    mcp_servers: list[Any] | None = None
    metadata: dict[str, str | None] | None = None
    multiagent: dict[str, Any] | None = None
    skills: list[Any] | None = None
    system: System | None = None
    tools: Tools | None = None
    version: Version = 1


class AgentReference(RequestModel):
    """spec: BetaManagedAgentsAgentParams."""

    type: Literal["agent"]
    id: str
    version: Version | None = None


class AgentWithOverrides(RequestModel):
    """spec: BetaManagedAgentsAgentWithOverridesParams. Null or an empty list clears for one session."""

    type: Literal["agent_with_overrides"]
    id: str
    version: Version | None = None
    model: ModelParam | None = None
    system: System | None = None
    tools: Tools | None = None
    mcp_servers: list[Any] | None = None
    skills: list[Any] | None = None


class SessionAgentUpdate(RequestModel):
    """spec: BetaManagedAgentsSessionAgentUpdateParam. A list that is sent replaces the stored one, an empty one clears."""

    tools: Tools = []
    mcp_servers: list[Any] = []


AgentRef = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Annotated[AgentReference | AgentWithOverrides, Field(discriminator="type")], Tag("object")],
    TextOrObject,
]
"""How a session names its agent: an id, a pinned version, or an agent with replacements."""


class RetrieveAgentQuery(QueryModel):
    version: Version | None = None


class ListAgentsQuery(QueryModel):
    limit: Annotated[int, Field(ge=1, le=limits.PAGE_LIMIT_MAX)] = limits.PAGE_LIMIT_DEFAULT
    page: str | None = None
    include_archived: Flag = False
    created_at_gte: Annotated[Instant | None, Field(alias="created_at[gte]")] = None
    created_at_lte: Annotated[Instant | None, Field(alias="created_at[lte]")] = None


class ListVersionsQuery(QueryModel):
    limit: Annotated[int, Field(ge=1, le=limits.PAGE_LIMIT_MAX)] = limits.PAGE_LIMIT_DEFAULT
    page: str | None = None
