"""What of an agent this server does not serve yet. Nothing is accepted and ignored: each refusal names its
field.

The only place for such refusals; a later feature lifts its own line.
"""

from collections.abc import Sequence
from typing import Any

from managed_agents.core.errors import InvalidRequest
from managed_agents.resources.agents.schemas import (
    CustomTool,
    Tool,
    UnservedTool,
    WebSearchConfig,
)


def refuse_unserved(
    *,
    tools: Sequence[Tool] = (),
    mcp_servers: Sequence[Any] = (),
    skills: Sequence[Any] = (),
    multiagent: object = None,
    web_search: bool,
    prefix: str = "",
) -> None:
    """Raise `InvalidRequest` for the first thing that is not served. `prefix` is the path of the agent's
    fields, `web_search` says whether this server has a search provider.
    """
    for index, tool in enumerate(tools):
        _refuse_in_tool(tool, f"{prefix}tools.{index}", web_search=web_search)
    if mcp_servers:
        raise _refusal(f"{prefix}mcp_servers", "MCP servers", "are")
    if skills:
        raise _refusal(f"{prefix}skills", "skills", "are")
    if multiagent is not None:
        raise _refusal(f"{prefix}multiagent", "multiagent orchestration")


def _refuse_in_tool(tool: Tool, path: str, *, web_search: bool) -> None:
    if isinstance(tool, UnservedTool):
        raise _refusal(f"{path}.type", f'"{tool.type}"')
    if isinstance(tool, CustomTool) or web_search:
        return
    default = tool.default_config.enabled if tool.default_config is not None else None
    for index, config in enumerate(tool.configs):
        is_on = config.enabled if config.enabled is not None else default is not False
        if isinstance(config, WebSearchConfig) and is_on:
            # As part of the whole toolset it is merely not offered; who names it has to know.
            raise InvalidRequest(
                f'{path}.configs.{index}.name: "web_search" needs a search provider, and this server has none '
                "(MANAGED_AGENTS_WEB_SEARCH)"
            )


def _refusal(path: str, what: str, verb: str = "is") -> InvalidRequest:
    return InvalidRequest(f"{path}: {what} {verb} not served yet by this server")
