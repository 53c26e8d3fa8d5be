"""What a model request is made of beside the conversation: model, system prompt, tools, thinking, cache marks. Pure.

Invariant: equal inputs give equal bytes, and each request of a session begins with the bytes of the one before it (cache marks
aside, which are no part of what is cached). A prefix cache then pays for everything but what is new.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from managed_agents.harness.tools import definitions, policies

Json = dict[str, Any]

OUTPUTS_NOTE = (
    "You work in an isolated Linux container. The working directory is /workspace. What network access there is goes through a "
    "proxy that the usual environment variables name; a 403 from it means that the host may not be reached. "
    "Files you leave in /mnt/session/outputs/ are handed to the user."
)
EFFORTS = ("low", "medium", "high", "xhigh", "max")
OUTPUT_TOKENS_MAX = 64_000  # of the model's own limit, what one response may take
THINKING_BUDGETS: Mapping[str, int] = {"low": 2_048, "medium": 4_096, "high": 8_192, "xhigh": 12_288, "max": 16_384}
CACHED: Json = {"type": "ephemeral"}


@dataclass(frozen=True, slots=True)
class ModelRules:
    """What the harness must know of the model, as `GET /v1/models` tells it."""

    context_tokens: int
    output_tokens: int
    # Levels of `output_config.effort`; none where the model refuses the field.
    efforts: tuple[str, ...] = ()
    # How to ask for thinking: "adaptive", "budget", or null where it is always on (or cannot be had).
    thinking: str | None = None

    @property
    def max_tokens(self) -> int:
        """What one response may take."""
        return min(self.output_tokens, OUTPUT_TOKENS_MAX)

    @property
    def full_tokens(self) -> int:
        """The prompt size from which on history is compacted first: there must be room for a whole response."""
        room = min(self.context_tokens * 9 // 10, self.context_tokens - self.max_tokens)
        return max(room, self.context_tokens // 2)


@dataclass(frozen=True, slots=True)
class Brief:
    """What a request is built from beside the log."""

    agent: Mapping[str, Any]
    model: ModelRules
    uploads: Sequence[str] = ()
    repositories: Sequence[str] = ()


def rules_of(context_tokens: int, output_tokens: int, capabilities: Mapping[str, Any]) -> ModelRules:
    """Read a model's `capabilities`. Without any, nothing is sent that a model might refuse."""
    effort: Mapping[str, Any] = capabilities.get("effort") or {}
    efforts = tuple(level for level in EFFORTS if _supported(effort.get(level))) if effort.get("supported") else ()
    thinks: Mapping[str, Any] = capabilities.get("thinking") or {}
    types: Mapping[str, Any] = thinks.get("types") or {}
    # A model that takes no other kind always thinks, and is not to be told to. spec: the vendor's migration notes, October 2026
    others = any(_supported(types.get(kind)) for kind in ("enabled", "disabled", "between_tools"))
    thinking = None
    if _supported(types.get("adaptive")):
        thinking = "adaptive" if others else None  # spec: thinking_types.py, each key says what the model accepts
    elif _supported(types.get("enabled")):
        thinking = "budget"
    return ModelRules(context_tokens, output_tokens, efforts, thinking)


def _supported(capability: Any) -> bool:
    return bool(capability and capability.get("supported"))


def system_prompt(agent: Mapping[str, Any], uploads: Sequence[str], repositories: Sequence[str] = ()) -> str:
    """The agent's own prompt, then the facts of its environment."""
    parts = [agent["system"]] if agent["system"] else []
    if definitions.offers_sandbox(agent["tools"]):
        parts.append(OUTPUTS_NOTE)
        if uploads:
            parts.append("Files the user attached (read-only):\n" + "\n".join(f"- {path}" for path in uploads))
        if repositories:
            listed = "\n".join(f"- {line}" for line in repositories)
            parts.append(f"Git repositories, cloned where that was possible (fetch and push need no credentials here):\n{listed}")
    return "\n\n".join(parts)


def tools_of(agent: Mapping[str, Any]) -> list[Json]:
    """The tools to offer, in a fixed order."""
    return [definitions.as_json(name) for name in definitions.offered(agent["tools"])] + policies.custom_tools(agent["tools"])


def body(brief: Brief, messages: Sequence[Json], *, said_tokens_max: int | None = None, with_tools: bool = True) -> Json:
    """The body of a Messages request for `messages`; `said_tokens_max` bounds what is said beside a thinking budget."""
    agent, rules = brief.agent, brief.model
    model = agent["model"]
    tools = tools_of(agent) if with_tools else []
    thinking = _thinking(rules, model["effort"]["type"])
    budget: int = 0 if thinking is None else thinking.get("budget_tokens", 0)
    said = rules.max_tokens if said_tokens_max is None else said_tokens_max + budget
    made: Json = {"model": model["id"], "max_tokens": min(said, rules.max_tokens)}
    if tools:
        made["tools"] = tools
    elif with_tools and (called := _called(messages)):
        # The session lost its tools; the API wants those named that the conversation calls.
        made["tools"] = [{"name": name, "input_schema": {"type": "object"}} for name in called]
        made["tool_choice"] = {"type": "none"}
    if system := system_prompt(agent, brief.uploads, brief.repositories):
        # Marked, so that sessions of one agent share it.
        made["system"] = [{"type": "text", "text": system, "cache_control": CACHED}]
    elif tools:
        tools[-1] = {**tools[-1], "cache_control": CACHED}
    made["messages"] = _marked(messages)
    if rules.efforts:
        made["output_config"] = {"effort": _nearest(model["effort"]["type"], rules.efforts)}
    if thinking is not None:
        made["thinking"] = thinking
    if model["speed"] != "standard":
        made["speed"] = model["speed"]
    if (geo := model.get("inference_geo")) is not None:
        made["inference_geo"] = geo
    return made


def _thinking(rules: ModelRules, effort: str) -> Json | None:
    """How thinking is asked for. The same in every request of a session: another budget would be another prefix."""
    if rules.thinking == "adaptive":
        return {"type": "adaptive"}
    budget = min(THINKING_BUDGETS[effort], rules.max_tokens // 2)
    return {"type": "enabled", "budget_tokens": budget} if rules.thinking == "budget" and budget >= 1024 else None


def _called(messages: Sequence[Json]) -> list[str]:
    """Names of the tools that the conversation has calls of."""
    turns = (message["content"] for message in messages if message["role"] == "assistant")
    return sorted({block["name"] for content in turns for block in content if block["type"] == "tool_use"})


def _nearest(effort: str, supported: Sequence[str]) -> str:
    """The asked level, or the highest supported one below it, or the lowest."""
    below = [level for level in supported if EFFORTS.index(level) <= EFFORTS.index(effort)]
    return below[-1] if below else supported[0]


def _marked(messages: Sequence[Json]) -> list[Json]:
    """Mark the ends of the last two user turns.

    The newest mark writes what the next request will read; the one before it is where the last request wrote. Without it the
    API looks back twenty blocks only, which one round of parallel calls can exceed.
    """
    marked = list(messages)
    ends = [index for index, message in enumerate(marked) if message["role"] == "user"][-2:]
    for index in ends:
        *rest, last = marked[index]["content"]
        marked[index] = {**marked[index], "content": [*rest, {**last, "cache_control": CACHED}]}
    return marked
