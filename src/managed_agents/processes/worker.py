"""The worker process: harness, hands, and the reconcilers of this host."""

import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable

import anyio
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.api.health import operations_app
from managed_agents.blobstore.local import LocalBlobStore
from managed_agents.core.settings import Settings
from managed_agents.db.engine import Database
from managed_agents.db.listener import Doorbell
from managed_agents.eventlog.batch import Appender
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.subscribe import Hub
from managed_agents.harness.brain import StandardHarness
from managed_agents.harness.hands import Hands
from managed_agents.harness.loop import Parts
from managed_agents.harness.request import ModelRequester
from managed_agents.harness.worker import Worker
from managed_agents.model.client import AnthropicModelClient
from managed_agents.model.endpoint import Endpoint, resolve_endpoint
from managed_agents.model.models import Models
from managed_agents.processes.lifetime import serving, until_signalled
from managed_agents.reconcilers.blob_collector import collect_blobs
from managed_agents.reconcilers.sandbox_collector import SandboxCollector
from managed_agents.reconcilers.session_eraser import erase_deleted
from managed_agents.sandbox.backend import Limits, SandboxBackend, SandboxError, SandboxSpec

logger = logging.getLogger(__name__)

SANDBOX_LOOK_SECONDS = 10.0
ERASE_LOOK_SECONDS = 2.0
BLOB_LOOK_SECONDS = 600.0
LOOK_SECONDS_MAX = 300.0


class CannotStart(Exception):
    """The worker cannot start with these settings; the message says what to do."""


async def run(settings: Settings) -> None:
    """Work until a signal arrives; sessions at hand are given back to the others.

    Raises:
        CannotStart: no model, or a backend that these settings forbid.
    """
