"""The models that the scripted model pretends to be: their limits and the request rules that differ between
them.

Names that do not begin with `claude-` are accepted with the rules of `GENERIC`, so that a test may call its
model whatever it likes; a `claude-…` name without a row is a 404, as a misspelt one would be at the real
API.
"""

from dataclasses import dataclass, replace

from managed_agents.scripted_model.checks import JsonObject, Refused

_CONTEXT_LONG = 1_000_000
_CONTEXT_SHORT = 200_000


@dataclass(frozen=True, slots=True)
class Model:
    """One model's rules. Prices are not here: nothing is billed."""

    id: str
    created: str
    context_tokens: int = _CONTEXT_LONG
    output_tokens_max: int = 128_000
    thinking_default: bool = False  # on when the field is omitted
    thinking_disable: bool = True
    thinking_disable_effort_max: str | None = None
    thinking_adaptive: bool = True
    thinking_budgets: bool = False
    thinking_display: str = "summarized"
    thinking_bound_to_prefix: bool = False
    sampling: bool = False  # temperature, top_p, top_k
    forced_tool_choice: bool = True
    prefill: bool = False
    system_messages: bool = False
    effort: bool = True
    fast: str = "refused"  # "served" | "ignored" | "refused"
    cache_tokens_min: int = 1024

    def listing(self) -> JsonObject:
        """Return the model as `GET /v1/models` shows it (spec: model_info.py, model_capabilities.py)."""

        def supported(yes: bool) -> JsonObject:
            return {"supported": yes}

        words = self.id.split("-")
        dots = ".".join(word for word in words if word.isdecimal() and len(word) < 8)
        name = " ".join([*(word.capitalize() for word in words if not word.isdecimal()), *([dots] if dots else [])])
        family = words[1] if self.id.startswith("claude-") else None
        return {
            "type": "model",
            "id": self.id,
            "display_name": name,
            "created_at": f"{self.created}T00:00:00Z",
            "lifecycle": "active",
            "line": family,
            "max_input_tokens": self.context_tokens,
            "max_tokens": self.output_tokens_max,
            "deprecated_at": None,
            "retires_at": None,
            "capabilities": {
                "batch": supported(False),
                "citations": supported(False),
                "code_execution": supported(False),
                "context_management": {"supported": False},
                "effort": {name: supported(self.effort) for name in ("low", "medium", "high", "xhigh", "max")}
                | {"supported": self.effort},
                "image_input": supported(True),
                "pdf_input": supported(True),
                "server_tools": {
                    "supported": False,
                    "code_execution": supported(False),
                    "web_search": supported(False),
                },
                "structured_outputs": supported(False),
                "thinking": {
                    "supported": True,
                    "types": {
                        "adaptive": supported(self.thinking_adaptive),
                        "between_tools": supported(False),
                        "disabled": supported(self.thinking_disable),
                        "enabled": supported(self.thinking_budgets),
                    },
                },
            },
        }


# From the vendor's public model, pricing and migration pages, November 2026.
_MIDDLE = Model("", "", thinking_budgets=True, sampling=True)
_OLDER = replace(_MIDDLE, context_tokens=_CONTEXT_SHORT, output_tokens_max=64_000)
_OLDEST = replace(_OLDER, prefill=True, thinking_adaptive=False)
_NEWER = Model("", "", thinking_default=True)
_FABLE_5 = replace(_NEWER, thinking_disable=False, system_messages=True)
_NEWEST = replace(_NEWER, forced_tool_choice=False, thinking_bound_to_prefix=True, system_messages=True)
_FABLE = replace(_NEWEST, thinking_disable=False)
_OPUS_5_5 = replace(_FABLE, thinking_display="omitted", fast="served")
_OPUS_5 = replace(_NEWER, thinking_disable_effort_max="high", system_messages=True, fast="served", cache_tokens_min=512)
_ROWS = (
    replace(_FABLE, id="claude-fable-5-2", created="2026-11-01"),
    replace(_FABLE, id="claude-mythos-5-2", created="2026-11-01"),
    replace(_NEWER, id="claude-haiku-5-5", created="2026-10-07", system_messages=True),
    replace(_NEWEST, id="claude-sonnet-5-5", created="2026-10-07", thinking_display="omitted"),
    replace(_OPUS_5_5, id="claude-opus-5-5", created="2026-10-07"),
    replace(_FABLE, id="claude-fable-5-1", created="2026-09-15"),
    replace(_FABLE, id="claude-mythos-5-1", created="2026-09-15"),
    replace(_NEWER, id="claude-sonnet-5", created="2026-06-01"),
    replace(_FABLE_5, id="claude-fable-5", created="2026-06-01"),
    replace(_FABLE_5, id="claude-mythos-5", created="2026-06-01"),
    replace(_OPUS_5, id="claude-opus-5", created="2026-06-01"),
    replace(_MIDDLE, id="claude-opus-4-8", created="2026-04-01", system_messages=True, fast="served"),
    replace(_MIDDLE, id="claude-opus-4-7", created="2026-03-01"),
    replace(_OLDER, id="claude-opus-4-6", created="2026-02-01", fast="ignored"),
    replace(_OLDER, id="claude-sonnet-4-6", created="2026-02-01"),
    replace(_OLDEST, id="claude-opus-4-5", created="2025-11-01"),
    replace(_OLDEST, id="claude-haiku-4-5", created="2025-10-01", effort=False),
    replace(_OLDEST, id="claude-sonnet-4-5", created="2025-09-29", effort=False),
)
MODELS = {row.id: row for row in _ROWS}
_DATED = {"claude-haiku-4-5-20251001", "claude-opus-4-5-20251101", "claude-sonnet-4-5-20250929"}
GENERIC = replace(_MIDDLE, id="scripted", created="2026-01-01", system_messages=True, fast="served")


def find_model(name: str) -> Model:
    """Return the rules for `name`. Raises: Refused 404 for a `claude-…` name without a row."""
    if name in _DATED:
        return replace(MODELS[name.rpartition("-")[0]], id=name)
    if (row := MODELS.get(name)) is not None:
        return row
    if name.startswith("claude-"):
        raise Refused(f"model: {name}", status=404, error_type="not_found_error")
    return replace(GENERIC, id=name)
