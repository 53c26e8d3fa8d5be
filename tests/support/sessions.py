"""Sessions written straight into the tables, for tests below the API."""

from typing import Any

from sqlalchemy import insert, text

from managed_agents.core import ids
from managed_agents.db.engine import Database
from managed_agents.eventlog.tables import SESSIONS, THREADS

AGENT: dict[str, Any] = {
    "type": "agent",
    "id": "agent_test",
    "version": 1,
    "name": "tester",
    "description": None,
    "system": None,
    "model": {"id": "claude-opus-5", "effort": {"type": "high"}, "speed": "standard"},
    "tools": [],
    "mcp_servers": [],
    "skills": [],
    "multiagent": None,
    "execution_identity": {"type": "service_account"},
}


async def workspace(db: Database) -> str:
    """A workspace; returns its id."""
    workspace_id = ids.new_id(ids.WORKSPACE)
    async with db.transaction() as tx:
        await tx.execute(text("INSERT INTO organizations (id, name) VALUES ('org_test', 'test') ON CONFLICT DO NOTHING"))
        await tx.execute(
            text("INSERT INTO workspaces (id, organization_id, name) VALUES (:id, 'org_test', :id)"), {"id": workspace_id}
        )
        await tx.execute(
            text(
                "INSERT INTO environments (id, workspace_id, name, config, metadata) "
                "VALUES ('env_' || :id, :id, 'test', '{}', '{}')"
            ),
            {"id": workspace_id},
        )
    return workspace_id


async def session(db: Database, workspace_id: str, *, owner: str | None = None, epoch: int = 0) -> tuple[str, str]:
    """A session and its primary thread; returns their ids."""
    session_id, thread_id = ids.new_id(ids.SESSION), ids.new_id(ids.THREAD)
    common = {"workspace_id": workspace_id, "agent": AGENT}
    async with db.transaction() as tx:
        at = (await tx.execute(text("SELECT clock_timestamp()"))).scalar_one()
        await tx.execute(
            insert(SESSIONS).values(
                id=session_id,
                environment_id=f"env_{workspace_id}",
                agent_id=AGENT["id"],
                agent_version=1,
                environment_config={"type": "cloud", "networking": {"type": "unrestricted"}, "packages": {"type": "packages"}},
                primary_thread_id=thread_id,
                created_at=at,
                updated_at=at,
                owner=owner,
                epoch=epoch,
                **common,
            )
        )
        await tx.execute(insert(THREADS).values(id=thread_id, session_id=session_id, created_at=at, updated_at=at, **common))
    return session_id, thread_id
