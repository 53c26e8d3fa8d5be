"""The tools of `agent_toolset_20260401` that this server runs, as the model sees them. Pure.

Input schemas follow the SDK's types (spec: beta_managed_agents_agent_toolset20260401_*_input.py); the descriptions are ours.
Their text is part of every cached prefix: changing it costs each running session one cache write.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

SANDBOX_TOOLS = ("bash", "edit", "glob", "grep", "read", "write")


def _schema(properties: Json, required: Sequence[str]) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_DEFINITIONS: dict[str, tuple[str, Json]] = {
    "bash": (
        "Run a command in a persistent bash shell. The working directory and variables are kept between calls. "
        "stdout and stderr are returned together; a non-zero exit status is an error. Set restart to true to get "
        "a fresh shell.",
        _schema(
            {
                "command": {"type": "string", "description": "The command to run."},
                "restart": {"type": "boolean", "description": "Start a fresh shell first."},
                "timeout_ms": {
                    "type": "integer",
                    "minimum": 0,
                    "description": "Time limit in milliseconds; 0 or absent means 120,000.",
                },
            },
            (),
        ),
    ),
    "read": (
        "Read a file: text, an image (png, jpg, gif, webp), a PDF or a notebook. For text, view_range selects lines.",
        _schema(
            {
                "file_path": {
                    "type": "string",
                    "description": "Absolute, or relative to the working directory.",
                },
                "view_range": {
                    "type": "array",
                    "items": {"type": "integer"},
                    "minItems": 2,
                    "maxItems": 2,
                    "description": "First and last line, counted from 1; a last line of 0 or less means the end.",
                },
            },
            ("file_path",),
        ),
    ),
    "write": (
        "Write a file, replacing it when it exists. Missing parent directories are created.",
        _schema({"file_path": {"type": "string"}, "content": {"type": "string"}}, ("file_path", "content")),
    ),
    "edit": (
        "Replace text in a file. old_string must occur exactly once, unless replace_all is true.",
        _schema(
            {
                "file_path": {"type": "string"},
                "old_string": {"type": "string"},
                "new_string": {"type": "string"},
                "replace_all": {"type": "boolean"},
            },
            ("file_path", "old_string", "new_string"),
        ),
    ),
    "glob": (
        "Find files by pattern (** crosses directories), newest first.",
        _schema(
            {
                "pattern": {"type": "string"},
                "path": {
                    "type": "string",
                    "description": "Where to look; the working directory when absent.",
                },
            },
            ("pattern",),
        ),
    ),
    "grep": (
        "Search file contents with a regular expression.",
        _schema(
            {
                "pattern": {"type": "string"},
                "path": {
                    "type": "string",
                    "description": "File or directory; the working directory when absent.",
                },
            },
            ("pattern",),
        ),
    ),
}


def offered(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the tools to offer: enabled in the agent's toolset and built in this server, in a fixed order."""
    for toolset in tools:
        if toolset["type"] == "agent_toolset_20260401":
            enabled = dict.fromkeys(SANDBOX_TOOLS, toolset["default_config"]["enabled"])
            enabled |= {config["name"]: config["enabled"] for config in toolset["configs"]}
            return [name for name in SANDBOX_TOOLS if enabled[name]]
    return []


def as_json(name: str) -> Json:
    """The definition of tool `name` for a Messages request."""
    description, schema = _DEFINITIONS[name]
    return {"name": name, "description": description, "input_schema": schema}


def refusal(name: str, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a call of `name` may not run, or None."""
    return None if name in offered(tools) else f"The tool {name} is not enabled in this session."
