"""Wrong settings and a database that is away: said once, with what to do, and without trying what cannot go better."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import text

from managed_agents.api.health import unready_reason
from managed_agents.core import logs
from managed_agents.db import databases
from managed_agents.db.engine import Database
from managed_agents.db.revisions import migrations_directory, revisions
from managed_agents.processes import parent
from managed_agents.processes.up import CannotStart, Child
from tests.integration.boot.waiting import until

COMMAND = [sys.executable, "-m", "managed_agents.cli.main"]
NOWHERE = "postgresql://nobody@127.0.0.1:9/nothing"


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ma-wrong-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def environment(data_dir: Path, **settings: str) -> dict[str, str]:
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("MANAGED_AGENTS_", "ANTHROPIC_"))}
    ours = {"data_dir": str(data_dir), "port": "0", **settings}
    return bare | {f"MANAGED_AGENTS_{name.upper()}": value for name, value in ours.items()}


def test_up_does_not_try_again_what_its_settings_forbid(data_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # The worker refuses: a model elsewhere must not drive the unisolated backend.
    settings = environment(data_dir, sandbox="local", model_base_url="https://model.example", database_url=NOWHERE)
    child = Child("worker", ["worker"], settings)
    child.start()
    with pytest.raises(CannotStart, match="the worker process cannot start with these settings; its message is above"):
        until(child.look, "the worker to end", 60)
    assert child.restarts == 0
    assert "the `local` sandbox isolates nothing" in capfd.readouterr().err


def test_a_process_that_cannot_start_says_so_by_its_status(data_dir: Path) -> None:
    (data_dir / "master.key").write_text("not a key\n")
    done = subprocess.run(
        [*COMMAND, "api"], env=environment(data_dir, database_url=NOWHERE), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == parent.CANNOT_START_STATUS
    assert "Restore it from the backup" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_api_without_a_database_says_so_once(data_dir: Path) -> None:
    log = data_dir / "log"
    missed = ("doorbell connection lost", "listening connection (managed_agents_previews) lost")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, "api"], env=environment(data_dir, database_url=NOWHERE), stdin=subprocess.DEVNULL, stderr=output
        )
    try:
        until(lambda: all(words in log.read_text() for words in missed) or None, "the connections to be missed")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    messages = [json.loads(line)["message"] for line in log.read_text().splitlines()]
    lost = sorted(message.partition(":")[0] for message in messages if " lost" in message)
    assert len(lost) == len(set(lost))


def test_trouble_is_said_when_it_begins_once_a_minute_and_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    trouble = logs.Trouble(logs.logging.getLogger("test.trouble"))
    caplog.set_level("INFO", "test.trouble")
    trouble.over("fine")
    for _ in range(241):  # two minutes, twice a second
        trouble.report("away")
        now += 0.5
    trouble.over("back")
    trouble.over("back")
    trouble.report("away again")
    assert caplog.messages == ["away", "away", "away", "back", "away again"]


def test_the_head_is_alembics() -> None:
    from alembic.script import ScriptDirectory

    assert [revisions().head] == ScriptDirectory(str(migrations_directory())).get_heads()


@pytest.fixture
async def unmigrated(postgres_url: str) -> AsyncIterator[Database]:
    name = f"test_{uuid4().hex[:12]}"
    db = Database(await databases.create_database(postgres_url, name), pool=1, application_name="test")
    yield db
    await db.dispose()
    await databases.drop_database(postgres_url, name)


@pytest.mark.anyio
async def test_readiness_compares_the_schema_with_this_release(unmigrated: Database, db: Database) -> None:
    assert await unready_reason(db) is None
    assert re.search("schema missing.*managed-agents migrate", await unready_reason(unmigrated) or "")

    async def at(revision: str) -> str | None:
        async with db.transaction() as tx:
            await tx.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
        return await unready_reason(db)

    behind = await at("0001")
    assert behind == f"database schema is at revision 0001, this release needs {revisions().head}: run `managed-agents migrate`"
    # Of a newer release: migrated while we still serve, before our successors start.
    assert await at("9999") is None
    assert await at(revisions().head) is None


@pytest.mark.anyio
async def test_readiness_without_a_database(caplog: pytest.LogCaptureFixture) -> None:
    away = Database(NOWHERE, pool=1, application_name="test")
    try:
        assert "MANAGED_AGENTS_DATABASE_URL" in (await unready_reason(away) or "")
    finally:
        await away.dispose()
