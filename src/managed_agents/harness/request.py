"""One model request: built from the transcript, streamed, its end or its failure as a value.

Failures are data here: the loop decides what becomes of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from managed_agents.harness.brain import Harness
from managed_agents.harness.response import Response
from managed_agents.harness.transcript import Transcript
from managed_agents.model import errors
from managed_agents.model.client import ModelClient
from managed_agents.model.events import MessageFinished, ModelEvent, ModelRequest
from managed_agents.model.models import Models
from managed_agents.model.prices import response_cost

FAST_MODE = "fast-mode-2026-02-01"  # spec: message_create_params.py, `speed`
OUTPUT_TOKENS_MAX = 64_000  # of the model's own limit, what one response may take


@dataclass(frozen=True, slots=True)
class Finished:
    """The model answered."""

    response: Response


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed. `error_type` and `message` are what clients are told."""

    error_type: str
    message: str
    retryable: bool
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ModelRequester:
    """The model as the loop sees it."""

    client: ModelClient
    models: Models

    async def request(
        self,
        harness: Harness,
        agent: dict[str, Any],
        transcript: Transcript,
        uploads: Sequence[str],
        *,
        watch: Callable[[ModelEvent], None],
    ) -> Finished | Failed:
        """Ask the model for the next turn of `transcript`; `watch` sees the stream. Cancelling closes the connection."""
        model = agent["model"]
        known = await self.models.retrieve(model["id"])
        body = harness.build_request(
            agent,
            transcript,
            max_tokens=min(known.max_tokens, OUTPUT_TOKENS_MAX),
            takes_effort=bool(known.capabilities.get("effort", {}).get("supported")),
            uploads=uploads,
        )
        betas = (FAST_MODE,) if model["speed"] == "fast" else ()
        try:
            async with self.client.stream(ModelRequest(body, betas)) as events:
                async for event in events:
                    if isinstance(event, MessageFinished):
                        return Finished(_response(event, model))
                    watch(event)
        except errors.ModelError as error:
            return _failed(error)
        raise AssertionError("a response that ends without its last event is an error of the client")


def _response(event: MessageFinished, model: Mapping[str, Any]) -> Response:
    return Response(
        event.content,
        event.usage,
        event.model,
        event.stop_reason,
        event.stop_details,
        # The served model is what is paid for, whatever was asked for.
        response_cost(event.model, event.usage, speed=model["speed"], inference_geo=model.get("inference_geo")),
        {index: bad.raw for index, bad in event.bad_inputs.items()},
    )


def _failed(error: errors.ModelError) -> Failed:
    match error:
        case errors.Overloaded():
            return Failed("model_overloaded_error", error.message, retryable=True)
        case errors.RateLimited():
            return Failed("model_rate_limited_error", error.message, retryable=True, retry_after_seconds=error.retry_after)
        case errors.Billing():
            return Failed("billing_error", error.message, retryable=False)
        case _:
            return Failed("model_request_failed_error", error.message, retryable=error.retryable)
