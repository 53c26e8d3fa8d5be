"""Rights that change are heard by every process at once, and nothing about a secret is ever shown."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from pydantic import SecretStr
from sqlalchemy import event, text

from managed_agents.db.engine import Database
from managed_agents.db.listener import KEYS_CHANNEL, listen
from managed_agents.resources.keys import service as keys
from managed_agents.resources.keys.directory import CACHE_KEYS_MAX, LOOK_AGAIN_SECONDS, KeyDirectory
from managed_agents.resources.keys.schemas import UpdateKey
from managed_agents.resources.organizations import service as organizations
from managed_agents.resources.rate_limits import service as rate_limits
from managed_agents.web.actor import RateKind, Reach, Scope
from tests.support.server import FIRST_KEY, HMAC_KEY
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

HEARD_SECONDS_MAX = 30.0  # a loaded machine; the caches' own clocks stand still


@asynccontextmanager
async def directories(db: Database, count: int = 2) -> AsyncIterator[list[KeyDirectory]]:
    """As many as api processes, each with its ear at the doorbell. Their caches never run out by themselves."""
    made = [KeyDirectory(db, HMAC_KEY, clock=lambda: 1000.0) for _ in range(count)]
    async with anyio.create_task_group() as group:
        for directory in made:
            heard = anyio.Event()

            async def connected(directory: KeyDirectory = directory, heard: anyio.Event = heard) -> None:
                directory.forget()
                heard.set()

            group.start_soon(listen, db.url, {KEYS_CHANNEL: directory.forget}, connected)
            with anyio.fail_after(HEARD_SECONDS_MAX):
                await heard.wait()
        yield made
        group.cancel_scope.cancel()


async def workspace(db: Database, name: str = "w") -> organizations.Workspace:
    await keys.bootstrap(db, HMAC_KEY, SecretStr(FIRST_KEY))
    return await organizations.create_workspace(db, name)


async def everything(db: Database) -> Reach:
    return Reach((await organizations.default_workspace(db)).organization_id, None)


Change = Callable[[Database, keys.NewApiKey, organizations.Workspace], Awaitable[object]]


async def _revoke(db: Database, made: keys.NewApiKey, _: organizations.Workspace) -> None:
    await keys.revoke(db, made.key.id)


async def _disable(db: Database, made: keys.NewApiKey, _: organizations.Workspace) -> None:
    await keys.update_key(db, await everything(db), made.key.id, UpdateKey(status="inactive"))


async def _archive(db: Database, _: keys.NewApiKey, of: organizations.Workspace) -> None:
    await organizations.archive(db, await everything(db), of.id)


@pytest.mark.requirement("ORG-004")
@pytest.mark.parametrize("change", [_revoke, _disable, _archive])
async def test_every_process_hears_at_once_that_a_key_is_useless(db: Database, change: Change) -> None:
    of = await workspace(db)
    made = await keys.create(db, HMAC_KEY, workspace_id=of.id, name="k")
    secret = made.secret.get_secret_value()
    async with directories(db) as processes:
        for process in processes:
            assert await process.lookup(secret) is not None
        await change(db, made, of)

        async def useless() -> bool:
            return [await process.lookup(secret) for process in processes] == [None, None]

        await until(useless, seconds=HEARD_SECONDS_MAX)


async def test_a_changed_limit_is_heard_too(db: Database) -> None:
    of = await workspace(db)
    made = await keys.create(db, HMAC_KEY, workspace_id=of.id, name="k")
    secret = made.secret.get_secret_value()
    async with directories(db, 1) as (process,):
        actor = await process.lookup(secret)
        assert actor is not None
        assert actor.own_limit(RateKind.CREATE) is None
        await rate_limits.override(db, await everything(db), of.id, {RateKind.CREATE: 7, RateKind.READ: 8})

        async def known() -> bool:
            actor = await process.lookup(secret)
            return actor is not None and (actor.creates_per_minute, actor.reads_per_minute) == (7, 8)

        await until(known, seconds=HEARD_SECONDS_MAX)


async def test_what_was_read_before_a_change_is_not_cached_after_it(db: Database) -> None:
    of = await workspace(db)
    made = await keys.create(db, HMAC_KEY, workspace_id=of.id, name="k")
    secret = made.secret.get_secret_value()
    directory = KeyDirectory(db, HMAC_KEY, clock=lambda: 1000.0)

    def ring_in_between(*_: object) -> None:
        directory.forget([made.key.id])

    event.listen(db.engine.sync_engine, "after_cursor_execute", ring_in_between)
    assert await directory.lookup(secret) is not None
    event.remove(db.engine.sync_engine, "after_cursor_execute", ring_in_between)
    await keys.revoke(db, made.key.id)
    assert await directory.lookup(secret) is None


@pytest.mark.requirement("ORG-005")
async def test_the_last_use_is_kept_without_a_write_per_request(db: Database) -> None:
    of = await workspace(db)
    made = await keys.create(db, HMAC_KEY, workspace_id=of.id, name="k")
    secret = made.secret.get_secret_value()
    now = 1000.0
    directory = KeyDirectory(db, HMAC_KEY, clock=lambda: now)
    statements: list[str] = []

    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement.split()[0])

    event.listen(db.engine.sync_engine, "before_cursor_execute", count)
    for _ in range(10):
        assert await directory.lookup(secret) is not None
    assert statements == ["SELECT", "UPDATE"]
    now += 6.0  # the cache has run out, the minute has not
    assert await directory.lookup(secret) is not None
    assert statements == ["SELECT", "UPDATE", "SELECT"]
    event.remove(db.engine.sync_engine, "before_cursor_execute", count)
    (key,) = [key for key in await keys.list_keys(db) if key.id == made.key.id]
    assert key.last_used_at is not None


async def test_a_key_that_expires_soon_is_cached_no_longer_than_it_lives(db: Database) -> None:
    of = await workspace(db)
    made = await keys.create(db, HMAC_KEY, workspace_id=of.id, name="k")
    now = 1000.0
    directory = KeyDirectory(db, HMAC_KEY, clock=lambda: now)
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE api_keys SET expires_at = clock_timestamp() + interval '2 seconds' WHERE name = 'k'"))
    assert await directory.lookup(made.secret.get_secret_value()) is not None
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE api_keys SET expires_at = clock_timestamp() WHERE name = 'k'"))
    now += 2.0
    assert await directory.lookup(made.secret.get_secret_value()) is None


@pytest.mark.requirement("ORG-006")
async def test_a_stream_ends_when_its_key_does(db: Database) -> None:
    of = await workspace(db)
    made = await keys.create(db, HMAC_KEY, workspace_id=of.id, name="k")
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE api_keys SET expires_at = clock_timestamp() + interval '1 second' WHERE name = 'k'"))
    directory = KeyDirectory(db, HMAC_KEY)
    actor = await directory.lookup(made.secret.get_secret_value())
    assert actor is not None
    with anyio.fail_after(LOOK_AGAIN_SECONDS / 2):  # nobody rings
        await directory.lost(actor)


@pytest.mark.requirement("ORG-002")
async def test_nothing_prints_a_secret(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    of = await workspace(db)
    with caplog.at_level(logging.DEBUG):
        made = await keys.create(db, HMAC_KEY, workspace_id=of.id, name="k", scope=Scope.ADMIN)
        secret = made.secret.get_secret_value()
        directory = KeyDirectory(db, HMAC_KEY)
        actor = await directory.lookup(secret)
    shown = [repr(made), str(made), repr(actor), repr(directory), str(made.key.body()), caplog.text]
    assert [text for text in shown if secret in text] == []
    async with db.transaction() as tx:
        rows = (await tx.execute(text("SELECT row_to_json(api_keys)::text AS row FROM api_keys"))).all()
    assert len(rows) == 2
    assert [row.row for row in rows if secret in row.row or FIRST_KEY in row.row] == []
    assert await KeyDirectory(db, b"\x18" * 32).lookup(secret) is None  # another installation's key


async def test_many_keys_do_not_fill_the_memory(db: Database) -> None:
    of = await workspace(db)
    made = await keys.create(db, HMAC_KEY, workspace_id=of.id, name="k")
    directory = KeyDirectory(db, HMAC_KEY)
    actor = await directory.lookup(made.secret.get_secret_value())
    assert actor is not None
    cache = directory._cache
    for index in range(CACHE_KEYS_MAX + 10):
        cache.put(str(index).encode(), actor, cache.state, 5.0)
    assert len(cache._actors) == CACHE_KEYS_MAX
    for index in range(100):
        assert await directory.lookup(f"sk-ma-{index}") is None
    assert len(cache._actors) == CACHE_KEYS_MAX
