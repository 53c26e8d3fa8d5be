"""The owner's grip on a session's sandbox: bind, provision beside the first model request, call, harvest.

The binding is a row, written before anything is created: whoever comes after a crash knows what may exist. A sandbox that
is gone makes the call at hand ambiguous, whether it had started or not, and the model is told so; the next call gets a fresh
one. Nothing here decides anything about the turn.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup
from sqlalchemy import text

from managed_agents.blobstore.store import BlobStore
from managed_agents.core import faults, ids, limits
from managed_agents.core.ids import SessionId
from managed_agents.db.engine import Database
from managed_agents.harness.turn import ToolCall
from managed_agents.sandbox.backend import (
    Call,
    CallUnknown,
    Limits,
    Outcome,
    Sandbox,
    SandboxBackend,
    SandboxBusy,
    SandboxGone,
    SandboxSpec,
    StaleEpoch,
)

logger = logging.getLogger(__name__)
