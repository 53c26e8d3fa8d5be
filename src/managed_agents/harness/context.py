"""A session as its owner knows it: the folded turn, the transcript, the inbox. Extended from its cursor, dropped at rest."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from managed_agents.db.engine import Database, Tx
from managed_agents.eventlog import read
from managed_agents.eventlog.append import SessionGone
from managed_agents.eventlog.events import NewEvent, QueuedEvent, StoredEvent
from managed_agents.harness import lease
from managed_agents.harness.brain import Transcript
from managed_agents.harness.turn import Turn, restored

READ_ROWS = 1000


@dataclass(slots=True)
class Context:
    """What the log and the inbox say. Everything in it can be rebuilt from them."""

    session_id: str
    input_seq: int
    due_in_seconds: float | None
    new_transcript: Callable[[], Transcript]
    transcript: Transcript = field(init=False)
    turn: Turn = field(default_factory=Turn)
    inbox: list[QueuedEvent] = field(default_factory=list[QueuedEvent])
    # The budget was used up when last looked at; only new input can change that.
    at_cap: bool = False
    # Whether the newest input is known: our last append saw none that we do not have, and nobody told of any since it was begun.
    current: bool = False
    hints: int = 0

    def __post_init__(self) -> None:
        self.transcript = self.new_transcript()

    def extend(self, events: Iterable[StoredEvent]) -> None:
        """Take events that follow the cursor, in order."""
        for event in events:
            assert event.seq == self.turn.seq + 1, "the log has no gaps"
            self.turn.apply(event)
            self.transcript.apply(event)

    def begin(self, events: Sequence[StoredEvent]) -> None:
        """Take the first events that are read: from the log's beginning, or from a checkpoint on."""
        if events and events[0].type == read.CHECKPOINT:
            self.turn = restored(events[0].private_json()["turn"], seq=events[0].seq - 1)
        self.extend(events)

    def foresee(self, events: Sequence[NewEvent]) -> None:
        """Take events that are to be appended next. They have no `processed_at` yet, which no fold looks at."""
        for event in events:
            assert event.payload is not None
            seq = self.turn.seq + 1
            self.extend([StoredEvent(self.session_id, seq, event.id, event.thread_id, event.type, event.payload, event.private)])

    async def load(self, db: Database) -> None:
        """Read the inbox, and the log from its newest checkpoint on."""
        async with db.autocommit() as tx:
            self.inbox, rows = await read.from_checkpoint(tx, self.session_id, limit=READ_ROWS)
            self.begin(rows)
            if len(rows) == READ_ROWS:
                await self._read_on(tx)

    async def load_again(self, db: Database) -> None:
        """Forget the fold, and read what the log says."""
        self.turn, self.transcript, self.current = Turn(), self.new_transcript(), False
        await self.load(db)

    async def follow(self, db: Database, stored: Sequence[StoredEvent]) -> None:
        """Take events this owner has just appended, in any order; what others appended between is read from the table."""
        events = sorted(stored, key=lambda event: event.seq)
        taken = {event.id for event in events}
        self.inbox = [event for event in self.inbox if event.id not in taken]
        if events and events[0].seq == self.turn.seq + 1 and events[-1].seq == self.turn.seq + len(events):
            self.extend(events)
        elif events:
            async with db.autocommit() as tx:
                await self._read_on(tx)

    def hinted(self) -> None:
        """Somebody says that there is new input."""
        self.hints += 1
        self.current = False

    def committed(self, input_seq: int | None, hints: int) -> None:
        """An append of ours was committed, with the session's input at `input_seq`; it was begun after so many `hints`.

        A hint that came since may be of input that the append did not see, whoever of the two is heard first.
        """
        self.current = input_seq == self.input_seq and hints == self.hints

    async def refresh(self, db: Database) -> None:
        """Read the newest input, unless it is known: `input_seq` first, so that an older figure is the worst that can happen.

        Raises:
            SessionGone: the session was deleted.
        """
        if self.current:
            self.current = False  # each append is good for one look
            return
        async with db.autocommit() as tx:
            found = await lease.current_input(tx, self.session_id)
            if found is None:
                raise SessionGone
            input_seq, self.due_in_seconds = found
            if input_seq != self.input_seq:
                # The API may also have appended (a running period, say): the cursor must not fall behind the inbox.
                self.inbox = await read.inbox_after(tx, self.session_id)
                await self._read_on(tx)
                self.input_seq = input_seq
                self.at_cap = False

    async def _read_on(self, tx: Tx) -> None:
        while rows := await read.after(tx, self.session_id, self.turn.seq, limit=READ_ROWS):
            self.extend(rows)
            if len(rows) < READ_ROWS:
                break
