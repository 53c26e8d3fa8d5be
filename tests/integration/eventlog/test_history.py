"""Pages of a history: what they hold, and that one costs the same wherever it lies and however long the history is.

The cost is counted in pages of the database that are touched, which no other load on the machine changes.
"""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, text

from managed_agents.db.engine import Database
from managed_agents.eventlog import read
from managed_agents.eventlog.read import HistoryCursor, HistoryFilter
from tests.support import sessions
from tests.support.histories import write_history

pytestmark = pytest.mark.anyio

START = datetime(2026, 1, 1, tzinfo=UTC)
SHORT, LONG = 1_000, 60_000
OTHERS = 60
LIMIT = 100
CHUNK = 50_000  # no transaction may take longer than ten seconds
MILLION = 1_000_000
RATIO_MAX = 1.5


class Histories:
    """A short and a long session in one database, and what a page of them costs."""

    def __init__(self, db: Database, threads: dict[int, tuple[str, str]]) -> None:
        self._db = db
        self._threads = threads

    async def page(
        self, length: int, order: str = "asc", after: int | None = None, **wanted: Any
    ) -> tuple[list[int | None], int]:
        """The `seq` of a page's events, and how many pages of the database were touched for it."""
        session_id, thread_id = self._threads[length]
        seen: list[tuple[str, Any]] = []

        def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            seen.append((statement, parameters))

        engine = self._db.engine.sync_engine
        cursor = HistoryCursor(order, after)  # pyright: ignore[reportArgumentType]
        async with self._db.autocommit() as tx:
            event.listen(engine, "before_cursor_execute", note)
            try:
                items, _ = await read.history(tx, session_id, cursor, HistoryFilter(thread_id, **wanted), limit=LIMIT)
            finally:
                event.remove(engine, "before_cursor_execute", note)
            touched = 0
            for statement, parameters in seen:
                # As a statement that is used again and again is planned: for any session, not for this one.
                await tx.exec_driver_sql("SET plan_cache_mode = force_generic_plan")
                await tx.exec_driver_sql(f"PREPARE looked AS {statement}")
                values = ", ".join(_literal(value) for value in parameters)
                explained = await tx.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE looked({values})")
                await tx.exec_driver_sql("DEALLOCATE looked")
                plan = explained.scalar_one()
                root = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
                touched += root["Shared Hit Blocks"] + root["Shared Read Blocks"]
        return [item.seq for item in items], touched


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"ARRAY[{', '.join(_literal(one) for one in value)}]"
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"


async def made(db: Database, *lengths: int) -> Histories:
    workspace_id = await sessions.workspace(db)
    for _ in range(OTHERS):  # most sessions are short, and what is planned for them must do for the long ones
        session_id, thread_id = await sessions.session(db, workspace_id)
        async with db.transaction() as tx:
            await write_history(tx, session_id, thread_id, 1, 20)
    threads = {length: await sessions.session(db, workspace_id) for length in lengths}
    for length, (session_id, thread_id) in threads.items():
        for first in range(1, length + 1, CHUNK):
            async with db.transaction() as tx:
                await write_history(tx, session_id, thread_id, first, min(first + CHUNK - 1, length))
    async with db.autocommit() as tx:
        await tx.execute(text("VACUUM ANALYZE events"))
        await tx.execute(text("VACUUM ANALYZE sessions"))
    return Histories(db, threads)


@pytest.fixture
async def histories(db: Database) -> Histories:
    return await made(db, SHORT, LONG)


@pytest.mark.requirement("EVT-100")
async def test_a_page_costs_the_same_everywhere(histories: Histories) -> None:
    await check_costs(histories, LONG)


@pytest.mark.full
@pytest.mark.requirement("EVT-100")
async def test_a_page_costs_the_same_in_a_million_events(db: Database) -> None:
    await check_costs(await made(db, SHORT, MILLION), MILLION)


async def check_costs(histories: Histories, length: int) -> None:
    """The first, a middle and the last page, in both orders, against the first page of the short one."""
    _, least = await histories.page(SHORT)
    for order, after in (("asc", None), ("asc", length // 2), ("asc", length - LIMIT), ("desc", None), ("desc", LIMIT + 1)):
        seqs, touched = await histories.page(length, order, after)
        assert len(seqs) == LIMIT
        # A longer index is one level deeper.
        assert touched <= RATIO_MAX * least + 3, (order, after, touched, least)


@pytest.mark.requirement("EVT-100")
async def test_rare_types_do_not_make_it_read_the_others(histories: Histories) -> None:
    seqs, touched = await histories.page(LONG, types=["session.error"])
    assert seqs == list(range(1000, LONG + 1, 1000))
    assert touched < 200
    mixed, _ = await histories.page(LONG, after=500, types=["session.error", "agent.message", "agent.message"])
    assert mixed == list(range(502, 502 + 2 * LIMIT, 2))
    last, touched = await histories.page(LONG, "desc", types=["session.error", "user.message"])
    assert last[:3] == [LONG, LONG - 1, LONG - 3]
    assert touched < 200
    assert (await histories.page(LONG, types=["session.status_idle"]))[0] == []


@pytest.mark.requirement("EVT-100")
async def test_instants_are_found_without_reading_up_to_them(histories: Histories) -> None:
    at = START + timedelta(milliseconds=LONG - 50)
    seqs, touched = await histories.page(LONG, gte=at)
    assert seqs == list(range(LONG - 50, LONG + 1))
    assert touched < 200
    seqs, touched = await histories.page(LONG, "desc", lt=START + timedelta(milliseconds=51))
    assert seqs == list(range(50, 0, -1))
    assert touched < 200


BOUNDS: list[tuple[dict[str, int], range]] = [
    ({"gt": 990}, range(991, 1001)),
    ({"gte": 990}, range(990, 1001)),
    ({"lt": 11}, range(1, 11)),
    ({"lte": 11}, range(1, 12)),
    ({"gte": 500, "lt": 503}, range(500, 503)),
    ({"gt": 500, "gte": 502, "lte": 503, "lt": 503}, range(502, 503)),
    ({"gt": 1000}, range(0)),
    ({"lt": 1}, range(0)),
    ({"gte": -5, "lte": 2}, range(1, 3)),
    ({"gte": 700, "lt": 600}, range(0)),
]


async def test_bounds(db: Database) -> None:
    histories = await made(db, SHORT)
    for bounds, expected in BOUNDS:
        wanted = {name: START + timedelta(milliseconds=number) for name, number in bounds.items()}
        assert (await histories.page(SHORT, **wanted))[0] == list(expected), bounds
        assert (await histories.page(SHORT, "desc", **wanted))[0] == list(expected)[::-1], bounds


async def test_bounds_between_and_far_from_the_events(db: Database) -> None:
    histories = await made(db, SHORT)
    half = timedelta(microseconds=500)
    at = START + timedelta(milliseconds=990)
    assert (await histories.page(SHORT, gt=at + half))[0] == list(range(991, 1001))
    assert (await histories.page(SHORT, gte=at - half))[0] == list(range(990, 1001))
    latest, earliest = datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)
    for nothing in ({"gt": latest}, {"gte": latest}, {"lt": earliest}, {"lte": earliest}):
        assert (await histories.page(SHORT, **nothing))[0] == []
    for everything in ({"lt": latest}, {"lte": latest}, {"gt": earliest}, {"gte": earliest}):
        assert len((await histories.page(SHORT, **everything))[0]) == LIMIT


async def test_an_empty_history(db: Database) -> None:
    session_id, thread_id = await sessions.session(db, await sessions.workspace(db))
    empty = Histories(db, {0: (session_id, thread_id)})
    for wanted in ({}, {"gte": START}, {"lt": START}, {"types": ["user.message"]}):
        assert (await empty.page(0, **wanted))[0] == []
