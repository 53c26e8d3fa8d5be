"""What the session's agent says about its tools: which are the client's, and under which policy the others run. Pure.

The agent's tools are stored resolved (`resources/agents/config.py`): every toolset has its default configuration, and every
entry of `configs` is complete.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

Tools = Sequence[Mapping[str, Any]]


def custom_tools(tools: Tools) -> list[Json]:
    """Definitions of the client's own tools for a Messages request, in the agent's order."""
    return [
        {"name": tool["name"], "description": tool["description"], "input_schema": tool["input_schema"]}
        for tool in tools
        if tool["type"] == "custom"
    ]


def is_custom(name: str, tools: Tools) -> bool:
    """Whether `name` is a tool that the client runs."""
    return any(tool["type"] == "custom" and tool["name"] == name for tool in tools)


def policy_of(name: str, tools: Tools) -> str:
    """The permission policy of built-in tool `name`: its own, else its toolset's."""
    for toolset in tools:
        if toolset["type"] == "agent_toolset_20260401":
            for config in toolset["configs"]:
                if config["name"] == name:
                    return config["permission_policy"]["type"]
            return toolset["default_config"]["permission_policy"]["type"]
    raise AssertionError(f"{name} is offered by no toolset")
