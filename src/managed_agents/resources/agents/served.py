"""What of an agent this server does not serve yet. Nothing is accepted and ignored: each refusal names its
field.

The only place for such refusals; a later feature lifts its own line.
"""

from collections.abc import Sequence
from typing import Any

from managed_agents.core.errors import InvalidRequest
from managed_agents.resources.agents.schemas import (
    AgentToolset,
    CustomTool,
    Tool,
    UnservedTool,
    WebToolConfig,
)

WEB_SETTINGS = ("allowed_domains", "blocked_domains", "max_content_tokens", "user_location", "url_sources")


def refuse_unserved(
    *,
    tools: Sequence[Tool] = (),
    mcp_servers: Sequence[Any] = (),
    skills: Sequence[Any] = (),
    multiagent: object = None,
    prefix: str = "",
) -> None:
    """Raise `InvalidRequest` for the first thing that is not served. `prefix` is the path of the agent's
    fields.
    """
    for index, tool in enumerate(tools):
        _refuse_in_tool(tool, f"{prefix}tools.{index}")
    if mcp_servers:
        raise _refusal(f"{prefix}mcp_servers", "MCP servers", "are")
    if skills:
        raise _refusal(f"{prefix}skills", "skills", "are")
    if multiagent is not None:
        raise _refusal(f"{prefix}multiagent", "multiagent orchestration")


def _refuse_in_tool(tool: Tool, path: str) -> None:
    if isinstance(tool, UnservedTool):
        raise _refusal(f"{path}.type", f'"{tool.type}"')
    if isinstance(tool, CustomTool):
        return
    for index, config in enumerate(tool.configs):
        if isinstance(config, WebToolConfig):
            _refuse_web(config, tool, f"{path}.configs.{index}")


def _refuse_web(config: WebToolConfig, tool: AgentToolset, path: str) -> None:
    """A web tool may be switched off; switching it on, or setting it up, would promise what is not there."""
    default = tool.default_config.enabled if tool.default_config is not None else None
    enabled = next((value for value in (config.enabled, default) if value is not None), True)
    if enabled:
        raise _refusal(f"{path}.name", f'"{config.name}"')
    for setting in WEB_SETTINGS:
        if getattr(config, setting) is not None:
            raise _refusal(f"{path}.{setting}", "this setting")


def _refusal(path: str, what: str, verb: str = "is") -> InvalidRequest:
    return InvalidRequest(f"{path}: {what} {verb} not served yet by this server")
