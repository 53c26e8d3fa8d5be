"""Waiting for what announces itself to nobody: look again and again, under a deadline."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

LOOK_SECONDS = 0.02
T = TypeVar("T")


async def until(look: Callable[[], T | Awaitable[T]], *, seconds: float = 30.0) -> T:
    """Return what `look` returns as soon as it is true."""
    with anyio.fail_after(seconds):
        while True:
            found = look()
            if isinstance(found, Awaitable):
                found = await found
            if found:
                return found
            await anyio.sleep(LOOK_SECONDS)
