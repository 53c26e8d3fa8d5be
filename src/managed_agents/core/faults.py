"""Named fault points: places where tests make this process fail, to see that another one takes over.

A point costs one set lookup while nothing is armed. Arm through the environment variable `MANAGED_AGENTS_FAULTS`
(`point:action[:nth]`, comma separated; action `kill` or `raise`), read once at start, or with `arm()` in-process.
`kill` is SIGKILL to this very process: nothing gets cleaned up.
"""

import os
import signal
from collections.abc import Callable

REGISTERED: dict[str, str] = {}
_armed: dict[str, tuple[Callable[[], None], int]] = {}
_hits: dict[str, int] = {}


class FaultInjected(BaseException):
    """Raised at an armed point. A `BaseException`, so that no error handling of the product mistakes it for its own."""


def register(point: str, where: str) -> str:
    """Declare a fault point at import time and return its name. `where` says what has just happened there."""
    assert point not in REGISTERED, f"fault point {point} registered twice"
    REGISTERED[point] = where
    return point


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise FaultInjected


def arm(point: str, action: str | Callable[[], None] = "raise", *, nth: int = 1) -> None:
    """Make the `nth` arrival at `point` (1 is the next one, 0 is each) perform `action`: "raise", "kill" or a callable."""
    assert point in REGISTERED, f"unknown fault point {point}"
    call = {"raise": _raise, "kill": _kill}[action] if isinstance(action, str) else action
    _armed[point] = (call, nth)
    _hits[point] = 0


def disarm() -> None:
    """Forget every armed point."""
    _armed.clear()
    _hits.clear()


def arm_from(spec: str) -> None:
    """Arm the points of `spec`, the form of `MANAGED_AGENTS_FAULTS`."""
    for item in filter(None, spec.split(",")):
        point, action, *nth = item.split(":")
        arm(point, action, nth=int(nth[0]) if nth else 1)


def reach(point: str) -> None:
    """Mark that execution is at `point`."""
    if point not in _armed:
        return
    call, nth = _armed[point]
    _hits[point] += 1
    if nth in (0, _hits[point]):
        call()
