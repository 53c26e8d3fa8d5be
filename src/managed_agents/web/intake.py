"""How much of a process its callers may take up: the pace of bodies, the memory of large ones, open streams.

Every body is read through `chunks`. What a body holds in memory beyond its free part is given back when its request ends, not
when it was read: the parsed document lives as long.
"""

import time
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from typing import cast

import anyio
from starlette.requests import Request
from starlette.types import Scope

from managed_agents.core import limits
from managed_agents.core.errors import ApiError, RateLimited
from managed_agents.web.actor import Actor
from managed_agents.web.state import Capacity, edge_services

HELD = "held_body_bytes"


async def chunks(request: Request) -> AsyncGenerator[bytes]:
    """Yield the body as it arrives. Raises 408 when it stalls or its average pace stays too low."""
    began, total = time.monotonic(), 0
    stream = request.stream()
    while True:
        left = limits.BODY_GRACE_SECONDS + total / limits.BODY_BYTES_PER_SECOND_MIN - (time.monotonic() - began)
        chunk: bytes | None = None
        with anyio.move_on_after(max(0.0, min(left, limits.BODY_STALL_SECONDS))) as pace:
            chunk = await anext(stream, None)
        if pace.cancelled_caught:
            raise ApiError(408, "timeout_error", "body: arrived too slowly", headers={"connection": "close"})
        if chunk is None:
            return
        total += len(chunk)
        yield chunk


def hold(request: Request, total: int) -> None:
    """Account for a body of which `total` bytes are in memory. Raises 529 when all large bodies together are too large."""
    wanted = max(0, total - limits.BODY_FREE_BYTES)
    state = request.scope["state"]
    capacity = edge_services(request).capacity
    more = wanted - state.get(HELD, 0)
    if more <= 0:
        return
    if capacity.body_bytes + more > capacity.body_bytes_max:
        headers = {"retry-after": "1", "connection": "close"}
        raise ApiError(529, "overloaded_error", "Overloaded: too many large bodies at once", headers=headers)
    capacity.body_bytes += more
    state[HELD] = wanted


def release(scope: Scope) -> None:
    """Give back what the request held. Repeating is harmless."""
    held = scope["state"].pop(HELD, 0)
    if held:
        capacity_of(scope).body_bytes -= held


def capacity_of(scope: Scope) -> Capacity:
    """Return the capacity of the application that serves `scope`."""
    return cast(Capacity, scope["app"].state.services.capacity)


@contextmanager
def counted_stream(scope: Scope) -> Generator[None]:
    """Count one open stream of the caller's workspace while the block runs. Raises 429 above the limit."""
    actor = cast(Actor, scope["state"]["actor"])
    capacity = capacity_of(scope)
    open_streams: Counter[str] = capacity.streams
    if open_streams[actor.workspace_id] >= capacity.streams_max:
        raise RateLimited(f"more than {capacity.streams_max} open streams of this workspace", headers={"retry-after": "5"})
    open_streams[actor.workspace_id] += 1
    try:
        yield
    finally:
        open_streams[actor.workspace_id] -= 1
        if not open_streams[actor.workspace_id]:
            del open_streams[actor.workspace_id]
