"""The operator's commands, as typed: what they print, and that a server would see it."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner, Result
from pydantic import SecretStr
from sqlalchemy import text

from managed_agents.cli.main import main
from managed_agents.db.engine import Database
from managed_agents.egress.access_log import Access
from managed_agents.encryption.keyring import LocalKeyProvider
from managed_agents.processes.purposes import API_KEYS
from managed_agents.resources.environments import service as environments
from managed_agents.resources.environments.schemas import CreateEnvironment
from managed_agents.resources.keys import service as keys
from managed_agents.resources.keys.directory import KeyDirectory
from managed_agents.resources.organizations import service as organizations
from managed_agents.resources.sessions.egress import StoredPolicies
from managed_agents.web.actor import Scope
from tests.support import sessions
from tests.support.server import FIRST_KEY

pytestmark = pytest.mark.anyio


@pytest.fixture
def hmac_key(tmp_path: Path) -> bytes:
    return LocalKeyProvider(tmp_path / "master.key").derive(API_KEYS)


@pytest.fixture
async def typed(db: Database, database_url: str, tmp_path: Path, hmac_key: bytes) -> Callable[..., Result]:
    """Run `managed-agents …` and return what it did."""
    await keys.bootstrap(db, hmac_key, SecretStr(FIRST_KEY))
    environment = {"MANAGED_AGENTS_DATABASE_URL": database_url, "MANAGED_AGENTS_DATA_DIR": str(tmp_path)}

    async def run(*arguments: str, status: int = 0) -> Result:
        done = await anyio.to_thread.run_sync(lambda: CliRunner(env=environment).invoke(main, list(arguments)))
        assert done.exit_code == status, done.output + repr(done.exception)
        return done

    return run


async def test_the_life_of_a_key(typed: Callable[..., Result], db: Database, hmac_key: bytes) -> None:
    made = await typed("keys", "create", "--name", "ci", "--scope", "viewer", "--expires-in", "12h")
    secret = made.stdout.strip()
    assert secret.startswith("sk-ma-")
    (key_id,) = re.findall(r"apikey_\w+", made.stderr)
    assert secret not in made.stderr

    async def live() -> bool:
        return await KeyDirectory(db, hmac_key).lookup(secret) is not None

    actor = await KeyDirectory(db, hmac_key).lookup(secret)
    assert actor is not None
    assert actor.scope is Scope.VIEWER
    listed = (await typed("keys", "list")).output
    assert re.search(rf"{key_id}  …{secret[-4:]}  active .* until 20.* viewer .* ci", listed)
    assert secret not in listed
    await typed("keys", "rename", key_id, "builds")
    await typed("keys", "disable", key_id)
    assert not await live()
    assert key_id in (await typed("keys", "list", "--status", "inactive")).output
    await typed("keys", "enable", key_id)
    assert await live()
    await typed("keys", "revoke", key_id)
    assert not await live()
    assert "archived" in (await typed("keys", "enable", key_id, status=1)).output
    assert "API key not found" in (await typed("keys", "revoke", "apikey_01x", status=1)).output
    assert "is not like 90m" in (await typed("keys", "create", "--name", "x", "--expires-in", "soon", status=2)).output
    assert "name: " in (await typed("keys", "rename", key_id, "", status=1)).output


async def test_what_a_sessions_sandboxes_reached(typed: Callable[..., Result], db: Database) -> None:
    session_id, _ = await sessions.session(db, await sessions.workspace(db))
    async with db.transaction() as tx:
        bind = "INSERT INTO sandboxes (id, session_id, generation, host, state) VALUES ('sbx_1', :id, 1, 'here', 'live')"
        await tx.execute(text(bind), {"id": session_id})
    assert (await typed("egress-log", session_id)).output == ""
    at = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
    entries = [
        Access(session_id, "sbx_1", 1, at, "http", "blocked.test", 80, "blocked", 0, 0, 0.01),
        Access(session_id, "sbx_1", 1, at + timedelta(seconds=1), "connect", "allowed.test", 443, "allowed", 512, 4096, 1.5),
    ]
    await StoredPolicies(db, nothing, nothing).write(entries, {})
    first, second = (await typed("egress-log", session_id)).output.splitlines()
    assert first.split() == ["2026-05-04", "03:02:01", "blocked", "http", "0", "0", "0.010", "blocked.test:80"]
    assert second.split() == ["2026-05-04", "03:02:02", "allowed", "connect", "512", "4096", "1.500", "allowed.test:443"]
    (line,) = (await typed("egress-log", session_id, "--limit", "1", "--json")).output.splitlines()
    shown = json.loads(line)
    assert (shown["host"], shown["at"], shown["bytes_received"]) == ("allowed.test", "2026-05-04T03:02:02Z", 4096)
    assert "Session not found" in (await typed("egress-log", "sesn_nobody", status=1)).output


async def nothing(*_: object) -> tuple[()]:
    """No package hosts, no credentials."""
    return ()


async def test_the_life_of_a_workspace(typed: Callable[..., Result], db: Database, hmac_key: bytes) -> None:
    workspace_id = (await typed("workspaces", "create", "research")).output.strip()
    secret = (await typed("keys", "create", "--name", "k", "--workspace", workspace_id)).stdout.strip()
    await typed("workspaces", "rename", workspace_id, "science")
    listed = (await typed("workspaces", "list")).output
    assert re.search(r"default   default", listed)
    assert "science" in listed
    shown = (await typed("workspaces", "limits", workspace_id, "--creates", "60", "--reads", "none")).output
    assert re.search(r"create +60 +\(organisation: 300 a minute\)\nread +none", shown)
    actor = await KeyDirectory(db, hmac_key).lookup(secret)
    assert actor is not None
    assert actor.creates_per_minute == 60
    shown = (await typed("workspaces", "limits", workspace_id, "--creates", "none")).output
    assert re.search(r"create +none", shown)
    assert "neither a number" in (await typed("workspaces", "limits", workspace_id, "--reads", "-1", status=2)).output
    await typed("workspaces", "archive", workspace_id)
    assert await KeyDirectory(db, hmac_key).lookup(secret) is None
    assert workspace_id not in (await typed("workspaces", "list")).output
    assert workspace_id in (await typed("workspaces", "list", "--all")).output
    default = await organizations.default_workspace(db)
    assert "cannot be archived" in (await typed("workspaces", "archive", default.id, status=1)).output


async def test_the_life_of_an_environment_key(typed: Callable[..., Result], db: Database, hmac_key: bytes) -> None:
    default = await organizations.default_workspace(db)
    environment = await environments.create(db, default.id, CreateEnvironment(name="e"))
    made = await typed("environment-keys", "create", environment.id, "--name", "worker-1")
    secret = made.stdout.strip()
    assert secret.startswith("sk-ma-env-")
    actor = await KeyDirectory(db, hmac_key).lookup(secret)
    assert actor is not None
    assert (actor.environment_id, actor.workspace_id) == (environment.id, default.id)
    (key_id,) = re.findall(r"envkey_\w+", made.stderr)
    assert key_id in (await typed("environment-keys", "list", environment.id)).output
    assert key_id not in (await typed("keys", "list")).output
    await typed("environment-keys", "revoke", key_id)
    assert await KeyDirectory(db, hmac_key).lookup(secret) is None
    await typed("environment-keys", "create", "env_01x", "--name", "x", status=1)
