"""What the gateway writes down in the database, and reads from it."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import pytest
from sqlalchemy import text

from managed_agents.core.errors import NotFound
from managed_agents.db.engine import Database
from managed_agents.egress.access_log import Access, AccessLog, LogFailed
from managed_agents.egress.gateway import Bounds
from managed_agents.egress.policy import Policy
from managed_agents.resources.sessions.egress import StoredPolicies, accesses
from tests.support import sessions
from tests.support.egress import WAIT_SECONDS, server, way_out
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.requirement("ENV-050")]

_BIND = text("INSERT INTO sandboxes (id, session_id, generation, host, state) VALUES (:id, :session_id, :nth, 'here', :state)")


async def stored(db: Database, **sandboxes: str) -> tuple[StoredPolicies, str]:
    """A session with a sandbox a generation, in the states given."""

    async def nothing(*_: object) -> tuple[()]:
        return ()

    session_id, _ = await sessions.session(db, await sessions.workspace(db))
    async with db.transaction() as tx:
        for nth, (id_, state) in enumerate(sandboxes.items(), 1):
            await tx.execute(_BIND, {"id": id_, "session_id": session_id, "nth": nth, "state": state})
    return StoredPolicies(db, nothing, nothing), session_id


def access(session_id: str, host: str) -> Access:
    return Access(session_id, "sbx_1", 1, datetime.now(UTC), "connect", host, 443, "allowed", 10, 20, 0.5)


def get(authority: str) -> bytes:
    return f"GET http://{authority}/ HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n".encode()


async def used(policies: StoredPolicies, sandbox_id: str, generation: int) -> int:
    policy = await policies.policy(sandbox_id, generation)
    assert policy is not None
    return policy.bytes_before


async def test_traffic_is_the_sessions_over_all_its_sandboxes(db: Database) -> None:
    policies, session_id = await stored(db, sbx_1="destroyed", sbx_2="live")
    await policies.write([access(session_id, "one.test")], {"sbx_1": 700, "sbx_2": 40, "sbx_nobody": 5})
    await policies.write([], {"sbx_2": 2})
    assert await used(policies, "sbx_2", 2) == 742
    assert await policies.policy("sbx_1", 1) is None  # it is gone, and what it used is not


async def test_accesses_are_read_oldest_first_within_a_limit(db: Database) -> None:
    policies, session_id = await stored(db, sbx_1="live")
    written = [access(session_id, f"{name}.test") for name in ("one", "two", "three")]
    await policies.write(written, {})
    assert await accesses(db, session_id) == written
    assert await accesses(db, session_id, limit=2) == written[1:]
    with pytest.raises(NotFound):
        await accesses(db, "sesn_nobody")


async def test_a_sandbox_that_follows_another_goes_on_with_its_count() -> None:
    async with way_out(bounds=Bounds(bytes=1000)) as way, server() as site:
        way.names["site.test"] = [["127.0.0.1"]]
        assert (await way.ask(get(site.authority))).startswith(b"HTTP/1.1 200")
        # What is written down meanwhile counts, whoever it was.
        way.policies["sbx_1", 1] = Policy("sesn_1", "unrestricted", bytes_before=1000)
        assert b"used up" in await way.ask(get(site.authority))


async def test_heads_and_interim_answers_are_traffic() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 40
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
    async with way_out() as way, server(interim + answer) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        assert (await way.ask(get(site.authority))).endswith(b"hello")
        [entry] = await way.logged(1)
        assert (entry.bytes_sent, entry.bytes_received) == (len(site.requests[0]), len(interim + answer))
    async with way_out(bounds=Bounds(bytes=1000)) as way, server(interim + answer) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        assert b"used up" in await way.ask(get(site.authority))


async def test_traffic_is_written_down_while_a_tunnel_is_open() -> None:
    async with way_out() as way, server(echo=True) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        async with await way.connect() as stream:
            await stream.send(f"CONNECT {site.authority} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            await stream.receive()
            await stream.send(b"x" * 500)

            async def counted() -> bool:
                await way.log.flush()
                return way.traffic["sbx_1"] == 1000  # there and back

            await until(counted, seconds=WAIT_SECONDS)
            assert way.accesses == []  # an entry is of what has ended


async def test_what_the_store_does_not_take_is_counted_later() -> None:
    class Store:
        def __init__(self) -> None:
            self.away = True
            self.taken: dict[str, int] = {}

        async def write(self, entries: Sequence[Access], traffic: Mapping[str, int]) -> None:
            del entries
            if self.away:
                raise LogFailed("away")
            self.taken = dict(traffic)

    store = Store()
    log = AccessLog(store)
    log.count("sbx_1", 5)
    await log.flush()
    log.count("sbx_1", 2)
    store.away = False
    await log.flush()
    assert store.taken == {"sbx_1": 7}
