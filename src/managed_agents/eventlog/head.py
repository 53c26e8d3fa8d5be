"""A session's row, under lock or to be compared when it is written, with everything that is staged to be written with it.

Staging gives `seq` and `processed_at` and folds. `processed_at` is the database's clock, at least one microsecond after the
session's previous event: strictly rising within a session, whichever process writes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import orjson

from managed_agents.core import clock
from managed_agents.eventlog import fold
from managed_agents.eventlog.events import NewEvent, QueuedEvent, StoredEvent, with_processed_at
from managed_agents.eventlog.fold import SessionState, ThreadState

_MICROSECOND = timedelta(microseconds=1)


class LeaseLost(Exception):
    """The writer no longer owns the session: stop, and write nothing more."""


class NewInput(Exception):
    """Input arrived that the writer's decision did not know of: decide again."""


class BudgetReached(Exception):
    """The session's budget lets no further model request begin."""


class SessionGone(Exception):
    """The session was deleted."""


class InboxFull(Exception):
    """The session's inbox holds its maximum."""


class TakenAlready(Exception):
    """A queued event to be taken up is not in the inbox any more (a retry after a commit nobody heard of)."""


@dataclass(slots=True)
class Head:
    """A session row: the values read, and everything staged to be written."""

    id: str
    workspace_id: str
    primary_thread_id: str
    agent_name: str
    at: datetime
    archived: bool
    deleted: bool
    epoch: int
    budget_cents: int | None
    last_seq: int
    last_processed_at: datetime | None
    last_inbox_seq: int
    inbox_count: int
    input_seq: int
    handled_seq: int
    due_at: datetime | None
    not_before: datetime | None
    crashes: int
    owner: str | None
    state: SessionState
    loaded: tuple[Any, ...]
    threads: dict[str, ThreadState] = field(default_factory=dict[str, ThreadState])
    events: list[tuple[NewEvent, StoredEvent, datetime]] = field(default_factory=list[tuple[NewEvent, StoredEvent, datetime]])
    queued: list[QueuedEvent] = field(default_factory=list[QueuedEvent])
    taken: list[str] = field(default_factory=list[str])
    touched_threads: set[str] = field(default_factory=set[str])

    def append(self, events: Iterable[NewEvent]) -> list[StoredEvent]:
        """Stage `events` in order. Returns them as they will be stored."""
        stored: list[StoredEvent] = []
        for event in events:
            at = self.at
            if self.last_processed_at is not None:
                at = max(at, self.last_processed_at + _MICROSECOND)
            assert self.last_processed_at is None or at > self.last_processed_at
            thread = self.threads.get(event.thread_id)
            if event.type in fold.THREAD_TYPES or event.usage is not None:
                self.touched_threads.add(event.thread_id)
            fold.apply(self.state, thread, event.type, at, event.usage)
            fold.apply_call(self.state, event.type, event.id, event.tool_use_id, event.awaits)
            payload = event.payload if event.payload is not None else self._usage_payload(event.id, at)
            self.last_seq += 1
            self.last_processed_at = at
            row = StoredEvent(
                self.id,
                self.last_seq,
                event.id,
                event.thread_id,
                event.type,
                with_processed_at(payload, clock.micros(at)),
                event.private,
                event.for_model,
            )
            self.events.append((event, row, at))
            stored.append(row)
        return stored

    @property
    def at_cap(self) -> bool:
        """Whether the budget is used up now, to the microsecond of `at`."""
        return fold.at_cap(self.budget_cents, self.state.totals, self.state.active.until(self.at))

    def enqueue(self, events: Iterable[NewEvent], *, maximum: int) -> list[QueuedEvent]:
        """Stage client events that have to wait.

        Raises:
            InboxFull: more than `maximum` would wait.
        """
        queued: list[QueuedEvent] = []
        for event in events:
            assert event.payload is not None
            self.last_inbox_seq += 1
            self.inbox_count += 1
            if self.inbox_count > maximum:
                raise InboxFull
            row = QueuedEvent(self.id, self.last_inbox_seq, event.id, event.thread_id, event.type, event.payload)
            self.queued.append(row)
            queued.append(row)
        return queued

    def _usage_payload(self, event_id: str, at: datetime) -> bytes:
        usage = fold.usage_json(self.state.totals, self.state.active.until(at), measured=self.state.requests > 0, runtime=True)
        budget = fold.budget_json(self.budget_cents)
        return orjson.dumps({"type": "session.usage", "id": event_id, "usage": usage, "budget": budget})
