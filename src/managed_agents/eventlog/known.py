"""Heads as this process last wrote or claimed them, with the versions of their rows, and an estimate of the database's clock.

Only a memory: whoever writes from it compares the version in the same statement, so that being out of date costs a round trip and
nothing else.
"""

import time
from collections import OrderedDict
from datetime import datetime, timedelta

from managed_agents.eventlog.head import Head
from managed_agents.eventlog.statements import begin_again

HEADS_MAX = 2000  # some kilobytes each; a worker runs fewer sessions


class KnownHeads:
    """Of each session the head that was written last, until it is taken to write from."""

    def __init__(self) -> None:
        self._heads: OrderedDict[str, tuple[Head, str]] = OrderedDict()
        self._clock: tuple[datetime, float] | None = None

    def keep(self, head: Head, version: str) -> None:
        """Remember a head that was committed as it is, if its session still has an owner."""
        if head.owner is None:
            return
        begin_again(head)
        self._heads[head.id] = head, version
        while len(self._heads) > HEADS_MAX:
            self._heads.popitem(last=False)

    def take(self, session_id: str) -> tuple[Head, str] | None:
        """Return the head to stage on, at the database's time now, and forget it: it is kept again once it is written."""
        found = self._heads.pop(session_id, None)
        if found is None or self._clock is None:
            return None
        head, _ = found
        told, received = self._clock
        head.at = told + timedelta(seconds=_now() - received)
        if head.last_processed_at is not None:
            head.at = max(head.at, head.last_processed_at)
        return found

    def heard(self, at: datetime) -> None:
        """Take the database's clock as it was told just now: the estimate is behind by a commit and its answer's way at most."""
        self._clock = at, _now()


def _now() -> float:
    """Seconds of a clock that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
