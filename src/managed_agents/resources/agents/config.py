"""What an agent is made of, as stored and as shown: every default filled in, so that nobody resolves it
again.

Pure. The stored form is the wire form (spec: BetaManagedAgentsAgent), which is why these are typed
dictionaries.
"""

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

from managed_agents.core.errors import InvalidRequest
from managed_agents.resources.agents.schemas import (
    AgentToolset,
    AwsRole,
    DefaultConfig,
    Effort,
    ExecutionIdentity,
    ModelConfig,
    PermissionPolicy,
    Tool,
)

EFFORT_DEFAULT = "high"  # spec: resolved to the model's default when the agent is saved; "high" in all samples
FAST_MODELS = frozenset({"claude-opus-5-5", "claude-opus-5", "claude-opus-4-8"})


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


class ResolvedToolset(TypedDict):
    type: Literal["agent_toolset_20260401"]
    default_config: ResolvedDefaultConfig
    configs: list[ResolvedToolConfig]


class ResolvedIdentity(TypedDict):
    type: str
    role_arn: NotRequired[str]


class AgentConfig(TypedDict):
    """One version of an agent, without its identity."""

    name: str
    description: str | None
    model: ResolvedModel
    system: str | None
    tools: list[ResolvedToolset]
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
    tools: list[ResolvedToolset]
    mcp_servers: list[dict[str, Any]]
    skills: list[dict[str, Any]]
    multiagent: dict[str, Any] | None
    execution_identity: ResolvedIdentity


def resolve_model(given: str | ModelConfig, stored: ResolvedModel | None = None, *, path: str = "model") -> ResolvedModel:
    """Fill in what was left out. An effort left out stays as stored while the model stays the same."""
    config = ModelConfig(id=given) if isinstance(given, str) else given
    effort = config.effort.type if isinstance(config.effort, Effort) else config.effort
    if effort is None and stored is not None and stored["id"] == config.id:
        effort = stored["effort"]["type"]
    if config.speed == "fast" and config.id.startswith("claude-") and config.id not in FAST_MODELS:
        raise InvalidRequest(f'{path}.speed: "fast" is not supported by {config.id}')
    resolved = ResolvedModel(id=config.id, effort={"type": effort or EFFORT_DEFAULT}, speed=config.speed or "standard")
    if config.inference_geo is not None:
        resolved["inference_geo"] = config.inference_geo
    return resolved


def resolve_tools(tools: Sequence[Tool], *, prefix: str = "") -> list[ResolvedToolset]:
    """Fill in what was left out of each toolset. What is not served has been refused before."""
    resolved: list[ResolvedToolset] = []
    for index, tool in enumerate(tools):
        assert isinstance(tool, AgentToolset), tool.type
        if resolved:
            raise InvalidRequest(f"{prefix}tools.{index}.type: only one {tool.type} is allowed")
        resolved.append(_resolve_toolset(tool, f"{prefix}tools.{index}"))
    return resolved


def _resolve_toolset(tool: AgentToolset, path: str) -> ResolvedToolset:
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
        configs.append(
            ResolvedToolConfig(
                type=config.name,
                name=config.name,
                enabled=default["enabled"] if config.enabled is None else config.enabled,
                permission_policy=_policy(config.permission_policy, default["permission_policy"]),
            )
        )
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
