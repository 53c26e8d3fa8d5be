"""Limits and capabilities of models, from `GET /v1/models/{id}`, remembered for an hour.

A model endpoint without that route (many compatible servers) must not stop a turn: then conservative limits
are used and asked for again a minute later. At most one lookup per model is under way.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

import anthropic
import anyio

from managed_agents.model.events import JsonObject

FOUND_SECONDS = 3600.0
FAILED_SECONDS = 60.0
LOOKUP_SECONDS = 5.0
MODELS_MAX = 512
MAX_TOKENS_FALLBACK = 32_000
MAX_INPUT_TOKENS_FALLBACK = 200_000


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model. `exists` is None when the endpoint could not tell."""

    id: str
    exists: bool | None
    max_tokens: int = MAX_TOKENS_FALLBACK
    max_input_tokens: int = MAX_INPUT_TOKENS_FALLBACK
    capabilities: JsonObject = field(default_factory=lambda: {})


class Models:
    """Cached lookups over one SDK client."""

    def __init__(self, client: anthropic.AsyncAnthropic, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, ModelInfo]] = OrderedDict()
        self._locks: dict[str, anyio.Lock] = {}

    async def retrieve(self, model: str) -> ModelInfo:
        """Return what is known of `model`, asking when that is too old. A failing endpoint is no error."""
        if (known := self._fresh(model)) is not None:
            return known
        lock = self._locks.setdefault(model, anyio.Lock())
        try:
            async with lock:
                if (known := self._fresh(model)) is not None:
                    return known
                info = await self._ask(model)
                self._remember(info)
                return info
        finally:
            if not lock.statistics().tasks_waiting:
                self._locks.pop(model, None)

    def _fresh(self, model: str) -> ModelInfo | None:
        entry = self._known.get(model)
        return entry[1] if entry is not None and entry[0] > self._clock() else None

    def _remember(self, info: ModelInfo) -> None:
        lifetime = FAILED_SECONDS if info.exists is None else FOUND_SECONDS
        self._known[info.id] = (self._clock() + lifetime, info)
        self._known.move_to_end(info.id)
        while len(self._known) > MODELS_MAX:
            self._known.popitem(last=False)

    async def _ask(self, model: str) -> ModelInfo:
        try:
            with anyio.fail_after(LOOKUP_SECONDS):
                found = await self._client.models.retrieve(quote(model, safe=""))
        except anthropic.NotFoundError as error:
            # A missing route is a 404 too; only the API's own envelope says that the model is unknown.
            return ModelInfo(model, exists=False if error.type == "not_found_error" and model in str(error.body) else None)
        except (anthropic.AnthropicError, TimeoutError):
            return ModelInfo(model, exists=None)
        return ModelInfo(
            id=model,
            exists=True,
            max_tokens=found.max_tokens or MAX_TOKENS_FALLBACK,
            max_input_tokens=found.max_input_tokens or MAX_INPUT_TOKENS_FALLBACK,
            capabilities=found.capabilities.model_dump() if found.capabilities is not None else {},
        )
