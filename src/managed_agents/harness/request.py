"""One model request: built from the transcript, streamed, its end or its failure as a value.

Failures are data here: the loop decides what becomes of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from managed_agents.harness.brain import Harness
from managed_agents.harness.response import Response
from managed_agents.harness.transcript import Transcript
from managed_agents.model import errors
from managed_agents.model.client import BlockFinished, MessageFinished, ModelClient, ModelRequest
from managed_agents.model.models import ModelCatalog
from managed_agents.model.prices import list_cost

OUTPUT_TOKENS_MAX = 32_000  # what a single response may take of the model's limit


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
