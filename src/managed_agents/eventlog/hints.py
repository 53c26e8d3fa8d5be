"""What is said after a commit: rows to this process's subscribers, a ring to the other processes. Never waited for.

Inside a unit of work (`db/engine.py`) the commit is still to come, and so is what is said.
"""

from collections.abc import Sequence

from managed_agents.core import faults
from managed_agents.db.engine import after_commit
from managed_agents.db.listener import LOG_CHANNEL, WORK_CHANNEL, Doorbell
from managed_agents.eventlog.events import QueuedEvent, StoredEvent
from managed_agents.eventlog.subscribe import Hub

BEFORE_HINT = faults.register("hints.before", "committed, nobody told yet")


class Hints:
    """The two receivers of every commit of this process."""

    def __init__(self, hub: Hub, doorbell: Doorbell) -> None:
        self._hub = hub
        self._doorbell = doorbell

    def appended(self, rows: Sequence[StoredEvent]) -> None:
        """Tell of rows appended to the log."""
        after_commit(lambda: self._appended(rows))

    def queued(self, rows: Sequence[QueuedEvent]) -> None:
        """Tell of events put into an inbox."""
        after_commit(lambda: self._queued(rows))

    def work(self, session_id: str) -> None:
        """Tell the workers that `session_id` has new input. Ring this first: it is what a turn waits for."""
        after_commit(lambda: self._work(session_id))

    def changed(self, session_id: str) -> None:
        """Tell streams that something other than rows changed: the session was deleted."""
        after_commit(lambda: self._changed(session_id))

    def _appended(self, rows: Sequence[StoredEvent]) -> None:
        faults.reach(BEFORE_HINT)
        self._hub.publish(rows)
        for session_id in {row.session_id for row in rows}:
            self._doorbell.ring(LOG_CHANNEL, session_id)

    def _queued(self, rows: Sequence[QueuedEvent]) -> None:
        self._hub.publish_queued(rows)
        for session_id in {row.session_id for row in rows}:
            self._doorbell.ring(LOG_CHANNEL, session_id)

    def _work(self, session_id: str) -> None:
        faults.reach(BEFORE_HINT)
        self._doorbell.ring(WORK_CHANNEL, session_id)

    def _changed(self, session_id: str) -> None:
        self._hub.refresh([session_id])
        self._doorbell.ring(LOG_CHANNEL, session_id)
