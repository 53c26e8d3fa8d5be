"""Recorded sessions: the log as the table holds it, what requests are built from beside it, and the requests that were made.

`MANAGED_AGENTS_RECORD=1 pytest tests/replay` records them again; a change of theirs is a change of what models see, and of the
prompt cache of every running session.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from managed_agents.db.engine import Database
from managed_agents.eventlog import read
from managed_agents.eventlog.events import StoredEvent
from managed_agents.harness.brain import Harness
from managed_agents.harness.context import READ_ROWS
from managed_agents.harness.prompt import Brief, ModelRules
from managed_agents.harness.turn import Turn

HERE = Path(__file__).with_name("recorded")
Json = dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """One session."""

    brief: Brief
    log: list[StoredEvent]
    requests: list[bytes]

    def dump(self) -> bytes:
        """The recording as a file: one line for what does not change, then a line an event, then a line a request."""
        rules = self.brief.model
        head = {
            "agent": self.brief.agent,
            "uploads": list(self.brief.uploads),
            "model": {name: getattr(rules, name) for name in ("context_tokens", "output_tokens", "efforts", "thinking")},
            "events": len(self.log),
        }
        events = [
            {"id": row.id, "thread": row.thread_id, "for_model": row.for_model, "body": row.json(), "private": row.private_json()}
            for row in self.log
        ]
        return b"\n".join([*(orjson.dumps(line) for line in (head, *events)), *self.requests, b""])

    @classmethod
    def load(cls, name: str) -> "Recording":
        """Read a recording."""
        head, *lines = (HERE / f"{name}.jsonl").read_bytes().splitlines()
        known = orjson.loads(head)
        log: list[StoredEvent] = []
        for seq, line in enumerate(lines[: known["events"]], 1):
            row = orjson.loads(line)
            private = orjson.dumps(row["private"]) if row["private"] else None
            body = orjson.dumps(row["body"])
            log.append(StoredEvent("sesn_1", seq, row["id"], row["thread"], row["body"]["type"], body, private, row["for_model"]))
        rules = ModelRules(**{**known["model"], "efforts": tuple(known["model"]["efforts"])})
        return cls(Brief(known["agent"], rules, known["uploads"]), log, lines[known["events"] :])


async def log_of(db: Database, session_id: str) -> list[StoredEvent]:
    """The whole log of a session."""
    async with db.autocommit() as tx:
        rows = await read.after(tx, session_id, 0, limit=READ_ROWS)
    assert len(rows) < READ_ROWS
    return rows


def rebuilt(harness: Harness, brief: Brief, log: list[StoredEvent]) -> Iterator[bytes]:
    """The requests that this log leads to, one for each span, as they are sent."""
    turn, transcript = Turn(), harness.transcript()
    for position, event in enumerate(log):
        turn.apply(event)
        transcript.apply(event)
        if event.type == "span.model_request_start":
            body = (
                transcript.compaction(brief, briefly=turn.too_long or turn.compaction_failed)
                if _compacts(log, position)
                else transcript.request(brief)
            )
            yield orjson.dumps({**body, "stream": True})


def _compacts(log: list[StoredEvent], start: int) -> bool:
    """Whether the span that begins there asked for a summary: its end says so."""
    end = next(event for event in log[start:] if event.type == "span.model_request_end")
    return "compaction" in end.private_json()
