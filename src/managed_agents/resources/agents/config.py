"""What an agent is made of, as stored and as shown: every default filled in, so that nobody resolves it
again.

Pure. The stored form is the wire form (spec: BetaManagedAgentsAgent), which is why these are typed
dictionaries.
"""

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict, cast, get_args

import orjson

from managed_agents.core.errors import InvalidRequest
from managed_agents.resources.agents import models, web_settings
from managed_agents.resources.agents.schemas import (
    TOOLS_BYTES_MAX,
    TOOLS_MAX,
    AgentToolset,
    AwsRole,
    CustomTool,
    DefaultConfig,
    Effort,
    ExecutionIdentity,
    ModelConfig,
    PermissionPolicy,
    SandboxToolConfig,
    SandboxToolName,
    Tool,
    WebToolName,
)

BUILT_IN_TOOLS = frozenset((*get_args(SandboxToolName), *get_args(WebToolName)))
RESERVED_PREFIXES = ("mcp__", "ant__")


class Typed(TypedDict):
    """An object that says only what it is, such as an effort or a permission policy."""

    type: str


class ResolvedModel(TypedDict):
    id: str
    effort: Typed
    speed: str
    inference_geo: NotRequired[str]


class ResolvedDefaultConfig(TypedDict):
    enabled: bool
    permission_policy: Typed


class ResolvedToolConfig(TypedDict):
    type: str
    name: str
    enabled: bool
    permission_policy: Typed
    # Of the web tools only.
    allowed_domains: NotRequired[list[str] | None]
    blocked_domains: NotRequired[list[str] | None]
    max_content_tokens: NotRequired[int | None]
    url_sources: NotRequired[dict[str, Any] | None]
    user_location: NotRequired[dict[str, Any] | None]


class ResolvedToolset(TypedDict):
    type: Literal["agent_toolset_20260401"]
    default_config: ResolvedDefaultConfig
    configs: list[ResolvedToolConfig]


class ResolvedCustomTool(TypedDict):
    type: Literal["custom"]
    name: str
    description: str
    input_schema: dict[str, Any]


ResolvedTool = ResolvedToolset | ResolvedCustomTool


class ResolvedIdentity(TypedDict):
    type: str
    role_arn: NotRequired[str]


class AgentConfig(TypedDict):
    """One version of an agent, without its identity."""

    name: str
    description: str | None
    model: ResolvedModel
    system: str | None
    tools: list[ResolvedTool]
    mcp_servers: list[dict[str, Any]]
    skills: list[dict[str, Any]]
    multiagent: dict[str, Any] | None
    metadata: dict[str, str]
    execution_identity: ResolvedIdentity


class AgentSnapshot(TypedDict):
    """The copy a session keeps (spec: BetaManagedAgentsSessionAgent)."""

    id: str
    type: Literal["agent"]
    version: int
    name: str
    description: str | None
    model: ResolvedModel
    system: str | None
    tools: list[ResolvedTool]
    mcp_servers: list[dict[str, Any]]
    skills: list[dict[str, Any]]
    multiagent: dict[str, Any] | None
    execution_identity: ResolvedIdentity


def resolve_model(given: str | ModelConfig, stored: ResolvedModel | None = None, *, path: str = "model") -> ResolvedModel:
    """Fill in what was left out. An effort left out stays as stored while the model stays the same.

    Raises:
        InvalidRequest: an effort, speed or region that the model does not take.
    """
    config = ModelConfig(id=given) if isinstance(given, str) else given
    effort = config.effort.type if isinstance(config.effort, Effort) else config.effort
    models.check(config.id, path, effort=effort, speed=config.speed, inference_geo=config.inference_geo)
    if effort is None and stored is not None and stored["id"] == config.id:
        effort = stored["effort"]["type"]
    # spec: BetaManagedAgentsModelConfig.effort is always present, the model's default when none was given
    resolved = ResolvedModel(
        id=config.id, effort={"type": effort or models.effort_default(config.id)}, speed=config.speed or "standard"
    )
    if config.inference_geo is not None:
        resolved["inference_geo"] = config.inference_geo
    return resolved


def resolve_tools(tools: Sequence[Tool], *, prefix: str = "") -> list[ResolvedTool]:
    """Fill in what was left out of each toolset. What is not served has been refused before.

    Raises:
        InvalidRequest: two toolsets, too many or too large tools, or a custom tool's name that is taken.
    """
    resolved: list[ResolvedTool] = []
    names: set[str] = set()
    toolsets = 0
    for index, tool in enumerate(tools):
        path = f"{prefix}tools.{index}"
        if isinstance(tool, CustomTool):
            resolved.append(_resolve_custom(tool, names, path))
            continue
        assert isinstance(tool, AgentToolset), tool.type
        toolsets += 1
        if toolsets > 1:
            raise InvalidRequest(f"{path}.type: only one {tool.type} is allowed")
        resolved.append(_resolve_toolset(tool, [tool.name for tool in tools if isinstance(tool, CustomTool)], path))
    if (count := len(names) + toolsets * len(BUILT_IN_TOOLS)) > TOOLS_MAX:
        raise InvalidRequest(f"{prefix}tools: at most {TOOLS_MAX} tools are allowed across all toolsets, got {count}")
    if len(orjson.dumps(resolved)) > TOOLS_BYTES_MAX:
        raise InvalidRequest(f"{prefix}tools: more than {TOOLS_BYTES_MAX // (1024 * 1024)} MB of definitions")
    return resolved


def _resolve_custom(tool: CustomTool, names: set[str], path: str) -> ResolvedCustomTool:
    """`names` are those of the custom tools before it."""
    if tool.name.startswith(RESERVED_PREFIXES):
        raise InvalidRequest(f"{path}.name: names that begin with {' or '.join(RESERVED_PREFIXES)} are reserved")
    if tool.name in BUILT_IN_TOOLS:
        raise InvalidRequest(f'{path}.name: "{tool.name}" is the name of a built-in tool')
    if tool.name in names:
        raise InvalidRequest(f'{path}.name: duplicate tool name "{tool.name}"')
    names.add(tool.name)
    return ResolvedCustomTool(
        type=tool.type, name=tool.name, description=tool.description, input_schema=tool.input_schema.as_sent
    )


def same_tools(left: Sequence[ResolvedTool], right: Sequence[ResolvedTool]) -> bool:
    """Say whether two lists of tools are the same for a model too: to Python, `1` is `True`, and the order of keys nothing."""
    return left == right and _written_schemas(left) == _written_schemas(right)


def _written_schemas(tools: Sequence[ResolvedTool]) -> list[bytes]:
    return [orjson.dumps(tool["input_schema"]) for tool in tools if tool["type"] == "custom"]


def _resolve_toolset(tool: AgentToolset, custom_tools: Sequence[str], path: str) -> ResolvedToolset:
    given = tool.default_config or DefaultConfig()
    default = ResolvedDefaultConfig(
        enabled=True if given.enabled is None else given.enabled,
        permission_policy=_policy(given.permission_policy, {"type": "always_allow"}),
    )
    configs: list[ResolvedToolConfig] = []
    seen: set[str] = set()
    for index, config in enumerate(tool.configs):
        if config.name in seen:
            raise InvalidRequest(f'{path}.configs.{index}.name: duplicate tool name "{config.name}"')
        if config.type not in (None, config.name):
            raise InvalidRequest(f"{path}.configs.{index}.type: Input should be '{config.name}'")
        seen.add(config.name)
        resolved = ResolvedToolConfig(
            type=config.name,
            name=config.name,
            enabled=default["enabled"] if config.enabled is None else config.enabled,
            permission_policy=_policy(config.permission_policy, default["permission_policy"]),
        )
        if not isinstance(config, SandboxToolConfig):
            settings = web_settings.resolve(config, custom_tools, f"{path}.configs.{index}")
            resolved = cast("ResolvedToolConfig", {**resolved, **settings})
        configs.append(resolved)
    return ResolvedToolset(type=tool.type, default_config=default, configs=configs)


def _policy(given: PermissionPolicy | None, default: Typed) -> Typed:
    return default if given is None else {"type": given.type}


def resolve_identity(given: ExecutionIdentity | None) -> ResolvedIdentity:
    """Return the principal; a server of one's own keeps and shows it without effect."""
    if isinstance(given, AwsRole):
        return {"type": given.type, "role_arn": given.role_arn}
    return {"type": "service_account"}


def snapshot(agent_id: str, version: int, config: AgentConfig) -> AgentSnapshot:
    """Return what a session keeps of an agent."""
    return AgentSnapshot(
        id=agent_id,
        type="agent",
        version=version,
        name=config["name"],
        description=config["description"],
        model=config["model"],
        system=config["system"],
        tools=config["tools"],
        mcp_servers=config["mcp_servers"],
        skills=config["skills"],
        multiagent=config["multiagent"],
        execution_identity=config["execution_identity"],
    )
