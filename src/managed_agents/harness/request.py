"""One model request: sent, streamed, its end or its failure as a value.

Failures are data here: the loop decides what becomes of them. What arrives is checked before anybody builds on it, because an
endpoint that only resembles the real one may answer anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from managed_agents.harness import prompt
from managed_agents.harness.prompt import ModelRules
from managed_agents.harness.response import Response
from managed_agents.model import errors
from managed_agents.model.client import ModelClient
from managed_agents.model.events import MessageFinished, ModelEvent, ModelRequest
from managed_agents.model.models import Models
from managed_agents.model.prices import response_cost

FAST_MODE = "fast-mode-2026-02-01"  # spec: message_create_params.py, `speed`
INTERLEAVED_THINKING = "interleaved-thinking-2025-05-14"  # spec: anthropic_beta_param.py; thinking between tool calls


@dataclass(frozen=True, slots=True)
class Finished:
    """The model answered."""

    response: Response


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed. `error_type` and `message` are what clients are told.

    `too_long`: it was too large for the model, so that a shorter one may do. `rejected`: something in it is not acceptable.
    """

    error_type: str
    message: str
    retryable: bool
    retry_after_seconds: float | None = None
    too_long: bool = False
    rejected: bool = False


def _unseen(_event: ModelEvent) -> None:
    """Nobody watches."""


@dataclass(frozen=True, slots=True)
class ModelRequester:
    """The model as the loop sees it."""

    client: ModelClient
    models: Models

    async def rules(self, model_id: str) -> ModelRules:
        """What is known of a model; asks its endpoint once an hour."""
        known = await self.models.retrieve(model_id)
        return prompt.rules_of(known.max_input_tokens, known.max_tokens, known.capabilities)

    async def send(
        self,
        body: Mapping[str, Any],
        model: Mapping[str, Any],
        *,
        watch: Callable[[ModelEvent], None] = _unseen,
    ) -> Finished | Failed:
        """Send `body`; `model` is the agent's, `watch` sees the stream. Cancelling closes the connection to the model."""
        betas = [FAST_MODE] if model["speed"] == "fast" else []
        if body.get("thinking", {}).get("type") == "enabled" and body.get("tools"):
            betas.append(INTERLEAVED_THINKING)
        try:
            async with self.client.stream(ModelRequest(body, tuple(betas))) as events:
                async for event in events:
                    if isinstance(event, MessageFinished):
                        return _finished(event, model)
                    watch(event)
        except errors.ModelError as error:
            return _failed(error)
        raise AssertionError("a response that ends without its last event is an error of the client")


def _finished(event: MessageFinished, model: Mapping[str, Any]) -> Finished | Failed:
    if (wrong := _nonsense(event.content)) is not None:
        return Failed("model_request_failed_error", f"The model endpoint's response makes no sense: {wrong}", retryable=True)
    response = Response(
        event.content,
        event.usage,
        event.model,
        event.stop_reason,
        event.stop_details,
        # The served model is what is paid for, whatever was asked for.
        response_cost(event.model, event.usage, speed=model["speed"], inference_geo=model.get("inference_geo")),
        {index: bad.raw for index, bad in event.bad_inputs.items()},
        model["id"],
        _speed(event.usage) if model["speed"] == "fast" else None,
    )
    return Finished(response)


def _speed(usage: Mapping[str, Any]) -> str | None:
    speed = usage.get("speed")
    return speed if speed in ("standard", "fast") else None  # spec: the values in beta_managed_agents_span_model_usage.py


_FIELDS: Mapping[str, Mapping[str, type]] = {
    "text": {"text": str},
    "thinking": {"thinking": str},
    "tool_use": {"id": str, "name": str, "input": dict},
}


def _nonsense(content: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with response blocks that we build on; None when nothing is."""
    ids: set[str] = set()
    for index, block in enumerate(content):
        kind = block.get("type")
        if not isinstance(kind, str):
            return f"content.{index} has no type"
        for name, wanted in _FIELDS.get(kind, {}).items():
            if not isinstance(block.get(name), wanted):
                return f"content.{index}.{name} of a {kind} block"
        if kind == "tool_use":
            if not block["id"] or not block["name"] or block["id"] in ids:
                return f"content.{index}: a tool use without a name or an id of its own"
            ids.add(block["id"])
    return None


def _failed(error: errors.ModelError) -> Failed:
    match error:
        case errors.Overloaded():
            error_type = "model_overloaded_error"
        case errors.RateLimited():
            error_type = "model_rate_limited_error"
        case errors.Billing():
            error_type = "billing_error"
        case _:
            error_type = "model_request_failed_error"
    too_long = isinstance(error, errors.TooLong)
    # Others of this class, a 404 say, are about the model, not about what was said. Inside a stream there is no status.
    rejected = isinstance(error, errors.BadRequest) and not too_long and error.status in (None, 400, 422)
    return Failed(error_type, error.message, error.retryable, error.retry_after, too_long, rejected)
