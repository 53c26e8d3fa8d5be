"""The harness's side of the Messages API: client, events, errors, model limits, list prices, effective
endpoint."""

from managed_agents.model.client import AnthropicModelClient, Deadlines, ModelClient
from managed_agents.model.endpoint import Endpoint, resolve_endpoint
from managed_agents.model.errors import (
    Auth,
    BadRequest,
    Billing,
    Cut,
    ModelError,
    Overloaded,
    RateLimited,
    ServerFailed,
    Stalled,
    TooLong,
)
from managed_agents.model.events import (
    BadToolInput,
    BlockFinished,
    BlockStarted,
    MessageFinished,
    MessageStarted,
    ModelEvent,
    ModelRequest,
    TextDelta,
)
from managed_agents.model.models import ModelInfo, Models
from managed_agents.model.prices import list_cost, runtime_cost, web_search_cost

__all__ = [
    "AnthropicModelClient",
    "Auth",
    "BadRequest",
    "BadToolInput",
    "Billing",
    "BlockFinished",
    "BlockStarted",
    "Cut",
    "Deadlines",
    "Endpoint",
    "MessageFinished",
    "MessageStarted",
    "ModelClient",
    "ModelError",
    "ModelEvent",
    "ModelInfo",
    "ModelRequest",
    "Models",
    "Overloaded",
    "RateLimited",
    "ServerFailed",
    "Stalled",
    "TextDelta",
    "TooLong",
    "list_cost",
    "resolve_endpoint",
    "runtime_cost",
    "web_search_cost",
]
