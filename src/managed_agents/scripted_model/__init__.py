"""A stand-alone peer that speaks the Messages API and answers as a script says.

It is the tests' model, the demo's without a key, and a tool for users who test their own agents offline
(docs/testing-your-agents.md). It imports nothing else of this package. The names below are what scripts
use.
"""

from managed_agents.scripted_model.app import create_app
from managed_agents.scripted_model.reply import (
    Part,
    Reply,
    ScriptError,
    broken_tool_use,
    cut,
    fail,
    pace,
    refuse,
    stall,
    stop_reason,
    text,
    thinking,
    tool_use,
)
from managed_agents.scripted_model.request import JudgedCall, Request, ToolResult
from managed_agents.scripted_model.script import Script, load_script
from managed_agents.scripted_model.server import scripted_model_command, serve

__all__ = [
    "JudgedCall",
    "Part",
    "Reply",
    "Request",
    "Script",
    "ScriptError",
    "ToolResult",
    "broken_tool_use",
    "create_app",
    "cut",
    "fail",
    "load_script",
    "pace",
    "refuse",
    "scripted_model_command",
    "serve",
    "stall",
    "stop_reason",
    "text",
    "thinking",
    "tool_use",
]
