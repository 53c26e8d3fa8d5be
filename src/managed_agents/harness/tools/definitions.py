"""The tools of `agent_toolset_20260401` that this server runs, as the model sees them. Pure.

Input schemas follow the SDK's types (spec: beta_managed_agents_agent_toolset20260401_*_input.py); the descriptions are ours.
Their text is part of every cached prefix: changing it costs each running session one cache write.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

SANDBOX_TOOLS = ("bash", "edit", "glob", "grep", "read", "write")
SHELL_TOOL = "bash"  # the one of the sandbox's tools whose calls share state
WEB_TOOLS = ("web_fetch", "web_search")  # run by the harness itself


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
    "web_fetch": (
        "Read a page on the public web: HTML comes as Markdown with its links, other text as it is, a PDF as a document.",
        _schema({"url": {"type": "string", "description": "An http or https URL."}}, ("url",)),
    ),
    "web_search": (
        "Search the web. Each result has an address, a title and an excerpt; read the whole page with web_fetch.",
        _schema({"query": {"type": "string", "description": "What to look for, in a few words."}}, ("query",)),
    ),
}


def available(tools: Sequence[Mapping[str, Any]], missing: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The agent's tools as this worker can serve them: `missing` names the built-in tools it cannot run, and why."""
    return [
        {**tool, "missing": dict(missing)} if tool["type"] == "agent_toolset_20260401" and missing else tool for tool in tools
    ]


def _toolset(tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((tool for tool in tools if tool["type"] == "agent_toolset_20260401"), None)


def offered(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the tools to offer: enabled in the agent's toolset and available here, in a fixed order."""
    if (toolset := _toolset(tools)) is None:
        return []
    names = (*SANDBOX_TOOLS, *WEB_TOOLS)
    enabled = dict.fromkeys(names, toolset["default_config"]["enabled"])
    enabled |= {config["name"]: config["enabled"] for config in toolset["configs"]}
    return [name for name in names if enabled[name] and name not in toolset.get("missing", ())]


def offers_sandbox(tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any tool is offered that runs in the sandbox."""
    return any(name in SANDBOX_TOOLS for name in offered(tools))


def settings_of(name: str, tools: Sequence[Mapping[str, Any]]) -> Json:
    """The entry of `configs` for a tool; empty when it has none."""
    toolset = _toolset(tools)
    configs: Sequence[Json] = () if toolset is None else toolset["configs"]
    return next((config for config in configs if config["name"] == name), Json())


def as_json(name: str) -> Json:
    """The definition of tool `name` for a Messages request."""
    description, schema = _DEFINITIONS[name]
    return {"name": name, "description": description, "input_schema": schema}


def refusal(name: str, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a call of `name` may not run, or None."""
    missing: Mapping[str, str] = (_toolset(tools) or {}).get("missing", {})
    if name in missing:
        return missing[name]
    return None if name in offered(tools) else f"The tool {name} is not enabled in this session."
